/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * System calls made inside a target: one of its threads is stopped once, runs a batch of calls, and goes on as if
 * nothing had happened. What is promised, and how it is kept, stands at the top of remote.c.
 *
 * A batch runs in order and ends at the first call whose result is not as demanded; the rest is not made.
 */
typedef struct RemoteCall {
        long nr;
        uint64_t args[6];
        bool ignore_error;      /* go on whatever it returns */
        bool take;              /* makes a userfaultfd: a copy of it is brought over, the target's own closed at once */
        long ret;               /* as the kernel returned it; -ECANCELED: not made */
        int fd;                 /* what was taken, the caller's to close; -errno */
} RemoteCall;

enum {
        REMOTE_E_GONE = 1,      /* the process, or every thread that could be used, ended */
        REMOTE_E_DENIED,        /* ptrace, or the mapping of the stub, is refused: final for this process */
        REMOTE_E_BUSY,          /* no thread could be stopped in time or in a harmless place: try later */
        REMOTE_E_TRACED,        /* somebody else traces it */
        REMOTE_E_UNFIT,         /* shadow stack, syscall user dispatch, 32-bit code, no gadget: final */
        REMOTE_E_LOST,          /* it was stopped, the batch may have run in part; the target goes on unharmed */
};

/* What reading a target said, for who tells of what was done in it. */
static inline int remote_error_of(int target_error) {
        return target_error == TARGET_E_GONE ? REMOTE_E_GONE
             : target_error == TARGET_E_DENIED ? REMOTE_E_DENIED : target_error;
}

/* As many calls as one stop may hold, whatever the time box says. */
#define REMOTE_BATCH_MAX 1024U

/* A stop is the time a thread stands still for us: from the last moment it was not seen standing yet until it was let
 * go, so an upper bound. */
typedef struct RemoteStats {
        uint64_t stops, calls, failures;
        uint64_t stop_nsec_max;
        uint32_t stop_histogram[64]; /* [i]: stops of [2^(i/2), 2^((i+1)/2)) * 1 µs, half powers of two */
        uint64_t reach_nsec_max;
        uint32_t reach_histogram[64]; /* the same of the time until a thread stood: it ran, or waited for a CPU */
} RemoteStats;

/* One daemon has one Remote: statistics and what is still to be let go (threads that did not stop in time). Must be
 * used by one thread only: ptrace binds to it. */
typedef struct Remote Remote;
int remote_new(Remote **ret);
Remote *remote_free(Remote *remote); /* waits briefly for, then abandons, threads that never stopped */
DEFINE_CLEANUP(Remote, remote_free)

/* Makes the calls in as many stops as keep each within its time box (2 ms at p99). *ret_done, also on failure: calls
 * made. 0: all of them, or up to and with the first that failed (its ret says how); REMOTE_E_*; -errno. */
int remote_call(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done);
/* The same with the first of them, as many as one stop has room for, which is one at least (n > 0). Of the others nothing
 * is said, not even that they were not made. */
int remote_call_some(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done);

/* While this is set, a stop that takes longer than it should, as each does where CPUs are scarce, is made as often as
 * takes a sixteenth of the time, not once in five seconds: for what has to be undone. */
void remote_insist(Remote *remote, bool insist);

/* First contact: proves that calls work here, asks whether the process is dumpable, and unmaps what a daemon that
 * died left behind. TARGET_OK, TARGET_SKIP_NOT_DUMPABLE, … in *ret. *ret_uffd, in the same stop: a userfaultfd of the
 * process's memory, the caller's to close, or -EBADF where none can be had (an old kernel, a security module, no
 * descriptor free), which is no failure; NULL: none is wanted. 0, REMOTE_E_*, -errno. */
int remote_adopt(Remote *remote, Target *target, int *ret_uffd, TargetSkip *ret);

/* Lets go of threads that stopped only after we had given up on them; cheap when there are none. To be called when
 * SIGCHLD arrives and between batches. */
void remote_reap(Remote *remote);
bool remote_has_lingering(const Remote *remote);

void remote_stats(const Remote *remote, RemoteStats *ret);
uint64_t remote_stop_percentile(const RemoteStats *stats, unsigned permille); /* nsec, upper edge of the bin */
uint64_t remote_reach_percentile(const RemoteStats *stats, unsigned permille);
const char *remote_error_name(int error);
