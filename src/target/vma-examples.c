/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A child with one mapping of every kind, each between two that are different, so that none becomes part of another;
 * and with the mappings that every process has. What cannot be made here (no huge pages, no keys, a limit) is left out:
 * its flag is then not learnt, and whoever else has it is read from smaps.
 *
 * A child, because some of it cannot be undone (mseal(2)) and none of it is to be ours for longer. It makes system
 * calls only, no library's memory: it is forked from a process that may have threads. It holds nothing after that, and
 * ends with us.
 */
#include "target/vma-reader.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* Newer than the headers of Debian 12. */
#define MAP_DROPPABLE_6_11 0x08
#define MADV_GUARD_INSTALL_6_13 102
#define SYS_mseal_6_10 462

#define MAPPINGS_MAX 64U
#define KEYS_MAX 15

typedef struct Examples {
        char *next, *end;
} Examples;

/* A page by itself; MAP_FAILED. */
static char *add_file(Examples *examples, int protection, int flags, int fd) {
        char *at = examples->next + PAGE_BYTES;

        if (at + 2 * PAGE_BYTES > examples->end)
                return MAP_FAILED;
        examples->next = at + PAGE_BYTES;
        return mmap(at, PAGE_BYTES, protection, flags | MAP_FIXED, fd, 0);
}

static char *add(Examples *examples, int protection, int flags) {
        return add_file(examples, protection, flags | MAP_ANONYMOUS, -1);
}

static char *add_plain(Examples *examples) { return add(examples, PROT_READ | PROT_WRITE, MAP_PRIVATE); }

static void add_advised(Examples *examples) {
        static const int advices[] = {
                MADV_DONTDUMP, MADV_DONTFORK, MADV_WIPEONFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE,
                MADV_SEQUENTIAL, MADV_RANDOM, MADV_GUARD_INSTALL_6_13,
        };

        for (size_t i = 0; i < ELEMENTSOF(advices); i++)
                (void)madvise(add_plain(examples), PAGE_BYTES, advices[i]);
}

static void add_locked(Examples *examples) {
        (void)syscall(SYS_mlock, add_plain(examples), PAGE_BYTES);
        (void)syscall(SYS_mlock2, add_plain(examples), PAGE_BYTES, 1 /* MLOCK_ONFAULT */);
}

static void add_registered(Examples *examples, int memfd) {
        static const uint64_t modes[] = {
                UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_MINOR,
        };
        struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM };
        int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

        if (fd < 0)
                return;
        (void)ioctl(fd, UFFDIO_API, &api);
        for (size_t i = 0; i < ELEMENTSOF(modes); i++) {
                char *page = modes[i] == UFFDIO_REGISTER_MODE_MINOR
                                     ? add_file(examples, PROT_READ | PROT_WRITE, MAP_SHARED, memfd)
                                     : add_plain(examples);
                struct uffdio_register reg = { .range = { (uintptr_t)page, PAGE_BYTES }, .mode = modes[i] };

                (void)ioctl(fd, UFFDIO_REGISTER, &reg);
        }
}

static void add_keyed(Examples *examples) {
        for (int i = 0; i < KEYS_MAX; i++) {
                int key = (int)syscall(SYS_pkey_alloc, 0, 0);

                if (key < 0)
                        return;
                (void)syscall(SYS_pkey_mprotect, add_plain(examples), PAGE_BYTES, PROT_READ | PROT_WRITE, key);
        }
}

/* Pages that a driver put there, one by one. */
static void add_ring(void) {
        struct io_uring_params params = {};
        int fd = (int)syscall(SYS_io_uring_setup, 2, &params);

        if (fd >= 0)
                (void)mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES);
}

static bool make_examples(void) {
        size_t bytes = (2 * MAPPINGS_MAX + 2) * PAGE_BYTES;
        int memfd = (int)syscall(SYS_memfd_create, "examples", 1U /* MFD_CLOEXEC */);
        Examples examples = {
                .next = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
        };

        if (examples.next == MAP_FAILED)
                return false;
        examples.end = examples.next + bytes;
        (void)add_plain(&examples);
        (void)add(&examples, PROT_READ, MAP_PRIVATE);
        (void)add(&examples, PROT_NONE, MAP_PRIVATE);
        (void)add(&examples, PROT_READ | PROT_EXEC, MAP_PRIVATE);
        (void)add(&examples, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
        (void)add(&examples, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_GROWSDOWN);
        (void)add(&examples, PROT_READ | PROT_WRITE, MAP_SHARED);
        (void)add(&examples, PROT_READ | PROT_WRITE, MAP_DROPPABLE_6_11);
        if (memfd >= 0 && ftruncate(memfd, (off_t)PAGE_BYTES) == 0)
                (void)add_file(&examples, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd);
        (void)mmap(NULL, BLOCK_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1, 0);
        add_advised(&examples);
        add_locked(&examples);
        add_registered(&examples, memfd);
        add_keyed(&examples);
        add_ring();
        (void)syscall(SYS_mseal_6_10, add_plain(&examples), PAGE_BYTES, 0);
        return true;
}

int vma_examples_begin(pid_t *ret) {
        pid_t self = getpid(), pid;
        int done[2], r = 0;
        ssize_t n;
        char c;

        if (pipe2(done, O_CLOEXEC) < 0)
                return -errno;
        pid = fork();
        if (pid == 0) {
                (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (getppid() != self || !make_examples() || write(done[1], "x", 1) != 1)
                        _exit(1);
                close(done[1]);
                for (;;)
                        pause();
        }
        if (pid < 0)
                r = -errno;
        close(done[1]);
        do
                n = r < 0 ? 1 : read(done[0], &c, 1);
        while (n < 0 && errno == EINTR);
        close(done[0]);
        if (r == 0 && n != 1) {
                vma_examples_end(pid);
                r = -ESRCH;
        }
        if (r == 0)
                *ret = pid;
        return r;
}

void vma_examples_end(pid_t pid) {
        (void)kill(pid, SIGKILL);
        while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
                ;
}
