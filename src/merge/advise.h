/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/plan.h"
#include "merge/stop-pace.h"
#include "target/origin.h"
#include "target/remote.h"

/*
 * Route advise: marks ranges MADV_MERGEABLE inside the target and lets the kernel's KSM merge them: the kernel
 * compares under protection, anonymous semantics stay its own, and our death harms nothing. What is ours to keep: which
 * ranges we marked (and not the process itself), for ever undoable, across a crash of ours too (state_dir).
 */
typedef struct Advise Advise;
/* remote is borrowed. state_dir: a directory of ours below /run. process_madvise: the kernel takes
 * MADV_MERGEABLE from outside (host_kernel_probe), no stop is needed. */
int advise_new(Remote *remote, const char *state_dir, bool process_madvise, Advise **ret);
Advise *advise_free(Advise *advise);
DEFINE_CLEANUP(Advise, advise_free)

/* Marked, but wanted no more by the last plans in a row. */
typedef struct MarkIdle {
        PlanRange range;
        unsigned plans;
} MarkIdle;

/* An undoing under way, over several calls. */
typedef struct MarksUndo {
        Ranges todo;            /* of this round: what is left of it begins with … */
        size_t next;            /* … this range */
        unsigned rounds;        /* begun so far */
        uint64_t before_pages;  /* ours when this one was */
} MarksUndo;

/* What is marked in one target. */
typedef struct Marks {
        Ranges ours;            /* marked by us, as far as we know */
        Ranges foreign;         /* marked by the process itself before we came: never unmarked */
        bool marks_itself;      /* there was any: what becomes mergeable without us is the process's own as well */
        bool recorded;          /* the state file is written */
        TargetOrigin origin;    /* of the process, while it lived */
        MarkIdle *idle;         /* by address */
        size_t n_idle;
        MarksUndo undo;
} Marks;

/* Learns what is marked in a target at first contact: from the state file of an earlier daemon if there is one; from
 * that of the process it was forked from, whose marks it inherited, or what is remembered of it if it has ended; else
 * every mergeable mapping is foreign.
 * -errno: it could not be learnt, and nothing is concluded: to be tried again. */
int marks_load(Advise *advise, Target *target, const VmaList *vmas, Marks *ret);
void marks_done(Marks *marks);

typedef struct AdviseResult {
        uint64_t pages_marked, pages_unmarked, calls;
        uint64_t failed_ranges; /* changed under us, or refused */
        bool unfinished;        /* there is more to be done: by the next plan, whatever is learnt until then; undoing, by
                                 * the next call */
        bool unmark_left;       /* and part of it was to be unmarked now */
} AdviseResult;

/* Makes the marks what the plan (from a list of the mappings as they are now) says: marks what is new; unmarks what
 * several plans in a row wanted no more. pause: may be NULL. 0 (also when single ranges failed: counted), REMOTE_E_* when
 * the target could not be called, wholly or for the rest (*ret then says what was done before); -errno. */
int advise_apply(Advise *advise, Target *target, const Plan *plan, Marks *marks, StopPause pause, void *userdata,
                 AdviseResult *ret);

/* Unmarks everything we marked: the kernel un-shares it. Repeated while that makes progress; 0 with failed_ranges > 0
 * when some are left (un-sharing needs memory). Something is done in each call, but until until_nsec (now_nsec(), some
 * milliseconds more) no longer: 0 with unfinished. The state file stays until advise_forget(): who was forked meanwhile
 * learns from it what to undo. REMOTE_E_*, -errno: the next call begins anew. */
int advise_undo(Advise *advise, Target *target, Marks *marks, uint64_t until_nsec, AdviseResult *ret);

/* Forgets a target that ended, replaced its program, or was undone: removes its state file. */
void advise_forget(Advise *advise, Target *target, Marks *marks);

/* The living processes that an earlier daemon marked, or this one. */
typedef void (*AdviseRecorded)(void *userdata, pid_t pid);
int advise_recorded(Advise *advise, AdviseRecorded handler, void *userdata);
