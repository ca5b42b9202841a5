/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Which pages of a pool save nothing: one process maps them, and nobody else. As plain memory they could be swapped
 * out, written without a copy, and merged again.
 *
 * How long a page has been alone is counted in looks, two bytes a page of the pool. The count ends whenever a page is
 * not met, or met with others: written and discarded pages are in no piece. Numbers of pages are given out anew; a note
 * that outlives its page is gone by the next look, when nobody maps the page, or says of the new one that it was moved,
 * which costs a wait and nothing else.
 */
#include "merge/pool-tidy.h"

#include "merge/remap-plan.h"

#include <string.h>

void tidy_pieces_done(TidyPieces *pieces) {
        free(pieces->pieces);
        *pieces = (TidyPieces){};
}

void pool_tidy_done(PoolTidy *tidy) {
        free(tidy->notes);
        *tidy = (PoolTidy){};
}

static int grow(PoolTidy *tidy, uint64_t n) {
        if (n > tidy->allocated) {
                uint64_t want = MAX_OF(n, tidy->allocated * 2);
                uint16_t *grown = reallocarray(tidy->notes, want, sizeof *grown);

                if (!grown)
                        return -ENOMEM;
                tidy->notes = grown;
                tidy->allocated = want;
        }
        if (n > tidy->n) {
                memset(tidy->notes + tidy->n, 0, (n - tidy->n) * sizeof *tidy->notes);
                tidy->n = n;
        }
        return 0;
}

/* There is no other copy of its content, or one that more could map. Where children that were forked map others more
 * often than we ever would, that is found out later. */
static bool is_needless(const PoolSpace *space, const Stable *stable, uint64_t page) {
        StableHit hit;
        uint64_t key;

        if (!stable_has_frame(stable, page, &key) || !stable_lookup(stable, key, &hit) || hit.n_dups <= 1)
                return true;
        return hit.n_sharing - 1 < (uint64_t)(hit.n_dups - 1) * space->max_sharing;
}

/* Takes down that the page was met, and says for how many looks in a row it has been alone. */
static uint32_t note(PoolTidy *tidy, const PoolSpace *space, const Stable *stable, uint64_t page) {
        uint16_t *notes = &tidy->notes[page];
        uint32_t looks = *notes & TIDY_LOOKS_MAX;
        bool alone = space->sharers[page] == 1 && !(*notes & TIDY_NOTE_SEEN) && is_needless(space, stable, page);

        looks = alone ? MIN_OF(looks + 1, TIDY_LOOKS_MAX) : 0;
        *notes = (uint16_t)((*notes & TIDY_NOTE_MOVED) | TIDY_NOTE_SEEN | looks);
        return looks;
}

/* Worth the mappings that it costs. */
static bool is_worth(const TidyPiece *piece, uint32_t from, uint32_t to) {
        bool at_start = from == 0 && piece->first, at_end = to == piece->n_pages && piece->last;

        return (at_start && at_end) || to - from >= (at_start || at_end ? REMAP_MINIMUM_RUN : TIDY_MIDDLE_PAGES);
}

static int look_at(PoolTidy *tidy, const PoolSpace *space, const Stable *stable, const TidyPiece *piece, uint32_t looks,
                   TidyPieces *out) {
        uint32_t first = 0;

        for (uint32_t i = 0; i <= piece->n_pages; i++) {
                if (i < piece->n_pages && note(tidy, space, stable, piece->page + i) >= looks)
                        continue;
                if (first < i && is_worth(piece, first, i)) {
                        if (GROW(out->pieces, out->n, out->allocated) < 0)
                                return -ENOMEM;
                        out->pieces[out->n++] = (TidyPiece){
                                .address = piece->address + first * PAGE_BYTES,
                                .page = piece->page + first,
                                .n_pages = i - first,
                                .member = piece->member,
                                .first = first == 0 && piece->first,
                                .last = i == piece->n_pages && piece->last,
                        };
                }
                first = i + 1;
        }
        return 0;
}

int pool_tidy_look(PoolTidy *tidy, const PoolSpace *space, const Stable *stable, const TidyPieces *pieces,
                   const uint32_t *looks, TidyPieces *ret) {
        _cleanup_(tidy_pieces_done) TidyPieces out = {};
        int r = grow(tidy, space->n);

        if (r < 0)
                return r;
        for (size_t i = 0; i < pieces->n && r == 0; i++) {
                const TidyPiece *piece = &pieces->pieces[i];

                if (piece->page + piece->n_pages <= space->n)
                        r = look_at(tidy, space, stable, piece, looks[piece->member], &out);
        }
        for (uint64_t page = 0; page < tidy->n; page++)
                tidy->notes[page] = tidy->notes[page] & TIDY_NOTE_SEEN ? (uint16_t)(tidy->notes[page] & ~TIDY_NOTE_SEEN) : 0;
        tidy->look++;
        if (r < 0)
                return r;
        *ret = out;
        out = (TidyPieces){};
        return 0;
}

void pool_tidy_moved(PoolTidy *tidy, uint64_t page, uint32_t n_pages, bool again, bool done) {
        if (grow(tidy, page + n_pages) == 0)
                for (uint32_t i = 0; i < n_pages; i++)
                        tidy->notes[page + i] = TIDY_NOTE_MOVED;
        if (again)
                tidy_again_note(&tidy->again, tidy->look, done);
}
