/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "guard-child.h"

#include "tests/keeper-directory.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

Pool *pool;
Keeper *keeper;
uint64_t pool_first;
const char *const guard_directory = keeper_directory;

void page_fill(void *page, uint64_t number) {
        uint64_t x = number * 0x9e3779b97f4a7c15 + 1;

        for (size_t i = 0; i < PAGE_BYTES / sizeof x; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                ((uint64_t *)page)[i] = x;
        }
}

bool page_is(const void *page, uint64_t number) {
        static _Thread_local uint64_t expected[PAGE_BYTES / sizeof(uint64_t)];

        page_fill(expected, number);
        return memcmp(page, expected, PAGE_BYTES) == 0;
}

bool page_is_zero(const void *page) {
        const uint64_t *words = page;

        for (size_t i = 0; i < PAGE_BYTES / sizeof *words; i++)
                if (words[i])
                        return false;
        return true;
}

void guard_test_begin(uint32_t n_pages, const char *program) {
        _cleanup_free_ char *data = malloc(n_pages * PAGE_BYTES);
        const char *reason = NULL;
        int r;

        track_test_begin();
        r = pool_new("test", 256, &pool, &reason);
        if (r == -EOPNOTSUPP || r == -EPERM)
                TEST_SKIP("no pool: %s: %s", reason, strerror(-r));
        CHECK(r == 0 && data, "%s: %s", reason, strerror(-r));
        for (uint32_t i = 0; i < n_pages; i++)
                page_fill(data + i * PAGE_BYTES, i);
        for (uint32_t i = 0, n; i < n_pages; i += n) {
                uint64_t page;
                n = MIN_OF(n_pages - i, POOL_RUN_MAX);
                CHECK(pool_alloc(pool, n, NULL, 0, &page) == 0 && page == i);
                CHECK(pool_write(pool, page, n, data + i * PAGE_BYTES) == 0);
        }
        if (!program)
                return;
        keeper_directory_make();
        r = keeper_new(guard_directory, program, &keeper);
        CHECK(r == 0, "keeper: %s", strerror(-r));
        CHECK(keeper_pool_add(keeper, pool_mount_fd(pool)) == 0);
}

void guard_test_end(void) {
        KeeperStats stats;
        char path[64];

        if (keeper) {
                CHECK(keeper_pool_drop(keeper, "test") == 0);
                CHECK(keeper_stats(keeper, &stats) == 0);
                printf("keeper: %lu faults, %lu zeros, %lu wakes, %lu forks, %lu remaps, %lu restarts\n", stats.faults,
                       stats.zeros, stats.wakes, stats.forks, stats.remaps, stats.restarts);
                keeper = keeper_free(keeper);
                for (unsigned i = 0; kill(stats.pid, 0) == 0; i++) {
                        CHECK(i < 500, "the keeper holds nothing and does not end");
                        usleep(10000);
                }
                snprintf(path, sizeof path, "%s/keeper", guard_directory);
                CHECK(unlink(path) == 0 && rmdir(guard_directory) == 0);
        }
        pool = pool_free(pool);
        track_test_end();
}

static long order_userfaultfd(long unused) {
        return syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

static long order_close(long fd) { return close((int)fd); }

int child_userfaultfd_kept(const Child *child, GuardKind kind, long *ret_theirs) {
        long theirs = child_order(child, order_userfaultfd, 0);
        int fd;

        CHECK(theirs >= 0);
        fd = (int)syscall(SYS_pidfd_getfd, child->target->pidfd, theirs, 0);
        CHECK(fd >= 0);
        if (kind != GUARD_NONE && guard_init(fd, kind) < 0)
                TEST_SKIP("no userfaultfd for shared memory");
        CHECK(guard_kind(fd) == kind && guard_id(fd) != 0);
        *ret_theirs = theirs;
        return fd;
}

int child_userfaultfd(const Child *child, GuardKind kind) {
        long theirs;
        int fd = child_userfaultfd_kept(child, kind, &theirs);

        CHECK(child_order(child, order_close, theirs) == 0);
        return fd;
}

static long order_map_pool(long unused) {
        void *at = (void *)area_page(shared->counters[0]);

        return mmap(at, shared->counters[1] * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                    pool_target_fd(pool), (off_t)(shared->counters[2] * PAGE_BYTES)) == at ? 0 : -errno;
}

void guarded_map_pool(const Guarded *guarded, uint64_t first, uint32_t n_pages, uint64_t pool_page) {
        shared->counters[0] = first;
        shared->counters[1] = n_pages;
        shared->counters[2] = pool_page;
        CHECK(pool_take(pool, pool_page, n_pages, area_page(first)) == 0);
        CHECK(child_order(&guarded->child, order_map_pool, 0) == 0);
}

void guarded_remap(Guarded *guarded, uint64_t first, uint32_t n_pages, uint64_t pool_page) {
        uint64_t start = area_page(first), end = start + n_pages * PAGE_BYTES;
        struct uffdio_register reg = { { start, end - start },
                UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP, 0 };

        guarded_map_pool(guarded, first, n_pages, pool_page);
        CHECK(ioctl(guarded->guard, UFFDIO_REGISTER, &reg) == 0);
        while (start < end) {
                struct uffdio_continue make = { { start, end - start }, UFFDIO_CONTINUE_MODE_DONTWAKE, 0 };
                int r = ioctl(guarded->guard, UFFDIO_CONTINUE, &make);
                CHECK(r == 0 || (errno == EAGAIN && make.mapped > 0));
                start += (uint64_t)make.mapped;
        }
}

/* Room on both sides, so that mappings do not join others. Lined up so that pool page 0 fits. */
static long order_map_area(long n_pages) {
        char *p;

        CHECK(order_map(n_pages * (long)PAGE_BYTES) == 0);
        p = (char *)area_page(0);
        if (!pool_fits(shared->start, 0)) {
                size_t bytes = (size_t)n_pages * PAGE_BYTES;
                CHECK(munmap(p, bytes) == 0);
                p += PAGE_BYTES;
                CHECK(mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                           -1, 0) == p && madvise(p, bytes, MADV_NOHUGEPAGE) == 0);
                shared->start += PAGE_BYTES;
        }
        return 0;
}

void guarded_map_area(const Child *child, uint32_t n_pages) { child_order(child, order_map_area, n_pages); }

void guarded_guard(Guarded *guarded, bool hand_over) {
        const Target *target = guarded->child.target;
        KeeperOwner owner = { .pid = target->pid, .start_ticks = target->start_ticks };

        guarded->guard = child_userfaultfd(&guarded->child, GUARD_ZERO);
        guarded->id = guard_id(guarded->guard);
        if (hand_over)
                CHECK(keeper_add(keeper, guarded->guard, &owner) == 0);
}

Guarded guarded_start(uint32_t n_pages, bool hand_over) {
        Guarded guarded = { .child = child_start() };

        guarded_map_area(&guarded.child, n_pages);
        guarded_guard(&guarded, hand_over);
        guarded_remap(&guarded, 0, n_pages, pool_first);
        return guarded;
}

void guarded_stop(Guarded *guarded) {
        child_stop(&guarded->child);
        CHECK(guard_is_dead(guarded->guard));
        safe_close(guarded->guard);
        if (keeper) {
                int r = keeper_drop(keeper, guarded->id);
                CHECK(r == 0 || r == -ENOENT, "%d", r);
        }
}

long order_is_pool(long page) { return page_is((void *)area_page((uint64_t)page), pool_first + (uint64_t)page); }
long order_is_zero(long page) { return page_is_zero((void *)area_page((uint64_t)page)); }
long order_discard(long page) { return madvise((void *)area_page((uint64_t)page), PAGE_BYTES, MADV_DONTNEED); }

long order_check_pool(long n_pages) {
        long wrong = 0;

        for (long i = 0; i < n_pages; i++)
                wrong += !order_is_pool(i);
        return wrong;
}
