/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "control/service.h"
#include "daemon/budget.h"
#include "daemon/roster.h"
#include "host/cpu.h"
#include "host/kernel.h"
#include "host/ksm.h"
#include "host/numa.h"
#include "host/walk.h"
#include "merge/burst.h"
#include "merge/zero.h"
#include "merge/judge.h"
#include "probe/probe.h"
#include "scan/kept.h"
#include "target/remote.h"
#include "target/vma-reader.h"

/*
 * The manager wires everything together and is the firewall for errors: whatever goes wrong with one target is counted
 * and ends with that target.
 *
 * Everything happens on one thread. Work comes in passes (pass.c); between two batches of a pass manager_breathe() lets
 * the event loop run, so that control is answered at once. What changes the managed set or interrupts the work
 * (reload, unmerge, pause, stop) is only noted there and carried out by the main loop between passes: a pass that sees
 * such a request gives up early and leaves the previous pass's result standing.
 */
typedef enum ManagerState {
        MANAGER_IDLE,
        MANAGER_SCANNING,
        MANAGER_MERGING,
        MANAGER_PAUSED,
        MANAGER_STOPPING,
} ManagerState;

#define MANAGER_NODES_WAIT \
        "KSM can change it only while no page is shared (ksmctl unmerge for each cgroup, then ksmctl reload)"

/* How long a clean stop, or who asked for an unmerge, waits for processes that cannot be called at the moment. */
#define UNDO_PATIENCE_NSEC (5 * NSEC_PER_SEC)
/* By so much a pass is put off while somebody is undone who is let run in between. */
#define UNDO_HOLDS_NSEC (60 * NSEC_PER_SEC)

typedef enum RequestKind { REQUEST_SCAN, REQUEST_UNMERGE } RequestKind;

/* An answer owed until the named work is done. */
typedef struct Request {
        RequestKind kind;
        ServiceCall *call;
        char *cgroup;
        bool started;                   /* scan: a pass that began after the request is under way; unmerge: it left */
        uint64_t id;                    /* unmerge: of those that left for it (Member.unmerge) */
        uint64_t pages, moved_nsec;     /* unmerge: taken apart so far; when it went on last */
        unsigned failed;                /* unmerge: processes that were given up */
        uint64_t tended;                /* unmerge: pages of the pools looked at since, for who is mapped no more */
} Request;

/* As much of an undoing as is done in one go, before the event loop has its turn. */
typedef struct UndoSlice {
        uint64_t until_nsec;            /* something is done in each, and a batch ended */
        uint64_t pages;                 /* undone; grows */
        bool cut;                       /* the time was up: it can go on at once */
} UndoSlice;

/* Sums of what the probes counted (probe/probe.h). */
typedef struct ProbeSums {
        struct probe_flushes flushes;
        struct probe_ksm ksm;
        struct probe_walks walks;
} ProbeSums;

/* What is wrong with a configuration, one sentence each. */
typedef struct Warnings {
        char **texts;
        size_t n, allocated;
} Warnings;

typedef struct Manager {
        Loop *loop;
        const char *config_path;        /* NULL: the default files */
        Conf *conf;
        HostKernel kernel;
        Numa numa;
        uint64_t numa_nsec;             /* when it was read */
        char *state_dir;
        int lock_fd;
        Ksm *ksm;                       /* NULL: absent or read-only, ksm_error says */
        int ksm_error;
        Burst *burst;
        Budget budget;                  /* CPUQuota=, CPUQuotaBusy= */
        CpuLeft cpu_left, cpu_left_longer; /* as of the last look, and of the last one at a longer time */
        uint64_t others_look_nsec;      /* how soon to look again while they want them */
        bool host_busy;                 /* as of the last look: others leave hardly a CPU */
        bool stranger_marked;           /* merging waits for a process of another domain to be undone */
        WalkCost walk;                  /* for MaxPageSharing=auto; mapping_nsec 0: not measured yet */
        uint32_t max_page_sharing;      /* in force, as of the last burst; 0: there was none */
        bool nodes_asked;               /* since the last reload ksmd was let forget what is merged no more */
        bool nodes_wait;                /* MergeAcrossNodes= was changed, and waits until no page is shared */
        bool limits_refused;            /* MaxPageSharing= and MergeAcrossNodes= wait until no page is shared */
        bool track_absent;              /* the kernel cannot follow writes */
        Crew *crew;                     /* that reads and matches */
        ScanBatch *batches;             /* n_batches of them, for one round of the crew */
        size_t n_batches;
        Probes *probes;
        LoopSource *probe_source, *refresh_soon_timer, *rest_timer;
        uint64_t probes_rested_nsec;    /* of those that were closed: a reload opens them anew */
        ProbeSums probes_counted;       /* by those */
        VmaReader vma_reader;           /* all targets' */
        struct ProbeNews *news;         /* what the probes said and was not carried out yet */
        JudgeBudget judge_budget;       /* BreakQuota= */
        bool breaks_too_dear;           /* it was exceeded when that was asked last: no burst begins or goes on now */
        uint32_t running;               /* how many threads of members ran at a time in the last burst, in CONF_SHARE_ONE */
        bool running_wait;              /* it is being found out: flushes are counted then */
        uint64_t costs_look_nsec, costs_flushes; /* how soon BreakQuota= is looked at in a burst; flushes at the last look */
        uint64_t breaks_found;          /* by looking: not seen by the probe */
        uint64_t breaks_seen;           /* by the probe, as of the last collection */
        uint32_t looks;                 /* at one member each: JudgeRecord.looked */
        uint16_t turn;                  /* JudgeRecord.turn */
        uint64_t managed_pages;         /* present in all members, as last counted */
        Remote *remote;
        Advise *advise;
        Zero *zero;                     /* NULL: pages cannot be given back here */
        struct Remapping *remapping;    /* route remap's; NULL: nobody needed it so far */
        bool keeper_missed;             /* an earlier daemon's is there and could not be reached: what is remapped is not known */
        uint64_t keeper_next_nsec, keeper_wait_nsec; /* when it is tried again to reach one; how long after the last time */
        Roster roster;
        Kept kept;                      /* what an earlier daemon knew and was not taken over yet */
        Service *service;
        LoopSource *signals[4], *tree_source, *tree_timer, *refresh_timer, *watchdog_timer;
        ManagerState state;
        bool in_pass, paused, stopping, once;
        bool reload_wanted;             /* SIGHUP came */
        Conf *new_conf;                 /* loaded, to be swapped in between passes */
        uint64_t started_nsec, next_pass_nsec, last_pass_nsec;
        uint64_t undo_at_nsec;          /* when undoing goes on; UINT64_MAX: there is nobody to be undone */
        uint64_t request_ids;           /* given so far */
        uint64_t full_scans;
        uint64_t merge_failures[_MERGE_FAILURE_MAX];    /* events: changed, gone, denied, busy */
        uint64_t pass_changes;          /* the last pass: pages newly marked, and pages to wait for */
        unsigned passes_waited, burst_backoff; /* passes since the last burst, and how many there are to be */
        uint64_t burst_missed;          /* pages the last burst did not merge */
        bool go_on;                     /* the last burst merged a part: the next pass is not to wait */
        unsigned recheck_in;            /* passes until what is wanted and unmerged is read again; 0: not at all */
        uint64_t sharing_seen;          /* KSM's pages_sharing when the last pass ended */
        unsigned census_age;            /* passes since the frames were counted */
        size_t census_members;          /* how many there were then */
        bool young_waiting;             /* the last pass left processes alone that are too young, */
        bool busy_waiting;              /* or that could not be called at first contact */
        uint64_t rests_until_nsec;      /* nor was it done with some that are not to be stopped before; UINT64_MAX: it was */
        int tree_error;                 /* of the cgroup tree, said once */
        Request *requests;
        size_t n_requests, requests_allocated;
        Warnings warnings;              /* of the configuration in force, or that is to be swapped in */
        uint64_t skipped_due_nsec;      /* when pages may be counted for Explain again (Member.skipped) */
        char *reload_problem;           /* why the last reload failed; NULL: it did not */
} Manager;

/* once: for manager_run_once(). What goes wrong is logged. */
int manager_new(const char *config_path, bool once, Manager **ret);
Manager *manager_free(Manager *manager);
DEFINE_CLEANUP(Manager, manager_free)

/* The control socket, taken over. */
int manager_listen(Manager *manager, int listen_fd);
int manager_run(Manager *manager);      /* until SIGTERM or SIGINT */
int manager_run_once(Manager *manager); /* one full convergence over what is opted in */

/* Loads the configuration anew; the main loop swaps it in. Its warnings replace the old ones; if it cannot be
 * read everything stays, and that is one warning more. */
int manager_load_config(Manager *manager);

/* Answers the i-th request, whose place the last one takes. */
void manager_end_request(Manager *manager, size_t i, int result, const char *reason, json_t *parameters);

/* Somebody waits for a pass; for one that has not begun yet. */
bool manager_scan_requested(const Manager *manager);
bool manager_scan_waits(const Manager *manager);

/* pace.c: lets the event loop run for nsec, and within a pass for as long as CPUQuota= wants work to wait. true: the
 * work at hand is to be given up. */
bool manager_breathe(Manager *manager, uint64_t nsec);
/* The event loop runs once, whatever the quota says: for what is not to wait. The same result. */
bool manager_attend(Manager *manager);
/* As manager_breathe() between two steps of the burst, which is paused meanwhile if it must wait, and in any case if
 * hold_nsec is not 0: for so long, at most a tenth of a second. */
bool manager_breathe_in_burst(Manager *manager, uint64_t hold_nsec);
/* standing.c: looks at how much it runs, if the last look is at least so long ago. */
void manager_look_how_it_runs(Member *member, uint64_t after_nsec);
/* Whether the host is busy, and what follows: looks at most every tenth of a second. */
void manager_look_at_others(Manager *manager);
/* The configuration says another, or others want more or less of the CPUs. */
void manager_set_quota(Manager *manager);
/* What is in force now: a share of one CPU, in 1/10,000. */
uint32_t manager_quota(const Manager *manager);
/* What CPUQuota= limits: the CPU time that the daemon, and ksmd on its behalf, have used so far. */
void manager_budget_stats(Manager *manager, BudgetStats *ret);

/* pass.c: one pass over everything opted in, merging included. MANAGER_E_CUT: there is more to be read, by the next
 * one; -ECANCELED: it was given up. */
enum { MANAGER_E_CUT = 1 };
int manager_pass(Manager *manager);

/* member.c: whether the member takes part in this pass: sets its skip, opens its memory, follows its mappings, and says
 * in faults whether it can have written anything. Where an earlier pass left pages unread, this is about those; their
 * blocks stay. */
bool manager_member_ready(Manager *manager, Member *member);
/* The same in a later step of the pass, which may have come to everybody but it: false, it is gone, leaves, or is not even
 * to be read. skip says whether it may be called. */
bool manager_takes_part(Manager *manager, Member *member);
/* What it writes is followed no longer; everything of it is looked at now and then. What is registered is to be given
 * back. */
void manager_end_track(Member *member);
/* Gives it back until then (now_nsec()). true: nothing is registered any more. */
bool manager_release_track(Member *member, uint64_t until_nsec);
/* track_claim() for all that is registered. */
void manager_claim_tracked(const Member *member, VmaList *vmas);
/* Its mappings as they are: read again unless they were read a moment ago and have not changed. As target_read_vmas(). */
int manager_refresh_vmas(Member *member);
/* The same, at once, and where in them pages are present. TARGET_E_*, -errno. */
int manager_refresh(Manager *manager, Member *member);
void manager_note_remote_error(Manager *manager, Member *member, int error /* REMOTE_E_* */);
/* Learns what is marked in a member that no pass has met: an earlier daemon may have marked it, and a child is born
 * with its parent's marks. REMOTE_E_GONE, REMOTE_E_DENIED, -errno. */
int manager_load_marks(Manager *manager, Member *member);
/* A slice of unmarking what is ours in it: 0 when nothing is, REMOTE_E_BUSY to try again, as manager_undo(). */
int manager_unmark(Manager *manager, Member *member, UndoSlice *slice);
/* A slice of undoing one member; 0 when nothing of ours is left in it (or it is gone), REMOTE_E_BUSY to try again, at
 * once if it was cut, else later: it cannot be called now, or memory to un-share into was short. */
int manager_undo(Manager *manager, Member *member, UndoSlice *slice);

/* undoing.c: a slice of undoing what was done to the members that left, counted to the requests that they left for.
 * true: some could not be reached, or there was no time, or they were born meanwhile: again when undo_at_nsec says. Who refuses
 * for good stays among the leaving, and is not waited for.
 * Where that is at once, no pass is to come in between. *ret_pages grows. */
bool manager_undo_leaving(Manager *manager, uint64_t *ret_pages);
uint64_t manager_undo_wait_nsec(const Manager *manager); /* until then; UINT64_MAX: nobody is left */
bool manager_undo_rests(const Manager *manager); /* for somebody to run meanwhile */
/* The requests to unmerge: what is asked for leaves; what is done is answered. An answer is near when only some
 * moments' work is left to be done for it. */
void manager_begin_unmerges(Manager *manager);
void manager_end_unmerges(Manager *manager);
bool manager_answer_is_near(const Manager *manager);
/* For who undoes within a pass, between two slices: the event loop has its turn. false: it is over, or to be left to a
 * later pass; the member may have left meanwhile. */
UndoSlice manager_undo_begin(void);
bool manager_undo_goes_on(Manager *manager, const Member *member, UndoSlice *slice);

/* census.c: counts what is saved now, by frames, and the statistics anew. */
void manager_census(Manager *manager);
/* Right before a burst: notes which of the pages that it may merge lie on frames of their own. */
void manager_note_frames(Manager *manager);
/* kept.c: what savings are counted by, for the next daemon. At the start: what an earlier one left; */
void manager_read_kept(Manager *manager);
/* what it knew of a member whose blocks are there, of a domain. Nothing where that was done before. */
void manager_take_kept(Manager *manager, Member *member);
void manager_take_notes(Manager *manager, Slot *slot);
/* Writes down what is known now. */
void manager_keep(Manager *manager);
/* Fills in the statistics of groups and slots from what is known. */
void manager_count(Manager *manager);
/* Pages of one member that have a twin and are not merged, by reason. */
void manager_add_failures(const MemberCounts *counts, PageStats *stats);
/* The sum over all domains, as last counted. */
void manager_total(const Manager *manager, PageStats *ret);

/* watch.c: the probes, as the configuration wants them; again after it changed. What they say of who comes and goes is
 * carried out at once, but not more often than every few milliseconds. */
int manager_open_probes(Manager *manager);
void manager_close_probes(Manager *manager);
/* Something happened to the cgroups: who is in them is read anew, at once, but not so often that it takes a share of a CPU. */
int manager_refresh_soon(Manager *manager);
/* What they counted since the daemon started, as probes_flushes() and so on. */
void manager_flushes(const Manager *manager, struct probe_flushes *ret);
void manager_ksm_counts(const Manager *manager, struct probe_ksm *ret);
void manager_walks(const Manager *manager, struct probe_walks *ret);
/* Who is managed may have changed: the probes are told. */
void manager_watch(Manager *manager);

/* judging.c: what breaks, and what follows from it (docs/judgement.md). A look of the census at one member goes block
 * by block to manager_looked(); having seen all that is marked it is ended. */
typedef struct JudgeLooking {
        Manager *manager;
        const CensusFrames *frames;
        Member *member;
        Block *block;                   /* being looked at; NULL: none that is known */
        uint64_t addr;                  /* of it */
        PageSet looked, merged, broken;
} JudgeLooking;
void manager_looked(void *looking, const CensusLook *look);
void manager_end_looking(JudgeLooking *looking);
/* Takes in what the probes counted since, and the time: once a second, and in each pass. */
void manager_judge(Manager *manager);
/* PayBack= or Judgement= changed: everybody is let go. */
void manager_forget_judgement(Manager *manager);
/* Who leaves, or runs another program: the probes forget his blocks, one by one, where they would go through everybody's. */
void manager_untell(const Manager *manager, const Member *member);
/* The probes are others: they were told of no block. */
void manager_forget_told(Manager *manager);
/* For how long BreakQuota= has merging wait; 0: not now, and never with --once. */
uint64_t manager_breaks_wait_nsec(Manager *manager);
uint64_t manager_cow_breaks(const Manager *manager);
void manager_count_judged(const Manager *manager, const Member *member, JudgeCounts *ret);

/* report.c: what the service asks. */
extern const ServiceOps manager_ops;
json_t *manager_stats_json(Manager *manager);
