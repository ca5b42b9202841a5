/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * When to start ksmd, with which settings, and when to stop it again.
 *
 * What ksmd does (mm/ksm.c, Linux 6.18): one scan goes over every marked page of every process, then full_scans grows
 * by one. A page is noted (its checksum) at the first visit and compared and merged at the second, if it did not
 * change between; only pages that meet within one scan are compared, the tree of unmerged pages is emptied at each
 * scan's start. Stopping leaves the cursor where it is. A process marked for the first time is put just behind the
 * cursor. So what was marked before the start is surely merged once full_scans has grown by 3: what lies before the
 * cursor is noted only in the second scan. By 2 when the cursor stands at the beginning (tests/kernel/ksm-scans).
 *
 * Measured (2 CPUs, 4 processes x 128 MiB, 30 % duplicate and 10 % zero pages marked in runs of 8, ksmd flat out):
 *   - first visit 0.6 us a page; second visit 4.7 us a merged page, all merged (100 %) at the second scan's end;
 *     later visits 0.3 us for a merged page, but 6 us for one without a twin. A scan more than needed is what costs.
 *   - ksmd's CPU time does not depend on pages_to_scan: 0.24, 0.26, 0.25, 0.27 s for 100, 1,000, 4,000, 20,000.
 *   - writing run waits for the mutex that ksmd holds for a batch of pages_to_scan, and with sleep_millisecs = 0 ksmd
 *     takes it again at once: 4 to 16 ms, up to 50, whatever the batch. With sleep_millisecs > 0 written first (which
 *     needs no mutex) it takes what is left of one batch: 0.1 ms at 100, 2 ms at 1,000, 5 ms at 20,000. Hence small
 *     batches, and the order in which host/ksm puts the knobs back.
 *   - smart_scan (6.7+) skips a page seen three times without a twin in 1 to 8 later scans: a scan of 93,000 marked
 *     pages of which 38,000 had no twin took 0.02 instead of 0.23 s. But a page so skipped misses a twin that comes
 *     later. So it is on, and off once after bursts that fell short.
 *   - held back by sleep_millisecs instead of run, ksmd stops after the batch it is at, and the write waits for nothing:
 *     ksmd looks at the value when it goes to sleep and is woken when it changes (5.0). So that is how a burst pauses,
 *     and a daemon that dies in a pause leaves a ksmd that does next to nothing.
 *   - 768 more pages merged in a set of 45,000 merged ones: ksmd 35 ms when as many were expected (it stops in the
 *     second scan), 54 ms when 20 too many were (it goes to the end of the third).
 */

#include "merge/burst.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

#define BATCH_PAGES 100U
#define SCANS_NEEDED 3U
#define SCANS_NEEDED_FROM_START 2U
#define FIRST_VISIT_NSEC 600U   /* a page */
#define MERGE_NSEC 4700U        /* a page */
#define INTERVAL_MIN_NSEC (1 * NSEC_PER_MSEC)
#define INTERVAL_MAX_NSEC (50 * NSEC_PER_MSEC)
#define OVERRUN_SHARE 64U       /* look at least so often that 1/64 of the burst's time is overrun */
#define SHORTFALL_SHARE 16U     /* falling short by 1/16 makes a later burst look at every page */
#define THOROUGH_AFTER_MAX 64U
#define STALLED_NSEC (5 * NSEC_PER_SEC)
#define LIMIT_NSEC (30 * NSEC_PER_SEC)
#define PAUSED_MSEC 600000U     /* a batch each ten minutes, should nobody come back */
#define LIMIT_PAGE_NSEC (200 * NSEC_PER_USEC) /* thirty times what the slowest visit takes */

/* What a burst changes, and puts back; whoever set another knob (max_page_sharing) keeps it. */
static const char *const burst_knobs[] = { "advisor_mode", "sleep_millisecs", "pages_to_scan", "smart_scan",
                                           "use_zero_pages", "run" };

struct Burst {
        Ksm *ksm;               /* borrowed */
        BurstState state;
        bool paused;
        bool unrestored;        /* a burst ended, of an earlier daemon perhaps, and knobs stand as it set them */
        uint64_t paused_nsec;           /* since when */
        uint64_t expected_pages, marked_pages;
        KsmCounters start, last;
        uint64_t start_nsec, moved_nsec;        /* when it began; when ksmd was last seen to have done something */
        uint64_t start_cpu_nsec;
        uint64_t merged_pages;
        uint64_t scans_needed;
        uint64_t interval_nsec;
        bool thorough;          /* this burst runs without smart_scan */
        unsigned short_bursts;  /* with smart_scan, since the last one without */
        unsigned thorough_after;        /* so many of them */
        BurstStats stats;
};

int burst_new(Ksm *ksm, Burst **ret) {
        Burst *burst = calloc(1, sizeof *burst);

        if (!burst)
                return -ENOMEM;
        burst->ksm = ksm;
        burst->thorough_after = 1;
        burst->unrestored = ksm_was_left_changed(ksm);
        *ret = burst;
        return 0;
}

Burst *burst_free(Burst *burst) {
        if (burst)
                burst_stop(burst);
        free(burst);
        return NULL;
}

/*
 * pages_sharing goes on counting the pages of a process that ended until ksmd comes by. So it may fall by more than is
 * merged meanwhile, and only what it grows by between two looks counts. That is too little rather than too much: then
 * the burst ends by its scans.
 */
static void count_merged(Burst *burst, const KsmCounters *counters) {
        int64_t before = (int64_t)burst->last.pages_sharing + burst->last.ksm_zero_pages;
        int64_t now = (int64_t)counters->pages_sharing + counters->ksm_zero_pages;

        if (now > before)
                burst->merged_pages += (uint64_t)(now - before);
        if (counters->full_scans < burst->last.full_scans)
                burst->start.full_scans = counters->full_scans; /* run = 2 makes it count from 0 again */
        burst->last = *counters;
}

static uint64_t clamp_interval(uint64_t nsec) {
        if (nsec < INTERVAL_MIN_NSEC)
                return INTERVAL_MIN_NSEC;
        return MIN_OF(nsec, INTERVAL_MAX_NSEC);
}

static void knobs_restore(Burst *burst) {
        int r = ksm_restore_knobs(burst->ksm, burst_knobs, ELEMENTSOF(burst_knobs));

        burst->unrestored = r != 0;
        if (r != 0)
                log_debug("KSM knobs not restored after a burst, will be tried again: %d", r);
}

void burst_restore(Burst *burst) {
        if (burst->state != BURST_RUNNING && burst->unrestored)
                knobs_restore(burst);
}

static int knobs_set(Burst *burst) {
        const struct {
                const char *name;
                uint64_t value;
                bool optional; /* it came with a later kernel, and nothing depends on it */
        } settings[] = {
                { "use_zero_pages", 1, true },
                { "smart_scan", !burst->thorough, true },
                { "pages_to_scan", BATCH_PAGES, false },
                { "sleep_millisecs", 0, false },
                { "run", 1, false },
        };
        int r;

        r = ksm_set_text(burst->ksm, "advisor_mode", "none");
        if (r < 0 && r != -ENOENT)
                return r;
        for (size_t i = 0; i < ELEMENTSOF(settings); i++) {
                r = ksm_set(burst->ksm, settings[i].name, settings[i].value);
                if (r < 0 && !(r == -ENOENT && settings[i].optional))
                        return r;
        }
        return 0;
}

int burst_start(Burst *burst, uint64_t expected_pages, uint64_t marked_pages) {
        KsmCounters known;
        uint64_t run;
        int r;

        if (burst->state == BURST_RUNNING)
                return -EALREADY;
        burst_restore(burst); /* a run = 1 of ours is not the administrator's */
        r = ksm_progress(burst->ksm, &burst->start, &run);
        if (r < 0)
                return r;
        if (run != 0) {
                burst->state = BURST_FOREIGN;
                return 0;
        }
        if (expected_pages == 0) {
                burst->state = BURST_DONE;
                return 0;
        }
        r = ksm_counters(burst->ksm, &known);
        if (r < 0)
                return r;
        burst->last = burst->start;
        burst->merged_pages = 0;
        burst->expected_pages = expected_pages;
        burst->marked_pages = MAX_OF(marked_pages, expected_pages);
        burst->thorough = burst->short_bursts >= burst->thorough_after;
        /* No page known and no scan done: the cursor never moved. */
        burst->scans_needed = known.full_scans == 0 && known.pages_shared == 0 && known.pages_unshared == 0 &&
                                              known.pages_volatile == 0 ?
                                      SCANS_NEEDED_FROM_START :
                                      SCANS_NEEDED;
        if (ksmd_cpu_nsec(burst->ksm, &burst->start_cpu_nsec) < 0)
                burst->start_cpu_nsec = UINT64_MAX; /* not visible from here */
        burst->interval_nsec =
                clamp_interval((burst->marked_pages * FIRST_VISIT_NSEC + expected_pages * MERGE_NSEC) / 2);

        r = knobs_set(burst);
        if (r < 0) {
                knobs_restore(burst);
                return r;
        }
        burst->start_nsec = burst->moved_nsec = now_nsec();
        burst->paused = false;
        burst->state = BURST_RUNNING;
        return 0;
}

/* Whether a next burst should look at the pages that smart_scan skips, given how this one went. Where that found
 * nothing (pages that cannot be merged: pinned, changing) it is tried more and more seldom. */
static void learn(Burst *burst) {
        bool fell_short = burst->merged_pages + DIV_ROUND_UP(burst->expected_pages, SHORTFALL_SHARE) <
                          burst->expected_pages;

        if (!burst->thorough)
                burst->short_bursts += fell_short;
        else {
                burst->short_bursts = 0;
                burst->thorough_after = fell_short ? MIN_OF(burst->thorough_after * 2, THOROUGH_AFTER_MAX) : 1;
        }
}

/* A pause is no time of the burst. */
static uint64_t running_nsec(const Burst *burst, uint64_t now) {
        return (burst->paused ? burst->paused_nsec : now) - burst->start_nsec;
}

/* What the burst under way made ksmd use. Where ksmd cannot be seen: all the time it was let run. */
static uint64_t ksmd_used_nsec(const Burst *burst) {
        uint64_t now;

        if (burst->start_cpu_nsec == UINT64_MAX)
                return running_nsec(burst, now_nsec());
        if (ksmd_cpu_nsec(burst->ksm, &now) < 0 || now < burst->start_cpu_nsec)
                return 0;
        return now - burst->start_cpu_nsec;
}

static void burst_end(Burst *burst, BurstState state) {
        BurstStats *stats = &burst->stats;
        KsmCounters counters;
        uint64_t run;

        knobs_restore(burst);
        burst->state = state;
        if (ksm_progress(burst->ksm, &counters, &run) == 0)
                count_merged(burst, &counters);
        if (state == BURST_DONE)
                learn(burst);
        stats->bursts++;
        stats->pages_expected += burst->expected_pages;
        stats->pages_merged += burst->merged_pages;
        stats->wall_nsec += running_nsec(burst, now_nsec());
        stats->full_scans += burst->last.full_scans - burst->start.full_scans;
        stats->ksmd_cpu_nsec += ksmd_used_nsec(burst);
        log_debug("KSM burst: %llu of %llu pages merged", (unsigned long long)burst->merged_pages,
                  (unsigned long long)burst->expected_pages);
}

/* Half of what is left by the pace so far: close in on the end, look seldom before it. */
static uint64_t next_interval(const Burst *burst, uint64_t now) {
        uint64_t merged = burst->merged_pages, elapsed = running_nsec(burst, now);
        uint64_t page_nsec = merged > 0 ? elapsed / merged : MERGE_NSEC;
        uint64_t left_nsec = (burst->expected_pages - merged) * MIN_OF(page_nsec, (uint64_t)MERGE_NSEC);

        return clamp_interval(MAX_OF(left_nsec / 2, elapsed / OVERRUN_SHARE));
}

void burst_look_at_all(Burst *burst) {
        burst->short_bursts = burst->thorough_after = 1;
}

BurstState burst_step(Burst *burst) {
        KsmCounters counters;
        uint64_t now, run;

        if (burst->state != BURST_RUNNING)
                return burst->state;
        if (ksm_progress(burst->ksm, &counters, &run) < 0) {
                burst_end(burst, BURST_DONE);
                return burst->state;
        }
        now = now_nsec();
        if (memcmp(&counters, &burst->last, sizeof counters) != 0)
                burst->moved_nsec = now;
        count_merged(burst, &counters);

        if (run != 1)
                burst_end(burst, BURST_FOREIGN); /* somebody stopped it */
        else if (burst->merged_pages >= burst->expected_pages ||
                 counters.full_scans - burst->start.full_scans >= burst->scans_needed ||
                 (!burst->paused && now - burst->moved_nsec > STALLED_NSEC) || /* nothing marked is left */
                 running_nsec(burst, now) > LIMIT_NSEC + burst->marked_pages * LIMIT_PAGE_NSEC)
                burst_end(burst, BURST_DONE);
        else
                burst->interval_nsec = next_interval(burst, now);
        return burst->state;
}

uint64_t burst_interval_nsec(const Burst *burst) { return burst->interval_nsec; }

void burst_stop(Burst *burst) {
        if (burst->state == BURST_RUNNING)
                burst_end(burst, BURST_IDLE);
}

void burst_pause(Burst *burst) {
        int r;

        if (burst->state != BURST_RUNNING || burst->paused)
                return;
        r = ksm_set(burst->ksm, "sleep_millisecs", PAUSED_MSEC);
        if (r != 0) {
                log_debug("KSM burst: cannot be paused, so it ends: %d", r);
                burst_stop(burst);
                return;
        }
        burst->paused_nsec = now_nsec();
        burst->paused = true;
}

void burst_resume(Burst *burst) {
        uint64_t now;
        int r;

        if (burst->state != BURST_RUNNING || !burst->paused)
                return;
        r = ksm_set(burst->ksm, "sleep_millisecs", 0);
        if (r != 0) {
                log_debug("KSM burst: cannot be resumed, so it ends: %d", r);
                burst_stop(burst);
                return;
        }
        now = now_nsec();
        burst->start_nsec += now - burst->paused_nsec;
        burst->moved_nsec = MIN_OF(burst->moved_nsec + (now - burst->paused_nsec), now); /* it finished a batch */
        burst->paused = false;
}

void burst_stats(const Burst *burst, BurstStats *ret) {
        *ret = burst->stats;
        if (burst->state == BURST_RUNNING)
                ret->ksmd_cpu_nsec += ksmd_used_nsec(burst);
}
