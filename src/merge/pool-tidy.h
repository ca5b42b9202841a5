/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/stable.h"
#include "merge/pool-space.h"
#include "merge/tidy-pace.h"

/*
 * What is to be put in order in a pool and in those who map it, decided without touching anything: what is mapped by
 * one process alone and saves nothing any more (pool-tidy.c), and what lies side by side in processes but apart in the
 * pool, so that each of them has several mappings where one would do (pool-apart.c).
 */

/* A stretch of a process's addresses that maps consecutive pages of the pool, none of them written or discarded
 * since. */
typedef struct TidyPiece {
        uint64_t address, page;
        uint32_t n_pages;
        uint32_t member;                /* whose it is */
        bool first, last;               /* its mapping begins, ends with it */
        bool joins;                     /* it begins where the one before ends, in a mapping with the same flags */
} TidyPiece;

typedef struct TidyPieces {
        TidyPiece *pieces;              /* by member, and by address */
        size_t n, allocated;
} TidyPieces;

void tidy_pieces_done(TidyPieces *pieces);

/* What is remembered of a pool from one look to the next. */
typedef struct PoolTidy {
        uint16_t *notes;                /* of each page: how often in a row it was seen alone; TIDY_NOTE_* */
        uint64_t n, allocated;
        uint32_t look;                  /* how many there were */
        TidyWait again;                 /* what had been moved before was moved */
} PoolTidy;

#define TIDY_NOTE_MOVED (1U << 15)      /* it was put where it is to lie beside its neighbours */
#define TIDY_NOTE_SEEN (TIDY_LOOKS_MAX + 1) /* in the look that is under way */

void pool_tidy_done(PoolTidy *tidy);

/* In the middle of a mapping, which becomes three. At one of its ends REMAP_MINIMUM_RUN pages are enough. */
#define TIDY_MIDDLE_PAGES 64U

/* One look at all pieces there are, whose pages' sharers were counted lately. stable: the domain's, which knows of a
 * content where else it is kept: a copy that is alone because all others are shared as often as may be stays, one for
 * which there is room elsewhere does not. looks: of each member, how long a page of it must have been alone. *ret: the
 * parts of pieces that are to be put back. -ENOMEM: nothing is changed. */
int pool_tidy_look(PoolTidy *tidy, const PoolSpace *space, const Stable *stable, const TidyPieces *pieces,
                   const uint32_t *looks, TidyPieces *ret);

/* Pages of the pool that are to lie one after the other, and where they are mapped: in all places at all of them, one
 * after the other. */
typedef struct TidyPart {
        uint64_t page;
        uint32_t n_pages;
} TidyPart;

typedef struct TidyPlace {
        uint64_t address;
        uint32_t member;
} TidyPlace;

typedef struct TidyUnit {
        size_t parts, n_parts;          /* the first of them in the plan's; how many */
        size_t places, n_places;
        uint32_t n_pages;               /* at most POOL_RUN_MAX */
        uint64_t saved;                 /* mappings, over all places */
        bool again;                     /* some of it was moved before */
} TidyUnit;

typedef struct TidyPlan {
        TidyUnit *units;                /* what saves most for its pages first; disjoint */
        TidyPart *parts;
        TidyPlace *places;
        size_t n, allocated, n_parts, parts_allocated, n_places, places_allocated;
} TidyPlan;

void tidy_plan_done(TidyPlan *plan);

/* Worth it: one mapping less for so many pages that are put back and mapped anew, some 3 ms of work; where a process is
 * short of mappings, any. */
#define TIDY_PAGES_A_MAPPING 256U
/* Put back and mapped anew for one unit, in all processes together. */
#define TIDY_UNIT_PAGES_MAX 16384U

/* A process that maps a pool has so many mappings, of as many as route remap lets it have; left: pages that were not
 * merged for want of them. */
bool tidy_short_of_mappings(uint64_t mappings, uint64_t mappings_max, uint64_t left);

/* Of the pieces of the last look. What was moved before and came apart again waits (tidy_again_waits()). -ENOMEM. */
int pool_tidy_plan(const PoolTidy *tidy, const PoolSpace *space, const TidyPieces *pieces, bool short_of_mappings,
                   TidyPlan *ret);
/* The unit was carried out, or tried, and its pages are these now. again: some of it was moved before; done: in all
 * places. */
void pool_tidy_moved(PoolTidy *tidy, uint64_t page, uint32_t n_pages, bool again, bool done);
