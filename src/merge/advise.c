/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Marking: brings the kernel's VM_MERGEABLE bits of a target to what the plan says, by madvise(2) made inside the
 * target (target/remote) or by process_madvise(2) where the kernel takes MADV_MERGEABLE from outside.
 *
 * The truth about marks is the kernel's: each plan says what is mergeable now, and what is ours of it follows from
 * what is foreign (see marks.c). So nothing breaks when the target unmaps, moves or unmarks what we marked, and no
 * call is made on a range that does not need it.
 *
 * Unmarking un-shares (MADV_UNMERGEABLE breaks every merged page, mm/ksm.c unmerge_ksm_pages), so it is done only
 *   - to what held nothing wanted, so nothing merged either, for UNMARK_PLANS plans in a row: contents that change
 *     for a while must not make ranges flap. What was not read yet, as when a daemon is started anew, may hold anything;
 *   - at an end of a marked range, or in its middle from UNMARK_MIDDLE_PAGES on: a hole costs two mappings, the end
 *     none;
 *   - at once, whatever it holds, to what has become a secret (locked, DONTDUMP), and to pages that are to be left alone because
 *     their merges break too soon (merge/judge.h): what is merged there would be broken soon anyway;
 *   - by undo.
 * It takes about 10 µs for each page it un-shares, so most are un-shared beforehand, from outside (unshare.c), and it is
 * made in pieces: remote_call() ends a stop between calls only.
 * Undoing may take minutes: the ranges to be unmarked are read once a round and worked off as time allows, call by
 * call of advise_undo(). What the target does with them meanwhile the kernel does not mind (a range that is not
 * mergeable, or not there), and the next round finds the rest.
 *
 * madvise(2) goes on past a hole in the range and says ENOMEM then; so after a call that failed, the kernel is asked
 * what was marked.
 */

#include "merge/marks.h"

#include "base/clock.h"
#include "merge/unshare.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define UNMARK_PLANS 4U
#define UNMARK_MIDDLE_PAGES BLOCK_PAGES
#define UNMARK_PIECE_BYTES (16 * PAGE_BYTES)
#define UNDO_ROUNDS 3U
/* Un-shared between two looks at the clock, some milliseconds; and how many make a stop worth while. */
#define UNDO_STEP_PAGES 512U
#define UNDO_STOP_PAGES 2048U

int advise_new(Remote *remote, const char *state_dir, bool process_madvise, Advise **ret) {
        _cleanup_(advise_freep) Advise *advise = calloc(1, sizeof *advise);
        int r;

        if (!advise)
                return -ENOMEM;
        *advise = (Advise){ .remote = remote, .statefd = -EBADF, .kpageflagsfd = -EBADF, .process_madvise = process_madvise };
        if (mkdir(state_dir, 0700) < 0 && errno != EEXIST)
                return -errno;
        advise->statefd = open(state_dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (advise->statefd < 0)
                return -errno;
        r = marks_sweep(advise->statefd);
        if (r < 0)
                return r;
        advise->kpageflagsfd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
        *ret = TAKE_PTR(advise);
        return 0;
}

Advise *advise_free(Advise *advise) {
        if (!advise)
                return NULL;
        for (size_t i = 0; i < advise->n_ended; i++)
                ranges_done(&advise->ended[i].foreign);
        safe_close(advise->statefd);
        safe_close(advise->kpageflagsfd);
        free(advise);
        return NULL;
}

typedef struct Batch {
        RemoteCall *calls;
        size_t n, allocated;
} Batch;

static void batch_done(Batch *batch) {
        free(batch->calls);
}

static int batch_add(Batch *batch, const Ranges *ranges, int advice, uint64_t piece_bytes) {
        for (size_t i = 0; i < ranges->n; i++)
                for (uint64_t at = ranges->ranges[i].start, end = ranges->ranges[i].end; at < end;) {
                        uint64_t bytes = MIN_OF(end - at, piece_bytes);
                        if (GROW(batch->calls, batch->n, batch->allocated) < 0)
                                return -ENOMEM;
                        batch->calls[batch->n++] = (RemoteCall){
                                .nr = SYS_madvise,
                                .args = { at, bytes, (uint64_t)advice },
                                .ignore_error = true,
                                .ret = -ECANCELED,
                        };
                        at += bytes;
                }
        return 0;
}

/* process_madvise(2) takes ranges of one advice and says how many bytes it got through: where it stopped short, the
 * range it stopped in is the one that failed, and the next call, which begins with that, says why. */
static int batch_run_outside(const Target *target, Batch *batch) {
        for (size_t i = 0; i < batch->n;) {
                struct iovec vectors[IOV_MAX];
                RemoteCall *first = &batch->calls[i];
                size_t n = 0;
                long done;

                for (; i + n < batch->n && n < ELEMENTSOF(vectors) && first[n].args[2] == first->args[2]; n++)
                        vectors[n] = (struct iovec){ (void *)(uintptr_t)first[n].args[0], first[n].args[1] };
                done = syscall(SYS_process_madvise, target->pidfd, vectors, n, (int)first->args[2], 0U);
                if (done < 0) {
                        if (errno == ESRCH)
                                return REMOTE_E_GONE;
                        if (errno == EPERM)
                                return REMOTE_E_DENIED;
                        first->ret = -errno;
                        i++;
                        continue;
                }
                for (size_t j = 0; j < n && (size_t)done >= vectors[j].iov_len; j++, i++) {
                        done -= (long)vectors[j].iov_len;
                        first[j].ret = 0;
                }
                /* Some of the range, but not all: not the start of another call, which would repeat it. */
                if (done > 0)
                        batch->calls[i++].ret = -ENOMEM;
        }
        return 0;
}

static int batch_run_inside(Advise *advise, Target *target, Batch *batch, StopPause pause, void *userdata,
                            AdviseResult *result) {
        size_t done = 0, made;
        int r;

        do {
                r = remote_call_some(advise->remote, target, batch->calls + done, batch->n - done, &made);
                done += made;
                result->unfinished = r == 0 && done < batch->n && pause && pause(userdata);
        } while (r == 0 && done < batch->n && !result->unfinished);
        return r;
}

static int batch_run(Advise *advise, Target *target, Batch *batch, StopPause pause, void *userdata,
                     AdviseResult *result) {
        int r;

        if (batch->n == 0)
                return 0;
        if (advise->process_madvise)
                r = batch_run_outside(target, batch);
        else
                r = batch_run_inside(advise, target, batch, pause, userdata, result);
        for (size_t i = 0; i < batch->n; i++) {
                const RemoteCall *call = &batch->calls[i];

                if (call->ret == -ECANCELED)
                        continue;
                result->calls++;
                if (call->ret != 0)
                        result->failed_ranges++;
                else if (call->args[2] == MADV_MERGEABLE)
                        result->pages_marked += call->args[1] / PAGE_BYTES;
                else
                        result->pages_unmarked += call->args[1] / PAGE_BYTES;
        }
        return r;
}

/* What the calls of one advice did, by address. */
static int batch_succeeded(const Batch *batch, int advice, Ranges *ret) {
        for (size_t i = 0; i < batch->n; i++) {
                const RemoteCall *call = &batch->calls[i];
                if (call->ret == 0 && call->args[2] == (uint64_t)advice &&
                    ranges_append(ret, call->args[0], call->args[0] + call->args[1]) < 0)
                        return -ENOMEM;
        }
        return 0;
}

static bool batch_failed(const Batch *batch, int advice) {
        for (size_t i = 0; i < batch->n; i++)
                if (batch->calls[i].ret != 0 && batch->calls[i].args[2] == (uint64_t)advice)
                        return true;
        return false;
}

static int target_mergeable(Target *target, Ranges *ret) {
        _cleanup_(vma_list_done) VmaList vmas = {};
        int r;

        r = target_read_vma_flags(target, true, &vmas);
        if (r == 0)
                r = marks_mergeable(&vmas, ret);
        return remote_error_of(r);
}

/* Of what is mergeable, what is ours: see Marks.marks_itself. */
static int marks_refresh(Marks *marks, const Ranges *mergeable) {
        if (marks->marks_itself)
                return ranges_intersect(&marks->ours, mergeable, &marks->ours);
        return ranges_subtract(mergeable, &marks->foreign, &marks->ours);
}

static int idle_append(MarkIdle **idle, size_t *n, size_t *allocated, uint64_t start, uint64_t end, unsigned plans) {
        if (start >= end)
                return 0;
        if (*n > 0 && (*idle)[*n - 1].range.end == start && (*idle)[*n - 1].plans == plans) {
                (*idle)[*n - 1].range.end = end;
                return 0;
        }
        if (GROW(*idle, *n, *allocated) < 0)
                return -ENOMEM;
        (*idle)[(*n)++] = (MarkIdle){ { start, end }, plans };
        return 0;
}

/* Counts one plan more, or none, for what is still unwanted, begins with one for what newly is. */
static int idle_update(Marks *marks, const Ranges *unwanted, unsigned plans) {
        _cleanup_free_ MarkIdle *idle = NULL;
        size_t n = 0, allocated = 0, j = 0;
        int r = 0;

        for (size_t i = 0; i < unwanted->n && r == 0; i++) {
                uint64_t at = unwanted->ranges[i].start, end = unwanted->ranges[i].end;

                while (j < marks->n_idle && marks->idle[j].range.end <= at)
                        j++;
                for (size_t k = j; k < marks->n_idle && marks->idle[k].range.start < end && r == 0; k++) {
                        const MarkIdle *old = &marks->idle[k];
                        uint64_t from = MAX_OF(at, old->range.start), to = MIN_OF(end, old->range.end);

                        r = idle_append(&idle, &n, &allocated, at, from, 1);
                        if (r == 0)
                                r = idle_append(&idle, &n, &allocated, from, to, MIN_OF(old->plans + plans, UNMARK_PLANS));
                        at = to;
                }
                if (r == 0)
                        r = idle_append(&idle, &n, &allocated, at, end, 1);
        }
        if (r < 0)
                return r;
        free(marks->idle);
        marks->idle = TAKE_PTR(idle);
        marks->n_idle = n;
        return 0;
}

/* Some of it may be due by a later plan. What has been idle for long enough and is not due waits for nothing: whatever
 * makes it due is learnt of. */
static bool idle_waits(const Marks *marks) {
        for (size_t i = 0; i < marks->n_idle; i++)
                if (marks->idle[i].plans < UNMARK_PLANS)
                        return true;
        return false;
}

/* What has been idle for long enough and is worth a call. */
static int idle_due(const Marks *marks, Ranges *ret) {
        _cleanup_(ranges_done) Ranges due = {};
        size_t j = 0;

        for (size_t i = 0; i < marks->n_idle; i++)
                if (marks->idle[i].plans >= UNMARK_PLANS &&
                    ranges_append(&due, marks->idle[i].range.start, marks->idle[i].range.end) < 0)
                        return -ENOMEM;
        for (size_t i = 0; i < due.n; i++) {
                const PlanRange *range = &due.ranges[i], *mark;

                while (marks->ours.ranges[j].end <= range->start)
                        j++;
                mark = &marks->ours.ranges[j];
                if (range->start != mark->start && range->end != mark->end &&
                    range->end - range->start < UNMARK_MIDDLE_PAGES * PAGE_BYTES)
                        continue;
                if (ranges_append(ret, range->start, range->end) < 0)
                        return -ENOMEM;
        }
        return 0;
}

/* What a plan says of a target. */
typedef struct Wish {
        Ranges planned, mergeable, revoked, open, hot;
        const Ranges *unread;           /* the plan's */
        bool goes_on;
} Wish;

static void wish_done(Wish *wish) {
        ranges_done(&wish->planned);
        ranges_done(&wish->mergeable);
        ranges_done(&wish->revoked);
        ranges_done(&wish->open);
        ranges_done(&wish->hot);
}

static int wish_read(const Plan *plan, Wish *ret) {
        int r = 0;

        ret->goes_on = plan->goes_on;
        ret->unread = &plan->unread;
        for (size_t i = 0; i < plan->n && r == 0; i++)
                r = ranges_append(&ret->planned, plan->ranges[i].start, plan->ranges[i].end);
        for (size_t i = 0; i < plan->n_hot && r == 0; i++)
                r = ranges_append(&ret->hot, plan->hot[i].start, plan->hot[i].end);
        for (size_t i = 0; i < plan->n_mergeable && r == 0; i++) {
                const PlanMergeable *m = &plan->mergeable[i];

                r = ranges_append(&ret->mergeable, m->range.start, m->range.end);
                if (r == 0 && m->revoked)
                        r = ranges_append(&ret->revoked, m->range.start, m->range.end);
                if (r == 0 && !m->revoked && !m->withheld)
                        r = ranges_append(&ret->open, m->range.start, m->range.end);
        }
        return r;
}

/* The calls that make the marks what is wished. */
static int wish_calls(const Wish *wish, Marks *marks, Batch *batch) {
        _cleanup_(ranges_done) Ranges mark = {}, unmark = {}, revoke = {}, unwanted = {}, hot = {};
        int r;

        r = ranges_intersect(&marks->ours, &wish->open, &unwanted);
        if (r == 0)
                r = ranges_subtract(&unwanted, &wish->planned, &unwanted);
        if (r == 0)
                r = ranges_subtract(&unwanted, wish->unread, &unwanted);
        if (r == 0)
                r = idle_update(marks, &unwanted, !wish->goes_on);
        if (r == 0)
                r = idle_due(marks, &unmark);
        if (r == 0)
                r = ranges_intersect(&marks->ours, &wish->revoked, &revoke);
        if (r == 0)
                r = ranges_unite(&unmark, &revoke, &unmark);
        if (r == 0)
                r = ranges_intersect(&marks->ours, &wish->hot, &hot);
        if (r == 0)
                r = ranges_unite(&unmark, &hot, &unmark);
        if (r == 0)
                r = ranges_subtract(&wish->planned, &wish->mergeable, &mark);
        if (r == 0)
                r = batch_add(batch, &unmark, MADV_UNMERGEABLE, UNMARK_PIECE_BYTES);
        if (r == 0)
                r = batch_add(batch, &mark, MADV_MERGEABLE, UINT64_MAX);
        return r;
}

/* What the calls changed goes to the marks; where one failed, or none can say, the kernel is asked. */
static int wish_account(const Wish *wish, Target *target, Marks *marks, const Batch *batch, bool ask) {
        _cleanup_(ranges_done) Ranges marked = {}, unmarked = {}, now = {};
        int r;

        r = batch_succeeded(batch, MADV_UNMERGEABLE, &unmarked);
        if (r == 0)
                r = ranges_subtract(&marks->ours, &unmarked, &marks->ours);
        if (r == 0 && ask && target_mergeable(target, &now) == 0) {
                r = ranges_subtract(&now, &wish->mergeable, &now);
                if (r == 0)
                        r = ranges_intersect(&wish->planned, &now, &marked);
        } else if (r == 0)
                r = batch_succeeded(batch, MADV_MERGEABLE, &marked);
        if (r == 0)
                r = ranges_unite(&marks->ours, &marked, &marks->ours);
        return r;
}

int advise_apply(Advise *advise, Target *target, const Plan *plan, Marks *marks, StopPause pause, void *userdata,
                 AdviseResult *ret) {
        _cleanup_(wish_done) Wish wish = {};
        _cleanup_(batch_done) Batch batch = {};
        AdviseResult result = {};
        int r, outcome;

        marks_forget_undo(marks); /* one that was not gone on with */
        r = wish_read(plan, &wish);
        if (r == 0)
                r = marks_refresh(marks, &wish.mergeable);
        if (r == 0)
                r = wish_calls(&wish, marks, &batch);
        if (r == 0 && batch.n > 0)
                r = marks_record(advise, target, marks);
        if (r < 0)
                return r;
        outcome = batch_run(advise, target, &batch, pause, userdata, &result);
        result.unmark_left = batch_failed(&batch, MADV_UNMERGEABLE);
        result.unfinished |= result.unmark_left || idle_waits(marks);
        r = wish_account(&wish, target, marks, &batch, result.failed_ranges > 0 || outcome == REMOTE_E_LOST);
        *ret = result;
        return outcome != 0 ? outcome : r;
}

/* What is ours now, to be unmarked in the round that begins. *ret_over: nothing is, or trying goes no further. */
static int undo_begin_round(Target *target, Marks *marks, AdviseResult *result, bool *ret_over) {
        _cleanup_(ranges_done) Ranges mergeable = {};
        MarksUndo *undo = &marks->undo;
        uint64_t pages;
        int r = target_mergeable(target, &mergeable);

        if (r == 0)
                r = marks_refresh(marks, &mergeable);
        if (r != 0)
                return r;
        pages = ranges_pages(&marks->ours);
        result->failed_ranges = marks->ours.n;
        *ret_over = pages == 0 || undo->rounds >= UNDO_ROUNDS || (undo->rounds > 0 && pages >= undo->before_pages);
        if (*ret_over)
                return 0;
        undo->rounds++;
        undo->before_pages = pages;
        undo->next = 0;
        return ranges_unite(&marks->ours, &(Ranges){}, &undo->todo);
}

/* The next of them, off the list, and un-shared as far as that is possible while the process runs. */
static int undo_take(const Advise *advise, Target *target, MarksUndo *undo, Ranges *ret) {
        uint64_t room = UNDO_STEP_PAGES * PAGE_BYTES;
        int r = 0;

        while (undo->next < undo->todo.n && room > 0 && r == 0) {
                PlanRange *range = &undo->todo.ranges[undo->next];
                uint64_t bytes = MIN_OF(range->end - range->start,
                                        DIV_ROUND_UP(room, UNMARK_PIECE_BYTES) * UNMARK_PIECE_BYTES);

                r = ranges_append(ret, range->start, range->start + bytes);
                (void)unshare_merged(target, advise->kpageflagsfd, range->start, range->start + bytes);
                range->start += bytes;
                room -= MIN_OF(room, bytes);
                undo->next += range->start == range->end;
        }
        return r;
}

void marks_forget_undo(Marks *marks) {
        ranges_done(&marks->undo.todo);
        marks->undo = (MarksUndo){};
}

int advise_undo(Advise *advise, Target *target, Marks *marks, uint64_t until_nsec, AdviseResult *ret) {
        MarksUndo *undo = &marks->undo;
        AdviseResult result = {};
        bool over = false;
        int r = 0;

        while (r == 0) {
                _cleanup_(ranges_done) Ranges ready = {};
                _cleanup_(batch_done) Batch batch = {};

                if (undo->next == undo->todo.n) {
                        r = undo_begin_round(target, marks, &result, &over);
                        if (r != 0 || over)
                                break;
                }
                do
                        r = undo_take(advise, target, undo, &ready);
                while (r == 0 && undo->next < undo->todo.n && ranges_pages(&ready) < UNDO_STOP_PAGES &&
                       now_nsec() < until_nsec);
                if (r == 0)
                        r = batch_add(&batch, &ready, MADV_UNMERGEABLE, UNMARK_PIECE_BYTES);
                if (r == 0)
                        r = batch_run(advise, target, &batch, NULL, NULL, &result);
                if (r == 0 && now_nsec() >= until_nsec) {
                        result.unfinished = true;
                        break;
                }
        }
        if (!result.unfinished)
                marks_forget_undo(marks);
        if (marks->ours.n == 0) {
                free(marks->idle);
                marks->idle = NULL;
                marks->n_idle = 0;
        }
        *ret = result;
        return r;
}

void advise_forget(Advise *advise, Target *target, Marks *marks) {
        marks_end(advise, marks);
        marks_unrecord(advise, target, marks);
}
