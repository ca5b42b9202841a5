/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/zero.h"

#include "base/clock.h"
#include "base/io.h"
#include "host/uapi.h"
#include "merge/stop-pace.h"
#include "merge/zero-program.h"

#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

/*
 * Carries a plan out in batches, each of which is one stop: all that can be done before and after it is. Where writes
 * are followed, the runs' own userfaultfd lets go of them for that long: a mapping has only one. What came of a batch
 * is read from the page tables, not from what the program said.
 */
#define PAGE_FIRST_NSEC 1200U
#define RUN_UNITS 4U
#define REGIONS 128

struct Zero {
        Remote *remote;
        int devicefd;
        StopPace pace;
};

static int try_move(int devicefd) {
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_MOVE };
        _cleanup_close_ int fd = ioctl(devicefd, USERFAULTFD_IOC_NEW, O_CLOEXEC);

        if (fd < 0)
                return -errno;
        return ioctl(fd, UFFDIO_API, &api) < 0 ? -EOPNOTSUPP : 0;
}

int zero_new(Remote *remote, Zero **ret) {
        _cleanup_close_ int fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        Zero *zero;
        int r;

        if (fd < 0)
                return -errno;
        r = try_move(fd);
        if (r == 0 && syscall(SYS_kcmp, getpid(), getpid(), KCMP_VM, 0, 0) != 0)
                r = -EOPNOTSUPP; /* nothing would tell who shares whose memory */
        if (r < 0)
                return r;
        zero = calloc(1, sizeof *zero);
        if (!zero)
                return -ENOMEM;
        *zero = (Zero){
                .remote = remote,
                .devicefd = TAKE_FD(fd),
                .pace = stop_pace_first(PAGE_FIRST_NSEC, RUN_UNITS),
        };
        *ret = zero;
        return 0;
}

Zero *zero_free(Zero *zero) {
        if (zero)
                safe_close(zero->devicefd);
        free(zero);
        return NULL;
}

static bool has_peer(pid_t pid) {
        _cleanup_closedir_ DIR *proc = NULL;
        bool found = false;

        if (open_directory(AT_FDCWD, "/proc", &proc) < 0)
                return true;
        for (const struct dirent *entry; !found && (entry = readdir(proc));) {
                pid_t other = dirent_pid(entry);

                found = other > 0 && other != pid && syscall(SYS_kcmp, pid, other, KCMP_VM, 0, 0) == 0;
        }
        return found;
}

int zero_target_fits(const Target *target) {
        _cleanup_free_ char *text = NULL;
        const char *locked;
        int r = read_file(target->procfd, "status", &text, NULL);

        if (r < 0)
                return r == -ENOENT || r == -ESRCH ? ZERO_E_GONE : r;
        locked = strstr(text, "\nVmLck:");
        if (locked && strtoul(locked + strlen("\nVmLck:"), NULL, 10) > 0)
                return ZERO_E_LOCKED;
        return has_peer(target->pid) ? ZERO_E_PEER : 0;
}

static void forget(Block *block, unsigned page) {
        page_set_remove(block->zero, page);
        page_set_remove(block->hashed, page);
        page_set_remove(block->twin, page);
        page_set_remove(block->saves, page);
        page_set_remove(block->changed, page);
}

/* Which pages of [start, end), in one block, are filled: there with a frame of their own, or swapped out. */
static int find_filled(const Target *target, uint64_t start, uint64_t end, PageSet ret) {
        PagemapRegion regions[REGIONS];
        PagemapScan scan = {
                .size = sizeof scan,
                .start = start,
                .end = end,
                .vec = (uintptr_t)regions,
                .vec_len = REGIONS,
                .category_anyof_mask = PAGEMAP_SCAN_PRESENT | PAGEMAP_SCAN_SWAPPED,
                .return_mask = PAGEMAP_SCAN_PRESENT | PAGEMAP_SCAN_SWAPPED | PAGEMAP_SCAN_PFNZERO,
        };

        memset(ret, 0, sizeof(PageSet));
        while (scan.start < end) {
                int n = ioctl(target->pagemapfd, PAGEMAP_SCAN_IOCTL, &scan);

                if (n < 0)
                        return errno == ESRCH ? TARGET_E_GONE : -errno;
                for (int i = 0; i < n; i++) {
                        if (regions[i].categories & PAGEMAP_SCAN_PFNZERO)
                                continue;
                        for (uint64_t at = regions[i].start; at < regions[i].end; at += PAGE_BYTES)
                                page_set_add(ret, (unsigned)(at % BLOCK_BYTES / PAGE_BYTES));
                }
                scan.start = pagemap_scan_resume(&scan, regions, n);
        }
        return 0;
}

static int note_run(Space *space, const ZeroRun *run, ZeroResult *result) {
        Block *block = space_find(space, run->start - run->start % BLOCK_BYTES);
        PageSet filled;
        int r = find_filled(space->target, run->start, run->end, filled);

        if (r != 0 || !block)
                return remote_error_of(r);
        for (uint64_t at = run->start; at < run->end; at += PAGE_BYTES) {
                unsigned page = (unsigned)(at % BLOCK_BYTES / PAGE_BYTES);

                forget(block, page);
                if (!page_set_has(filled, page)) {
                        page_set_add(block->hole, page);
                        result->pages_given++;
                }
        }
        return 0;
}

static uint32_t pages_of(const ZeroRun *run) { return (uint32_t)((run->end - run->start) / PAGE_BYTES); }

static uint64_t count_units(const Zero *zero, const ZeroRun *runs, size_t n) {
        uint64_t units = 0;

        for (size_t i = 0; i < n; i++)
                units += stop_pace_units(&zero->pace, pages_of(&runs[i]));
        return units;
}

/* How far a plan was carried out: what comes next is this run, from address at on; 0: all of it. */
typedef struct Progress {
        size_t run;
        uint64_t at;
} Progress;

/* As much of what comes next as a stop has time for: run after run, the last one in part if that is of small pages. */
static size_t choose(const Zero *zero, const ZeroPlan *plan, Progress from, ZeroRun ret[static ZERO_RUNS_MAX]) {
        uint64_t all = MAX_OF(stop_pace_batch(&zero->pace), zero_test_units_min), used = 0;
        size_t n = 0;

        for (size_t i = from.run; i < plan->n && n < ZERO_RUNS_MAX; i++) {
                uint32_t room = stop_pace_room(&zero->pace, all, used), pages;
                ZeroRun run = plan->runs[i];

                if (i == from.run && from.at > 0)
                        run.start = from.at;
                pages = pages_of(&run);
                if (n > 0 && room < (run.huge ? pages : MIN_OF(pages, STOP_PACE_PIECE_MIN)))
                        break;
                if (!run.huge)
                        run.end = run.start + MIN_OF(pages, room) * PAGE_BYTES;
                ret[n++] = run;
                used += stop_pace_units(&zero->pace, pages_of(&run));
        }
        return n;
}

/* A mapping has one userfaultfd: ours that follows writes lets go of the runs, or takes them back. */
static void let_track(Track *track, const ZeroRun *runs, size_t n, bool resume) {
        uint64_t end;
        size_t spanned;

        for (size_t i = 0; track && i < n; i += spanned) {
                spanned = zero_span(runs + i, n - i, &end);
                if (resume)
                        track_resume(track, runs[i].start, end);
                else
                        (void)track_suspend(track, runs[i].start, end);
        }
}

/* *n: of the runs; those that were visited. */
static int give_batch(Zero *zero, Space *space, Track *track, const ZeroRun *runs, size_t *n, ZeroResult *result) {
        RemoteTransaction transaction;
        ZeroBatch batch;
        int r = zero_batch_make(runs, *n, zero->devicefd, &batch);

        if (r < 0)
                return r;
        _cleanup_(remote_program_freep) RemoteProgram *program = batch.program;
        *n = batch.n_runs;
        let_track(track, runs, batch.n_runs, false);
        transaction = (RemoteTransaction){
                .program = program,
                .patience_nsec = zero_test_patience_nsec,
                .run_nsec = MAX_OF(stop_pace_begin_nsec(&zero->pace), zero_test_patience_nsec),
                .expect_nsec = stop_pace_ran_nsec(&zero->pace, count_units(zero, runs, batch.n_runs)),
        };
        r = remote_transact(zero->remote, space->target, &transaction);
        let_track(track, runs, batch.n_runs, true);
        if (r != 0)
                return r;
        *n = MIN_OF(remote_program_get(program, batch.visited), batch.n_runs);
        if (*n == 0)
                return REMOTE_E_BUSY; /* no time, no descriptor, no room for scratch: not now */
        stop_pace_learn(&zero->pace, count_units(zero, runs, *n), transaction.stop_nsec, transaction.ran_nsec);
        result->runs += *n;
        result->pages_back += remote_program_get(program, batch.back) / PAGE_BYTES;
        result->pages_lost += remote_program_get(program, batch.lost);
        result->pages_refused -= remote_program_get(program, batch.taken) / PAGE_BYTES;
        for (size_t i = 0; i < *n; i++) {
                result->pages_refused += pages_of(&runs[i]);
                r = note_run(space, &runs[i], result);
                if (r != 0)
                        return r;
        }
        return 0;
}

int zero_give_back(Zero *zero, Space *space, Track *track, const ZeroPlan *plan, StopPause pause, void *userdata,
                   ZeroResult *ret) {
        for (Progress progress = {}; progress.run < plan->n;) {
                ZeroRun runs[ZERO_RUNS_MAX];
                size_t n = choose(zero, plan, progress, runs);
                int r = give_batch(zero, space, track, runs, &n, ret);

                if (r != 0)
                        return r;
                progress.run += n - 1;
                progress.at = runs[n - 1].end;
                if (progress.at == plan->runs[progress.run].end)
                        progress = (Progress){ .run = progress.run + 1 };
                ret->unfinished = progress.run < plan->n && pause && pause(userdata);
                if (ret->unfinished)
                        break;
        }
        return 0;
}

static int count_block(const Space *space, Block *block, const VmaList *vmas, uint64_t *pages) {
        PageSet filled;
        int r = find_filled(space->target, block->addr, block->addr + BLOCK_BYTES, filled);

        if (r != 0)
                return r;
        for (unsigned page = 0; page < BLOCK_PAGES; page++) {
                if (!page_set_has(block->hole, page))
                        continue;
                if (!page_set_has(filled, page) && vma_list_find(vmas, block->addr + page * PAGE_BYTES)) {
                        (*pages)++;
                        continue;
                }
                page_set_remove(block->hole, page);
                block->refilled |= block->huge;
        }
        return 0;
}

int zero_count(Space *space, const VmaList *vmas, uint64_t *ret_pages) {
        uint64_t pages = 0;

        for (size_t b = 0; b < space->n; b++) {
                int r;

                if (!page_set_any(space->blocks[b]->hole))
                        continue;
                r = count_block(space, space->blocks[b], vmas, &pages);
                if (r != 0)
                        return r;
        }
        *ret_pages = pages;
        return 0;
}
