/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * target/remote-boost: a thread of another process runs at our urgency for as long as we wait for a priority inheritance
 * futex that names it as the owner, and no longer: neither when we are not urgent any more, nor when we are killed. Nothing
 * of it is changed but where the scheduler puts it, and its children inherit nothing.
 */
#include "target/remote-internal.h"
#include "test.h"

#include "base/io.h"

#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define NORMAL 20
#define URGENT (-1 - REMOTE_BOOST_PRIORITY)

static struct Shared {
        volatile bool fork_now;
        volatile pid_t child;
} *shared;

/* The priority the scheduler goes by (proc_pid_stat(5), field 18). */
static long priority(pid_t pid) {
        _cleanup_free_ char *text = NULL;
        char path[64];
        long value;

        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0, "%s", path);
        CHECK(sscanf(strrchr(text, ')'), ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %ld", &value) == 1);
        return value;
}

static pid_t start(void (*run)(void)) {
        pid_t pid = fork();

        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                run();
                _exit(0);
        }
        return pid;
}

static void end(pid_t pid) {
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

static void sleep_and_fork(void) {
        for (;; usleep(500))
                if (shared->fork_now) {
                        shared->fork_now = false;
                        shared->child = start((void (*)(void))pause);
                }
}

static void spin(void) {
        CHECK(nice(19) == 19);
        for (;;)
                ;
}

static void await(pid_t pid, long expected, const char *when) {
        uint64_t until = now_nsec() + 20 * NSEC_PER_SEC;

        while (priority(pid) != expected) {
                CHECK(now_nsec() < until, "%s: priority %ld, not %ld", when, priority(pid), expected);
                usleep(1000);
        }
}

static void test_lends(Remote *remote, pid_t target) {
        struct sched_param param;

        await(target, NORMAL, "at first");
        remote_boost_begin(remote, target);
        CHECK(remote->boosted && !remote->boost_refused);
        await(target, URGENT, "lent");
        CHECK(sched_getscheduler(target) == SCHED_OTHER && sched_getparam(target, &param) == 0 &&
              param.sched_priority == 0, "its policy was changed");
        shared->child = 0;
        shared->fork_now = true;
        while (shared->child == 0)
                usleep(1000);
        CHECK(priority(target) == URGENT && priority(shared->child) == NORMAL, "a child inherited it");
        remote_boost_end(remote);
        CHECK(priority(target) != URGENT, "it was not taken back");
        await(target, NORMAL, "taken back");
        kill(shared->child, SIGKILL);
}

static Remote *lender;
static pid_t lent_to;
static void lend_for_ever(void) {
        remote_boost_begin(lender, lent_to);
        for (;;)
                pause();
}

static void test_ends_with_us(Remote *remote, pid_t target) {
        lender = remote;
        lent_to = target;
        for (int i = 0; i < 20; i++) {
                pid_t pid = start(lend_for_ever);

                await(target, URGENT, "lent by another");
                end(pid);
                await(target, NORMAL, "killed");
        }
}

/* In quick succession, and to those that end meanwhile. */
static void test_again_and_again(Remote *remote, pid_t target) {
        for (int i = 0; i < 200; i++) {
                pid_t other = i % 4 == 0 ? start(sleep_and_fork) : target;

                remote_boost_begin(remote, other);
                if (i % 8 == 0)
                        end(other);
                remote_boost_end(remote);
                CHECK(!remote->boosted && (i % 8 == 0 || priority(other) != URGENT), "round %d", i);
                if (i % 8 != 0)
                        await(other, NORMAL, "taken back again");
                if (other != target && i % 8 != 0)
                        end(other);
        }
        remote_boost_begin(remote, target);
        await(target, URGENT, "lent in the end");
        remote_boost_end(remote);
        CHECK(priority(target) != URGENT);
        await(target, NORMAL, "in the end");
}

int main(void) {
        long cpus = sysconf(_SC_NPROCESSORS_ONLN);
        pid_t hogs[64], target;
        _cleanup_(remote_freep) Remote *remote = NULL;

        test_need_root();
        if (cpus < 2)
                TEST_SKIP("one CPU: nothing is lent");
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED && remote_new(&remote) == 0);
        target = start(sleep_and_fork);
        remote_boost_begin(remote, target);
        if (!remote->boosted)
                printf("idle CPUs: nothing is lent\n");
        remote_boost_end(remote);
        cpus = MIN_OF(cpus + 1, (long)ELEMENTSOF(hogs));
        for (long i = 0; i < cpus; i++)
                hogs[i] = start(spin);
        usleep(20000);
        remote_boost_begin(remote, target);
        remote_boost_end(remote);
        if (remote->boost_refused)
                TEST_SKIP("SCHED_FIFO is not allowed here");
        test_lends(remote, target);
        test_ends_with_us(remote, target);
        test_again_and_again(remote, target);
        for (long i = 0; i < cpus; i++)
                end(hogs[i]);
        end(target);
        return 0;
}
