/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * Which pages of a target were written since we last asked: by a userfaultfd of its memory that write-protects without
 * ever delivering a fault. How, at what price, and what can go wrong: docs/tracking.md.
 */

#define TRACK_CHUNK_BYTES ((uint64_t)128 << 20)

/* What is driven as one: all that is registered within one such stretch of addresses, gaps included; of a mapping that
 * holds only a page here and there a longer stretch. */
typedef struct TrackChunk {
        uint64_t start, end;
        uint32_t due, visited;  /* these and quiet are for whoever drives; 0 at first, kept while the chunk exists */
        uint8_t quiet;
} TrackChunk;

typedef struct TrackRange {
        uint64_t start, end;
} TrackRange;

typedef struct TrackRanges {
        TrackRange *ranges;
        size_t n, allocated;
} TrackRanges;

void track_ranges_done(TrackRanges *ranges);
void track_ranges_sort(TrackRanges *ranges, size_t first); /* by address, from one on */

/* One registered mapping. */
typedef struct TrackMapping {
        uint64_t start, end;
        uint64_t piece_bytes;   /* to be given back at a time */
        bool file;              /* private, of a file: holds pages that nobody here has written */
} TrackMapping;

typedef struct Track {
        int uffd;
        TrackChunk *chunks;     /* by address */
        size_t n, allocated;
        TrackMapping *mappings; /* by address */
        size_t n_mappings, mappings_allocated;
        bool stale;             /* part of it is registered no more: update, with mappings read anew */
        bool grown;             /* the last update covered more than the one before: first writes to that were no faults */
} Track;

/* Takes uffd over, also on failure. -errno: the kernel has no asynchronous write protection (before 6.7), or it is no
 * fresh userfaultfd. */
int track_new(int uffd, Track **ret);

/* Gives everything back piece by piece, so that no piece keeps the target from its mappings for long, then closes.
 * After a target_has_userfaultfd(), update first, with mappings read after it: what is another's is then not
 * touched. */
Track *track_free(Track *track);

/* The same, but until until_nsec (now_nsec()) only, and without closing: for what takes 0.1 s a GiB and need not be done
 * in one go. true: nothing is registered any more. */
bool track_release(Track *track, uint64_t until_nsec);
DEFINE_CLEANUP(Track, track_free)

/* Mappings just read that are tracked, and by us, count as if they were not. To be called on every list before anybody
 * else looks at it; track may be NULL. */
void track_claim(const Track *track, VmaList *vmas);

/* Registers what qualifies and is not yet, gives back what must not be tracked any more, forgets what is gone.
 * vmas: read after the last update, and claimed. A mapping that cannot be registered is not covered. TARGET_E_GONE:
 * the memory is gone, by the end of the process or execve(2). -errno: nothing is known, free it. */
int track_update(Track *track, const Target *target, const VmaList *vmas);

/* Lifts protection; all of it counts as written. */
void track_unprotect(Track *track, uint64_t start, uint64_t end);

bool track_covers(const Track *track, uint64_t addr);

/* Appends, by address, the present pages in what is covered of [start, end) that were written since they were last
 * protected, or may have been; not those of huge pages, nor of files. protect: and protects them again, atomically with
 * looking: what is read of them afterwards is at least as new, and what is written after that is reported again.
 * Several threads may ask at once, of different parts. TARGET_E_GONE; -errno: what was written may be forgotten by now,
 * free the track. */
int track_written(Track *track, const Target *target, uint64_t start, uint64_t end, bool protect,
                  TrackRanges *ranges);

/* [start, end), within one mapping, belongs to another userfaultfd for a moment: what is written in it meanwhile is not
 * seen, and track_resume() makes all of it count as written. -errno: it could not be given back, nothing changed. */
int track_suspend(const Track *track, uint64_t start, uint64_t end);
void track_resume(Track *track, uint64_t start, uint64_t end);
