/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "remote-transaction.h"

#include "host/uapi.h"
#include "test.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define SCRATCH (REMOTE_REGION_BASE + REMOTE_REGION_SLOTS * REMOTE_REGION_STRIDE)
#define SCRATCH_PAGES 8U
#define FILE_PAGES 4U /* one of zeros, two that are the same, one of zeros */

static int device(void) {
        static int fd = -EBADF;
        if (fd < 0) {
                fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
                CHECK(fd >= 0, "/dev/userfaultfd");
        }
        return fd;
}

static int file(void) {
        static int fd = -EBADF;
        char page[PAGE_BYTES];
        if (fd < 0) {
                fd = memfd_create("transaction", MFD_CLOEXEC);
                CHECK(fd >= 0 && ftruncate(fd, FILE_PAGES * PAGE_BYTES) == 0);
                memset(page, 0x5a, sizeof page);
                for (unsigned i = 1; i <= 2; i++)
                        CHECK(pwrite(fd, page, sizeof page, (off_t)(i * PAGE_BYTES)) == (ssize_t)sizeof page);
        }
        return fd;
}

/* What the program leaves for us to look at. */
typedef struct Found {
        unsigned fds, uffd, zeros, nonzeros, moved, back, came, error;
        int taken;
} Found;

static int look_inside(void *userdata, RemoteProgram *program, const Target *target) {
        Found *found = userdata;
        found->taken = remote_program_take(program, target, found->uffd);
        return found->taken >= 0 ? 0 : found->taken;
}

static void look(RemoteProgram *p, const Found *found, unsigned out) {
        const uint64_t at = SCRATCH + PAGE_BYTES;
        REMOTE_CALL(p, out, found->error, SYS_pread64, remote_word(found->fds + 1), remote_value(at),
                    remote_value(FILE_PAGES * PAGE_BYTES), remote_value(0));
        REMOTE_OPERATE(p, REMOTE_OP_ZEROS, REMOTE_NOWHERE, found->zeros, remote_value(at), remote_value(FILE_PAGES * PAGE_BYTES));
        REMOTE_OPERATE(p, REMOTE_OP_NONZEROS, REMOTE_NOWHERE, found->nonzeros, remote_value(at + PAGE_BYTES),
                       remote_value(3 * PAGE_BYTES));
}

/* The page goes to scratch and comes back. While it is away it is this program's alone to keep. */
static void move(RemoteProgram *p, Found *found, uint64_t page, unsigned out) {
        const struct {
                uint64_t to, from, range;
        } ways[] = {{SCRATCH, page, SCRATCH}, {page, SCRATCH, page}};
        unsigned moves[2], wait = remote_program_label(p);
        for (unsigned i = 0; i < 2; i++) {
                unsigned range = remote_program_words(p, 4);
                remote_program_set(p, range, ways[i].range);
                remote_program_set(p, range + 1, PAGE_BYTES);
                remote_program_set(p, range + 2, UFFDIO_REGISTER_MODE_MISSING);
                moves[i] = remote_program_words(p, 5);
                remote_program_set(p, moves[i], ways[i].to);
                remote_program_set(p, moves[i] + 1, ways[i].from);
                remote_program_set(p, moves[i] + 2, PAGE_BYTES);
                REMOTE_CALL(p, out, found->error, SYS_ioctl, remote_word(found->uffd), remote_value(UFFDIO_REGISTER), remote_at(range));
        }
        REMOTE_CALL(p, out, found->error, SYS_ioctl, remote_word(found->uffd), remote_value(UAPI_UFFDIO_MOVE), remote_at(moves[0]));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, found->moved, remote_value(1), remote_value(0));
        remote_program_ask(p, look_inside, found, wait);
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, found->came, remote_value(1), remote_value(0));
        remote_program_here(p, wait);
        REMOTE_CALL(p, REMOTE_NOWHERE, found->back, SYS_ioctl, remote_word(found->uffd), remote_value(UAPI_UFFDIO_MOVE),
                    remote_at(moves[1]));
}

static RemoteProgram *build(uint64_t page, Found *found) {
        const int given[] = {device(), file()};
        RemoteProgram *p = NULL;
        CHECK(remote_program_new(&p) == 0);
        unsigned out = remote_program_label(p), unmap = remote_program_label(p), api = remote_program_words(p, 3);
        *found = (Found){
                .fds = remote_program_words(p, 2), .uffd = remote_program_words(p, 1),
                .zeros = remote_program_words(p, 1), .nonzeros = remote_program_words(p, 1),
                .moved = remote_program_words(p, 1), .back = remote_program_words(p, 1),
                .came = remote_program_words(p, 1), .error = remote_program_words(p, 1), .taken = -EBADF,
        };
        remote_program_hold(p);
        remote_program_give(p, given, ELEMENTSOF(given), found->fds, out);
        REMOTE_CALL(p, out, found->uffd, SYS_ioctl, remote_word(found->fds), remote_value(USERFAULTFD_IOC_NEW),
                    remote_value(O_CLOEXEC | O_NONBLOCK));
        remote_program_note(p, found->uffd);
        remote_program_set(p, api, UFFD_API);
        REMOTE_CALL(p, out, found->error, SYS_ioctl, remote_word(found->uffd), remote_value(UFFDIO_API), remote_at(api));
        REMOTE_CALL(p, out, found->error, SYS_mmap, remote_value(SCRATCH), remote_value(SCRATCH_PAGES * PAGE_BYTES),
                    remote_value(PROT_READ | PROT_WRITE),
                    remote_value(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE), remote_value(UINT64_MAX),
                    remote_value(0));
        REMOTE_CALL(p, unmap, found->error, SYS_madvise, remote_value(SCRATCH), remote_value(SCRATCH_PAGES * PAGE_BYTES),
                    remote_value(MADV_DONTFORK));
        look(p, found, unmap);
        if (page)
                move(p, found, page, unmap);
        remote_program_here(p, unmap);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_value(SCRATCH), remote_value(SCRATCH_PAGES * PAGE_BYTES));
        remote_program_here(p, out);
        remote_program_close(p, found->uffd);
        remote_program_close(p, found->fds);
        remote_program_close(p, found->fds + 1);
        return p;
}

int transaction_once(Remote *remote, Target *target, uint64_t page, bool *ret_moved) {
        Found found;
        _cleanup_(remote_program_freep) RemoteProgram *p = build(page, &found);
        RemoteTransaction transaction = {.program = p, .patience_nsec = 20 * NSEC_PER_MSEC};
        int r = remote_transact(remote, target, &transaction);
        if (found.taken >= 0)
                close(found.taken);
        if (r != 0)
                return r;
        /* One that was slow to be answered has done nothing at all. */
        int64_t error = (int64_t)remote_program_get(p, found.error);
        if (remote_program_get(p, found.zeros) == 0)
                return REMOTE_E_LOST;
        CHECK(remote_program_get(p, found.zeros) == PAGE_BYTES && remote_program_get(p, found.nonzeros) == 2 * PAGE_BYTES,
              "looked at: %lu %lu", remote_program_get(p, found.zeros), remote_program_get(p, found.nonzeros));
        *ret_moved = remote_program_get(p, found.moved);
        /* Shared with a child by fork(2), marked for merging, …: such a page is not moved. */
        CHECK(*ret_moved || !page || error < 0);
        CHECK(!*ret_moved || remote_program_get(p, found.back) == 0, "back: %ld", (long)remote_program_get(p, found.back));
        CHECK(transaction.threads > 0);
        return 0;
}
