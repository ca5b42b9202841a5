/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * scan/track: exactly what was written is reported, whatever becomes of the mapping, however large or sparse it is, and
 * through fork, exec and the end of the process; page tables stay as they are.
 */
#include "track-child.h"

#include "base/io.h"
#include "host/uapi.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static void check_exact(Child *child, bool protect) {
        Pages pages = child_written(child, shared->start, area_end(), protect);

        for (uint64_t i = 0; i < shared->pages; i++)
                CHECK(is_picked(i) == pages_have(&pages, area_page(i)), "page %lu of %lu, %u permille", i,
                      shared->pages, shared->permille);
        track_ranges_done(&pages.written);
}

static void test_exact(uint64_t bytes) {
        static const unsigned permilles[] = { 0, 1, 10, 500, 999, 1000 };
        Child child = child_tracked(bytes / PAGE_BYTES);

        for (size_t i = 0; i < ELEMENTSOF(permilles); i++) {
                shared->permille = permilles[i];
                shared->seed = i * 0x123456789;
                child_order(&child, order_write_picked, 0);
                check_exact(&child, false); /* looking changes nothing */
                check_exact(&child, true);
                CHECK(child_count_written(&child, shared->start, area_end()) == 0);
        }
        child_stop(&child);
}

static uint64_t status_kilobytes(const Child *child, const char *key) {
        _cleanup_free_ char *text = NULL;
        const char *p;

        CHECK(read_file(child->target->procfd, "status", &text, NULL) == 0 && (p = strstr(text, key)), "%s", key);
        return strtoull(p + strlen(key), NULL, 10);
}

#define SPARSE_PAGES 1024U
static long touch_sparse(long offset) {
        for (uint64_t i = 0; i < shared->pages; i += shared->pages / SPARSE_PAGES)
                ++*(volatile uint8_t *)area_page(i + (uint64_t)offset);
        return 0;
}

/* So many GiB, with 1,024 pages in them. */
static void test_sparse(uint64_t gib) {
        Child child = child_start();
        uint64_t tables, best = UINT64_MAX;

        child_order(&child, order_map, (long)(gib * GIB));
        child_order(&child, touch_sparse, 5);
        tables = status_kilobytes(&child, "VmPTE:");
        child_adopt(&child);
        CHECK(child_count_written(&child, shared->start, area_end()) == SPARSE_PAGES);
        for (int i = 0; i < 5; i++) {
                uint64_t began = now_nsec();
                CHECK(child_count_written(&child, shared->start, area_end()) == 0);
                best = MIN_OF(best, now_nsec() - began);
        }
        child_order(&child, touch_sparse, 5);
        CHECK(child_count_written(&child, shared->start, area_end()) == SPARSE_PAGES);
        CHECK(status_kilobytes(&child, "VmPTE:") == tables, "page tables were filled");
        printf("%lu GiB with %u pages: %zu chunks, looked through in %.1f ms; page tables %lu kB\n", gib, SPARSE_PAGES,
               child.track->n, (double)best / 1e6, tables);
        /* The control: one page more in each does show there. */
        child_order(&child, touch_sparse, 100000);
        CHECK(status_kilobytes(&child, "VmPTE:") >= tables + 4 * 1000);
        child_stop(&child);
}

/* The pages of the area from the first on that are reported are these, and no others. */
static void expect(Child *child, const char *expected, int line) {
        uint64_t n = strlen(expected);
        Pages pages = child_written(child, shared->start, area_page(n), true);

        for (uint64_t i = 0; i < n; i++)
                CHECK(pages_have(&pages, area_page(i)) == (expected[i] == 'w'), "line %d: page %lu, expected %s", line,
                      i, expected);
        track_ranges_done(&pages.written);
}
#define EXPECT(child, expected) expect(child, expected, __LINE__)

static void *page(long i) { return (void *)area_page((uint64_t)i); }
static long touch(long i) { return ++*(volatile uint8_t *)page(i); }
static long drop(long i) { return madvise(page(i), PAGE_BYTES, MADV_DONTNEED); }
static long map_over(void *address) {
        return mmap(address, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
               MAP_FAILED;
}
static long renew(long i) { return map_over(page(i)); }
static long unmap(long i) { return munmap(page(i), PAGE_BYTES); }
static long forbid(long i) { return mprotect(page(i), PAGE_BYTES, PROT_READ); }
static long allow(long i) { return mprotect(page(i), PAGE_BYTES, PROT_READ | PROT_WRITE); }
static long lock(long i) { return syscall(SYS_mlock, page(i), PAGE_BYTES); } /* ASan has an mlock() that does nothing */
static long unlock(long i) { return syscall(SYS_munlock, page(i), PAGE_BYTES); }
/* Elsewhere and back: what comes back is registered no more. */
static long there_and_back(long i) {
        void *from = page(i), *to = (void *)(shared->start - 64 * MIB);

        if (mremap(from, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
                return -1;
        return mremap(to, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, from) != from;
}

/* What can become of a mapping, seen before and after the next update. */
static void test_mappings(void) {
        Child child = child_tracked(8);

        CHECK(child.track->grown);
        child_update(&child);
        CHECK(!child.track->grown);
        child_order(&child, touch, 0);
        child_order(&child, touch, 7);
        EXPECT(&child, "w------w");
        EXPECT(&child, "--------");

        /* Dropped: not there, so not reported; what is there next is. */
        CHECK(child_order(&child, drop, 3) == 0);
        EXPECT(&child, "--------");
        child_order(&child, touch, 3);
        EXPECT(&child, "---w----");

        /* Mapped anew: reported as long as it is not registered. */
        CHECK(child_order(&child, renew, 2) == 0);
        child_order(&child, touch, 2);
        CHECK(!child.track->stale);
        EXPECT(&child, "--w-----");
        CHECK(child.track->stale);
        EXPECT(&child, "--w-----");
        child_update(&child);
        CHECK(!child.track->stale && child.track->grown);
        EXPECT(&child, "--w-----");
        EXPECT(&child, "--------");

        CHECK(child_order(&child, there_and_back, 5) == 0);
        EXPECT(&child, "-----w--");
        child_update(&child);
        EXPECT(&child, "-----w--");
        EXPECT(&child, "--------");

        /* Split by its protection: all of it stays registered, and covered. */
        child_order(&child, touch, 4);
        CHECK(child_order(&child, forbid, 4) == 0);
        child_order(&child, touch, 6);
        EXPECT(&child, "----w-w-");
        child_update(&child);
        CHECK(!child.track->grown && track_covers(child.track, area_page(4)));
        CHECK(child_order(&child, allow, 4) == 0);
        child_order(&child, touch, 4);
        EXPECT(&child, "----w---");

        /* Locked: given back. */
        CHECK(child_order(&child, lock, 1) == 0);
        child_update(&child);
        CHECK(!track_covers(child.track, area_page(1)) && track_covers(child.track, area_page(0)) &&
              track_covers(child.track, area_page(2)));
        CHECK(vma_list_find(&child.vmas, area_page(1))->skip == VMA_SKIP_LOCKED);
        child_order(&child, touch, 1);
        EXPECT(&child, "--------");
        child_read_vmas(&child);
        CHECK(!vma_list_find(&child.vmas, area_page(1))->tracked);
        CHECK(child_order(&child, unlock, 1) == 0);
        CHECK(!child.track->grown);
        child_update(&child);
        CHECK(child.track->grown);
        EXPECT(&child, "-w------");

        /* Gone. */
        CHECK(child_order(&child, unmap, 0) == 0);
        EXPECT(&child, "--------");
        child_update(&child);
        CHECK(!track_covers(child.track, area_page(0)) && track_covers(child.track, area_page(1)));
        CHECK(!child.track->grown);
        child_stop(&child);
}

static long away(long i) {
        void *from = page(i), *to = (void *)(shared->start - 64 * MIB);
        return mremap(from, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to;
}
static long back(long i) {
        void *to = page(i), *from = (void *)(shared->start - 64 * MIB);
        return mremap(from, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to;
}

/* Back between neighbours, registered as they are: the kernel merges them and then drops the registration of all. */
static void test_merging_back(void) {
        Child child = child_tracked(8);

        CHECK(child_order(&child, away, 3) == 0);
        child_update(&child);
        CHECK(child_count_written(&child, shared->start - 64 * MIB, area_page(8)) == 1);
        CHECK(child_order(&child, back, 3) == 0);
        child_order(&child, touch, 5);
        CHECK(child_written(&child, shared->start, area_page(8), true).count >= 1);
        child_order(&child, touch, 6); /* after it was reported, before it is registered again */
        child_update(&child);
        {
                Pages pages = child_written(&child, shared->start, area_page(8), true);
                CHECK(pages_have(&pages, area_page(3)) && pages_have(&pages, area_page(6)));
                track_ranges_done(&pages.written);
        }
        EXPECT(&child, "--------");
        child_order(&child, touch, 5);
        EXPECT(&child, "-----w--");
        child_stop(&child);
}

/* The same, and the daemon ends before it has seen it: for the next one all of it is written. */
static void test_old_marks(void) {
        Child child = child_tracked(8);

        CHECK(child_order(&child, away, 3) == 0);
        child_update(&child);
        CHECK(child_order(&child, back, 3) == 0);
        child.track = track_free(child.track);
        child_order(&child, order_write_picked, 0);
        child_adopt(&child);
        EXPECT(&child, "wwwwwwww");
        EXPECT(&child, "--------");
        child_stop(&child);
}

static long grow(long pages) {
        void *p = (void *)shared->start;
        return mremap(p, shared->pages * PAGE_BYTES, (size_t)pages * PAGE_BYTES, 0) != p;
}
static long move(long pages) {
        void *p = (void *)shared->start, *to = (void *)(shared->start + GIB);
        size_t bytes = (size_t)pages * PAGE_BYTES;
        return mremap(p, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to;
}
static long grow_into_gap(long pages) {
        void *p = (void *)shared->start;
        return mremap(p, 4 * PAGE_BYTES, (size_t)pages * PAGE_BYTES, 0) != p;
}
static long grow_heap(long bytes) {
        char *p = sbrk(bytes);
        for (long i = 0; i < bytes; i += (long)PAGE_BYTES)
                p[i] = 1;
        return (long)p;
}
static long use_stack(long depth) {
        volatile char here[PAGE_BYTES];
        here[0] = 1;
        return depth ? use_stack(depth - 1) + here[0] : 0;
}

static void test_growth(void) {
        Child child = child_tracked(4);
        uint64_t heap;

        /* In place: of one mapping with what was registered, and so registered. */
        CHECK(child_order(&child, grow, 8) == 0);
        child_order(&child, touch, 6);
        CHECK(!track_covers(child.track, area_page(6)));
        child_update(&child);
        CHECK(track_covers(child.track, area_page(6)) && child.track->grown);
        EXPECT(&child, "------w-");
        /* Away: known at the new place after the next update, with all that is in it. */
        CHECK(child_order(&child, move, 8) == 0);
        EXPECT(&child, "--------");
        child_update(&child);
        CHECK(!track_covers(child.track, shared->start));
        shared->start += GIB;
        EXPECT(&child, "wwww--w-");
        EXPECT(&child, "--------");

        heap = (uint64_t)child_order(&child, grow_heap, 16 * (long)PAGE_BYTES);
        CHECK(!track_covers(child.track, heap + 8 * PAGE_BYTES));
        child_update(&child);
        CHECK(child_count_written(&child, heap, heap + 16 * PAGE_BYTES) == 16);
        child_order(&child, grow_heap, 16 * (long)PAGE_BYTES);
        CHECK(child_count_written(&child, heap, heap + 16 * PAGE_BYTES) == 0);
        child_update(&child);
        CHECK(child_count_written(&child, heap, heap + 32 * PAGE_BYTES) == 16);

        /* In place towards a neighbour that is tracked too: what lies between is not protected before it is reported. */
        child_stop(&child);
        child = child_tracked(8);
        CHECK(child_order(&child, unmap, 4) == 0 && child_order(&child, unmap, 5) == 0);
        child_update(&child);
        CHECK(child_order(&child, grow_into_gap, 6) == 0);
        child_order(&child, touch, 5);
        child_order(&child, touch, 7);
        EXPECT(&child, "-------w");
        child_update(&child);
        EXPECT(&child, "-----w--");

        /* The main stack is not tracked, and grows as ever. */
        child_order(&child, use_stack, 300);
        child_update(&child);
        child_read_vmas(&child);
        for (size_t i = 0; i < child.vmas.n; i++)
                CHECK(!child.vmas.vmas[i].growsdown || !child.vmas.vmas[i].tracked);
        child_stop(&child);
}

static long fork_and_write(long i) {
        pid_t pid = fork();

        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                touch(i);
                for (;;)
                        pause();
        }
        usleep(20000);
        return pid;
}

/* The child of a tracked process is not tracked, and can be; its parent goes on being. */
static void test_fork(void) {
        Child parent = child_tracked(8), child;

        child_order(&parent, touch, 1);
        child = child_of((pid_t)child_order(&parent, fork_and_write, 2));
        EXPECT(&parent, "-w------");
        child_order(&parent, touch, 3);
        EXPECT(&parent, "---w----");
        child_read_vmas(&child);
        for (size_t i = 0; i < child.vmas.n; i++)
                CHECK(!child.vmas.vmas[i].tracked);
        child_adopt(&child);
        EXPECT(&child, "wwwwwwww");
        EXPECT(&child, "--------");
        child_order(&parent, touch, 4);
        EXPECT(&child, "--------");
        EXPECT(&parent, "----w---");
        child_stop(&child);
        child_order(&parent, touch, 5);
        EXPECT(&parent, "-----w--");
        child_stop(&parent);
}

static long execute(long unused) {
        if (fork() == 0) /* somebody has to answer */
                return 0;
        execl("/bin/sleep", "sleep", "100", NULL);
        _exit(1);
}

static void expect_gone(Child *child) {
        _cleanup_(track_ranges_done) TrackRanges ranges = {};

        CHECK(track_written(child->track, child->target, shared->start, area_end(), true, &ranges) == TARGET_E_GONE);
        CHECK(ranges.n == 0);
        /* As the kernel says of the memory it knew: whatever list it is given. */
        for (size_t i = 0; i < child->vmas.n; i++)
                child->vmas.vmas[i].tracked = false;
        CHECK(track_update(child->track, child->target, &child->vmas) == TARGET_E_GONE);
}

static void test_end(void) {
        Child child = child_tracked(8);

        child_order(&child, execute, 0);
        usleep(100000);
        CHECK(target_image_replaced(child.target));
        expect_gone(&child);
        child_stop(&child);

        child = child_tracked(8);
        kill(child.pid, SIGKILL);
        waitid(P_PID, (id_t)child.pid, &(siginfo_t){}, WEXITED | WNOWAIT);
        expect_gone(&child);
        child_stop(&child);
}

static int own_uffd = -EBADF;
static long make_uffd(long features) {
        struct uffdio_api api = { .api = UFFD_API, .features = (uint64_t)features };

        own_uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        return own_uffd < 0 || ioctl(own_uffd, UFFDIO_API, &api) < 0;
}
static long register_own(long unused) {
        struct uffdio_register reg = { .range = { shared->start, PAGE_BYTES }, .mode = UFFDIO_REGISTER_MODE_WP };
        return ioctl(own_uffd, UFFDIO_REGISTER, &reg) < 0 ? errno : 0;
}
static long close_own(long unused) { return close(own_uffd); }

static void test_own_userfaultfd(void) {
        Child child = child_tracked(8), qemu;
        int ends[2];
        pid_t pid;

        CHECK(child_order(&child, make_uffd, 0) == 0);
        CHECK(target_has_userfaultfd(child.target));
        CHECK(child_order(&child, register_own, 0) == EBUSY);
        child.track = track_free(child.track);
        CHECK(child_order(&child, register_own, 0) == 0);
        child_read_vmas(&child);
        CHECK(vma_list_find(&child.vmas, shared->start)->skip == VMA_SKIP_UFFD);
        child_order(&child, close_own, 0);
        CHECK(!target_has_userfaultfd(child.target));

        /* What is another's is not covered; the rest is. */
        CHECK(child_order(&child, make_uffd, 0) == 0 && child_order(&child, register_own, 0) == 0);
        {
                TargetSkip skip;
                int uffd = -EBADF;

                child_take(&child, &uffd, &skip);
                CHECK(track_new(uffd, &child.track) == 0);
        }
        child_update(&child);
        CHECK(!track_covers(child.track, area_page(0)) && track_covers(child.track, area_page(1)));
        child.track = track_free(child.track);
        child_read_vmas(&child);
        CHECK(vma_list_find(&child.vmas, shared->start)->tracked && !vma_list_find(&child.vmas, area_page(1))->tracked);
        child_stop(&child);

        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        pid = fork();
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                dup2(ends[0], STDIN_FILENO);
                execl("/bin/sh", "sh", "-c", "read nothing", "-incoming", NULL);
                _exit(127);
        }
        usleep(100000);
        qemu = child_of(pid);
        CHECK(target_has_userfaultfd(qemu.target));
        child_stop(&qemu);
        close(ends[0]);
        close(ends[1]);
}

static long register_gap(long i) {
        struct uffdio_register reg = { .range = { area_page((uint64_t)i), PAGE_BYTES }, .mode = UFFDIO_REGISTER_MODE_WP };
        return map_over(page(i)) || ioctl(own_uffd, UFFDIO_REGISTER, &reg) < 0;
}

/* A process that begins to track a mapping of its own, between two of ours: what it has written stays written to it. */
static void test_own_tracking(void) {
        Child child = child_tracked(8);
        PagemapRegion region;
        PagemapScan scan = {
                .size = sizeof scan,
                .start = area_page(4),
                .end = area_page(5),
                .vec = (uintptr_t)&region,
                .vec_len = 1,
                .category_mask = PAGEMAP_SCAN_WPALLOWED | PAGEMAP_SCAN_WRITTEN | PAGEMAP_SCAN_PRESENT,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };

        CHECK(child_order(&child, unmap, 4) == 0);
        child_update(&child);
        CHECK(child_order(&child, make_uffd, (long)UAPI_UFFD_WP_ASYNC) == 0 && child_order(&child, register_gap, 4) == 0);
        child_order(&child, touch, 4);
        child_order(&child, touch, 5);
        EXPECT(&child, "-----w--");
        CHECK(ioctl(child.target->pagemapfd, PAGEMAP_SCAN_IOCTL, &scan) == 1);
        child_stop(&child);
}

static long leave_no_descriptor(long unused) {
        int lowest = dup(0);
        struct rlimit limit = { (rlim_t)lowest, (rlim_t)lowest };
        close(lowest);
        return setrlimit(RLIMIT_NOFILE, &limit);
}

/* Nothing can be opened there: it is adopted, and not tracked. */
static void test_no_descriptor(void) {
        Child child = child_start();
        TargetSkip skip = TARGET_SKIP_DENIED;
        int uffd = 0;

        CHECK(child_order(&child, leave_no_descriptor, 0) == 0);
        child_take(&child, &uffd, &skip);
        CHECK(skip == TARGET_OK && uffd == -EBADF);
        child_stop(&child);
}

static long equal_contents(long unused) {
        for (uint64_t i = 0; i < shared->pages; i++)
                memset(page((long)i), 'k', PAGE_BYTES);
        return madvise((void *)shared->start, shared->pages * PAGE_BYTES, MADV_MERGEABLE);
}
static long check_contents(long unused) {
        for (uint64_t i = 0; i < shared->pages * PAGE_BYTES; i++)
                if (((volatile char *)shared->start)[i] != 'k')
                        return (long)i + 1;
        return 0;
}

#define KSM "/sys/kernel/mm/ksm/"
static const char *const knobs[] = { KSM "run", KSM "sleep_millisecs", KSM "pages_to_scan" };
static const char *const turned[] = { "1", "10", "2000" };
static uint64_t found[ELEMENTSOF(knobs)];
static void put_back(void) {
        char text[32];

        for (size_t i = 0; i < ELEMENTSOF(knobs); i++) {
                snprintf(text, sizeof text, "%lu", found[i]);
                (void)write_text(AT_FDCWD, knobs[i], text);
        }
}

/* Merged under tracking: as usual, reported at most once for it, and then quiet. */
static void test_ksm(void) {
        uint64_t until, merged = 0;
        Child child;

        test_lock_ksm();
        for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                if (read_u64(AT_FDCWD, knobs[i], &found[i]) < 0) {
                        printf("no KSM here\n");
                        return;
                }
        child = child_tracked(256);
        CHECK(child_order(&child, equal_contents, 0) == 0);
        child_update(&child);
        CHECK(child_count_written(&child, shared->start, area_end()) == 256);
        for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                CHECK(write_text(AT_FDCWD, knobs[i], turned[i]) == 0);
        until = now_nsec() + 60 * NSEC_PER_SEC; /* not of the wait for the lock */
        for (; merged < 255 && now_nsec() < until; usleep(10000))
                CHECK(read_u64(AT_FDCWD, KSM "pages_sharing", &merged) == 0);
        put_back();
        CHECK(merged >= 255, "%lu merged", merged);
        CHECK(child_count_written(&child, shared->start, area_end()) <= 256);
        CHECK(child_count_written(&child, shared->start, area_end()) == 0);
        CHECK_HARMLESS(child_order(&child, check_contents, 0) == 0);
        CHECK(child_count_written(&child, shared->start, area_end()) == 0);
        child_order(&child, touch, 9);
        CHECK(child_count_written(&child, shared->start, area_end()) == 1);
        child_stop(&child);
}

int main(void) {
        track_test_begin();
        test_exact(64 * MIB + 3 * PAGE_BYTES);
        test_exact(GIB);
        test_sparse(1024);
        test_sparse(32768);
        test_mappings();
        test_merging_back();
        test_old_marks();
        test_growth();
        test_fork();
        test_end();
        test_own_userfaultfd();
        test_own_tracking();
        test_no_descriptor();
        test_ksm();
        track_test_end();
        return 0;
}
