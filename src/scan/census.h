/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/frames.h"
#include "scan/scan.h"

/*
 * What the frames say of a set of address ranges: the only proof of a saving. A KSM frame that is mapped once saves
 * nothing and counts nowhere: its page need not be asked about, which is what makes this cheap.
 *
 * What processes share because one was forked from the other is no saving of ours: they would without us. So beside the
 * pages that map a merged frame those frames are counted that they would take unmerged.
 */
typedef struct Census {
        uint64_t ksm_mappings;  /* pages that map a KSM frame that is mapped elsewhere too */
        uint64_t ksm_unmerged;  /* frames that these would lie on, were they not merged */
        uint64_t ksm_frames;    /* distinct KSM frames among them */
        int64_t lagging;        /* frames that a page was noted for which has left them, and others lie on still */
        uint64_t zeropage;      /* pages that map the shared zero page */
        uint64_t given;         /* of them, those that did not when they were marked */
        uint64_t given_unmerged; /* frames that these would lie on */
        uint64_t pages;         /* present anonymous pages */
} Census;

/* Frames that relatives shared by fork and that a page was noted for: while some still lie on them nobody else is. */
typedef struct CensusNotes {
        FrameMap frames;
        uint64_t round;
} CensusNotes;

/* Whose pages are counted. */
typedef struct CensusPart {
        Target *target;
        const CensusNotes *notes; /* of its domain; NULL: none were taken */
        const Space *space;     /* NULL: nothing is known of its pages */
        bool all_known;         /* the scanner was told of every merged frame (scanner_set_known_frames()): one that it does
                                 * not know was put in another's place by the kernel, and is to be read again */
        uint64_t kin;           /* the same for all that were forked from one another; 0: it has no relatives among them */
} CensusPart;

/* What one look at a stretch of pages of one block saw. Sets are of pages of the block. */
typedef struct CensusLook {
        uint64_t block;         /* its address */
        unsigned first, n;      /* the pages looked at */
        const uint64_t *entries; /* of the pagemap, one a page */
        PageSet merged;         /* map a KSM frame that is mapped elsewhere too, */
        PageSet zeropage;       /* or the shared zero page */
} CensusLook;
typedef void (*CensusLooked)(void *userdata, const CensusLook *look);

typedef struct CensusFrames CensusFrames; /* the distinct frames met so far, over any number of targets */
int census_frames_new(Scanner *scanner, CensusFrames **ret);
CensusFrames *census_frames_free(CensusFrames *frames);
DEFINE_CLEANUP(CensusFrames, census_frames_free)

/* Adds [start, end) of the target; ksm_frames counts only frames that frames had not met. looked (may be NULL) is told
 * of each block, in pieces by address. TARGET_E_GONE, -errno. */
int census_add(CensusFrames *frames, const CensusPart *part, uint64_t start, uint64_t end, Census *add,
               CensusLooked looked, void *userdata);
/* What the entry of a pagemap says, asking about a frame that is mapped once, too. */
typedef enum CensusPage { CENSUS_ABSENT, CENSUS_MERGED /* KSM's, or the zero page */, CENSUS_OTHER } CensusPage;
CensusPage census_page(const CensusFrames *frames, uint64_t entry);
/* How often the frame was met so far, as a KSM frame; 1 for a KSM frame that was not, 0 for any other. */
uint32_t census_mappings(const CensusFrames *frames, uint64_t pfn);

void census_notes_begin(CensusNotes *notes); /* a new round over everything that is marked */
void census_notes_done(CensusNotes *notes);
/* Notes, in Block.own, which pages of [start, end) have a frame that no other page was noted for: to be asked of
 * everything that is marked, of all who have relatives, right before it is merged. TARGET_E_GONE, -errno. */
int census_note(CensusFrames *frames, CensusNotes *notes, const CensusPart *part, uint64_t start, uint64_t end);
