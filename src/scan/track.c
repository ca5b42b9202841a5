/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A userfaultfd with asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7): a page is protected, the first
 * write to it lifts the protection in the kernel's own fault handler, and PAGEMAP_SCAN tells which pages are without,
 * and protects them again under the same lock. No fault is delivered, nobody is ever waited for: should we die, the
 * kernel closes the descriptor and everything is as before.
 *
 * What always holds:
 *   - What is said to be covered reports every write. The kernel drops the registration of what is moved (mremap) or
 *     mapped anew at the same address, and says nothing; so each scan also asks for present pages that are not
 *     registered, and reports them all as written until an update has registered them.
 *   - A huge page is never protected: the next write would split it. And page tables are never filled with marks for
 *     pages that are not there: only what is PRESENT is matched.
 *   - Nothing is registered that somebody else registered (the kernel says EBUSY), that is left alone anyhow
 *     (VmaSkip), or that grows by itself (the main stack).
 *
 * Registering and giving back change nothing but flags of a mapping, and set the kernel to split and merge mappings
 * where their flags come to differ. Giving back also walks the page tables to lift all protection, under the mmap lock
 * held for writing: hence in pieces. They are cut at multiples of 2 MiB, where no huge page is split by it.
 */
#include "scan/track.h"

#include "base/clock.h"
#include "host/uapi.h"

#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#define REGIONS 512
/* One call covers no more, and protects no more pages than these: each takes a millisecond of the target's mmap lock. */
#define CALL_BYTES ((uint64_t)1 << 30)
#define CALL_PAGES (TRACK_CHUNK_BYTES / PAGE_BYTES)
/* In a sparse mapping a chunk is made to hold so many pages, each of which may need a page table looked through. */
#define SPARSE_PAGES 64U
#define SPARSE_CHUNK_BYTES ((uint64_t)1 << 40)
/* Walking so much that is not registered costs less than another call. */
#define BRIDGE_BYTES ((uint64_t)1 << 20)
/* Lifting protection takes some 100 ns a page: an eighth of a chunk is half a millisecond. */
#define PIECES_IN_CHUNK 8U
#define REST_AFTER_NSEC (200 * NSEC_PER_USEC)

int track_new(int uffd, Track **ret) {
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_WP_ASYNC };
        _cleanup_close_ int fd = uffd;
        Track *track;

        if (ioctl(fd, UFFDIO_API, &api) < 0)
                return -errno;
        track = calloc(1, sizeof *track);
        if (!track)
                return -ENOMEM;
        track->uffd = TAKE_FD(fd);
        *ret = track;
        return 0;
}

static int register_range(int uffd, uint64_t start, uint64_t end) {
        struct uffdio_register reg = { .range = { start, end - start }, .mode = UFFDIO_REGISTER_MODE_WP };

        return ioctl(uffd, UFFDIO_REGISTER, &reg) < 0 ? -errno : 0;
}

static uint64_t next_multiple(uint64_t address, uint64_t unit) { return (address / unit + 1) * unit; }

/* A mapping may have been ours, or an earlier daemon's, before: where mremap(2) merges what it moves with its new
 * neighbours, the kernel drops the registration of all of them and leaves the marks of protection in their pages
 * (mremap_userfaultfd_prep(), 6.18). What is written then lifts none of them, and would look protected once it is
 * registered again. So they are lifted here. */
static void lift_old_marks(int uffd, uint64_t start, uint64_t end, uint64_t piece_bytes) {
        for (uint64_t at = start, stop; at < end; at = stop) {
                struct uffdio_writeprotect lift = { .mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE };

                stop = MIN_OF(end, next_multiple(at, piece_bytes));
                lift.range.start = at;
                lift.range.len = stop - at;
                (void)ioctl(uffd, UFFDIO_WRITEPROTECT, &lift);
        }
}

void track_unprotect(Track *track, uint64_t start, uint64_t end) {
        lift_old_marks(track->uffd, start, end, end - start);
}

/* The first page with such a mark; end: there is none. To look costs a hundredth of lifting. */
static uint64_t first_old_mark(const Target *target, uint64_t start, uint64_t end) {
        PagemapRegion region;
        PagemapScan scan = {
                .size = sizeof scan,
                .start = start,
                .vec = (uintptr_t)&region,
                .vec_len = 1,
                .max_pages = 1,
                .category_mask = PAGEMAP_SCAN_WRITTEN,
                .category_inverted = PAGEMAP_SCAN_WRITTEN,
                .category_anyof_mask = PAGEMAP_SCAN_PRESENT | PAGEMAP_SCAN_SWAPPED,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };

        for (; scan.start < end; scan.start = scan.end) {
                int n;

                scan.end = MIN_OF(end, next_multiple(scan.start, CALL_BYTES));
                n = ioctl(target->pagemapfd, PAGEMAP_SCAN_IOCTL, &scan);
                if (n != 0) /* where it cannot be told, all counts as written */
                        return n < 0 ? scan.start : region.start;
        }
        return end;
}

/* Registering answers ENOMEM both for too many mappings and for an address space that is gone; this tells, and at
 * the most makes one page count as written. */
static bool is_gone(int uffd, uint64_t addr) {
        struct uffdio_writeprotect allow = { .range = { addr, PAGE_BYTES }, .mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE };

        return ioctl(uffd, UFFDIO_WRITEPROTECT, &allow) < 0 && errno == ESRCH;
}

static int unregister_range(int uffd, uint64_t start, uint64_t end) {
        struct uffdio_range range = { start, end - start };

        return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

/* The lock goes to whoever asks first, and that would be us: so whenever it was kept for some time, it is left
 * alone for as long. */
static void rest(uint64_t *began) {
        uint64_t now = now_nsec();
        struct timespec pause = { .tv_nsec = (long)MIN_OF(now - *began, NSEC_PER_SEC - 1) };

        if (now - *began < REST_AFTER_NSEC)
                return;
        clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
        *began = now_nsec();
}

/* What is not there any more is not an error; where there are too many mappings already to cut this one, all at once.
 * *began: when the last rest ended. */
static void give_back(int uffd, uint64_t start, uint64_t end, uint64_t piece_bytes, uint64_t *began) {
        for (uint64_t at = start, stop; at < end; at = stop) {
                stop = MIN_OF(end, next_multiple(at, piece_bytes));
                if (unregister_range(uffd, at, stop) == -ENOMEM) {
                        (void)unregister_range(uffd, at, end);
                        return;
                }
                rest(began);
        }
}

Track *track_free(Track *track) {
        uint64_t began = now_nsec();

        if (!track)
                return NULL;
        for (size_t i = 0; i < track->n_mappings; i++)
                give_back(track->uffd, track->mappings[i].start, track->mappings[i].end, track->mappings[i].piece_bytes,
                          &began);
        safe_close(track->uffd);
        free(track->chunks);
        free(track->mappings);
        free(track);
        return NULL;
}

bool track_release(Track *track, uint64_t until_nsec) {
        uint64_t began = now_nsec();

        track->stale = true;
        while (track->n_mappings > 0 && now_nsec() < until_nsec) {
                TrackMapping *last = &track->mappings[track->n_mappings - 1];
                uint64_t at = MAX_OF(last->start, (last->end - 1) / last->piece_bytes * last->piece_bytes);

                /* Where there are too many mappings to cut this one, closing gives it back. */
                (void)unregister_range(track->uffd, at, last->end);
                last->end = at;
                track->n_mappings -= at == last->start;
                rest(&began);
        }
        return track->n_mappings == 0;
}

/* The first mapping that ends above addr. */
static size_t find_mapping(const Track *track, uint64_t addr) {
        return FIRST_BEHIND(track->mappings, track->n_mappings, addr);
}

bool track_covers(const Track *track, uint64_t addr) {
        size_t i = find_mapping(track, addr);

        return i < track->n_mappings && track->mappings[i].start <= addr;
}

/* A mapping has one userfaultfd: where part of it is ours, all of it is, also what it has grown by. *at: the mapping of
 * ours to go on with. */
static bool is_ours(const Track *track, size_t *at, const Vma *vma) {
        while (*at < track->n_mappings && track->mappings[*at].end <= vma->start)
                ++*at;
        return vma->tracked && *at < track->n_mappings && track->mappings[*at].start < vma->end;
}

void track_claim(const Track *track, VmaList *vmas) {
        size_t at = 0;

        for (size_t i = 0; track && i < vmas->n; i++)
                if (is_ours(track, &at, &vmas->vmas[i]))
                        vma_claim(&vmas->vmas[i]);
}

/* Extends the last chunk, or begins one: by address, one for each stretch. old: what to inherit from. */
static int add_chunk(Track *new, const Track *old, size_t *at, uint64_t start, uint64_t end) {
        TrackChunk *last = new->n ? &new->chunks[new->n - 1] : NULL;
        TrackChunk chunk = { .start = start, .end = end };

        if (last && last->start / TRACK_CHUNK_BYTES == start / TRACK_CHUNK_BYTES) {
                last->end = end;
                return 0;
        }
        while (*at < old->n && old->chunks[*at].start / TRACK_CHUNK_BYTES < start / TRACK_CHUNK_BYTES)
                ++*at;
        if (*at < old->n && old->chunks[*at].start / TRACK_CHUNK_BYTES == start / TRACK_CHUNK_BYTES) {
                chunk.due = old->chunks[*at].due;
                chunk.visited = old->chunks[*at].visited;
                chunk.quiet = old->chunks[*at].quiet;
        }
        if (GROW(new->chunks, new->n, new->allocated) < 0)
                return -ENOMEM;
        new->chunks[new->n++] = chunk;
        return 0;
}

static uint64_t chunk_bytes(const Vma *vma) {
        uint64_t pages = vma->anonymous_bytes / PAGE_BYTES + 1, bytes = TRACK_CHUNK_BYTES;

        while (bytes < SPARSE_CHUNK_BYTES && bytes < vma->end - vma->start &&
               pages <= (vma->end - vma->start) / (2 * bytes) * SPARSE_PAGES)
                bytes *= 2;
        return bytes;
}

static uint64_t piece_bytes(const Vma *vma) { return chunk_bytes(vma) / PIECES_IN_CHUNK; }

static int add_mapping(Track *new, const Track *old, size_t *at, const Vma *vma) {
        uint64_t bytes = chunk_bytes(vma);

        for (uint64_t start = vma->start, end; start < vma->end; start = end) {
                int r;

                end = MIN_OF(vma->end, next_multiple(start, bytes));
                r = add_chunk(new, old, at, start, end);
                if (r < 0)
                        return r;
        }
        if (GROW(new->mappings, new->n_mappings, new->mappings_allocated) < 0)
                return -ENOMEM;
        new->mappings[new->n_mappings++] = (TrackMapping) { vma->start, vma->end, piece_bytes(vma), vma->file };
        return 0;
}

/* Whether it is registered in the end: 1, 0; -ESRCH: there is no memory any more. One that was made read-only stays
 * registered: it may be made writable, and written, before we look again. */
static int adjust(const Track *track, const Target *target, const Vma *vma, bool ours) {
        bool wanted = vma->skip == VMA_OK && !vma->growsdown;
        uint64_t began = now_nsec();
        int r;

        if (ours && !wanted)
                give_back(track->uffd, vma->start, vma->end, piece_bytes(vma), &began);
        if (ours || !wanted || !vma->write)
                return ours && wanted;
        r = register_range(track->uffd, vma->start, vma->end);
        if (r == 0)
                lift_old_marks(track->uffd, first_old_mark(target, vma->start, vma->end), vma->end, piece_bytes(vma));
        return r == -ENOMEM && is_gone(track->uffd, vma->start) ? -ESRCH : r == 0;
}

/* All of it was covered before. at: the first mapping of ours that ends behind its start. */
static bool was_covered(const Track *track, size_t at, const Vma *vma) {
        uint64_t end = vma->start;

        for (; at < track->n_mappings && track->mappings[at].start <= end && end < vma->end; at++)
                end = track->mappings[at].end;
        return end >= vma->end;
}

int track_update(Track *track, const Target *target, const VmaList *vmas) {
        Track new = {};
        size_t at_mapping = 0, at_chunk = 0;
        int r = 0;

        for (size_t i = 0; i < vmas->n && r >= 0; i++) {
                const Vma *vma = &vmas->vmas[i];
                bool ours = is_ours(track, &at_mapping, vma);

                r = adjust(track, target, vma, ours);
                if (r > 0) {
                        new.grown |= !ours || !was_covered(track, at_mapping, vma);
                        r = add_mapping(&new, track, &at_chunk, vma);
                }
        }
        if (r < 0) {
                free(new.chunks);
                free(new.mappings);
                return r == -ESRCH ? TARGET_E_GONE : r;
        }
        free(track->chunks);
        free(track->mappings);
        new.uffd = track->uffd;
        *track = new;
        return 0;
}

typedef struct Found {
        TrackRanges *ranges;
        size_t first;           /* of this call */
} Found;

static int add_range(Found *found, uint64_t start, uint64_t end) {
        TrackRanges *all = found->ranges;
        TrackRange *last = all->n > found->first ? &all->ranges[all->n - 1] : NULL;

        if (last && last->end == start) {
                last->end = end;
                return 0;
        }
        if (GROW(all->ranges, all->n, all->allocated) < 0)
                return -ENOMEM;
        all->ranges[all->n++] = (TrackRange) { start, end };
        return 0;
}

/* Adds what of the region is covered. *at: the mapping to go on with. */
static int add_region(const Track *track, size_t *at, uint64_t start, uint64_t end, Found *found) {
        while (*at < track->n_mappings && track->mappings[*at].end <= start)
                ++*at;
        for (size_t i = *at; i < track->n_mappings && track->mappings[i].start < end; i++) {
                int r = add_range(found, MAX_OF(start, track->mappings[i].start), MIN_OF(end, track->mappings[i].end));
                if (r < 0)
                        return r;
        }
        return 0;
}

/* Makes the calls for [scan->start, end), all of whose mappings from at on are of one kind. */
static int scan_span(const Track *track, int pagemapfd, PagemapScan *scan, uint64_t end, size_t at, Found *found) {
        PagemapRegion regions[REGIONS];

        scan->size = sizeof *scan;
        scan->vec = (uintptr_t)regions;
        scan->vec_len = REGIONS;
        scan->max_pages = CALL_PAGES;
        while (scan->start < end) {
                uint64_t pages = 0;
                int n;

                scan->end = MIN_OF(end, next_multiple(scan->start, CALL_BYTES));
                n = ioctl(pagemapfd, PAGEMAP_SCAN_IOCTL, scan);
                if (n < 0)
                        return errno == ESRCH ? TARGET_E_GONE : -errno;
                for (int i = 0; i < n; i++) {
                        int r = add_region(track, &at, regions[i].start, regions[i].end, found);
                        if (r < 0)
                                return r;
                        pages += (regions[i].end - regions[i].start) / PAGE_BYTES;
                }
                scan->start = pages == CALL_PAGES ? regions[n - 1].end : pagemap_scan_resume(scan, regions, n);
        }
        return 0;
}

/* Where the mappings that adjoin the one at *i end; *i: the one behind them. */
static uint64_t run_end(const Track *track, size_t *i) {
        uint64_t end = track->mappings[(*i)++].end;

        for (; *i < track->n_mappings && track->mappings[*i].start == end; ++*i)
                end = track->mappings[*i].end;
        return end;
}

/* The same, but protecting only what is covered: what lies in a gap may be what one of our mappings has grown by, of which
 * nothing is reported yet, or may be tracked by a userfaultfd of the process's own. A call that protects takes 2 us, so it
 * is made only where a look shows that there is anything. */
static int protect_span(const Track *track, int pagemapfd, PagemapScan *scan, uint64_t end, size_t at, Found *found) {
        _cleanup_(track_ranges_done) TrackRanges seen = {};
        PagemapScan look = *scan;
        uint64_t start = scan->start;
        size_t next = at;
        int r;

        if (end <= run_end(track, &next))
                return scan_span(track, pagemapfd, scan, end, at, found);
        look.flags = 0;
        r = scan_span(track, pagemapfd, &look, end, at, &(Found){ .ranges = &seen });
        for (size_t i = at, k = 0; r == 0 && i < track->n_mappings && track->mappings[i].start < end;) {
                uint64_t stop;

                at = i;
                scan->start = MAX_OF(start, track->mappings[at].start);
                stop = MIN_OF(end, run_end(track, &i));
                while (k < seen.n && seen.ranges[k].end <= scan->start)
                        k++;
                if (k < seen.n && seen.ranges[k].start < stop)
                        r = scan_span(track, pagemapfd, scan, stop, at, found);
        }
        return r;
}

static int compare_ranges(const void *a, const void *b) {
        const TrackRange *x = a, *y = b;

        return x->start < y->start ? -1 : x->start > y->start;
}

void track_ranges_sort(TrackRanges *ranges, size_t first) {
        if (ranges->n > first)
                qsort(ranges->ranges + first, ranges->n - first, sizeof *ranges->ranges, compare_ranges);
}

void track_ranges_done(TrackRanges *ranges) {
        free(ranges->ranges);
        *ranges = (TrackRanges) {};
}

/* By address, each page once: what was mapped anew between two calls may be in both answers. */
static void put_in_order(TrackRanges *all, size_t first) {
        TrackRange *ranges = all->ranges;
        size_t n = first;

        track_ranges_sort(all, first);
        for (size_t i = first; i < all->n; i++)
                if (n > first && ranges[i].start <= ranges[n - 1].end)
                        ranges[n - 1].end = MAX_OF(ranges[n - 1].end, ranges[i].end);
                else
                        ranges[n++] = ranges[i];
        all->n = n;
}

static int written_in_span(Track *track, int pagemapfd, uint64_t start, uint64_t end, size_t at, bool protect,
                           Found *found) {
        const uint64_t file = track->mappings[at].file ? PAGEMAP_SCAN_FILE : 0; /* costs a look at each page's frame */
        PagemapScan lost = {
                .start = start,
                .category_mask = PAGEMAP_SCAN_WPALLOWED | PAGEMAP_SCAN_PRESENT | PAGEMAP_SCAN_HUGE | file,
                .category_inverted = PAGEMAP_SCAN_WPALLOWED | PAGEMAP_SCAN_HUGE | file,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };
        PagemapScan written = {
                .flags = protect ? PAGEMAP_SCAN_PROTECT : 0,
                .start = start,
                .category_mask = PAGEMAP_SCAN_WPALLOWED | PAGEMAP_SCAN_WRITTEN | PAGEMAP_SCAN_PRESENT |
                                 PAGEMAP_SCAN_HUGE | file,
                .category_inverted = PAGEMAP_SCAN_HUGE | file,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };
        size_t first = found->ranges->n, n;
        int r;

        found->first = first;
        r = (protect ? protect_span : scan_span)(track, pagemapfd, &written, end, at, found);
        if (r != 0)
                return r;
        found->first = n = found->ranges->n;
        r = scan_span(track, pagemapfd, &lost, end, at, found);
        if (found->ranges->n > n) {
                __atomic_store_n(&track->stale, true, __ATOMIC_RELAXED); /* others may look at other parts now */
                put_in_order(found->ranges, first);
        }
        return r;
}

int track_written(Track *track, const Target *target, uint64_t start, uint64_t end, bool protect,
                  TrackRanges *ranges) {
        Found found = { ranges, ranges->n };

        /* As few calls as may be: mappings of one kind that lie close together in one. */
        for (size_t i = find_mapping(track, start), first; i < track->n_mappings && track->mappings[i].start < end;) {
                uint64_t stop = track->mappings[first = i++].end;
                int r;

                for (; i < track->n_mappings && track->mappings[i].start - stop <= BRIDGE_BYTES &&
                       track->mappings[i].file == track->mappings[first].file; i++)
                        stop = track->mappings[i].end;
                r = written_in_span(track, target->pagemapfd, MAX_OF(start, track->mappings[first].start),
                                    MIN_OF(end, stop), first, protect, &found);
                if (r != 0)
                        return r;
        }
        return 0;
}

/* Giving back lifts the protection of every page (userfaultfd_unregister(), 6.18), and what is present without it
 * counts as written. Where registering fails, the mapping being gone or there being too many, the next scan finds pages
 * that are not registered. */
int track_suspend(const Track *track, uint64_t start, uint64_t end) {
        return track_covers(track, start) ? unregister_range(track->uffd, start, end) : 0;
}

void track_resume(Track *track, uint64_t start, uint64_t end) {
        if (track_covers(track, start) && register_range(track->uffd, start, end) < 0)
                track->stale = true;
}
