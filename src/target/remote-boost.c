/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include "base/clock.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/*
 * A thread that is stopped has to get a CPU at each of its five resumes before it stands again, and on a machine whose
 * CPUs are busy each may take as long as everybody else's turn: one call then lasts tens of milliseconds, and the
 * target stands for all of it. So for those moments it is lent our priority, by the kernel's own means for that:
 * priority inheritance. A thread of ours waits under SCHED_FIFO for a priority inheritance futex whose word names the
 * target's thread as the owner; the owner of what a more urgent thread waits for runs as urgently (futex(2)).
 *
 * Why this and not sched_setattr(2) on the target: nothing of the target is changed, neither its policy nor what it or
 * its children can see or inherit; and there is nothing to undo. When our thread ends its waiting the loan ends, and
 * it does so by the kernel's hand when we are killed.
 *
 * What must hold:
 *   - The loan ends before the thread is let go: then it goes on at its own priority. One that runs at ours and never
 *     sleeps could keep our waiting thread, which is no more urgent, from its CPU. Where we die in the middle that is
 *     for the other CPUs to save us from: so with a single CPU nothing is lent.
 *   - It ends without our waiting thread: that one is made an ordinary one, which the kernel passes on to the owner in the
 *     same call (rt_mutex_adjust_pi()). To wait until it has got a CPU itself has taken 100 ms on busy machines, the target
 *     standing. Until it has, the owner is as preferred as it is among ordinary threads: nice -20, which starves nobody.
 *   - The futex is a shared one: a private one of ours cannot have an owner elsewhere (EPERM since 6.18's stable kernels).
 *   - A waiting that a signal interrupts is begun anew by the kernel (-ERESTARTNOINTR), and looks at the word first:
 *     so the handler takes the owner's name away, and the wait succeeds.
 * Whoever may not use SCHED_FIFO (CAP_SYS_NICE, RLIMIT_RTPRIO) lends nothing, and stops take longer.
 */
#define BOOST_SIGNAL (SIGRTMIN + 5)
#define BEGIN_WAIT_NSEC NSEC_PER_MSEC
#define END_WAIT_NSEC (100 * NSEC_PER_MSEC) /* where it cannot be made an ordinary one */

struct RemoteBoost {
        pthread_t thread;
        _Atomic pid_t tid;      /* of it; 0: it has not begun yet */
        pid_t pid;              /* whose thread it is: a fork has none */
        _Atomic uint32_t *owner; /* the futex: a page of its own, shared */
        _Atomic uint32_t asked; /* a futex: counts what was asked for */
        _Atomic uint32_t done;  /* how much of that is over */
        _Atomic bool stop;
};

static void on_boost_signal(int signo, siginfo_t *info, void *context) {
        _Atomic uint32_t *owner = info->si_value.sival_ptr;

        if (info->si_code == SI_QUEUE && owner)
                atomic_store(owner, 0);
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value) {
        return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void *lend(void *arg) {
        RemoteBoost *boost = arg;
        sigset_t set;

        sigfillset(&set);
        sigdelset(&set, BOOST_SIGNAL);
        pthread_sigmask(SIG_SETMASK, &set, NULL);
        (void)setpriority(PRIO_PROCESS, 0, -20); /* of this thread, for the end of a waiting */
        atomic_store(&boost->tid, (pid_t)syscall(SYS_gettid));
        for (uint32_t seen = 0; !boost->stop;) {
                if (boost->asked == seen) {
                        (void)futex(&boost->asked, FUTEX_WAIT_PRIVATE, seen);
                        continue;
                }
                seen = boost->asked;
                if (!boost->stop && futex(boost->owner, FUTEX_LOCK_PI, 0) == 0)
                        (void)futex(boost->owner, FUTEX_UNLOCK_PI, 0);
                atomic_store(boost->owner, 0);
                atomic_store(&boost->done, seen);
        }
        return NULL;
}

static bool set_urgent(const RemoteBoost *boost, bool urgent) {
        const struct sched_param param = { .sched_priority = urgent ? REMOTE_BOOST_PRIORITY : 0 };

        return boost->tid > 0 && sched_setscheduler(boost->tid, urgent ? SCHED_FIFO : SCHED_OTHER, &param) == 0;
}

/* Ends the waiting that is under way, or about to begin. */
static void interrupt_lender(const RemoteBoost *boost) {
        (void)pthread_sigqueue(boost->thread, BOOST_SIGNAL, (union sigval){ .sival_ptr = (void *)boost->owner });
}

static RemoteBoost *boost_destroy(RemoteBoost *boost) {
        if (boost->owner)
                munmap((void *)boost->owner, PAGE_BYTES);
        free(boost);
        return NULL;
}

static int boost_start(RemoteBoost *boost) {
        const struct sched_param urgent = { .sched_priority = REMOTE_BOOST_PRIORITY };
        struct sigaction action = { .sa_sigaction = on_boost_signal, .sa_flags = SA_RESTART | SA_SIGINFO };
        sigset_t all, before;
        pthread_attr_t attributes;
        void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int r;

        if (page == MAP_FAILED)
                return -errno;
        boost->owner = page;
        if (sigaction(BOOST_SIGNAL, &action, NULL) < 0)
                return -errno;
        pthread_attr_init(&attributes);
        pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
        pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
        pthread_attr_setschedparam(&attributes, &urgent);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: signals are the main thread's */
        r = pthread_create(&boost->thread, &attributes, lend, boost);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        if (r != 0)
                return -r;
        (void)pthread_setname_np(boost->thread, "boost");
        for (uint64_t until = now_nsec() + BEGIN_WAIT_NSEC; boost->tid == 0 && now_nsec() < until;)
                remote_nap(5 * NSEC_PER_USEC);
        return 0;
}

static RemoteBoost *boost_of(Remote *remote) {
        if (remote->boost && remote->boost->pid == getpid())
                return remote->boost;
        RemoteBoost *boost = calloc(1, sizeof *boost); /* that of before a fork is the parent's */
        if (!boost)
                return NULL;
        boost->pid = getpid();
        remote->boost_refused = boost_start(boost) < 0;
        return remote->boost = remote->boost_refused ? boost_destroy(boost) : boost;
}

bool remote_boost_works(Remote *remote) {
        return !remote->boost_refused && remote->n_cpus > 1 && boost_of(remote);
}

void remote_boost_begin(Remote *remote, pid_t tid) {
        if (!remote_cpus_are_contended(remote, 1) || !remote_boost_works(remote))
                return;
        RemoteBoost *boost = remote->boost;
        if (boost->done != boost->asked || !set_urgent(boost, true))
                return;
        uint64_t until = now_nsec() + BEGIN_WAIT_NSEC;
        atomic_store(boost->owner, (uint32_t)tid);
        atomic_fetch_add(&boost->asked, 1);
        (void)futex(&boost->asked, FUTEX_WAKE_PRIVATE, 1);
        remote->boosted = true;
        /* The kernel notes in the word that somebody waits, right before it lends. */
        while (!(*boost->owner & FUTEX_WAITERS) && boost->done != boost->asked && now_nsec() < until)
                remote_nap(5 * NSEC_PER_USEC);
}

void remote_boost_end(Remote *remote) {
        const RemoteBoost *boost = remote->boost;

        if (!remote->boosted)
                return;
        remote->boosted = false;
        if (boost->done == boost->asked)
                return;
        bool over = set_urgent(boost, false);
        interrupt_lender(boost);
        if (over)
                return;
        uint64_t until = now_nsec() + END_WAIT_NSEC;
        while (boost->done != boost->asked && now_nsec() < until)
                remote_nap(5 * NSEC_PER_USEC);
}

RemoteBoost *remote_boost_free(RemoteBoost *boost) {
        if (!boost || boost->pid != getpid())
                return NULL; /* a parent's page and thread are not ours to end */
        boost->stop = true;
        atomic_fetch_add(&boost->asked, 1);
        (void)futex(&boost->asked, FUTEX_WAKE_PRIVATE, 1);
        interrupt_lender(boost);
        pthread_join(boost->thread, NULL);
        return boost_destroy(boost);
}
