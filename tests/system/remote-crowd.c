/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/io.h"
#include "target/remote-internal.h"
#include "tests/test.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * How many threads are made to stand: nobody stands while others are still being looked at, what is said of a stop is
 * no shorter than it was, one that is not listed is not overlooked, a process with more threads than can be parked is
 * not stopped at all, one that is killed meanwhile and that nobody waits for holds nobody up, and those that are parked
 * come home when we lost patience with the program. Prints what it measured. Built with the remote sources of its own
 * (REMOTE_TEST), whose steps tell when something happens.
 */
#define TRIES 60U
#define PATIENCE_NSEC (20 * NSEC_PER_MSEC)

unsigned remote_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static unsigned interrupted, seized_late;
static bool desert;
static pid_t doomed;
static uint64_t first_nsec, all_nsec, last_nsec;

void remote_test_step(RemoteStep step) {
        if (step == REMOTE_STEP_SEIZED)
                seized_late += interrupted > 0;
        if (step == REMOTE_STEP_SEIZED && doomed)
                kill(doomed, SIGKILL);
        if (step == REMOTE_STEP_CROWD && interrupted++ == 0)
                first_nsec = now_nsec();
        if (step == REMOTE_STEP_ANSWERED && desert)
                remote_test_program_wait_nsec = 0; /* it runs on without us, the others parked */
        if (step == REMOTE_STEP_STANDING)
                all_nsec = now_nsec();
        if (step == REMOTE_STEP_DETACHED)
                last_nsec = now_nsec();
        if (step == REMOTE_STEP_DETACHED && remote_test_program_wait_nsec == 0)
                usleep(1000); /* the program ends */
}

static void *sleep_on(void *unused) {
        pause();
        return NULL;
}

static void *sleep_last(void *unused) {
        CHECK(setpriority(PRIO_PROCESS, 0, 19) == 0); /* of this thread */
        return sleep_on(NULL);
}

/* last: all on one CPU, which the first thread has before all others. */
static pid_t start(unsigned n_threads, bool last) {
        int fds[2];
        char byte;

        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                cpu_set_t one;
                CPU_ZERO(&one);
                CPU_SET(0, &one);
                CHECK(!last || sched_setaffinity(0, sizeof one, &one) == 0);
                for (unsigned i = 1; i < n_threads; i++) {
                        pthread_t thread;
                        CHECK(pthread_create(&thread, NULL, last ? sleep_last : sleep_on, NULL) == 0);
                }
                CHECK(write(fds[1], "", 1) == 1);
                (void)sleep_on(NULL);
        }
        CHECK(read(fds[0], &byte, 1) == 1);
        close(fds[0]);
        close(fds[1]);
        usleep(20000); /* all of them sleep */
        return pid;
}

/* A thread that did not stop in time is still ours, and its end too. */
static void end(Remote *remote, pid_t pid) {
        kill(pid, SIGKILL);
        while (waitpid(pid, NULL, WNOHANG) == 0) {
                remote_reap(remote);
                usleep(1000);
        }
}

static int transact(Remote *remote, Target *target, bool hold, RemoteTransaction *transaction) {
        _cleanup_(remote_program_freep) RemoteProgram *program = NULL;

        CHECK(remote_program_new(&program) == 0);
        unsigned fd = remote_program_words(program, 1), out = remote_program_label(program);
        int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (hold)
                remote_program_hold(program);
        remote_program_give(program, &null, 1, fd, out);
        remote_program_here(program, out);
        remote_program_close(program, fd);
        *transaction = (RemoteTransaction){ .program = program, .patience_nsec = PATIENCE_NSEC };
        interrupted = 0;
        first_nsec = last_nsec = 0;
        int r = remote_transact(remote, target, transaction);
        transaction->program = NULL;
        close(null);
        return r;
}

static int compare(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

        return x < y ? -1 : x > y;
}

static void test_stop(Remote *remote, unsigned n_threads) {
        _cleanup_(target_freep) Target *target = NULL;
        uint64_t stood[TRIES], stand[TRIES];
        size_t n = 0, said_whole = 0;
        pid_t pid = start(n_threads, false);

        CHECK(target_new(pid, &target) == 0);
        seized_late = 0;
        for (unsigned i = 0; i < TRIES; i++) {
                RemoteTransaction transaction;
                int r = transact(remote, target, true, &transaction);

                CHECK(r >= 0, "%s", strerror(-r));
                if (r != 0) { /* somebody got no CPU in time, and is to be let go first */
                        usleep(5000);
                        continue;
                }
                stood[n] = last_nsec - first_nsec;
                stand[n] = all_nsec - first_nsec;
                said_whole += transaction.stop_nsec >= stood[n++];
        }
        end(remote, pid);
        CHECK(seized_late == 0, "%u were seized while others stood", seized_late);
        if (n == 0) {
                TEST_SKIP_PART("%u threads: not one transaction of %u, the CPUs are too busy", n_threads, TRIES);
                return;
        }
        /* Of the others the first had to wait for a CPU before it stood. */
        if (said_whole == 0 && n_threads >= 64) {
                CHECK(n < TRIES / 2, "not one of %zu stops was as long as was said", n);
                TEST_SKIP_PART("%u threads: how long a stop is said to have been, as only %zu of %u came about", n_threads, n, TRIES);
        }
        qsort(stood, n, sizeof *stood, compare);
        qsort(stand, n, sizeof *stand, compare);
        printf("%u threads: until all stand p50 %lu us, the whole p50 %lu, max %lu us; of %zu stops %zu counted from the first "
               "interrupt on\n", n_threads, stand[n / 2] / 1000, stood[n / 2] / 1000, stood[n - 1] / 1000, n, said_whole);
}

/* The program ends while we let go of the others: they come to the CPU when the one that ran it has gone. */
static void test_deserted(Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        unsigned lost = 0;
        pid_t pid = start(4, true);

        CHECK(target_new(pid, &target) == 0);
        desert = true;
        for (unsigned i = 0; i < 2 * TRIES; i++) {
                RemoteTransaction transaction;

                remote_test_program_wait_nsec = NSEC_PER_SEC;
                lost += transact(remote, target, true, &transaction) == REMOTE_E_LOST;
                for (unsigned wait = 0; wait < 1000 && (remote_has_lingering(remote) || wait < 2); wait++) {
                        usleep(200);
                        remote_reap(remote);
                }
                CHECK(target_alive(target), "the process was killed after %u", lost);
        }
        desert = false;
        remote_test_program_wait_nsec = NSEC_PER_SEC;
        printf("deserted in %u of %u\n", lost, 2 * TRIES);
        CHECK(lost > 0);
        end(remote, pid);
}

/* Frames as AMX makes them: they would reach into the next region. */
static void test_too_large(Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        pid_t pid = start(100, false);

        CHECK(target_new(pid, &target) == 0);
        remote_test_vector_bytes = 11 << 10;
        for (unsigned i = 0; i < TRIES; i++) {
                RemoteTransaction transaction;
                int r = transact(remote, target, true, &transaction);
                CHECK(r == REMOTE_E_BUSY, "%s", remote_error_name(r));
                usleep(2000);
        }
        remote_test_vector_bytes = 0;
        CHECK(target_alive(target));
        end(remote, pid);
}

/* The kernel leaves one out when another ends: who was not seen runs. */
static void test_unlisted(Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_closedir_ DIR *tasks = NULL;
        RemoteTransaction transaction;
        pid_t pid = start(2, false);

        CHECK(target_new(pid, &target) == 0 && remote_tasks_open(target, &tasks) == 0);
        CHECK(remote_nobody_inside(target) && !remote_anybody_leaves(target));
        while ((remote_test_unlisted = remote_tasks_next(tasks)) == pid)
                ;
        all_nsec = 0;
        int r = transact(remote, target, true, &transaction);
        CHECK(r == REMOTE_E_BUSY && all_nsec == 0, "%s, %s", remote_error_name(r), all_nsec ? "all stood" : "one ran");
        CHECK(!remote_nobody_inside(target) && remote_anybody_leaves(target));
        remote_test_unlisted = 0;
        end(remote, pid);
}

/* Killed while it is being stopped, under a parent that does not wait for it: it stays listed. */
static void test_unreaped(Remote *remote, unsigned n_threads) {
        _cleanup_(target_freep) Target *target = NULL;
        RemoteTransaction transaction;
        int fds[2];
        pid_t pid;

        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        pid_t parent = fork();
        CHECK(parent >= 0);
        if (parent == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                pid = start(n_threads, false);
                CHECK(write(fds[1], &pid, sizeof pid) == sizeof pid);
                (void)sleep_on(NULL);
        }
        CHECK(read(fds[0], &pid, sizeof pid) == sizeof pid);
        close(fds[0]);
        close(fds[1]);
        CHECK(target_new(pid, &target) == 0);
        doomed = pid;
        alarm(10); /* it would go on for ever */
        int r = transact(remote, target, true, &transaction);
        alarm(0);
        CHECK(doomed == pid && (r == REMOTE_E_GONE || r == REMOTE_E_BUSY), "%s", remote_error_name(r));
        doomed = 0;
        printf("%u threads, killed and not waited for: %s\n", n_threads, remote_error_name(r));
        end(remote, parent);
}

static void test_too_many(Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        RemoteTransaction transaction;
        pid_t pid = start(REMOTE_PARKED_MAX + 1, false);

        CHECK(target_new(pid, &target) == 0);
        int r = transact(remote, target, true, &transaction);
        CHECK(r == REMOTE_E_BUSY && interrupted == 0, "%s, %u interrupted", remote_error_name(r), interrupted);
        CHECK(transaction.stop_nsec == 0 && target->stood_nsec == 0);
        r = transact(remote, target, false, &transaction);
        CHECK(interrupted == REMOTE_PARKED_MAX + 1, "who parks nobody may stop more: %s, %u interrupted",
              remote_error_name(r), interrupted);
        end(remote, pid);
}

int main(void) {
        _cleanup_(remote_freep) Remote *remote = NULL;

        test_need_root();
        CHECK(remote_new(&remote) == 0);
        for (unsigned n = 1; n <= 250; n = n == 1 ? 8 : n == 8 ? 64 : n == 64 ? 250 : 251)
                test_stop(remote, n);
        test_too_many(remote);
        test_too_large(remote);
        test_unlisted(remote);
        test_unreaped(remote, 1);
        test_unreaped(remote, 8);
        test_deserted(remote);
        return 0;
}
