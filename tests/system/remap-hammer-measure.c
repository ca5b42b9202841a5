/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What remapping costs, and that a process which did nothing meanwhile has as many mappings afterwards as before.
 */
#include "remap-hammer.h"

#include "merge/remap.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* Of all threads; pid 0: ours. */
static uint64_t cpu_nsec(pid_t pid) {
        struct timespec time;
        clockid_t clock = CLOCK_PROCESS_CPUTIME_ID;

        CHECK(pid == 0 || clock_getcpuclockid(pid, &clock) == 0, "clock");
        CHECK(clock_gettime(clock, &time) == 0, "clock");
        return (uint64_t)time.tv_sec * NSEC_PER_SEC + (uint64_t)time.tv_nsec;
}

/* What it costs: a process of its own that does nothing, merged and put back in runs of so many pages. */
void hammer_measure(uint32_t run_pages) {
        static Maps maps;
        const uint64_t pages = 1536;
        Target *target;
        Remote *remote;
        RemapGuard guard;
        uint64_t *address = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        pid_t pid = fork();

        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                uint8_t *p = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

                madvise(p, pages * PAGE_BYTES, MADV_NOHUGEPAGE);
                for (uint64_t i = 0; i < pages; i++)
                        hammer_pattern(p + i * PAGE_BYTES, i);
                *address = (uintptr_t)p;
                for (;;)
                        pause();
        }
        while (!*(volatile uint64_t *)address)
                usleep(1000);
        CHECK(remote_new(&remote) == 0 && target_new(pid, &target) == 0, "target");
        while (remap_guard_make(remote, target, &guard) != 0)
                usleep(2000);
        hammer_guard_add(guard.zero, false);
        hammer_guard_add(guard.mute, true);
        read_maps(pid, &maps);
        const size_t maps_before = maps.n;
        for (int undo = 0; undo <= 1; undo++) {
                uint64_t stop = 0, longest = 0, batches = 0, done = 0, begun = now_nsec(), cpu = cpu_nsec(0), its = cpu_nsec(pid);

                for (uint64_t page = 0; page + run_pages <= pages;) {
                        RemapRange ranges[REMAP_BATCH_MAX];
                        RemapBatch batch = { .ranges = ranges, .guard = &guard, .pool_fd = pool_ro,
                                             .settle = hammer_guard_sync, .run_nsec = 50 * NSEC_PER_MSEC,
                                             .pool_dev = pool_stat.st_dev, .pool_inode = pool_stat.st_ino };
                        uint64_t at = page;

                        /* So many that a stop stays below 2 ms. A page between runs keeps them apart. */
                        for (uint32_t n = 0; n < 512 && batch.n < 24 && at + run_pages <= pages; n += run_pages) {
                                ranges[batch.n++] = (RemapRange){
                                        .start = *address + at * PAGE_BYTES,
                                        .n_pages = run_pages,
                                        .page = at,
                                        .advice = VMA_NOHUGEPAGE,
                                        .neighbour = !undo ? 0 : *address + (at > 0 ? at - 1 : run_pages) * PAGE_BYTES,
                                };
                                at += run_pages + 1;
                        }
                        int r = undo ? remap_undo(remote, target, &batch) : remap_merge(remote, target, &batch);
                        if (r != 0 || ranges[0].result != REMAP_DONE) {
                                CHECK(now_nsec() - begun < 20 * NSEC_PER_SEC, "%d: %s, %d", r,
                                      remap_result_name(ranges[0].result), ranges[0].error);
                                usleep(1000);
                                continue;
                        }
                        for (size_t i = 0; i < batch.n; i++)
                                done += ranges[i].result == REMAP_DONE ? run_pages : 0;
                        stop += batch.stop_nsec;
                        longest = MAX_OF(longest, batch.stop_nsec);
                        batches++;
                        page = at;
                }
                printf("%s in runs of %u: %lu pages in %lu stops of %lu us (max %lu), ns of CPU a page: ours %lu, its %lu\n",
                       undo ? "put back" : "merged", run_pages, done, batches, stop / batches / 1000, longest / 1000,
                       (cpu_nsec(0) - cpu) / done, (cpu_nsec(pid) - its) / done);
        }
        for (TargetSkip skip; remote_adopt(remote, target, NULL, &skip) != 0;)
                usleep(2000); /* a region that we came too late for is taken away */
        read_maps(pid, &maps);
        for (size_t i = 0; i < maps.n && maps.n != maps_before; i++)
                printf("  %lx-%lx inode %lu\n", maps.maps[i].start, maps.maps[i].end, maps.maps[i].inode);
        CHECK(maps.n == maps_before, "%zu mappings, %zu before", maps.n, maps_before);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        remote_free(remote);
        target_free(target);
        remap_guard_done(&guard);
}
