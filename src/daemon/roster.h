/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "cgroup/policy.h"
#include "cgroup/tree.h"
#include "control/stats.h"
#include "loop/loop.h"
#include "merge/advise.h"
#include "merge/domain.h"
#include "merge/remap.h"
#include "merge/tidy-pace.h"
#include "scan/census.h"
#include "scan/select.h"
#include "target/activity.h"
#include "target/vma-reader.h"

/*
 * Who is managed: the cgroups that the configuration opts in (Group), the processes in them (Member), the domains they
 * belong to (Slot). Kept up to date from the cgroup tree and from pidfds; nothing here touches a process.
 *
 * Whatever leaves (a process that moved out of its cgroup, a cgroup opted out) goes to the list of the leaving: the
 * manager undoes what was done to it and then has it dropped. Only then is a process that is opted in again, or runs
 * another program, taken in anew: two records of one process would undo each other's work. A pass works on a snapshot:
 * what leaves while a pass runs is marked gone or leaving and freed only by roster_drop(), outside of passes.
 */
typedef struct Slot {
        char *name;                     /* of the domain */
        bool own;                       /* Domain=%c: named after its cgroup */
        bool dry_run;                   /* nothing is merged: its cgroups say dry-run */
        ConfRoute asked;                /* for, by the configuration */
        ConfRoute route;                /* that is taken: CONF_ROUTE_ADVISE, CONF_ROUTE_ZERO, CONF_ROUTE_REMAP, or … */
        const char *idle_reason;        /* … why this domain merges nothing; NULL when it merges */
        const char *zero_reason;        /* why only zero pages are given back, though open; NULL: it was asked for */
        struct RemapPool *pool;         /* route remap; borrowed. NULL: none was needed yet */
        const char *trust_problem;      /* why nothing is put into the pool now; NULL: nothing speaks against it */
        bool apart;                     /* … and what several cgroups have in it already has to go */
        Domain *domain;                 /* NULL while idle_reason is set and it is no dry run */
        unsigned n_groups;
        bool recheck_forked;            /* the running pass reads these again (SelectRules) */
        CensusNotes notes;              /* of what is being merged */
        bool notes_taken;               /* those of an earlier daemon are among them, if there were any */
        PageStats stats;
} Slot;

typedef struct Group {
        char *path;
        uint64_t id;                    /* the kernel's; 0: not known */
        Slot *slot;
        /* Copies of what the section says, so that a reload cannot pull them away under a pass. */
        uint32_t minimum_run_pages, huge_page_split;
        bool include_dontdump;
        ConfSwitch track;
        struct Member **members;        /* by pid */
        size_t n_members, members_allocated;
        uint64_t huge_pages_split, huge_pages_collapsed;
        uint64_t pool_pages_returned, pool_pieces_joined;
        PageStats stats;
} Group;

/* What is known of one process, in pages. */
typedef struct MemberCounts {
        uint64_t present, zero, twin, merged, given, changed, unique;
        uint64_t alone;                 /* left alone for a while (merge/judge.h) */
        uint64_t wanted, expected;      /* to be marked; marked, and will leave their frames */
        uint64_t marked, left_huge, left_budget, left_run, left_stack, left_kind, unmerged;
} MemberCounts;

/* All of a member's mappings of pools, gone through once while they are put back: as far as that came. */
typedef struct UnmapRound {
        const struct RemapPool *keep;   /* what is not put back: another one, another round */
        uint64_t from;                  /* address; 0: it begins */
        uint64_t done, left, busy;      /* pages */
        unsigned rounds;                /* that were before it */
        bool written_too;
} UnmapRound;

/* How it stands and runs by turns (standing.c). */
typedef struct Standing {
        uint64_t looked_nsec;           /* when it was looked at last; 0: never */
        uint64_t cpu_nsec, stood_nsec;  /* the CPU time it had used then, and for how long it had stood */
        uint32_t runs;                  /* how much of a CPU it used between the last two looks, CONF_SHARE_ONE; 0: asleep */
        uint64_t rests_until_nsec;      /* it is not to be stopped before */
        bool cut;                       /* there is more to be done then, in this pass */
} Standing;
/* Who used less than one in so many of a CPU's time is asleep, but for its timers. */
#define MEMBER_ASLEEP_SHARE 16U

typedef struct Member {
        Group *group;
        Target *target;
        LoopSource *exit_source;
        Space space;
        VmaList vmas;                   /* as they were at … */
        uint64_t vmas_nsec, vmas_fingerprint; /* … this time, looking like this */
        uint64_t refreshed_nsec;        /* when blocks and track were made to fit them; 0: they are to be */
        Track *track;                   /* NULL: its writes are not followed */
        Track *past_track;              /* followed no longer: what is registered is being given back */
        TargetActivity activity;        /* as of the last pass that looked at it */
        uint64_t faults;                /* since the pass before (UINT64_MAX: unknown) */
        Standing standing;
        uint32_t last_pass;             /* of its domain, that read all it had to; 0: none yet */
        uint32_t met_pass;              /* of its domain, in which it was asked last whether it takes part (skip) */
        uint32_t unconfirmed;           /* of its domain: the first pass that read new blocks which stood no second look yet;
                                         * 0: there are none */
        uint32_t warm_from;             /* of its domain: what was read before was made as cold as it was */
        Selection todo;                 /* what is to be read */
        Marks marks;
        MemberCounts counts;
        Census census;                  /* of what is marked, as of the last census */
        uint64_t breaks_seen;           /* by the probe, as of the last collection */
        uint64_t kin;                   /* the same for all that were forked from one another; 0: not known */
        bool has_relatives;             /* among the members, as of the last census */
        uint64_t holes;                 /* pages given back (route zero) and so still, as of the last census */
        unsigned passes_waited;         /* since it was planned last, while there was something to plan */
        TargetSkip skip;                /* why the last pass left it alone */
        int remote_error;               /* REMOTE_E_* of the last attempt to call it */
        bool space_ready, marks_loaded, adopted;
        bool kept_taken;                /* what an earlier daemon knew of it is in its blocks */
        bool track_tried;               /* its writes are followed, or cannot be */
        bool vmas_changed;              /* since they were read */
        bool look_again;                /* what is known of it is outdated, whatever its activity says */
        bool touched;                   /* something was learnt of it that is not counted and planned yet */
        bool plan_again;                /* there is something to mark, later or once more */
        bool unmark;                    /* something is to be unmarked, by the next pass */
        RemapGuard guard;               /* route remap; ours to close. None: nothing was remapped, as far as is known */
        Ranges own;                     /* what this daemon remapped in it: each page was on a frame of its own */
        TidyWait alone;                 /* what nobody shared was put back */
        uint64_t pooled, astray;        /* pages of its mappings of pools; of other pools than its domain's */
        const char *remap_refused;      /* why none of its pages can be remapped; NULL: they can */
        const char *zero_refused;       /* why none of its zero pages can be given back; NULL: they can */
        UnmapRound unmap;               /* route remap; of a putting back that was cut */
        uint64_t undo_at_nsec, undo_wait_nsec; /* leaving: could not be undone, is tried again then; after how long */
        bool undo_rests;                /* leaving: it runs, and undoing goes on then */
        uint64_t left;                  /* leaving: the id of its cgroup (Group.id); 0: not known */
        uint64_t unmerge;               /* leaving: by which request (Request.id); 0: none */
        uint64_t skipped[_VMA_SKIP_MAX]; /* for Explain: present pages in mappings that are left alone, by reason, … */
        uint64_t skipped_due_nsec;      /* … as of the last count; when they may be counted again. 0: they were not yet */
        bool gone;                      /* the process ended */
        bool leaving;                   /* opted out: to be undone */
        bool given_up;                  /* leaving: it refuses for good; asked again now and then all the same */
        bool undone;                    /* its record is still needed for who was born meanwhile */
        bool put_back;                  /* leaving: so will be the pages of who was born meanwhile */
} Member;

/* Pages that map a merged frame: as the pages were read, or as the frames were counted since. */
static inline uint64_t member_merged(const Member *member) {
        return MAX_OF(member->counts.merged, member->census.ksm_mappings);
}

/* It was met and keeps no secrets, as of met_pass. Who is stopped or frozen cannot be called, and can be read. */
static inline bool member_may_be_read(const Member *member) {
        return member->skip == TARGET_OK ||
               (member->adopted && (member->skip == TARGET_SKIP_FROZEN || member->skip == TARGET_SKIP_STOPPED));
}

/* Route remap's: what makes a slot's pool (NULL, or why there is none), and takes what is in it into its new domain. */
typedef struct RosterPools {
        const char *(*open)(void *userdata, Slot *slot);
        void (*learn)(Slot *slot);
        void *userdata;
} RosterPools;

typedef struct Roster {
        Loop *loop;                     /* borrowed */
        CgroupTree *tree;
        const Conf *conf;               /* borrowed */
        Slot **slots;
        size_t n_slots, slots_allocated;
        Group **groups;
        size_t n_groups, groups_allocated;
        Member **leaving;               /* gone or opted out, in no group's list any more */
        size_t n_leaving, leaving_allocated;
        char **blocked;                 /* cgroups unmerged by command: left alone until the next reload */
        size_t n_blocked, blocked_allocated;
        const Numa *numa;               /* borrowed */
        VmaReader *vma_reader;          /* borrowed: every target's */
        bool apart;                     /* pages of different nodes are kept apart, whatever is configured by now */
        RosterPools pools;
        bool dismissed;                 /* nobody is taken in any more */
        bool ask_again;                 /* for pools that could not be had */
        bool ksm_available, zero_available;
        unsigned scan_threads;          /* as many as the daemon started with */
} Roster;

/* Opens the cgroup tree (root NULL: the host's) and takes in what the configuration opts in. */
int roster_init(Roster *roster, Loop *loop, const Conf *conf, const char *root, const Numa *numa, bool ksm_available,
                bool zero_available, VmaReader *vma_reader, const RosterPools *pools);
void roster_done(Roster *roster);

/* Reads which processes the groups hold now: newcomers are opened, those that left go to the leaving. */
void roster_refresh(Roster *roster);
/* The same of one cgroup, by its id; an unknown one is ignored. */
void roster_refresh_cgroup(Roster *roster, uint64_t id);
/* The configuration was swapped: groups that are not opted in any more, or differently, leave; others come. */
void roster_reconfigure(Roster *roster, const Conf *conf);
/* Whether pages of different nodes are kept apart from now on: nothing may be merged. */
void roster_set_apart(Roster *roster, bool apart);
/* One cgroup leaves, for the unmerge of this number (Member.unmerge), and is left alone until roster_reconfigure(). Who left it
 * before, and is still to be undone, is counted to it.
 * -ENOENT, -ENOMEM. */
int roster_block(Roster *roster, const char *path, uint64_t unmerge);
/* A member leaves, and is met anew when what was done to it is undone. */
void roster_expel(Roster *roster, Member *member);
bool roster_is_blocked(const Roster *roster, const char *path);
/* A process that an earlier daemon marked and that is managed no more joins the leaving. TARGET_E_GONE,
 * TARGET_E_DENIED, -errno. */
int roster_add_orphan(Roster *roster, pid_t pid);
/* Everything leaves, and nobody is taken in any more. */
void roster_dismiss(Roster *roster);
/* Frees a member of the leaving, whose undoing is over. Not during a pass. */
void roster_drop(Roster *roster, Member *member);
/* Drops domains without cgroups; a domain that waited for KSM may get it then. Not during a pass. */
void roster_prune_slots(Roster *roster);

/* Safeguards that tests leave out, to see that they are missed. */
enum {
        ROSTER_GUARD_DOMAIN = 1 << 0,   /* cgroups of one domain share a slot, and those of two do not */
        ROSTER_GUARD_BORN = 1 << 1,     /* who was born while his parent was undone is undone too */
};

#ifdef DAEMON_TEST
extern unsigned roster_test_leave_out;
#define roster_guards(guard) (!(roster_test_leave_out & (guard)))
#else
#define roster_guards(guard) true
#endif

Group *roster_find_group(const Roster *roster, const char *path);
Member *roster_find_member(const Roster *roster, pid_t pid);
Member *roster_find_leaving(const Roster *roster, pid_t pid);
size_t roster_count_members(const Roster *roster);
