/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/*
 * Which thread of a target to stop. Stopping wakes a sleeping thread out of its system call as a signal would, only
 * that no handler runs. Most calls are then restarted by the kernel and nobody notices; some return -EINTR, which
 * is repaired; and some return part of what was asked for (a long write, io_uring_enter that had submitted already),
 * which nobody can take back. So we look first (/proc/PID/task/TID/syscall tells call, arguments and stack pointer of a
 * thread that is blocked, and "running" of one that is not), and stop one where it cannot matter. For a thread that
 * was running a small chance remains that it enters such a call before the interrupt reaches it.
 */
#define LOOK_AT_MAX 64U
#define SIGNALS_BLOCKABLE 0xfffffffffffbfeffU /* all but SIGKILL and SIGSTOP */

typedef struct SleepRule {
        long nr;
        RemoteSleep sleep;
        bool repeatable;        /* returns -EINTR only with nothing done */
        struct {
                int8_t arg;     /* that must not hold flags; 0: none (arguments count from 1) */
                uint64_t flags;
        } not[2];
} SleepRule;
#define MORE_THAN_ONE (~(uint64_t)1)

/* EXACT: no timeout, or one the kernel goes on with (a restart block, or the remaining time written back: where it cannot
 * be, into a constant or by a personality of STICKY_TIMEOUTS, poll_select_finish() says EINTR). */
static const SleepRule sleep_rules[] = {
        { SYS_restart_syscall, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_futex, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_nanosleep, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_clock_nanosleep, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_ppoll, REMOTE_SLEEP_EXACT, true, {} },
        { SYS_pselect6, REMOTE_SLEEP_EXACT, true, {} },
#ifdef SYS_poll
        { SYS_poll, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_select, REMOTE_SLEEP_EXACT, true, {} },
        { SYS_pause, REMOTE_SLEEP_EXACT, false, {} },
#endif
        { SYS_rt_sigsuspend, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_read, REMOTE_SLEEP_EXACT, true, {} }, /* of a socket with SO_RCVTIMEO; others are restarted */
        { SYS_wait4, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_waitid, REMOTE_SLEEP_EXACT, false, {} },
        { SYS_accept, REMOTE_SLEEP_EXACT, true, {} },
        { SYS_accept4, REMOTE_SLEEP_EXACT, true, {} },
        { SYS_recvfrom, REMOTE_SLEEP_AGAIN, true, { { 4, MSG_WAITALL } } },
        { SYS_recvmsg, REMOTE_SLEEP_AGAIN, true, { { 3, MSG_WAITALL } } },
        { SYS_msgrcv, REMOTE_SLEEP_EXACT, false, {} },
#ifdef SYS_epoll_wait
        { SYS_epoll_wait, REMOTE_SLEEP_AGAIN, true, {} },
#endif
        { SYS_epoll_pwait, REMOTE_SLEEP_AGAIN, true, {} },
#ifdef SYS_epoll_pwait2
        { SYS_epoll_pwait2, REMOTE_SLEEP_AGAIN, true, {} },
#endif
        { SYS_rt_sigtimedwait, REMOTE_SLEEP_AGAIN, true, {} },
        { SYS_semop, REMOTE_SLEEP_AGAIN, true, {} },
        { SYS_semtimedop, REMOTE_SLEEP_AGAIN, true, {} },
        { SYS_mq_timedreceive, REMOTE_SLEEP_AGAIN, true, {} },
        { SYS_io_getevents, REMOTE_SLEEP_AGAIN, true, { { 2, MORE_THAN_ONE } } }, /* of more than one it may return some */
        { SYS_io_uring_enter, REMOTE_SLEEP_AGAIN, true, { { 2, UINT64_MAX }, { 3, MORE_THAN_ONE } } }, /* only waits; for one */
};

int remote_tasks_open(const Target *target, DIR **ret) {
        int r = open_directory(target->procfd, "task", ret);

        return r == -ENOENT || r == -ESRCH ? REMOTE_E_GONE : r;
}

#ifdef REMOTE_TEST
pid_t remote_test_unlisted;
#define is_listed(tid) ((tid) != remote_test_unlisted)
#else
#define is_listed(tid) true
#endif

pid_t remote_tasks_next(DIR *tasks) {
        for (const struct dirent *entry; (entry = readdir(tasks));) {
                pid_t tid = dirent_pid(entry);

                if (tid > 0 && is_listed(tid))
                        return tid;
        }
        return 0;
}

/* proc_task_getattr() adds them to a directory's two links. */
size_t remote_tasks_count(DIR *tasks) {
        struct stat st;

        return fstat(dirfd(tasks), &st) == 0 && st.st_nlink > 2 ? st.st_nlink - 2 : 0;
}

static const SleepRule *find_rule(long nr) {
        for (size_t i = 0; i < ELEMENTSOF(sleep_rules); i++)
                if (sleep_rules[i].nr == nr)
                        return &sleep_rules[i];
        return NULL;
}

RemoteSleep remote_sleep_class(long nr, const uint64_t args[6]) {
        if (nr == -1)
                return REMOTE_SLEEP_NONE;
        const SleepRule *rule = find_rule(nr);
        if (!rule)
                return REMOTE_SLEEP_REFUSE;
        for (size_t i = 0; i < ELEMENTSOF(rule->not) && rule->not[i].arg; i++)
                if (args[rule->not[i].arg - 1] & rule->not[i].flags)
                        return REMOTE_SLEEP_REFUSE;
#ifdef SYS_epoll_wait
        if (nr == SYS_epoll_wait && (int)args[3] == -1)
                return REMOTE_SLEEP_EXACT;
#endif
        if (nr == SYS_epoll_pwait && (int)args[3] == -1)
                return REMOTE_SLEEP_EXACT;
        return rule->sleep;
}

bool remote_sleep_repeatable(long nr) {
        const SleepRule *rule = find_rule(nr);
        return rule && rule->repeatable;
}

int remote_thread_status(const Target *target, pid_t tid, RemoteThreadStatus *ret) {
        char path[64];
        _cleanup_free_ char *text = NULL;
        snprintf(path, sizeof path, "task/%d/status", tid);
        int r = read_file(target->procfd, path, &text, NULL);
        if (r < 0)
                return r == -ENOENT || r == -ESRCH ? REMOTE_E_GONE : r;
        RemoteThreadStatus status = { .seccomp = -1 };
        const char *p;
        if ((p = strstr(text, "\nState:\t")))
                status.state = p[8];
        if ((p = strstr(text, "\nTracerPid:\t")))
                status.tracer = atoi(p + 12);
        if ((p = strstr(text, "\nSeccomp:\t")))
                status.seccomp = atoi(p + 10);
        if ((p = strstr(text, "\nx86_Thread_features:\t")))
                status.shadow_stack = memmem(p, strcspn(p + 1, "\n") + 1, "shstk", 5);
        if ((p = strstr(text, "\nSigBlk:\t")))
                status.blocks_all = strtoull(p + 9, NULL, 16) == SIGNALS_BLOCKABLE;
        *ret = status;
        return 0;
}

/* What one thread is doing: as the file says. */
typedef struct Activity {
        bool running;
        long nr;                /* -1: blocked, but not in a call */
        uint64_t args[6], sp, pc;
} Activity;

/* REMOTE_E_GONE, -errno: it cannot be looked at. */
static int look_at(const Target *target, pid_t tid, Activity *ret) {
        char path[64], text[256];
        snprintf(path, sizeof path, "task/%d/syscall", tid);
        _cleanup_close_ int fd = openat(target->procfd, path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : -1;
        if (n < 0)
                return errno == ENOENT || errno == ESRCH ? REMOTE_E_GONE : -errno;
        text[n] = '\0';
        Activity a = {.running = strncmp(text, "running", 7) == 0};
        if (!a.running &&
            sscanf(text, "%ld %lx %lx %lx %lx %lx %lx %lx %lx", &a.nr, &a.args[0], &a.args[1], &a.args[2], &a.args[3],
                   &a.args[4], &a.args[5], &a.sp, &a.pc) != 9 &&
            (sscanf(text, "%ld %lx %lx", &a.nr, &a.sp, &a.pc) != 3 || a.nr != -1))
                return -EBADMSG;
        *ret = a;
        return 0;
}

static RemoteSleep judge(const Target *target, const RemoteMaps *maps, pid_t tid) {
        Activity a;
        if (look_at(target, tid, &a) != 0)
                return REMOTE_SLEEP_REFUSE;
        if (a.running)
                return REMOTE_SLEEP_NONE;
        /* A stack that cannot be one of the C library's is known from here; the thread pointer only once it stands. */
        RemoteMap map;
        if (!remote_maps_find(maps, a.sp - 1, &map) || !map.write || map.inode ||
            (map.main_stack && tid != target->pid) || remote_region_has(a.pc))
                return REMOTE_SLEEP_REFUSE;
        return remote_sleep_class(a.nr, a.args);
}

bool remote_must_sleep_on(const Target *target, pid_t tid) {
        Activity a;
        int r = look_at(target, tid, &a);
        return r < 0 || (r == 0 && !a.running && remote_sleep_class(a.nr, a.args) == REMOTE_SLEEP_REFUSE);
}

/* io_uring's workers and vhost's: threads of the process that never return to user mode (PF_IO_WORKER, PF_USER_WORKER
 * of include/linux/sched.h; field 9 of stat). */
bool remote_is_worker(const Target *target, pid_t tid) {
        char path[64];
        _cleanup_free_ char *text = NULL;
        unsigned flags;
        snprintf(path, sizeof path, "task/%d/stat", tid);
        if (read_file(target->procfd, path, &text, NULL) < 0)
                return false;
        const char *p = strrchr(text, ')');
        return p && sscanf(p + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & (0x10 | 0x4000));
}

bool remote_nobody_inside(const Target *target) {
        _cleanup_closedir_ DIR *tasks = NULL;
        if (remote_tasks_open(target, &tasks) != 0)
                return false;
        size_t threads = 0, elsewhere = 0;
        for (pid_t tid; (tid = remote_tasks_next(tasks)) > 0; threads++) {
                Activity a;
                elsewhere += look_at(target, tid, &a) == 0 && !a.running && !remote_region_has(a.pc);
        }
        return threads == remote_tasks_count(tasks) && (threads == 1 || elsewhere == threads);
}

bool remote_anybody_leaves(const Target *target) {
        _cleanup_closedir_ DIR *tasks = NULL;
        if (remote_tasks_open(target, &tasks) != 0)
                return true;
        size_t alive = 0;
        for (pid_t tid; (tid = remote_tasks_next(tasks)) > 0;) {
                RemoteThreadStatus status;
                int r = remote_thread_status(target, tid, &status);
                if (r < 0 || (r == 0 && status.blocks_all && status.state != 'S'))
                        return true;
                alive += r == 0;
        }
        return alive != remote_tasks_count(tasks);
}

static bool is_better(const RemoteCandidate *a, const RemoteCandidate *b) {
        return a->confined != b->confined ? b->confined : a->sleep < b->sleep;
}

static void insert(RemoteCandidate *list, size_t *n, RemoteCandidate candidate) {
        size_t at = *n;
        while (at > 0 && is_better(&candidate, &list[at - 1]))
                at--;
        if (at >= REMOTE_CANDIDATES)
                return;
        size_t end = MIN_OF(*n, (size_t)REMOTE_CANDIDATES - 1);
        memmove(list + at + 1, list + at, (end - at) * sizeof *list);
        list[at] = candidate;
        *n = end + 1;
}

static bool is_unfit(const RemoteUnfit *unfit, pid_t tid) {
        for (size_t i = 0; i < unfit->n; i++)
                if (unfit->tids[i] == tid)
                        return true;
        return false;
}

/* What confines it is asked only once somebody was unfit: it costs as much as all the rest. */
static RemoteCandidate consider(const Target *target, const RemoteMaps *maps, const RemoteUnfit *unfit, pid_t tid) {
        RemoteCandidate candidate = { tid, REMOTE_SLEEP_REFUSE, false };
        RemoteThreadStatus status;
        if (is_unfit(unfit, tid))
                return candidate;
        if (unfit->n > 0) {
                if (remote_thread_status(target, tid, &status) != 0 || !remote_status_is_fit(&status))
                        return candidate;
                candidate.confined = status.seccomp > 0;
        }
        candidate.sleep = judge(target, maps, tid);
        return candidate;
}

static bool is_best(const RemoteCandidate *candidate) {
        return candidate->sleep == REMOTE_SLEEP_EXACT && !candidate->confined;
}

int remote_choose(const Target *target, const RemoteMaps *maps, const RemoteUnfit *unfit,
                  RemoteCandidate ret[static REMOTE_CANDIDATES], size_t *ret_n) {
        size_t n = 0;
        RemoteCandidate leader = consider(target, maps, unfit, target->pid);
        if (leader.sleep != REMOTE_SLEEP_REFUSE)
                insert(ret, &n, leader);
        if (!is_best(&leader)) {
                _cleanup_closedir_ DIR *tasks = NULL;
                int r = remote_tasks_open(target, &tasks);
                if (r != 0)
                        return r;
                size_t looked = 0;
                for (pid_t tid; looked < LOOK_AT_MAX && (tid = remote_tasks_next(tasks)) > 0;) {
                        if (tid == target->pid || is_unfit(unfit, tid))
                                continue;
                        looked++;
                        RemoteCandidate candidate = consider(target, maps, unfit, tid);
                        if (candidate.sleep != REMOTE_SLEEP_REFUSE)
                                insert(ret, &n, candidate);
                        if (n > 0 && is_best(&ret[0]))
                                break;
                }
        }
        *ret_n = n;
        return 0;
}

bool remote_others_may_be_fit(const Target *target, const RemoteUnfit *unfit) {
        _cleanup_closedir_ DIR *tasks = NULL;
        if (remote_tasks_open(target, &tasks) != 0)
                return false;
        for (pid_t tid; (tid = remote_tasks_next(tasks)) > 0;) {
                RemoteThreadStatus status;
                if (!is_unfit(unfit, tid) && !remote_is_worker(target, tid) &&
                    remote_thread_status(target, tid, &status) == 0 && status.seccomp <= 0 && remote_status_is_fit(&status))
                        return true;
        }
        return false;
}
