/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What tracking costs (scan/track), on this machine: a scan of 1 GiB of which so much was written, the first write of
 * the target to a page after a scan, and the stop in which a target is adopted with its userfaultfd. JSON lines, CPU
 * time, the least of several runs.
 */
#include "../kernel/track-child.h"

#include <signal.h>
#include <sys/mman.h>

#define RUNS 7

static long write_all_timed(long unused) {
        uint64_t began = clock_nsec(CLOCK_THREAD_CPUTIME_ID);

        order_write_picked(0);
        return (long)(clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began);
}

static void show_scans(void) {
        static const unsigned permilles[] = { 0, 1, 10, 100, 1000 };
        Child child = child_tracked(GIB / PAGE_BYTES);

        for (size_t i = 0; i < ELEMENTSOF(permilles); i++) {
                uint64_t best = UINT64_MAX, best_write = UINT64_MAX, best_again = UINT64_MAX;
                size_t pages = 0;

                shared->permille = permilles[i];
                for (int run = 0; run < RUNS; run++) {
                        uint64_t began;

                        best_write = MIN_OF(best_write, (uint64_t)child_order(&child, write_all_timed, 0));
                        best_again = MIN_OF(best_again, (uint64_t)child_order(&child, write_all_timed, 0));
                        began = clock_nsec(CLOCK_THREAD_CPUTIME_ID);
                        pages = child_count_written(&child, shared->start, area_end());
                        best = MIN_OF(best, clock_nsec(CLOCK_THREAD_CPUTIME_ID) - began);
                }
                printf("{\"name\": \"scan\", \"bytes\": %lu, \"written_permille\": %u, \"pages\": %zu, "
                       "\"cpu_usec\": %.1f, \"nsec_per_first_write\": %.0f}\n",
                       GIB, permilles[i], pages, (double)best / 1e3,
                       pages ? (double)(best_write - MIN_OF(best_write, best_again)) / (double)pages : 0);
        }
        child_stop(&child);
}

static void show_adoptions(bool with_uffd) {
        Child child = child_start();
        RemoteStats stats;

        remote = remote_free(remote);
        CHECK(remote_new(&remote) == 0);
        for (int i = 0; i < 300; i++) {
                TargetSkip skip;
                int uffd = -EBADF;

                (void)remote_adopt(remote, child.target, with_uffd ? &uffd : NULL, &skip);
                safe_close(uffd);
                usleep(1000);
        }
        remote_stats(remote, &stats);
        printf("{\"name\": \"adopt\", \"userfaultfd\": %s, \"stops\": %lu, \"stop_usec_p50\": %lu, "
               "\"stop_usec_p99\": %lu, \"stop_usec_max\": %lu}\n",
               with_uffd ? "true" : "false", stats.stops, remote_stop_percentile(&stats, 500) / 1000,
               remote_stop_percentile(&stats, 990) / 1000, stats.stop_nsec_max / 1000);
        child_stop(&child);
}

int main(void) {
        track_test_begin();
        show_adoptions(false);
        show_adoptions(true);
        show_scans();
        track_test_end();
        return 0;
}
