/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Pool pages become plain anonymous memory again under the eyes of a reader that cannot be stopped: it waits where nothing
 * is there yet, and never sees a zero; afterwards the mapping is one with its neighbours, and can be moved and grown as
 * ever (docs/route-remap.md has the order of calls). argv[1]: the keeper, which holds the mute userfaultfd; argv[2]:
 * control: of a build that answers its faults.
 */
#include "guard-child.h"

#include "host/uapi.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define PAGES 96U
#define RUN_FIRST 32U
#define RUN_PAGES 32U

typedef struct MoveArgument { /* struct uffdio_move, 6.8 */
        uint64_t dst, src, len, mode;
        int64_t moved;
} MoveArgument;
#define MOVE_IOCTL _IOWR(UFFDIO, 0x05, MoveArgument)

enum { FRESH = 3, COPY, READS, ZEROS, WRONG }; /* in shared->counters */

static uint64_t run_start(void) { return area_page(RUN_FIRST); }

/* Plain memory all over, as a process has it before anything is remapped. */
static long order_fill(long unused) {
        for (uint64_t i = 0; i < PAGES; i++)
                page_fill((void *)area_page(i), pool_first + i);
        return 0;
}

/* Copies in memory of their own that no child ever shares; and a fresh mapping that touches no other, with all the flags
 * that the area has (order_map()). */
static long order_prepare(long unused) {
        char *copy, *fresh;

        copy = mmap(NULL, RUN_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(copy != MAP_FAILED && madvise(copy, RUN_PAGES * PAGE_BYTES, MADV_DONTFORK) == 0);
        memcpy(copy, (void *)run_start(), RUN_PAGES * PAGE_BYTES);
        fresh = mmap(NULL, (RUN_PAGES + 2) * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        CHECK(fresh != MAP_FAILED);
        fresh += PAGE_BYTES;
        CHECK(mprotect(fresh, RUN_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0);
        CHECK(madvise(fresh, RUN_PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
        shared->counters[COPY] = (uintptr_t)copy;
        shared->counters[FRESH] = (uintptr_t)fresh;
        return 0;
}

static long order_put(long unused) {
        return mremap((void *)shared->counters[FRESH], RUN_PAGES * PAGE_BYTES, RUN_PAGES * PAGE_BYTES,
                      MREMAP_MAYMOVE | MREMAP_FIXED, (void *)run_start()) == (void *)run_start() ? 0 : -errno;
}

static long order_move_out(long uffd) {
        MoveArgument move = { run_start(), shared->counters[COPY], RUN_PAGES * PAGE_BYTES, 0, 0 };

        return ioctl((int)uffd, MOVE_IOCTL, &move) == 0 ? 0 : -errno;
}

/* All in one mapping grows. */
static long order_grow(long unused) {
        void *p = mremap((void *)area_page(0), PAGES * PAGE_BYTES, 2 * PAGES * PAGE_BYTES, MREMAP_MAYMOVE);

        if (p == MAP_FAILED)
                return -errno;
        for (uint64_t i = 0; i < PAGES; i++)
                if (!page_is((char *)p + i * PAGE_BYTES, pool_first + i))
                        return 1 + (long)i;
        return madvise(p, PAGE_BYTES, MADV_FREE);
}

/* Reads the run from outside, over and over. */
static pid_t start_reader(pid_t target) {
        pid_t parent = getpid(), pid = fork();

        CHECK(pid >= 0);
        if (pid > 0)
                return pid;
        while (getppid() == parent && !__atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE)) {
                static char data[RUN_PAGES * PAGE_BYTES];
                struct iovec ours = { data, sizeof data }, theirs = { (void *)run_start(), sizeof data };
                ssize_t n = process_vm_readv(target, &ours, 1, &theirs, 1, 0);

                for (ssize_t i = 0; i < n / (ssize_t)PAGE_BYTES; i++)
                        if (page_is_zero(data + i * (ssize_t)PAGE_BYTES))
                                shared->counters[ZEROS]++;
                        else if (!page_is(data + i * (ssize_t)PAGE_BYTES, pool_first + RUN_FIRST + (uint64_t)i))
                                shared->counters[WRONG]++;
                __atomic_fetch_add(&shared->counters[READS], 1, __ATOMIC_RELEASE);
        }
        _exit(0);
}

static void register_range(int uffd, uint64_t start, uint64_t end, uint64_t mode) {
        struct uffdio_register reg = { { start, end - start }, mode, 0 };

        CHECK(ioctl(uffd, UFFDIO_REGISTER, &reg) == 0);
}
static void unregister_range(int uffd, uint64_t start, uint64_t end) {
        struct uffdio_range range = { start, end - start };

        CHECK(ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0);
}

static size_t mappings_of_area(Child *child) {
        size_t n = 0;

        child_read_vmas(child);
        for (size_t i = 0; i < child->vmas.n; i++)
                n += child->vmas.vmas[i].start < area_end() && child->vmas.vmas[i].end > shared->start;
        return n;
}

/* A userfaultfd of the child for UFFDIO_MOVE and asynchronous protection, as scan/track has it. */
static int order_tracking(const Child *child) {
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_WP_ASYNC };
        int fd = child_userfaultfd(child, GUARD_NONE);

        if (ioctl(fd, UFFDIO_API, &api) < 0)
                TEST_SKIP("no asynchronous write protection (Linux 6.7)");
        return fd;
}

static void unmerge(bool tracked, bool control) {
        Guarded guarded = { .child = child_start() };
        Child *child = &guarded.child;
        KeeperOwner owner = { .pid = child->pid };
        uint64_t run_end = area_page(0), reads;
        int mute, tracking = -EBADF;
        pid_t reader;
        long theirs;

        shared->stop = 0;
        memset(shared->counters, 0, sizeof shared->counters);
        guarded_map_area(child, PAGES);
        run_end = run_start() + RUN_PAGES * PAGE_BYTES;
        child_order(child, order_fill, 0);
        if (tracked) {
                tracking = order_tracking(child);
                register_range(tracking, shared->start, area_end(), UFFDIO_REGISTER_MODE_WP);
        }
        CHECK(mappings_of_area(child) == 1);
        guarded_guard(&guarded, true);
        guarded_remap(&guarded, RUN_FIRST, RUN_PAGES, pool_first + RUN_FIRST);
        CHECK(mappings_of_area(child) == 3);
        reader = start_reader(child->pid);
        mute = child_userfaultfd_kept(child, GUARD_MUTE, &theirs);
        CHECK(keeper_add(keeper, mute, &owner) == 0);
        child_order(child, order_prepare, 0);
        register_range(mute, shared->counters[FRESH], shared->counters[FRESH] + RUN_PAGES * PAGE_BYTES,
                       UFFDIO_REGISTER_MODE_MISSING);
        CHECK(child_order(child, order_put, 0) == 0); /* returns: the keeper has read the event */
        usleep(20000);
        reads = __atomic_load_n(&shared->counters[READS], __ATOMIC_ACQUIRE);
        usleep(20000);
        CHECK(control || shared->counters[READS] <= reads + 1, "the reader does not wait");
        if (tracked) { /* so that the flags are the same when the first page comes */
                uint64_t both = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING;
                register_range(tracking, run_start() - PAGE_BYTES, run_start(), both);
                register_range(mute, run_start(), run_end, both);
        } else
                register_range(mute, run_start() - PAGE_BYTES, run_end, UFFDIO_REGISTER_MODE_MISSING);
        if (child_order(child, order_move_out, theirs) < 0 && !control)
                TEST_SKIP("no UFFDIO_MOVE (Linux 6.8)");
        unregister_range(mute, tracked ? run_start() : run_start() - PAGE_BYTES, run_end);
        if (tracked) {
                unregister_range(tracking, run_start() - PAGE_BYTES, run_start());
                register_range(tracking, run_start() - PAGE_BYTES, run_end, UFFDIO_REGISTER_MODE_WP);
        }
        for (unsigned i = 0; __atomic_load_n(&shared->counters[READS], __ATOMIC_ACQUIRE) <= reads + 3; i++) {
                CHECK(i < 1000, "the reader still waits");
                usleep(10000);
        }
        shared->stop = 1;
        CHECK(waitpid(reader, NULL, 0) == reader);
        printf("%lu reads of %u pages from outside, %lu zero, %lu wrong; %zu mappings\n", shared->counters[READS],
               RUN_PAGES, shared->counters[ZEROS], shared->counters[WRONG], mappings_of_area(child));
        CHECK_HARMLESS(shared->counters[ZEROS] == 0 && shared->counters[WRONG] == 0);
        CHECK_HARMLESS(child_order(child, order_check_pool, PAGES) == 0);
        if (test_has_zero_page()) {
                CHECK(mappings_of_area(child) == 1);
                CHECK(child_order(child, order_grow, 0) == 0);
        } else
                /* The reader's fault gave the fresh mapping an anon_vma of its own before it waited (do_anonymous_page()),
                 * as a writer's does anywhere: it joins no other. */
                printf("no zero page: a mapping that was read stays one of its own, not tested to join its neighbours\n");
        CHECK(keeper_drop(keeper, guard_id(mute)) == 0);
        safe_close(mute);
        safe_close(tracking);
        guarded_stop(&guarded);
}

int main(int argc, char **argv) {
        bool control = argc == 3;

        CHECK(argc >= 2);
        guard_test_begin(256, argv[1]);
        unmerge(false, control);
        unmerge(true, control);
        guard_test_end();
        return 0;
}
