/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Marks and their undoing against a fake target: a row of pages that are mapped or not and mergeable or not. The fake
 * replaces remote_call_some(), unshare_merged() and target_read_vma_flags() at link time. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/io.h"
#include "merge/advise.h"
#include "merge/marks.h"
#include "merge/unshare.h"
#include "tests/test.h"

#include <ftw.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define N_PAGES 4096U
#define BASE (1U << 30)
/* Of a state file; this layout is none that is known, and fits every process. */
#define LAYOUT "0000000000000000 0000000000000000 0000000000000000\n"
#define STATE "ksmd-user marks 2\n" LAYOUT

static struct {
        bool mapped[N_PAGES], mergeable[N_PAGES], unshared[N_PAGES];
        VmaSkip skip[N_PAGES];
        unsigned fail_after;    /* calls made in a stop before remote_call_some() gives up with outcome */
        int outcome;
        bool forgetful;         /* it says of no call what it returned */
        int error;              /* of each call */
        unsigned stop_calls;    /* there is room for in a stop */
        unsigned calls, batches, pauses, pauses_max;
} fake;

static void fake_reset(void) {
        memset(&fake, 0, sizeof fake);
        memset(fake.mapped, true, sizeof fake.mapped);
        fake.fail_after = fake.stop_calls = fake.pauses_max = UINT32_MAX;
}

int remote_call_some(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) {
        assert_true(n > 0);
        n = MIN_OF(n, fake.stop_calls);
        fake.batches++;
        for (size_t i = 0; i < n; i++) {
                size_t first = (calls[i].args[0] - BASE) / PAGE_BYTES, pages = calls[i].args[1] / PAGE_BYTES;
                if (i >= fake.fail_after) {
                        *ret_done = i;
                        return fake.outcome;
                }
                assert_int_equal(calls[i].nr, SYS_madvise);
                assert_true(calls[i].ignore_error && pages > 0 && first + pages <= N_PAGES);
                fake.calls++;
                calls[i].ret = fake.error;
                for (size_t j = first; j < first + pages && !fake.error; j++) {
                        if (fake.mapped[j])
                                fake.mergeable[j] = calls[i].args[2] == MADV_MERGEABLE;
                        else
                                calls[i].ret = -ENOMEM;
                }
                if (fake.forgetful)
                        calls[i].ret = -ECANCELED;
        }
        *ret_done = n;
        return fake.forgetful ? REMOTE_E_LOST : 0;
}

uint64_t unshare_merged(Target *target, int kpageflagsfd, uint64_t start, uint64_t end) {
        for (uint64_t at = start; at < end; at += PAGE_BYTES)
                fake.unshared[(at - BASE) / PAGE_BYTES] = true;
        return 0;
}

static bool pause_then_end(void *userdata) { return ++fake.pauses >= fake.pauses_max; }

int target_read_vma_flags(Target *target, bool include_dontdump, VmaList *ret) {
        VmaList list = {};

        for (unsigned i = 0, j; i < N_PAGES; i = j) {
                for (j = i; j < N_PAGES && fake.mapped[j] == fake.mapped[i] && fake.mergeable[j] == fake.mergeable[i] &&
                            fake.skip[j] == fake.skip[i]; j++)
                        ;
                if (!fake.mapped[i])
                        continue;
                assert_int_equal(GROW(list.vmas, list.n, list.allocated), 0);
                list.vmas[list.n++] = (Vma){ .start = BASE + i * PAGE_BYTES, .end = BASE + j * PAGE_BYTES,
                                             .mergeable = fake.mergeable[i], .skip = fake.skip[i] };
        }
        *ret = list;
        return 0;
}

typedef struct Fixture {
        char dir[32];
        Advise *advise;
        Target target;
        Marks marks;
} Fixture;

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
        return remove(path);
}

static int setup(void **state) {
        Fixture *f = calloc(1, sizeof *f);

        fake_reset();
        strcpy(f->dir, "/tmp/test-advise.XXXXXX");
        assert_non_null(mkdtemp(f->dir));
        assert_int_equal(advise_new(NULL, f->dir, false, &f->advise), 0);
        /* A process that lives as long as the test does. */
        f->target = (Target){ .pid = getpid(), .pidfd = -EBADF, .procfd = open("/proc/self", O_PATH | O_CLOEXEC),
                              .start_ticks = 4711 };
        *state = f;
        return 0;
}

static int teardown(void **state) {
        Fixture *f = *state;

        marks_done(&f->marks);
        advise_free(f->advise);
        close(f->target.procfd);
        nftw(f->dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        free(f);
        return 0;
}

static void load(Fixture *f) {
        _cleanup_(vma_list_done) VmaList vmas = {};

        marks_done(&f->marks);
        target_read_vma_flags(NULL, true, &vmas);
        assert_int_equal(marks_load(f->advise, &f->target, &vmas, &f->marks), 0);
}

/* Applies a plan of up to two ranges of pages. */
static int apply(Fixture *f, unsigned a, unsigned b, unsigned c, unsigned d, AdviseResult *ret) {
        _cleanup_(vma_list_done) VmaList vmas = {};
        _cleanup_(plan_done) Plan plan = {};
        Space space = {};
        PlanRules rules = { .minimum_run_pages = 1, .vmas_max = 100000 };

        target_read_vma_flags(NULL, true, &vmas);
        assert_int_equal(plan_make(&space, &vmas, &rules, &plan), 0);
        plan.ranges = reallocarray(plan.ranges, 2, sizeof *plan.ranges);
        if (a < b)
                plan.ranges[plan.n++] = (PlanRange){ BASE + a * PAGE_BYTES, BASE + b * PAGE_BYTES };
        if (c < d)
                plan.ranges[plan.n++] = (PlanRange){ BASE + c * PAGE_BYTES, BASE + d * PAGE_BYTES };
        *ret = (AdviseResult){};
        return advise_apply(f->advise, &f->target, &plan, &f->marks, pause_then_end, NULL, ret);
}

static unsigned marked(unsigned from, unsigned to) {
        unsigned n = 0;

        for (unsigned i = from; i < to; i++)
                n += fake.mergeable[i];
        return n;
}

static bool has_state(const Fixture *f) {
        char path[96];

        snprintf(path, sizeof path, "%s/%d.%llu", f->dir, f->target.pid, (unsigned long long)f->target.start_ticks);
        return access(path, F_OK) == 0;
}

static void write_state(const Fixture *f, pid_t pid, uint64_t ticks, const char *text) {
        char path[96];

        snprintf(path, sizeof path, "%s/%d.%llu", f->dir, pid, (unsigned long long)ticks);
        assert_int_equal(write_file_atomic(AT_FDCWD, path, text), 0);
}

static void test_mark_and_undo(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_false(has_state(f));
        assert_int_equal(apply(f, 10, 20, 30, 1000, &result), 0);
        assert_true(has_state(f));
        assert_int_equal(result.pages_marked, 980);
        assert_int_equal(result.calls, 2);
        assert_int_equal(marked(0, N_PAGES), 980);
        assert_int_equal(f->marks.ours.n, 2);
        /* The same plan again calls nobody. */
        assert_int_equal(apply(f, 10, 20, 30, 1000, &result), 0);
        assert_int_equal(fake.batches, 1);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(result.pages_unmarked, 980);
        assert_int_equal(result.failed_ranges, 0);
        assert_int_equal(result.calls, 1 + DIV_ROUND_UP(970, 16)); /* in pieces */
        for (unsigned i = 0; i < N_PAGES; i++)
                assert_int_equal(fake.unshared[i], (i >= 10 && i < 20) || (i >= 30 && i < 1000));
        assert_int_equal(marked(0, N_PAGES), 0);
        assert_true(has_state(f)); /* for who was forked meanwhile */
        advise_forget(f->advise, &f->target, &f->marks);
        assert_false(has_state(f));
}

/* The caller has its turn between two stops, and may leave the rest to the next plan. */
static void test_paused(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        fake.stop_calls = 1;
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), 0);
        assert_int_equal(fake.batches, 2);
        assert_int_equal(fake.pauses, 1); /* not when all is done */
        assert_false(result.unfinished);
        fake.pauses_max = 2;
        assert_int_equal(apply(f, 10, 25, 30, 45, &result), 0);
        assert_true(result.unfinished);
        assert_int_equal(result.pages_marked, 5);
        assert_int_equal(marked(0, N_PAGES), 25);
        assert_int_equal(ranges_pages(&f->marks.ours), 25);
        assert_int_equal(apply(f, 10, 25, 30, 45, &result), 0);
        assert_false(result.unfinished);
        assert_int_equal(marked(0, N_PAGES), 30);
}

/* What the process marked itself before we came stays, and what it marks later too. */
static void test_foreign(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        memset(fake.mergeable + 100, true, 100);
        load(f);
        assert_int_equal(f->marks.foreign.n, 1);
        assert_int_equal(apply(f, 50, 150, 0, 0, &result), 0);
        assert_int_equal(result.pages_marked, 50);
        memset(fake.mergeable + 300, true, 100);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, 100), 0);
        assert_int_equal(marked(100, 200), 100);
        assert_int_equal(marked(300, 400), 100);
}

/* The daemon is killed after marking: the next one knows whose each mark is. */
static void test_crash(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        memset(fake.mergeable + 100, true, 100);
        load(f);
        assert_int_equal(apply(f, 50, 150, 2000, 2010, &result), 0);
        load(f);
        assert_true(f->marks.recorded);
        assert_int_equal(f->marks.ours.n, 2);
        assert_int_equal(ranges_pages(&f->marks.ours), 60);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, N_PAGES), 100);
        assert_int_equal(marked(100, 200), 100);
        assert_true(has_state(f)); /* for who was forked meanwhile */
        advise_forget(f->advise, &f->target, &f->marks);
        assert_false(has_state(f));
        /* Without the file, all of it would be foreign. */
        load(f);
        assert_int_equal(f->marks.ours.n, 0);
        assert_int_equal(f->marks.foreign.n, 1);
}

/* A process that never marked itself moved what we marked (mremap takes the bit along): undone as well. */
static void test_moved(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_int_equal(apply(f, 10, 20, 0, 0, &result), 0);
        memset(fake.mapped + 10, false, 10);
        memset(fake.mergeable + 10, false, 10);
        memset(fake.mergeable + 500, true, 10);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, N_PAGES), 0);
        assert_int_equal(fake.calls, 2);
}

static void test_no_flapping(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_int_equal(apply(f, 0, 2000, 0, 0, &result), 0);
        /* Wanted in every second plan: stays. */
        for (unsigned i = 0; i <= 20; i++) {
                assert_int_equal(apply(f, i % 2 ? 100 : 0, 2000, 0, 0, &result), 0);
                assert_int_equal(result.calls, 0);
        }
        /* Unwanted by four: an end goes, a small piece in the middle stays, and asks for no plan any more. */
        for (unsigned i = 0; i < 4; i++) {
                assert_int_equal(marked(0, 100), 100);
                fake.error = i == 3 ? -ENOMEM : 0;
                assert_int_equal(apply(f, 100, 1000, 1100, 2000, &result), 0);
                assert_true(result.unfinished);
        }
        fake.error = 0;
        assert_int_equal(apply(f, 100, 1000, 1100, 2000, &result), 0);
        assert_false(result.unfinished);
        assert_int_equal(marked(0, 100), 0);
        assert_int_equal(marked(100, 2000), 1900);
        /* A big piece in the middle goes. */
        for (unsigned i = 0; i < 4; i++)
                assert_int_equal(apply(f, 100, 1000, 1600, 2000, &result), 0);
        assert_int_equal(marked(100, 1000), 900);
        assert_int_equal(marked(1000, 1600), 0);
        assert_int_equal(marked(1600, 2000), 400);
        assert_int_equal(ranges_pages(&f->marks.ours), 1300);
        /* All of it goes when nothing is wanted. */
        for (unsigned i = 0; i < 4; i++)
                assert_int_equal(apply(f, 0, 0, 0, 0, &result), 0);
        assert_int_equal(marked(0, N_PAGES), 0);
}

/* What was marked by an earlier daemon and was not read yet may be merged: it is neither wanted nor unwanted. */
static void test_unread(void **state) {
        Fixture *f = *state;
        Block blocks[3] = {}, *present[3];
        PlanRules rules = { .minimum_run_pages = 1, .vmas_max = 100000 };
        AdviseResult result;

        write_state(f, f->target.pid, f->target.start_ticks, STATE);
        memset(fake.mergeable, true, 3 * BLOCK_PAGES);
        load(f);
        for (unsigned i = 0; i < 3; i++) {
                blocks[i].addr = BASE + i * BLOCK_BYTES;
                blocks[i].pass = i == 0;
                present[i] = &blocks[i];
        }
        page_set_add(blocks[0].merged, 0);
        for (unsigned i = 0; i < 8; i++) {
                _cleanup_(vma_list_done) VmaList vmas = {};
                _cleanup_(plan_done) Plan plan = {};

                if (i == 4) { /* it was read, and there is nothing in it */
                        assert_int_equal(fake.calls, 0);
                        assert_int_equal(marked(0, N_PAGES), 3 * BLOCK_PAGES);
                        blocks[2].pass = 2;
                }
                target_read_vma_flags(NULL, true, &vmas);
                assert_int_equal(plan_make(&(Space){ .blocks = present, .n = 3 }, &vmas, &rules, &plan), 0);
                assert_int_equal(advise_apply(f->advise, &f->target, &plan, &f->marks, NULL, NULL, &result), 0);
        }
        assert_int_equal(marked(0, 2 * BLOCK_PAGES), 2 * BLOCK_PAGES);
        assert_int_equal(marked(2 * BLOCK_PAGES, N_PAGES), 0);
}

/* Locked or DONTDUMP by now: unmarked at once; skipped for another reason: left as it is, for ever. */
static void test_secret(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_int_equal(apply(f, 0, 300, 0, 0, &result), 0);
        for (unsigned i = 100; i < 200; i++)
                fake.skip[i] = i < 150 ? VMA_SKIP_LOCKED : VMA_SKIP_UNREADABLE;
        assert_int_equal(apply(f, 0, 100, 200, 300, &result), 0);
        assert_int_equal(marked(0, 100), 100);
        assert_int_equal(marked(100, 150), 0);
        for (unsigned i = 0; i < 10; i++)
                assert_int_equal(apply(f, 0, 100, 200, 300, &result), 0);
        assert_int_equal(marked(150, 300), 150);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, N_PAGES), 0);
}

static void test_foreign_secret_stays(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        memset(fake.mergeable, true, 10);
        for (unsigned i = 0; i < 10; i++)
                fake.skip[i] = VMA_SKIP_DONTDUMP;
        load(f);
        for (unsigned i = 0; i < 10; i++)
                assert_int_equal(apply(f, 0, 0, 0, 0, &result), 0);
        assert_int_equal(marked(0, 10), 10);
}

/* A hole has come into a range: the call fails, but the kernel marked the rest; exactly that is recorded. */
static void test_hole(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        memset(fake.mergeable + 1000, true, 1); /* so that marks do not follow from the mappings alone */
        load(f);
        memset(fake.mapped + 12, false, 2);
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), 0);
        assert_int_equal(result.failed_ranges, 1);
        assert_int_equal(result.pages_marked, 10);
        assert_int_equal(f->marks.ours.n, 3);
        assert_int_equal(ranges_pages(&f->marks.ours), 18);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, 1000), 0);
        assert_true(fake.mergeable[1000]);
}

static void test_refused(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        fake.error = -EINVAL;
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), 0);
        assert_int_equal(result.failed_ranges, 2);
        assert_int_equal(result.pages_marked, 0);
        assert_int_equal(f->marks.ours.n, 0);
        /* Not enough memory to un-share: says so, gives up for now, keeps the file; later it works. */
        fake.error = 0;
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), 0);
        fake.error = -ENOMEM;
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(result.failed_ranges, 2);
        assert_true(has_state(f));
        fake.error = 0;
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(result.failed_ranges, 0);
        assert_true(has_state(f)); /* for who was forked meanwhile */
        advise_forget(f->advise, &f->target, &f->marks);
        assert_false(has_state(f));
}

/* The target could not be called for all of it: what was done is known, the rest is done by the next plan. */
static void test_interrupted(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        memset(fake.mergeable + 1000, true, 1);
        load(f);
        fake.fail_after = 1;
        fake.outcome = REMOTE_E_BUSY;
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), REMOTE_E_BUSY);
        assert_int_equal(result.pages_marked, 10);
        assert_int_equal(ranges_pages(&f->marks.ours), 10);
        fake.fail_after = UINT32_MAX;
        assert_int_equal(apply(f, 10, 20, 30, 40, &result), 0);
        assert_int_equal(result.pages_marked, 10);
        assert_int_equal(ranges_pages(&f->marks.ours), 20);
        /* Nobody can say what was done: the kernel is asked. */
        fake.forgetful = true;
        assert_int_equal(apply(f, 10, 60, 0, 0, &result), REMOTE_E_LOST);
        assert_int_equal(ranges_pages(&f->marks.ours), 50);
}

/* The time is up after each step: the marks go bit by bit, whatever the target does with the rest meanwhile. */
static void test_in_slices(void **state) {
        Fixture *f = *state;
        AdviseResult result = { .unfinished = true };
        unsigned slices = 0;

        load(f);
        assert_int_equal(apply(f, 0, 1500, 1600, 2000, &result), 0);
        for (bool unfinished = true; unfinished; slices++) {
                unsigned before = marked(0, N_PAGES);

                assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, 0, &result), 0);
                assert_true(before - marked(0, N_PAGES) < 512 + 16);
                unfinished = result.unfinished;
                if (slices == 0) { /* it unmaps what is next, moves what is last to where we were already */
                        memset(fake.mapped + 600, false, 8);
                        memset(fake.mergeable + 600, false, 8);
                        memset(fake.mergeable + 1900, false, 100);
                        memset(fake.mergeable + 100, true, 100);
                }
                if (slices == 1) { /* who is killed here leaves what shows whose the rest is */
                        _cleanup_(vma_list_done) VmaList vmas = {};
                        Marks next = {};

                        target_read_vma_flags(NULL, true, &vmas);
                        assert_int_equal(marks_load(f->advise, &f->target, &vmas, &next), 0);
                        assert_int_equal(ranges_pages(&next.ours), marked(0, N_PAGES));
                        marks_done(&next);
                }
        }
        assert_true(slices >= DIV_ROUND_UP(1900, 512));
        assert_int_equal(marked(0, N_PAGES), 0);
        assert_int_equal(f->marks.ours.n, 0);
        assert_true(has_state(f));
}

/* One that marks itself anew all the time does not keep us busy for ever. */
static void test_in_slices_ends(void **state) {
        Fixture *f = *state;
        AdviseResult result = { .unfinished = true };
        unsigned slices = 0;

        load(f);
        assert_int_equal(apply(f, 0, 2000, 0, 0, &result), 0);
        for (bool unfinished = true; unfinished; slices++) {
                assert_true(slices < 4 * DIV_ROUND_UP(2000, 512));
                assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, 0, &result), 0);
                memset(fake.mergeable, true, 2000);
                unfinished = result.unfinished;
        }
        assert_true(result.failed_ranges > 0);
}

/* It could not be called for the rest: the next time begins with what is marked then. */
static void test_slice_fails(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_int_equal(apply(f, 0, 2000, 0, 0, &result), 0);
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, 0, &result), 0);
        assert_true(result.unfinished);
        fake.outcome = REMOTE_E_BUSY;
        fake.fail_after = 1;
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), REMOTE_E_BUSY);
        assert_false(result.unfinished);
        assert_true(marked(0, N_PAGES) > 0);
        fake.fail_after = UINT32_MAX;
        assert_int_equal(advise_undo(f->advise, &f->target, &f->marks, UINT64_MAX, &result), 0);
        assert_int_equal(marked(0, N_PAGES), 0);
}

static void test_bad_state_file(void **state) {
        static const char *const bad[] = {
                "",
                "x",
                "ksmd-user marks 2\n",
                "ksmd-user marks 1\n" LAYOUT,
                "ksmd-user marks 2\n0000000000000000 0000000000000000\n",
                "ksmd-user marks 2\n0000000000000000 0000000000000000 000000000000000x\n",
                "ksmd-user marks 2\n0000000000000000 0000000000000000 0000000000000000",
                STATE "0000000040000000-0000000040001000",
                STATE "0000000040000000-0000000040001000\n\n",
                STATE "0000000040001000-0000000040000000\n",
                STATE "0000000040000000-0000000040000800\n",
                STATE "000000004000000g-0000000040001000\n",
                STATE "0000000040002000-0000000040003000\n0000000040000000-0000000040001000\n",
                STATE " -000000004000000-0000000040001000\n",
        };
        Fixture *f = *state;

        memset(fake.mergeable + 1, true, 9);
        for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
                write_state(f, f->target.pid, f->target.start_ticks, bad[i]);
                load(f);
                assert_int_equal(f->marks.ours.n, 0);
                assert_int_equal(ranges_pages(&f->marks.foreign), 9);
                assert_false(f->marks.recorded);
        }
        write_state(f, f->target.pid, f->target.start_ticks, STATE "0000000040000000-0000000040005000\n");
        load(f);
        assert_int_equal(ranges_pages(&f->marks.ours), 5);
        assert_true(f->marks.recorded);
}

/* Pid and start time outlive execve(2), and so does the file; the new program's own marks are not ours. */
static void test_other_program(void **state) {
        Fixture *f = *state;
        AdviseResult result;
        TargetOrigin origin;
        char text[256];

        assert_int_equal(target_origin(&f->target, &origin), 0);
        memset(fake.mergeable, true, 10);
        for (unsigned other = 0; other < 2; other++) {
                snprintf(text, sizeof text, "ksmd-user marks 2\n%016llx %016llx %016llx\n",
                         (unsigned long long)(origin.start_code + other * PAGE_BYTES),
                         (unsigned long long)origin.start_stack, (unsigned long long)origin.start_brk);
                write_state(f, f->target.pid, f->target.start_ticks, text);
                load(f);
                assert_int_equal(ranges_pages(&f->marks.ours), other ? 0 : 10);
                assert_int_equal(ranges_pages(&f->marks.foreign), other ? 10 : 0);
        }
        /* And so it stays, though the file is not the old one any more. */
        assert_int_equal(apply(f, 20, 30, 0, 0, &result), 0);
        load(f);
        assert_int_equal(ranges_pages(&f->marks.ours), 10);
        assert_int_equal(ranges_pages(&f->marks.foreign), 10);
}

static uint64_t own_start_ticks(void) {
        _cleanup_free_ char *text = NULL;
        unsigned long long ticks = 0;

        assert_int_equal(read_file(AT_FDCWD, "/proc/self/stat", &text, NULL), 0);
        assert_int_equal(sscanf(strrchr(text, ')'), ") %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                                "%*s %*s %*s %llu", &ticks), 1);
        return ticks;
}

static bool exists(const Fixture *f, const char *name) {
        char path[96];

        snprintf(path, sizeof path, "%s/%s", f->dir, name);
        return access(path, F_OK) == 0;
}

static void test_sweep(void **state) {
        Fixture *f = *state;
        _cleanup_(advise_freep) Advise *next = NULL;
        char name[64];

        snprintf(name, sizeof name, "%d.%llu", getpid(), (unsigned long long)own_start_ticks());
        write_state(f, getpid(), own_start_ticks(), "a");
        write_state(f, getpid(), 1, "a");
        write_state(f, 0x7ffffffe, 5, "a");
        assert_int_equal(write_file_atomic(f->advise->statefd, "knobs", "a"), 0);
        assert_int_equal(write_file_atomic(f->advise->statefd, "1.2x", "a"), 0);
        assert_int_equal(write_file_atomic(f->advise->statefd, "12.13.new", "a"), 0);
        assert_int_equal(advise_new(NULL, f->dir, false, &next), 0);
        assert_true(exists(f, name) && exists(f, "knobs") && exists(f, "1.2x"));
        assert_false(exists(f, "2147483646.5") || exists(f, "12.13.new"));
        snprintf(name, sizeof name, "%d.1", getpid());
        assert_false(exists(f, name));
}

/* From now on n files can be opened, and no more. */
static void allow_files(unsigned n, struct rlimit *ret_before) {
        int next = dup(STDIN_FILENO);

        close(next);
        assert_int_equal(getrlimit(RLIMIT_NOFILE, ret_before), 0);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ (rlim_t)next + n, ret_before->rlim_max }), 0);
}

/* What cannot be read just now says nothing: not that the process ended, not that its marks are its own. */
static void test_unreadable(void **state) {
        Fixture *f = *state;
        struct rlimit before;
        VmaList vmas = {};
        char name[64];

        snprintf(name, sizeof name, "%d.%llu", getpid(), (unsigned long long)own_start_ticks());
        f->target.start_ticks = own_start_ticks();
        write_state(f, getpid(), own_start_ticks(), STATE);
        memset(fake.mergeable, true, 5);
        target_read_vma_flags(NULL, true, &vmas);
        allow_files(1, &before);
        assert_int_equal(marks_sweep(f->advise->statefd), 0);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
        assert_true(exists(f, name));
        allow_files(0, &before);
        assert_int_equal(marks_load(f->advise, &f->target, &vmas, &f->marks), -EMFILE);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
        load(f);
        assert_int_equal(ranges_pages(&f->marks.ours), 5);
        assert_int_equal(unlinkat(f->advise->statefd, name, 0), 0);
        assert_int_equal(mkdirat(f->advise->statefd, name, 0700), 0);
        assert_int_equal(marks_load(f->advise, &f->target, &vmas, &f->marks), -EISDIR);
        vma_list_done(&vmas);
}

/* A child has our marks from birth: they are ours in it too, unless it is another program by now; also where the process
 * it was forked from has ended and its file with it. */
static void test_fork(void **state) {
        Fixture *f = *state;
        char path[64];

        write_state(f, getpid(), own_start_ticks(), STATE "0000000040000000-0000000040005000\n");
        memset(fake.mergeable, true, 10);
        for (unsigned round = 0; round < 3; round++) {
                bool other = round == 1;
                int ready[2];
                char byte;
                pid_t pid;

                if (round == 2) {
                        snprintf(path, sizeof path, "%d.%llu", getpid(), (unsigned long long)own_start_ticks());
                        assert_int_equal(unlinkat(f->advise->statefd, path, 0), 0);
                }
                assert_int_equal(pipe(ready), 0);
                pid = fork();
                if (pid == 0) {
                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        close(ready[0]);
                        fcntl(ready[1], F_SETFD, FD_CLOEXEC);
                        if (other)
                                execl("/bin/sleep", "sleep", "100", NULL);
                        else
                                (void)!write(ready[1], "", 1);
                        for (;;)
                                pause();
                }
                close(ready[1]);
                (void)!read(ready[0], &byte, 1); /* a byte, or closed by execve */
                close(ready[0]);
                snprintf(path, sizeof path, "/proc/%d", pid);
                close(f->target.procfd);
                f->target = (Target){ .pid = pid, .procfd = open(path, O_PATH | O_CLOEXEC), .start_ticks = 99 };
                load(f);
                assert_int_equal(ranges_pages(&f->marks.ours), other ? 0 : 5);
                assert_int_equal(ranges_pages(&f->marks.foreign), other ? 10 : 5);
                assert_int_equal(has_state(f), !other);
                advise_forget(f->advise, &f->target, &f->marks);
                kill(pid, SIGKILL);
                waitpid(pid, NULL, 0);
        }
}

static void test_forget(void **state) {
        Fixture *f = *state;
        AdviseResult result;

        load(f);
        assert_int_equal(apply(f, 10, 20, 0, 0, &result), 0);
        assert_true(has_state(f));
        advise_forget(f->advise, &f->target, &f->marks);
        assert_false(has_state(f));
}

/* Set operations against bitmaps. */
static void test_ranges(void **state) {
        uint64_t seed = 88172645463325252ULL;

        for (unsigned round = 0; round < 3000; round++) {
                bool in[2][64] = {}, x, y, z;
                Ranges sets[2] = {}, out[3] = {};

                for (unsigned i = 0; i < 2; i++)
                        for (unsigned j = 0; j < 64; j++) {
                                seed ^= seed << 13;
                                seed ^= seed >> 7;
                                seed ^= seed << 17;
                                in[i][j] = j > 0 && seed % 4 ? in[i][j - 1] : seed >> 40 & 1;
                                if (in[i][j])
                                        assert_int_equal(ranges_append(&sets[i], j * PAGE_BYTES,
                                                                       (j + 1) * PAGE_BYTES), 0);
                        }
                assert_int_equal(ranges_subtract(&sets[0], &sets[1], &out[0]), 0);
                assert_int_equal(ranges_intersect(&sets[0], &sets[1], &out[1]), 0);
                assert_int_equal(ranges_unite(&sets[0], &sets[1], &out[2]), 0);
                for (unsigned k = 0; k < 3; k++) {
                        for (size_t i = 1; i < out[k].n; i++)
                                assert_true(out[k].ranges[i - 1].end < out[k].ranges[i].start);
                        for (unsigned j = 0; j < 64; j++) {
                                x = in[0][j], y = in[1][j];
                                z = false;
                                for (size_t i = 0; i < out[k].n; i++)
                                        z = z || (out[k].ranges[i].start <= j * PAGE_BYTES &&
                                                  out[k].ranges[i].end > j * PAGE_BYTES);
                                assert_int_equal(z, k == 0 ? x && !y : k == 1 ? x && y : x || y);
                        }
                        ranges_done(&out[k]);
                }
                ranges_done(&sets[0]);
                ranges_done(&sets[1]);
        }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_ranges),
                TEST(test_mark_and_undo), TEST(test_paused), TEST(test_foreign), TEST(test_crash), TEST(test_moved),
                TEST(test_no_flapping), TEST(test_unread), TEST(test_secret), TEST(test_foreign_secret_stays),
                TEST(test_hole),
                TEST(test_refused), TEST(test_interrupted), TEST(test_in_slices), TEST(test_in_slices_ends),
                TEST(test_slice_fails), TEST(test_bad_state_file), TEST(test_other_program), TEST(test_sweep),
                TEST(test_unreadable),
                TEST(test_fork), TEST(test_forget),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
