/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <errno.h>
#include <pthread.h>
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
 * Handlers run in between other calls too: waitid(2) may be made in one (signal-safety(7)), and the list of threads is whole
 * at any time.
 */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
#define COLLECT_SIGNAL (SIGRTMIN + 6) /* BOOST_SIGNAL is the one before */
#define COLLECT_NSEC NSEC_PER_MSEC

/* A tracee's stop is told of whatever is asked for, and told once: so it is looked at first. */
static void collect_end(pid_t tid) {
        siginfo_t info = {};

        if (waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) == 0 && info.si_pid == tid &&
            (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED))
                (void)waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | __WALL);
}

static void on_collect_signal(int signo, siginfo_t *info, void *context) {
        const Remote *remote = info->si_value.sival_ptr;
        int saved = errno;

        if (info->si_code != SI_TIMER || !remote)
                return;
        for (const RemoteThread *thread = remote->threads; thread; thread = thread->next)
                if (!thread->dead)
                        collect_end(thread->tid);
        errno = saved;
}

int remote_collect_begin(RemoteCollector *collector, Remote *remote) {
        struct sigaction action = { .sa_sigaction = on_collect_signal, .sa_flags = SA_RESTART | SA_SIGINFO };
        struct sigevent event = {
                .sigev_notify = SIGEV_THREAD_ID,
                .sigev_signo = COLLECT_SIGNAL,
                .sigev_value.sival_ptr = remote,
        };
        const struct itimerspec period = { .it_value.tv_nsec = COLLECT_NSEC, .it_interval.tv_nsec = COLLECT_NSEC };
        sigset_t set;

        *collector = (RemoteCollector){};
        if (!remote_guards(REMOTE_GUARD_COLLECT))
                return 0;
        event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
        if (sigaction(COLLECT_SIGNAL, &action, NULL) < 0 || timer_create(CLOCK_MONOTONIC, &event, &collector->timer) < 0)
                return -errno;
        collector->armed = true;
        sigemptyset(&set);
        sigaddset(&set, COLLECT_SIGNAL);
        pthread_sigmask(SIG_UNBLOCK, &set, &collector->before);
        return timer_settime(collector->timer, 0, &period, NULL) < 0 ? -errno : 0;
}

/* A signal that is on its way has come by the time the mask is back. */
void remote_collect_end(RemoteCollector *collector) {
        if (!collector->armed)
                return;
        timer_delete(collector->timer);
        pthread_sigmask(SIG_SETMASK, &collector->before, NULL);
}
