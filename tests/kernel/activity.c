/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Promises: the first write to a protected page is counted as a fault of the process that writes, be it made by its own
 * instructions, by a system call of one of its threads, or on a thread that has ended since; a process that does
 * nothing counts nothing. On that rests that a process without faults is not even looked at. Another process's CPU time is
 * told to the nanosecond, whichever of its threads used it, but for what one that runs used since the last tick. On that
 * rests who pays for a TLB flush.
 */
#include "track-child.h"

#include "base/clock.h"
#include "target/activity.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define PAGES 256U

static long write_pages(long n) {
        for (long i = 0; i < n; i++)
                ++*(volatile uint8_t *)area_page((uint64_t)i);
        return 0;
}

static long read_into_pages(long n) {
        int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);

        for (long i = 0; i < n; i++)
                CHECK(read(fd, (void *)area_page((uint64_t)i), 8) == 8);
        close(fd);
        return 0;
}

static void *write_in_thread(void *n) {
        write_pages((long)(intptr_t)n);
        return NULL;
}

static long run_in_thread(void *(*run)(void *), long argument) {
        pthread_t thread;

        CHECK(pthread_create(&thread, NULL, run, (void *)(intptr_t)argument) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
        return 0;
}

static long write_by_thread(long n) { return run_in_thread(write_in_thread, n); }

static long map_more(long bytes) {
        CHECK(mmap(NULL, (size_t)bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
        return 0;
}

static long rename_oddly(long unused) { return prctl(PR_SET_NAME, "a) R 1 ("); }

static void *spin(void *nsec) {
        while (clock_nsec(CLOCK_THREAD_CPUTIME_ID) < (uint64_t)(uintptr_t)nsec)
                ;
        return NULL;
}

static long spin_in_thread(long nsec) { return run_in_thread(spin, nsec); }

static void cpu_time_is_told(Child *child) {
        uint64_t before, after;

        for (long nsec = NSEC_PER_MSEC / 2; nsec <= (long)(20 * NSEC_PER_MSEC); nsec *= 2) {
                CHECK(target_cpu_nsec(child->target, &before) == 0);
                child_order(child, spin_in_thread, nsec);
                CHECK(target_cpu_nsec(child->target, &after) == 0);
                CHECK(after - before >= (uint64_t)nsec, "%lu of %ld", after - before, nsec);
        }
}

static uint64_t faults_of(Child *child, long (*order)(long)) {
        TargetActivity before, after;

        (void)child_count_written(child, shared->start, area_end());
        CHECK(target_activity(child->target, &before) == 0);
        if (order)
                child_order(child, order, PAGES);
        CHECK(target_activity(child->target, &after) == 0);
        return after.faults - before.faults;
}

int main(void) {
        TargetActivity before, after;
        uint64_t nsec;
        Target gone;
        Child child;

        track_test_begin();
        child = child_tracked(PAGES);
        child_order(&child, rename_oddly, 0);
        for (unsigned i = 0; i < 3; i++) {
                CHECK(faults_of(&child, write_pages) >= PAGES);
                CHECK(faults_of(&child, read_into_pages) >= PAGES);
                CHECK(faults_of(&child, write_by_thread) >= PAGES);
        }
        CHECK(faults_of(&child, NULL) == 0);
        /* Not protected again, they cost nothing: what is counted is the first write. */
        child_order(&child, write_pages, PAGES);
        CHECK(target_activity(child.target, &before) == 0);
        child_order(&child, write_pages, PAGES);
        CHECK(target_activity(child.target, &after) == 0);
        CHECK(after.faults - before.faults < PAGES / 8, "%lu", after.faults - before.faults);
        child_order(&child, map_more, 1 << 20);
        CHECK(target_activity(child.target, &after) == 0);
        CHECK(after.mapped_bytes >= before.mapped_bytes + (1 << 20) && after.resident_pages >= PAGES);
        cpu_time_is_told(&child);
        gone = (Target){ .pid = child.target->pid };
        child_stop(&child);
        CHECK(target_cpu_nsec(&gone, &nsec) == TARGET_E_GONE);
        track_test_end();
        return 0;
}
