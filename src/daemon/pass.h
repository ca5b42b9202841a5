/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/manager.h"

/* Some stops of a member in a row, at most until it is to be let run for a while (standing.c). */
typedef struct Visit {
        Manager *manager;
        Member *member;
        uint64_t begun_cpu_nsec, stood_nsec; /* our CPU time when it began, and for how long the member had stood by then */
        uint64_t allowed_nsec;          /* for how long it may stand; 0: not known before the first stop */
        bool interrupted;               /* the pass is to be given up */
} Visit;

/*
 * Shared by the parts of a pass: pass.c (the order of things), reading.c (read and match), marking.c (plan, mark),
 * bursting.c (let ksmd merge).
 *
 * A pass works on a snapshot of the members, since processes and cgroups come and go while it breathes; a member that
 * has gone or is leaving is passed over.
 */
typedef struct Pass {
        Manager *manager;
        Member **members;               /* snapshot, in the order they are read in */
        size_t n_members;
        Slot **slots;
        size_t n_slots;
        uint64_t first_read_nsec;
        uint64_t pages_read;
        uint64_t expected, marked;      /* over all domains that merge */
        uint64_t newly_marked;          /* pages, of any member */
        bool asked_for;                 /* somebody waits for it: quiet blocks are looked at too */
        size_t fresh, fresh_sampled;    /* blocks read for the first time; of them those that are not tracked */
        bool cut;                       /* read its share, and there is more */
        bool learnt;                    /* something, of any member */
        bool marks_changed;
        bool merged;                    /* ksmd was let run */
        Visit visit;                    /* at hand, of a member that is marked, given pages back, or remapped */
        bool visits_again;              /* it is not the first one in this pass */
} Pass;

/* The event loop gets its turn after so many entries of a pagemap were looked at: 2 to 3 ms. */
#define BREATH_PAGES ((uint64_t)1 << 16)
/* So far at most in one go from at on, to end. */
static inline uint64_t breath_end(uint64_t at, uint64_t end) {
        const uint64_t bytes = BREATH_PAGES * PAGE_BYTES;

        return MIN_OF(end, (at / bytes + 1) * bytes);
}
/* census.c: within a pass the event loop has its turn if there were so many pages since it had (*pages grows). */
void pass_breathe_counting(Manager *manager, uint64_t n_pages, uint64_t *pages);

static inline bool passed_over(const Member *member) { return member->gone || member->leaving; }

/* Valid while the member is not leaving. */
static inline Slot *pass_slot(const Member *member) { return member->group->slot; }
static inline Domain *pass_domain(const Member *member) { return member->group->slot->domain; }

/* Between two of them visit_pause(), a StopPause: the event loop has its turn, CPUQuota= is kept. true, among others: it has
 * stood for long enough (member->standing.cut). */
Visit visit_begin(Manager *manager, Member *member);
bool visit_pause(void *visit);
void visit_end(const Visit *visit);

/* MetadataMax=: to be asked for after every round of work. */
void pass_limit_memory(const Pass *pass);

/* All: -ECANCELED when the main loop has something to carry out. */
int pass_read(Pass *pass);
/* What was read for the first time is believed only when it stands a second look; what was cold is cold again after it. */
int pass_confirm(Pass *pass);
/* The pass is given up before that: only the latter. */
void pass_keep_cold(const Pass *pass);
/* huge.c: huge pages of the member that seem worth splitting are read again, whole. TARGET_E_GONE: the member is to be
 * passed over. */
int pass_judge_huge(Pass *pass, Member *member, const PlanRules *rules);
/* It was marked: remembers which huge pages that may split. */
void pass_open_huge(Member *member);
/* Offers back huge pages that were split and hold nothing merged any more. */
int pass_collapse(Pass *pass);
/* marking.c: plans and marks what was learnt about. */
int pass_mark(Pass *pass);
/* giving.c: route zero, in the place of marking. -errno. */
int pass_give(Pass *pass, Member *member);
/* remapping.c: route remap, zero pages included, in the place of marking. -errno. */
int pass_remap(Pass *pass, Member *member);
/* Whether the cgroups of each domain may share its pool now. */
void pass_judge_trust(Pass *pass);
/* What a member maps of a pool that is not for it becomes its own again. -errno. */
int pass_leave_others(Pass *pass, Member *member);
/* tidying.c: puts pools in order, a little, when there is nothing else to do. */
int pass_tidy(Pass *pass);
/* bursting.c: lets ksmd run when it is worth while. */
int pass_burst(Pass *pass);
