/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <errno.h>
#include <pthread.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * PTRACE_SEIZE sleeps while a thread of the process executes a program (cred_guard_mutex). That one kills all the others
 * and waits until they are gone (de_thread()), and those that are ours already are gone only when we have collected
 * their ends: both would sleep for ever. No look beforehand helps, for it may begin at any moment, and no signal ends
 * that sleep: the kernel begins the call anew (-ERESTARTNOINTR). But it runs the handler before, so a timer of this
 * thread interrupts us meanwhile, and its handler collects whoever has ended. He is found to be dead later, for
 * nobody is left to wait for.
 *
 * Others keep it asleep for as long as they like: to execute is also to read the file, and who answers for its file system,
 * or for a permission event (fanotify(7)), may never do. So after some periods the handler has the call that is about to
 * begin anew fail instead.
 *
 * Handlers run in between other calls too: waitid(2) may be made in one (signal-safety(7)), and the list of threads is whole
 * at any time.
 */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
#define COLLECT_SIGNAL (SIGRTMIN + 6) /* BOOST_SIGNAL is the one before */
#define COLLECT_NSEC NSEC_PER_MSEC
#define COLLECT_PERIODS 20U

/* A tracee's stop is told of whatever is asked for, and told once: so it is looked at first. */
static void collect_one(pid_t tid) {
        siginfo_t info = {};

        if (waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) == 0 && info.si_pid == tid &&
            (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED))
                (void)waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | __WALL);
}

static void on_collect_signal(int signo, siginfo_t *info, void *context) {
        Remote *remote = info->si_value.sival_ptr;
        int saved = errno;

        if (info->si_code != SI_TIMER || !remote)
                return;
        for (const RemoteThread *thread = remote->threads; thread; thread = thread->next)
                if (!thread->dead)
                        collect_one(thread->tid);
        if (++remote->collector.periods > COLLECT_PERIODS)
                (void)remote_arch_skip_call(context, SYS_ptrace, PTRACE_SEIZE, -EAGAIN);
        errno = saved;
}

static int set_period(const RemoteCollector *collector, long nsec) {
        const struct itimerspec period = { .it_value.tv_nsec = nsec, .it_interval.tv_nsec = nsec };

        return timer_settime(collector->timer, 0, &period, NULL) < 0 ? -errno : 0;
}

static int make_timer(Remote *remote) {
        struct sigaction action = { .sa_sigaction = on_collect_signal, .sa_flags = SA_RESTART | SA_SIGINFO };
        struct sigevent event = {
                .sigev_notify = SIGEV_THREAD_ID,
                .sigev_signo = COLLECT_SIGNAL,
                .sigev_value.sival_ptr = remote,
        };
        RemoteCollector *collector = &remote->collector;

        if (collector->pid == getpid())
                return 0; /* that of before a fork is the parent's */
        event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
        if (sigaction(COLLECT_SIGNAL, &action, NULL) < 0 || timer_create(CLOCK_MONOTONIC, &event, &collector->timer) < 0)
                return -errno;
        collector->pid = getpid();
        return 0;
}

static int collect_begin(Remote *remote) {
        RemoteCollector *collector = &remote->collector;
        sigset_t set;
        int r;

        if (!remote_guards(REMOTE_GUARD_COLLECT))
                return 0;
        r = make_timer(remote);
        if (r < 0)
                return r;
        collector->periods = 0;
        sigemptyset(&set);
        sigaddset(&set, COLLECT_SIGNAL);
        pthread_sigmask(SIG_UNBLOCK, &set, &collector->before);
        collector->armed = true;
        return set_period(collector, COLLECT_NSEC);
}

/* A signal that is on its way has come by the time the mask is back. */
static void collect_end(Remote *remote) {
        RemoteCollector *collector = &remote->collector;

        if (!collector->armed)
                return;
        (void)set_period(collector, 0);
        pthread_sigmask(SIG_SETMASK, &collector->before, NULL);
        collector->armed = false;
}

int remote_collect_seize(Remote *remote, pid_t tid, unsigned long options) {
        int r = collect_begin(remote);
        if (r == 0 && ptrace(PTRACE_SEIZE, tid, 0, options) < 0)
                r = -errno;
        collect_end(remote);
        return r;
}

void remote_collect_done(Remote *remote) {
        if (remote->collector.pid == getpid())
                timer_delete(remote->collector.timer);
        remote->collector = (RemoteCollector){};
}
