/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/remote-arch.h"
#include "target/remote-map.h"
#include "target/remote-program.h"
#include "target/remote.h"

#include <dirent.h>
#include <signal.h>
#include <time.h>

/*
 * Shared by the files of the remote call: remote.c (the interface, batches, the time box), remote-choose.c (which
 * thread), remote-thread.c (stop it, let it go, wait), remote-collect.c (who dies meanwhile), remote-filter.c (what its
 * seccomp filters say), remote-inject.c (run calls in it and take them back), remote-visit.c (what is prepared before),
 * remote-crowd.c (all threads), remote-park.c (kept waiting even if we die), remote-program.c and remote-transact.c
 * (transactions), remote-take.c (a descriptor that one of them made), remote-map.c (its mappings and the two snippets
 * of its own code we borrow), remote-<arch>.c (registers, frame, stub).
 */

int remote_code_find(const Target *target, int memfd, RemoteCode *ret); /* REMOTE_E_GONE, _DENIED, _UNFIT, -errno */
bool remote_code_verify(int memfd, const RemoteCode *code);

/* The first address the stack pointer may be lowered to for a thread whose registers say this: only where the kernel
 * itself would put a signal frame, and nothing else lives. 0: not a stack that can be recognised. */
uint64_t remote_stack_floor(int memfd, const RemoteMaps *maps, bool leader, uint64_t sp, uint64_t thread_pointer);

/* Everything that can be prepared before a thread stands. */
typedef struct RemoteVisit {
        Target *target;
        int memfd;
        RemoteMaps maps;
        RemoteCode code;
        uint64_t region;
        RemoteCall leftovers[2 * REMOTE_REGION_SLOTS];
        size_t n_leftovers;
} RemoteVisit;

int remote_visit_prepare(Target *target, RemoteVisit *visit); /* REMOTE_E_*, -errno */
void remote_visit_done(RemoteVisit *visit);
/* What is left over, once a thread stands: until then a deserted stub may have gone home, and closed what it held. */
void remote_visit_look_again(RemoteVisit *visit);
/* Whether a thread, as it stands, is in a place where our calls can do no harm: 0, REMOTE_E_*, -errno. Also makes the
 * kernel restart the call that we interrupted. *ret_floor: how far down its stack may be used. */
typedef struct RemoteThread RemoteThread;
int remote_visit_check(RemoteThread *thread, const RemoteVisit *visit, uint64_t *ret_floor);
bool remote_lingers_inside(const Remote *remote, const Target *target);
/* A stop took too long. */
void remote_note_slow(Remote *remote, uint64_t stood_nsec, uint64_t detached_nsec);
/* There were few of these of late. */
bool remote_may_be_slow(const Remote *remote);
/* More threads want to run than so many for each CPU. */
bool remote_cpus_are_contended(const Remote *remote, unsigned threads);
/* So many: one that runs will have to wait once it stood. */
#define REMOTE_CONTENDED_THREADS 4U

/* sched_setattr(2), first version: linux/sched/types.h and sched.h cannot be included together. */
typedef struct SchedAttr {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
} SchedAttr;
_Static_assert(sizeof(SchedAttr) == 48, "SCHED_ATTR_SIZE_VER0");

typedef struct RemoteHaste {
        SchedAttr before;
        long slack_nsec;
        bool scheduled;
        Remote *boosting;       /* what was lent for it is taken back at the end; NULL: nothing is lent */
} RemoteHaste;
void remote_haste_begin(RemoteHaste *haste);
void remote_haste_end(RemoteHaste *haste);

/* remote-boost.c: lends our urgency to a thread that is to be stopped, until it is let go. Where that is not to be had,
 * or the CPUs are idle and it would gain nothing, nothing happens. */
#define REMOTE_BOOST_PRIORITY 1
typedef struct RemoteBoost RemoteBoost;
void remote_boost_begin(Remote *remote, pid_t tid);
void remote_boost_end(Remote *remote);
bool remote_boost_works(Remote *remote);
RemoteBoost *remote_boost_free(RemoteBoost *boost);

/* How harmless it is to wake a thread out of a system call. */
typedef enum RemoteSleep {
        REMOTE_SLEEP_EXACT,     /* the kernel restarts it with what is left of its timeout */
        REMOTE_SLEEP_AGAIN,     /* can be repeated; a timeout starts over */
        REMOTE_SLEEP_NONE,      /* not asleep: running, or about to */
        REMOTE_SLEEP_REFUSE,    /* may return a part, or must not be repeated */
} RemoteSleep;
RemoteSleep remote_sleep_class(long nr, const uint64_t args[6]);
/* -EINTR out of this call means that nothing happened: it may be made again. */
bool remote_sleep_repeatable(long nr);

typedef struct RemoteCandidate {
        pid_t tid;
        RemoteSleep sleep;
        bool confined;          /* only looked at once others were unfit */
} RemoteCandidate;

#define REMOTE_CANDIDATES 4U
/* Threads that were asked, and are unfit: what one is, others need not be. */
#define REMOTE_UNFIT_MAX 16U
typedef struct RemoteUnfit {
        pid_t tids[REMOTE_UNFIT_MAX];
        size_t n;
} RemoteUnfit;
/* The best threads to stop, best first, and none of those; where there are any, first whom no filter confines. *ret_n may be 0.
 * REMOTE_E_GONE, -errno. */
int remote_choose(const Target *target, const RemoteMaps *maps, const RemoteUnfit *unfit,
                  RemoteCandidate ret[static REMOTE_CANDIDATES], size_t *ret_n);
/* Somebody who was not asked, for he sleeps on, may be fit. */
bool remote_others_may_be_fit(const Target *target, const RemoteUnfit *unfit);

/* No thread but the one that is about to be stopped (and is looked at then) can be executing in a region of ours:
 * it is the only one, or all are asleep elsewhere. */
bool remote_nobody_inside(const Target *target);
/* A thread may have said that it is home and not be there yet: until rt_sigreturn(2) has read its frame, which lies in the
 * region, it blocks all signals. True also if that cannot be told. */
bool remote_anybody_leaves(const Target *target);

/* Opens /proc/PID/task: REMOTE_E_GONE, -errno. */
int remote_tasks_open(const Target *target, DIR **ret);
pid_t remote_tasks_next(DIR *tasks); /* 0: no more */
/* How many threads there are at this moment. Who ends while they are listed may have the kernel leave others out. */
size_t remote_tasks_count(DIR *tasks);
/* It sleeps in a call that must not be interrupted, or cannot be looked at. One that ended does neither. */
bool remote_must_sleep_on(const Target *target, pid_t tid);
bool remote_is_worker(const Target *target, pid_t tid); /* one of the kernel's own threads in the process */

typedef struct RemoteThreadStatus {
        char state;
        pid_t tracer;
        int seccomp;            /* -1: the kernel has none */
        bool shadow_stack;
        bool blocks_all;        /* all signals that can be: as a thread in a region of ours does */
} RemoteThreadStatus;
int remote_thread_status(const Target *target, pid_t tid, RemoteThreadStatus *ret); /* REMOTE_E_GONE, -errno */
bool remote_status_is_fit(const RemoteThreadStatus *status); /* neither a shadow stack nor strict mode */

/* How far a thread has been taken: what has to be undone. */
typedef enum RemoteStage {
        REMOTE_STAGE_SEIZED,    /* nothing of it was changed */
        REMOTE_STAGE_INSIDE,    /* registers and mask are ours, the frame below its stack undoes them */
        REMOTE_STAGE_PARKED,    /* the same, but its frame lies in the region of the thread that runs a program */
} RemoteStage;

/* A thread that is ours to let go. Only remote_thread_free() ends it, and that restores and detaches, or keeps it among
 * the lingering ones until that is possible. */
struct RemoteThread {
        Remote *remote;
        RemoteThread *next, **link; /* among all that are ours, and what points to it there */
        bool lingers;           /* it is let go as soon as it stops */
        pid_t pid, tid;
        int memfd;              /* /proc/PID/mem of the mm it had when chosen; owned */
        RemoteStage stage;
        bool stopped, dead;
        bool executed;          /* another program than it was chosen in: there is nothing in it for us but to let it go */
        bool seccomp;           /* it has a filter that may not let it clean up when nobody traces it */
        size_t n_filters;       /* that were read */
        int inject;             /* a signal it had taken already when it stopped: goes back with the next resume */
        uint64_t interrupted_nsec; /* of the last interrupt that made it stand in place; 0: none did */
        uint64_t stopped_nsec;  /* when it was last not seen standing: it stands since then or later */
        RemoteCode code;
        RemoteRegs regs;        /* as found */
        uint64_t mask;
        bool masked;            /* all signals are blocked */
        bool program;           /* what was sent into it is a program */
        uint64_t cookie;        /* in a register while they are ours */
        uint64_t frame;         /* address of the sigreturn address that precedes the frame */
        uint64_t region;        /* our mapping; 0: none, as far as we know */
        uint64_t region_bytes;  /* with the frames of parked threads */
        uint64_t wanted;        /* where it is being mapped */
        bool deserted;          /* parked: the program runs on without us, and it is to wait for that */
        bool leaves_region;     /* others are in it, or it could not be unmapped: the next visit takes it away */
        uint8_t *below;         /* what stood below the stack, and is to stand there again */
        size_t below_size;
};

/* memfd NULL: only to stand, nothing will be run in it. */
int remote_thread_seize(Remote *remote, const Target *target, pid_t tid, const RemoteThreadStatus *status,
                        int *memfd, RemoteThread **ret);
/* Interrupts a running thread and waits until it stands in an interrupt-stop (not in a group-stop: REMOTE_E_BUSY). */
int remote_thread_stop(RemoteThread *thread, uint64_t timeout_nsec);
int remote_thread_interrupt(RemoteThread *thread);
/* After it: until it stands so, or now_nsec() is past until (0: one look). REMOTE_E_BUSY with it standing: a
 * group-stop. */
int remote_thread_await(RemoteThread *thread, uint64_t until_nsec);
/* Standing: a call that we interrupted and that returned -EINTR is made again. */
void remote_thread_repair(RemoteThread *thread);
bool remote_thread_in_region(const RemoteThread *thread);
int remote_thread_suspend_seccomp(RemoteThread *thread); /* REMOTE_E_*: it cannot be had */
/* Waits for the next stop of any kind; *ret_status as from waitpid(). REMOTE_E_BUSY: not in time. REMOTE_E_GONE: it ended,
 * or went over to another program, in which it stands then. */
int remote_thread_wait(RemoteThread *thread, uint64_t timeout_nsec, int *ret_status);
/* It stands with this status, which is not what was waited for: a signal goes back where it came from with the next
 * resume. One that our own instructions caused (they can only if somebody unmapped the region under them) is dropped:
 * the frame still leads home. */
void remote_thread_keep_signal(RemoteThread *thread, int status);
int remote_thread_resume(RemoteThread *thread, int request);
RemoteThread *remote_thread_free(RemoteThread *thread);
DEFINE_CLEANUP(RemoteThread, remote_thread_free)
RemoteThread *remote_thread_forget(RemoteThread *thread); /* only where it is ours no more, or we end */
bool remote_thread_in_rseq(RemoteThread *thread, uint64_t pc);
int remote_thread_gone(RemoteThread *thread); /* a ptrace request said ESRCH: collects its end */
void remote_nap(uint64_t nsec);

/* A thread that executes a program holds what PTRACE_SEIZE sleeps for: until the others of its process are gone, and those
 * that are ours are gone when we have collected their ends; or for as long as its file is not to be read. */
typedef struct RemoteCollector {
        timer_t timer;
        pid_t pid;              /* whose timer it is: a fork has none */
        sigset_t before;
        bool armed;
        unsigned periods;       /* since it was armed */
} RemoteCollector;
/* PTRACE_SEIZE that collects the ends of those that are ours meanwhile. -errno; -EAGAIN: it would have slept on. */
int remote_collect_seize(Remote *remote, pid_t tid, unsigned long options);
void remote_collect_done(Remote *remote);

/* Of a standing thread: whether what it is about to run for us could harm it if we died in the middle, by what confines it
 * now. REMOTE_E_UNFIT: it could; REMOTE_E_GONE, _DENIED, -errno. Its filters are suspended. Finds out whether it may clean up
 * after us. must_allow: each call has to work without us too, an error would be as bad as an end. */
int remote_filter_check(RemoteThread *thread, const Target *target, uint64_t region, const RemoteCall *calls, size_t n,
                        bool must_allow);
/* Threads have filters in common, inherited: with as many as one whose were read, the last as long, they are taken for his. */
bool remote_filters_alike(const RemoteThread *thread, const RemoteThread *read);
/* Of another standing thread, that is to wait for the runner and to go home by rt_sigreturn(2): REMOTE_E_UNFIT, _GONE, -errno. */
int remote_filter_check_return(RemoteThread *thread, const RemoteThread *runner);
/* The action of one program; pure. *ret_only_nr: it looked at the number and the architecture only. */
struct sock_filter;
struct seccomp_data;
uint32_t remote_filter_run(const struct sock_filter *program, size_t n, const struct seccomp_data *data,
                           bool *ret_only_nr);

/* Puts the thread at our call: saves what is to be saved, writes the frame, maps the region. */
int remote_enter(RemoteThread *thread, uint64_t floor, uint64_t region, size_t n_parked);
int remote_mask_get(pid_t tid, uint64_t *ret); /* both: -errno */
int remote_mask_set(pid_t tid, uint64_t mask);
/* After remote_enter(): sends the thread into the stub, which finds n descriptors (0: a program) in the region. */
int remote_launch(RemoteThread *thread, uint64_t n);
/* While the stub runs: lets the thread go on if something made it stand. REMOTE_E_GONE, -errno. */
int remote_tend(RemoteThread *thread);
/* The stub, the head before it with our part of its contents, into a buffer of REMOTE_REGION_HEAD_BYTES. */
RemoteHead *remote_head_write(const RemoteThread *thread, uint8_t *text);
int remote_write(const RemoteThread *thread, const void *data, size_t size, uint64_t address);
/* A program was begun in the thread and is not known to have ended. */
bool remote_in_program(const RemoteThread *thread);
/* Of the 2 ms of a stop this much is for getting in and the calls; the rest is for getting out. */
#define REMOTE_RUN_NSEC (1100 * NSEC_PER_USEC)
/* When no more is to be begun in a stop that has run_nsec, of a thread that stands since stood_nsec and is ready now. */
uint64_t remote_run_deadline(uint64_t stood_nsec, uint64_t run_nsec);
/* Runs as many of the calls as there is time for, one at least; one of them at most may be one to take from. *ret_done:
 * made. May be called once after remote_enter(). stood_nsec: since when it stands. */
int remote_run(RemoteThread *thread, RemoteCall *calls, size_t n, uint64_t stood_nsec, size_t *ret_done,
               uint64_t *ret_run_nsec);
/* From any stop of a thread in stage INSIDE: closes what is held, unmaps, restores; stage SEIZED afterwards. */
int remote_leave(RemoteThread *thread);

#define REMOTE_UFFD_LINK "anon_inode:[userfaultfd]"
/* The stub holds the userfaultfd fd for us: takes a copy, and has the stub close it. *ret: owned, or -errno: it
 * could not be had. 0; REMOTE_E_LOST: the stub did not wait so long (and has closed it). */
int remote_take(RemoteThread *thread, uint64_t fd, int *ret);
/* Whether the stub, stopped with these registers, holds one that is still to be closed: *ret. */
bool remote_still_held(const RemoteThread *thread, const RemoteRegs *regs, uint64_t *ret);
/* A userfaultfd that nobody has used yet: in the first thread's table. */
bool remote_held_is_fresh(pid_t pid, uint64_t fd);

#define REMOTE_PROGRAM_LABELS_MAX 256U
#define REMOTE_PROGRAM_NOTES_MAX 16U
#define REMOTE_PROGRAM_ASKS_MAX 8U
#define REMOTE_PROGRAM_GIVE_MAX 4U
#define REMOTE_PROGRAM_GIVEN_MAX 4U

typedef struct RemoteAsk {
        RemoteAnswer answer;
        void *userdata;
        unsigned question;      /* the number of the one that it answers, with others */
} RemoteAsk;

/* Of a descriptor: whether it was noted, st_dev, st_ino, in three words. */
typedef struct RemoteNote {
        unsigned word, noted;
} RemoteNote;

typedef struct RemoteGiven {
        int fds[REMOTE_PROGRAM_GIVE_MAX];
        size_t n;
        unsigned socket;        /* the word of the end that we write to */
} RemoteGiven;

typedef struct RemoteCrowd RemoteCrowd;

struct RemoteProgram {
        RemoteInstruction ops[REMOTE_PROGRAM_OPS_MAX];
        uint64_t words[REMOTE_PROGRAM_WORDS_MAX];
        uint16_t labels[REMOTE_PROGRAM_LABELS_MAX]; /* the instruction; REMOTE_NOWHERE: not placed yet */
        RemoteAsk asks[REMOTE_PROGRAM_ASKS_MAX];
        RemoteNote notes[REMOTE_PROGRAM_NOTES_MAX];
        RemoteGiven given[REMOTE_PROGRAM_GIVEN_MAX];
        unsigned n_ops, n_words, n_labels, n_asks, n_questions, n_notes, n_given;
        unsigned stat_word;     /* where fstat(2) writes */
        RemoteCrowd *crowd;     /* while it runs: who stands, … */
        RemoteThread *runner;   /* … and who runs it */
        int error;              /* the first; negative */
        bool finished;          /* labels are resolved */
        bool holds;             /* there is a remote_program_hold() */
};
int remote_program_finish(RemoteProgram *program); /* negative: what went wrong while it was built */
/* False: instruction i is no system call. */
bool remote_program_call_at(const RemoteProgram *program, unsigned i, uint64_t region, RemoteCall *ret);

/* All threads of a process, to stand or standing. */
struct RemoteCrowd {
        RemoteThread **threads;
        size_t n, allocated;
        pid_t *workers;         /* those that cannot be stopped */
        size_t n_workers, allocated_workers;
        uint64_t interrupted_nsec, stood_nsec; /* when the first was interrupted; since when, at most, one of them stands */
        uint64_t patience_nsec; /* in: so long those that stand wait for those that do not yet, and for one that is fit */
        size_t n_max;           /* in: of more threads none is stopped */
};
/* only: 0, or the one thread to stop (tests). 0: all stand. REMOTE_E_*, -errno: call remote_crowd_done() all the same. */
int remote_crowd_stop(Remote *remote, const Target *target, pid_t only, RemoteCrowd *crowd);
RemoteThread *remote_crowd_find(const RemoteCrowd *crowd, pid_t tid); /* NULL: not among them */
bool remote_crowd_is_impatient(const RemoteCrowd *crowd);
void remote_crowd_done(RemoteCrowd *crowd); /* lets all of them go */

/* Sends all the others to wait in the region of the one that runs a program (remote-park.c). It must be waiting for us
 * there. Anything but 0: some were not, and nothing is to be begun. */
int remote_crowd_park(RemoteCrowd *crowd, RemoteThread *runner);
#define REMOTE_PARKED_MAX 256U
uint64_t remote_park_bytes(const RemoteThread *runner); /* that one needs behind the region */
int remote_unpark(RemoteThread *thread); /* -errno, REMOTE_E_GONE */
/* The program ended, or (deserted) goes on without us. */
void remote_crowd_unpark(RemoteCrowd *crowd, RemoteThread *runner, bool deserted);

struct Remote {
        RemoteThread *threads;  /* that are ours, the last one first */
        RemoteStats stats;
        uint64_t slow_stops, slow_stop_nsec; /* longer than they should be: how many, when the last was over, … */
        uint64_t slow_stop_took_nsec; /* … and how long it took */
        bool insists;           /* remote_insist() */
        uint64_t call_nsec;     /* learnt: of one call in a batch */
        RemoteBoost *boost;     /* NULL: not needed yet */
        bool boosted;           /* a thread, at this moment */
        bool boost_refused;     /* it may not be more urgent than others itself */
        RemoteCollector collector;
        uint64_t spins;         /* pauses that take REMOTE_SPIN_NSEC here */
        unsigned n_cpus;        /* as it began: what is online costs three calls to find out, while a target stands */
};

void remote_stats_count(RemoteStats *stats, uint64_t interrupted_nsec, uint64_t stood_nsec, uint64_t detached_nsec);

/* The stub waits this long for us at its end before it goes home alone. */
#define REMOTE_SPIN_NSEC (15 * NSEC_PER_MSEC)
/* One call of ours that comes back at once (mmap, munmap), however busy the machine is. */
#define REMOTE_STEP_NSEC (200 * NSEC_PER_MSEC)

/* The protocol's steps: tests end the caller at each of them, and leave single safeguards out to see them missed. */
typedef enum RemoteStep {
        REMOTE_STEP_SEIZED,
        REMOTE_STEP_INTERRUPTED,
        REMOTE_STEP_SIGNAL,     /* it stopped with a signal that it had taken already */
        REMOTE_STEP_STOPPED,
        REMOTE_STEP_FRAME,
        REMOTE_STEP_MAP_REGS,
        REMOTE_STEP_MASKED,
        REMOTE_STEP_MAP_ENTRY,
        REMOTE_STEP_MAPPED,
        REMOTE_STEP_CODE,
        REMOTE_STEP_STUB_REGS,
        REMOTE_STEP_RUNNING,
        REMOTE_STEP_TAKEN,
        REMOTE_STEP_RELEASED,
        REMOTE_STEP_CROWD,      /* a thread that is to stand was seized */
        REMOTE_STEP_STANDING,   /* all stand */
        REMOTE_STEP_PROGRAM,    /* a program is about to run */
        REMOTE_STEP_PARK_REGS,  /* of another thread: its registers are ours, its mask not yet */
        REMOTE_STEP_PARKED,
        REMOTE_STEP_ASKED,
        REMOTE_STEP_ANSWERED,
        REMOTE_STEP_DONE,
        REMOTE_STEP_BACK,
        REMOTE_STEP_UNMAP_REGS,
        REMOTE_STEP_UNMAP_ENTRY,
        REMOTE_STEP_UNMAPPED,
        REMOTE_STEP_MASK_BACK,
        REMOTE_STEP_REGS_BACK,
        REMOTE_STEP_STACK_BACK,
        REMOTE_STEP_DETACHED,
        _REMOTE_STEP_MAX,
} RemoteStep;

enum {
        REMOTE_GUARD_EINTR = 1 << 0,    /* the repair of an interrupted call */
        REMOTE_GUARD_RSEQ = 1 << 1,     /* not inside a restartable sequence */
        REMOTE_GUARD_RED_ZONE = 1 << 2,
        REMOTE_GUARD_XSTATE = 1 << 3,   /* vector state in the frame */
        REMOTE_GUARD_ORDER = 1 << 4,    /* registers before mask going in, after it going out */
        REMOTE_GUARD_SECCOMP = 1 << 5,
        REMOTE_GUARD_MASK = 1 << 6,     /* signals blocked meanwhile */
        REMOTE_GUARD_CLOSE = 1 << 8,    /* of a descriptor that was taken */
        REMOTE_GUARD_SAME = 1 << 9,     /* only if it is still that one */
        REMOTE_GUARD_FILTER = 1 << 10,  /* not where a seccomp filter would kill, should we die */
        REMOTE_GUARD_CROWD = 1 << 11,   /* all threads stand during a transaction */
        REMOTE_GUARD_WHOLE = 1 << 12,   /* a program is never called back in its middle */
        REMOTE_GUARD_CALM = 1 << 13,    /* nobody who runs is stopped where CPUs are scarce */
        REMOTE_GUARD_LEFT = 1 << 14,    /* what a dead caller left is taken away only if it still is what it was */
        REMOTE_GUARD_PARK = 1 << 15,    /* the others wait for its end, even if we die */
        REMOTE_GUARD_PEEK = 1 << 16,    /* a signal that it had taken is not collected before it is given back */
        REMOTE_GUARD_FIRST = 1 << 17,   /* one call is made in any case */
        REMOTE_GUARD_LATE = 1 << 18,    /* they have some time, however long getting in took */
        REMOTE_GUARD_INSIST = 1 << 19,  /* remote_insist() */
        REMOTE_GUARD_FOLLOW = 1 << 20,  /* a thread that executes a program is let go under its new number */
        REMOTE_GUARD_COLLECT = 1 << 21, /* others' ends are collected during a seize, which is given up some time */
};

#ifdef REMOTE_TEST
extern unsigned remote_test_leave_out;
extern uint64_t remote_test_program_wait_nsec; /* for a program to end */
extern uint64_t remote_test_vector_bytes; /* by which a frame is larger than here */
extern pid_t remote_test_unlisted; /* a thread that the kernel leaves out */
void remote_test_step(RemoteStep step);
#define remote_guards(guard) (!(remote_test_leave_out & (guard)))
#define remote_step(step) remote_test_step(step)
#else
#define remote_guards(guard) true
#define remote_step(step) ((void)0)
#endif
