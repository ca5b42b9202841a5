/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/stable.h"
#include "merge/pool-space.h"

/*
 * What is to be put in order in a pool and in those who map it, decided without touching anything: what is mapped by
 * one process alone and saves nothing any more.
 */

/* A stretch of a process's addresses that maps consecutive pages of the pool, none of them written or discarded since. */
typedef struct TidyPiece {
        uint64_t address, page;
        uint32_t n_pages;
        uint32_t member;                /* whose it is */
        bool first, last;               /* its mapping begins, ends with it */
} TidyPiece;

typedef struct TidyPieces {
        TidyPiece *pieces;              /* by member, and by address */
        size_t n, allocated;
} TidyPieces;

void tidy_pieces_done(TidyPieces *pieces);

/* What is remembered of a pool from one look to the next. */
typedef struct PoolTidy {
        uint16_t *notes;                /* of each page: how often in a row it was seen alone; TIDY_NOTE_SEEN */
        uint64_t n, allocated;
        uint32_t look;                  /* how many there were */
} PoolTidy;

#define TIDY_NOTE_SEEN (1U << 14)       /* in the look that is under way */
#define TIDY_LOOKS_MAX (TIDY_NOTE_SEEN - 1)

void pool_tidy_done(PoolTidy *tidy);

/* A new page has one mapping until the process with its twin had its turn, which may take some passes when it cannot be
 * called just then: it must have been alone for so many looks. */
#define TIDY_LOOKS_MIN 8U
/* In the middle of a mapping, which becomes three. At one of its ends REMAP_MINIMUM_RUN pages are enough. */
#define TIDY_MIDDLE_PAGES 64U

/* Pages to be put back, because nobody else maps them. */
typedef struct TidyStretch {
        uint64_t address, page;
        uint32_t n_pages;
        uint32_t member;
} TidyStretch;

typedef struct TidyStretches {
        TidyStretch *stretches;         /* by member, and by address */
        size_t n, allocated;
} TidyStretches;

void tidy_stretches_done(TidyStretches *stretches);

/* One look at all pieces there are, whose pages' sharers were counted lately. stable: the domain's, which knows of a
 * content where else it is kept: a copy that is alone because all others are shared as often as may be stays, one for
 * which there is room elsewhere does not. looks: of each member, how long a page of it must have been alone. -ENOMEM:
 * nothing is changed. */
int pool_tidy_look(PoolTidy *tidy, const PoolSpace *space, const Stable *stable, const TidyPieces *pieces,
                   const uint32_t *looks, TidyStretches *ret);
