/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Every item once, by threads that really work side by side; and what the threads must not do: take signals, run while
 * there is nothing to do. With -Db_sanitize=thread the plain counters here prove what crew_run() says of memory. */
#include "base/crew.h"

#include <dirent.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define THREADS 4U
#define ITEMS 10000U

typedef struct Job {
        unsigned seen[ITEMS];           /* how often each item was worked on */
        unsigned by[THREADS];           /* items by thread */
        pthread_t ids[THREADS];
        pthread_barrier_t barrier;
        bool signals_taken;
} Job;

static void count(void *userdata, unsigned thread, size_t item) {
        Job *job = userdata;

        job->seen[item]++;
        job->by[thread]++;
}

static void test_each_item_once(void **state) {
        for (unsigned n = 1; n <= THREADS; n++) {
                _cleanup_(crew_freep) Crew *crew = NULL;
                Job job = {};
                unsigned sum = 0;

                assert_int_equal(crew_new(n, &crew), 0);
                assert_int_equal(crew_size(crew), n);
                crew_run(crew, ITEMS, count, &job);
                for (unsigned i = 0; i < ITEMS; i++)
                        assert_int_equal(job.seen[i], 1);
                for (unsigned i = 0; i < THREADS; i++)
                        sum += job.by[i];
                assert_int_equal(sum, ITEMS);
                for (unsigned i = n; i < THREADS; i++)
                        assert_int_equal(job.by[i], 0);
        }
}

/* Job after job, down to none and one item: a thread that wakes late must not touch the next one's. */
static void test_many_jobs(void **state) {
        _cleanup_(crew_freep) Crew *crew = NULL;
        static Job jobs[2];

        assert_int_equal(crew_new(THREADS, &crew), 0);
        for (unsigned round = 0; round < 5000; round++) {
                Job *job = &jobs[round % 2];
                size_t n = round % 9;

                memset(job->seen, 0, (n + 1) * sizeof *job->seen);
                crew_run(crew, n, count, job);
                for (size_t i = 0; i < n; i++)
                        assert_int_equal(job->seen[i], 1);
                assert_int_equal(job->seen[n], 0);
        }
}

/* No item ends before all have begun, each in a thread of its own. */
static void meet(void *userdata, unsigned thread, size_t item) {
        Job *job = userdata;
        sigset_t mask;

        pthread_sigmask(SIG_SETMASK, NULL, &mask);
        if (thread != 0 &&
            (!sigismember(&mask, SIGTERM) || !sigismember(&mask, SIGCHLD) || !sigismember(&mask, SIGHUP)))
                job->signals_taken = true;
        job->ids[thread] = pthread_self();
        job->by[thread]++;
        pthread_barrier_wait(&job->barrier);
}

static void test_side_by_side(void **state) {
        _cleanup_(crew_freep) Crew *crew = NULL;
        Job job = {};
        sigset_t before, after;

        pthread_sigmask(SIG_SETMASK, NULL, &before);
        assert_int_equal(crew_new(THREADS, &crew), 0);
        pthread_sigmask(SIG_SETMASK, NULL, &after);
        assert_int_equal(sigismember(&before, SIGTERM), sigismember(&after, SIGTERM));
        pthread_barrier_init(&job.barrier, NULL, THREADS);
        crew_run(crew, THREADS, meet, &job);
        pthread_barrier_destroy(&job.barrier);
        assert_true(pthread_equal(job.ids[0], pthread_self()));
        for (unsigned i = 0; i < THREADS; i++) {
                assert_int_equal(job.by[i], 1);
                for (unsigned k = 0; k < i; k++)
                        assert_false(pthread_equal(job.ids[i], job.ids[k]));
                if (i > 0) {
                        char name[16], want[16];

                        snprintf(want, sizeof want, "crew-%u", i);
                        assert_int_equal(pthread_getname_np(job.ids[i], name, sizeof name), 0);
                        assert_string_equal(name, want);
                }
        }
        assert_false(job.signals_taken);
}

static unsigned count_threads(void) {
        DIR *dir = opendir("/proc/self/task");
        unsigned n = 0;

        assert_non_null(dir);
        for (struct dirent *entry; (entry = readdir(dir));)
                n += entry->d_name[0] != '.';
        closedir(dir);
        return n;
}

/* A thread that was joined is in /proc for a moment more. */
static unsigned count_threads_settled(void) {
        unsigned n = count_threads();

        for (unsigned i = 0; i < 50; i++) {
                usleep(1000);
                if (count_threads() != n) {
                        n = count_threads();
                        i = 0;
                }
        }
        return n;
}

static void test_alone_makes_no_thread(void **state) {
        unsigned before = count_threads_settled();
        Crew *crew;

        assert_int_equal(crew_new(1, &crew), 0);
        assert_int_equal(count_threads(), before);
        crew_free(crew);
        assert_int_equal(crew_new(3, &crew), 0);
        assert_int_equal(count_threads(), before + 2);
        crew_free(crew);
        assert_int_equal(count_threads_settled(), before);
        crew_free(NULL);
}

/* Idle threads have used no CPU time when they are asked again. */
static void note_cpu(void *userdata, unsigned thread, size_t item) {
        uint64_t *cpu = userdata;
        struct timespec now;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
        cpu[thread] = (uint64_t)now.tv_sec * NSEC_PER_SEC + (uint64_t)now.tv_nsec;
        usleep(20000); /* leaves an item to each */
}

static void test_idle(void **state) {
        _cleanup_(crew_freep) Crew *crew = NULL;
        uint64_t before[THREADS] = {}, after[THREADS] = {};

        assert_int_equal(crew_new(THREADS, &crew), 0);
        crew_run(crew, THREADS, note_cpu, before);
        usleep(300000);
        crew_run(crew, THREADS, note_cpu, after);
        for (unsigned i = 1; i < THREADS; i++)
                if (before[i] && after[i])
                        assert_in_range(after[i] - before[i], 0, 100 * NSEC_PER_MSEC);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_each_item_once), cmocka_unit_test(test_many_jobs),
                cmocka_unit_test(test_side_by_side), cmocka_unit_test(test_alone_makes_no_thread),
                cmocka_unit_test(test_idle),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
