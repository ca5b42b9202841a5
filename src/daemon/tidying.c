/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Pools are put in order: pages that one process maps alone become its plain memory again, and what lies side by side
 * in all processes but apart in the pool is put together (joining.c). What, is decided by merge/pool-tidy.h; it is
 * carried out by the programs that put back and merge (merge/remap.h), and only where nothing was written since: who
 * puts back what was written says that nobody has it pinned, which in a pass would be said again and again.
 *
 * Nothing here is urgent. A look at all mappings of a pool, and a few milliseconds of work, are had in a pass that had
 * nothing else to do, while others leave CPUs free, and then not until so much time has gone by that all of it is a
 * small part of CPUQuota=. What could not be done is planned anew by a later look.
 *
 * What always holds: between pool_take() and a mapping nobody has his turn. Where something fails, or we are killed,
 * pages are plain, or mapped from one place of the pool or another, and all of that is what the next pass finds and
 * deals with.
 */
#include "daemon/tidying.h"

#include "base/clock.h"
#include "base/log.h"
#include "host/pagemap.h"
#include "merge/remap-plan.h"

#include <string.h>

/* Passes that had something else to do: then it is done all the same. */
#define PATIENCE_PASSES 8U
/* Put back in one go. */
#define CHUNK_PAGES BLOCK_PAGES

static void tidying_done(Tidying *t) {
        free(t->members);
        free(t->looks);
        free(t->fits);
        tidy_pieces_done(&t->pieces);
}

bool tidying_breathe(Tidying *t) {
        t->breath_pages = 0;
        t->over |= manager_breathe(t->pass->manager, 0);
        return !t->over;
}

bool tidying_has_time(const Tidying *t) { return !t->over && !t->lost && now_nsec() < t->until_nsec; }

static bool could_fit(const Member *member) {
        return !passed_over(member) && member->skip == TARGET_OK &&
               (!tidy_guards(TIDY_GUARD_FITS) || !member->remap_refused);
}

bool tidying_fits(const Member *member) {
        return could_fit(member) && (!tidy_guards(TIDY_GUARD_FITS) || remap_target_fits(member->target) == 0);
}

bool tidying_fitted(const Tidying *t, uint32_t k) {
        const Member *member = t->members[k];

        if (!could_fit(member))
                return false;
        if (t->fits[k] == TIDYING_NOT_ASKED)
                t->fits[k] = tidying_fits(member) ? TIDYING_FITS : TIDYING_FITS_NOT;
        return t->fits[k] == TIDYING_FITS;
}

/* The pool's page as it was mapped: neither written nor discarded. */
static bool is_the_pools(uint64_t entry) {
        return pagemap_is_files(entry) || (!tidy_guards(TIDY_GUARD_WRITTEN) && (entry & PAGEMAP_PRESENT));
}

/* The last piece is complete. Of pieces that nobody could do anything with nothing is said, there may be very many. */
static void end_piece(Tidying *t, const Vma *vma) {
        TidyPiece *piece = &t->pieces.pieces[t->pieces.n - 1];

        piece->last = piece->address + piece->n_pages * PAGE_BYTES == vma->end;
        if (piece->n_pages < REMAP_MINIMUM_RUN && !(piece->first && piece->last))
                t->pieces.n--;
}

static int begin_piece(Tidying *t, uint32_t k, const Vma *vma, const Vma *before, uint64_t address) {
        TidyPieces *pieces = &t->pieces;
        const TidyPiece *last = pieces->n > 0 ? &pieces->pieces[pieces->n - 1] : NULL;
        bool beside = last && last->member == k && last->address + last->n_pages * PAGE_BYTES == address;

        if (GROW(pieces->pieces, pieces->n, pieces->allocated) < 0)
                return -ENOMEM;
        pieces->pieces[pieces->n++] = (TidyPiece){
                .address = address,
                .page = (vma->offset + address - vma->start) / PAGE_BYTES,
                .member = k,
                .first = address == vma->start,
                .joins = beside && before && before->advice == vma->advice && before->mergeable == vma->mergeable,
        };
        return 0;
}

static int tell_mapping(Tidying *t, uint32_t k, const Vma *vma, const Vma *before) {
        uint64_t entries[BLOCK_PAGES];
        bool open = false;

        for (uint64_t at = vma->start; at < vma->end;) {
                size_t want = (size_t)MIN_OF((vma->end - at) / PAGE_BYTES, (uint64_t)BLOCK_PAGES), n;
                int r = target_read_pagemap(t->members[k]->target, at, want, entries, &n);

                if (r != 0)
                        return r;
                for (size_t i = 0; i < n; i++, at += PAGE_BYTES) {
                        if (is_the_pools(entries[i])) {
                                r = open ? 0 : begin_piece(t, k, vma, before, at);
                                if (r < 0)
                                        return r;
                                t->pieces.pieces[t->pieces.n - 1].n_pages++;
                                open = true;
                        } else if (open) {
                                end_piece(t, vma);
                                open = false;
                        }
                }
        }
        if (open)
                end_piece(t, vma);
        t->breath_pages += (vma->end - vma->start) / PAGE_BYTES;
        return 0;
}

/* What of a process is not told is not there for the planner, which then finds pages mapped more often than it
 * knows. */
static int tell_member(Tidying *t, uint32_t k) {
        Member *member = t->members[k];
        const Vma *before = NULL;
        size_t n = t->pieces.n;
        int r = manager_refresh_vmas(member);

        if (r == 0)
                manager_note_pooled(t->pass->manager, member);
        for (size_t i = 0; i < member->vmas.n && r == 0; i++) {
                const Vma *vma = &member->vmas.vmas[i];

                if (!remap_vma_is(vma, &t->slot->pool->identity) || !tidying_may_move(vma))
                        continue;
                r = tell_mapping(t, k, vma, before);
                before = vma;
        }
        if (r != 0)
                t->pieces.n = n;
        return r == -ENOMEM ? r : 0;
}

static int tell_all(Tidying *t) {
        const Pass *pass = t->pass;
        int r = 0;

        t->members = calloc(pass->n_members + 1, sizeof(Member *));
        t->looks = calloc(pass->n_members + 1, sizeof *t->looks);
        t->fits = calloc(pass->n_members + 1, sizeof *t->fits);
        if (!t->members || !t->looks || !t->fits)
                return -ENOMEM;
        for (size_t i = 0; i < pass->n_members && r == 0; i++) {
                Member *member = pass->members[i];

                if (passed_over(member) || pass_slot(member) != t->slot || member->pooled == 0 || member->skip != TARGET_OK)
                        continue;
                t->members[t->n] = member;
                t->looks[t->n] = tidy_alone_looks(&member->alone, t->tidy->look);
                r = tell_member(t, t->n++);
                if (t->breath_pages >= BREATH_PAGES && !tidying_breathe(t))
                        return -ECANCELED;
        }
        return r;
}

bool tidying_all_mapped(const Tidying *t, uint64_t page, uint32_t n_pages, uint32_t sharers) {
        uint32_t counts[BLOCK_PAGES];

        if (n_pages > BLOCK_PAGES || pool_refresh(t->pool, page, n_pages, counts) < 0)
                return false;
        for (uint32_t i = 0; i < n_pages; i++)
                if (counts[i] != sharers)
                        return false;
        return true;
}

void tidying_tell_tree(const Tidying *t, uint64_t page, uint32_t n_pages) {
        const PoolSpace *space = pool_space(t->pool);
        uint32_t counts[BLOCK_PAGES];

        if (n_pages > BLOCK_PAGES || pool_refresh(t->pool, page, n_pages, counts) < 0)
                return;
        for (uint64_t i = page; i < page + n_pages; i++)
                if (space->sharers[i] < POOL_RESERVED)
                        (void)stable_set_sharers(t->slot->domain->stable, i, space->sharers[i]);
}

void tidying_note_result(Tidying *t, Member *member, int r, bool plain) {
        t->pass->marks_changed = true;
        t->lost |= r == REMOTE_E_LOST;
        if (passed_over(member))
                return;
        if (r > 0)
                manager_note_remote_error(t->pass->manager, member, r);
        else if (r < 0)
                log_debug("process %d: putting in order: %s", member->target->pid, strerror(-r));
        member->look_again |= plain;
        (void)manager_refresh(t->pass->manager, member);
}

/* Pieces of one member, as much as one go may be, beginning at *done of the first. *first, *done: where to
 * go on. */
static size_t take_chunk(const Tidying *t, const TidyPieces *alone, size_t *first, uint32_t *done, TidyPiece *chunk,
                         size_t max) {
        uint32_t member = alone->pieces[*first].member, room = CHUNK_PAGES;
        size_t n = 0;

        while (*first < alone->n && alone->pieces[*first].member == member && room > 0 && n < max) {
                TidyPiece one = alone->pieces[*first];

                one.address += *done * PAGE_BYTES;
                one.page += *done;
                one.n_pages = MIN_OF(one.n_pages - *done, room);
                room -= one.n_pages;
                *done += one.n_pages;
                if (*done == alone->pieces[*first].n_pages) {
                        ++*first;
                        *done = 0;
                }
                if (tidying_all_mapped(t, one.page, one.n_pages, 1))
                        chunk[n++] = one;
        }
        return n;
}

static void put_back_alone(Tidying *t, const TidyPieces *alone) {
        TidyPiece chunk[REMAP_BATCH_MAX];
        uint32_t done = 0;

        for (size_t i = 0; i < alone->n && tidying_has_time(t);) {
                Member *member = t->members[alone->pieces[i].member];
                _cleanup_(ranges_done) Ranges ranges = {};
                size_t n = take_chunk(t, alone, &i, &done, chunk, ELEMENTSOF(chunk));
                uint64_t pages = 0, wanted = 0;
                int r = 0;

                if (n == 0 || !tidying_fits(member))
                        continue;
                for (size_t k = 0; k < n && r == 0; k++) {
                        wanted += chunk[k].n_pages;
                        r = ranges_append(&ranges, chunk[k].address, chunk[k].address + chunk[k].n_pages * PAGE_BYTES);
                }
                if (r == 0)
                        r = manager_put_back(t->pass->manager, member, t->slot->pool, &ranges, &pages);
                for (size_t k = 0; k < n; k++)
                        tidying_tell_tree(t, chunk[k].page, chunk[k].n_pages);
                member->group->pool_pages_returned += pages;
                if (pages > 0)
                        tidy_alone_note(&member->alone, t->tidy->look);
                tidying_note_result(t, member, r, true);
                log_debug("process %d: %lu pages that nobody shares are its own again", member->target->pid, pages);
                (void)tidying_breathe(t);
                /* In the order of addresses, or it would not become one mapping: the rest of it another time. */
                while (pages < wanted && i < alone->n && t->members[alone->pieces[i].member] == member) {
                        i++;
                        done = 0;
                }
        }
}

static bool tidy_slot(Pass *pass, Slot *slot) {
        _cleanup_(tidying_done) Tidying t = {
                .pass = pass,
                .slot = slot,
                .pool = slot->pool->pool,
                .tidy = &slot->pool->tidy,
        };
        _cleanup_(tidy_pieces_done) TidyPieces alone = {};
        int r = tell_all(&t);

        if (r == 0)
                r = pool_tidy_look(t.tidy, pool_space(t.pool), slot->domain->stable, &t.pieces, t.looks, &alone);
        if (r < 0)
                log_debug("pool of %s cannot be put in order: %s", slot->pool->name, strerror(-r));
        else {
                t.until_nsec = tidy_until_nsec(now_nsec());
                put_back_alone(&t, &alone);
                tidying_join(&t);
        }
        return !t.over && !t.lost;
}

static bool may_be_tidied(const Slot *slot) {
        return slot->pool && slot->route == CONF_ROUTE_REMAP && !slot->dry_run && !slot->trust_problem && !slot->apart;
}

static bool is_due(Pass *pass) {
        const Manager *m = pass->manager;
        Remapping *remapping = m->remapping;
        uint64_t now = now_nsec();

        if (!remapping || m->once || pass->cut || now < remapping->tidy_nsec || now < remapping->uncertain_until_nsec)
                return false;
        if (m->host_busy && manager_quota(m) < m->conf->daemon.cpu_quota)
                return false;
        if (pass->marks_changed && ++remapping->tidy_waited < PATIENCE_PASSES)
                return false;
        remapping->tidy_waited = 0;
        return true;
}

/* One pool after the other, going round, while it takes no longer than what follows from a look. */
int pass_tidy(Pass *pass) {
        Manager *m = pass->manager;
        uint64_t begun = now_nsec();
        bool go_on = true;

        if (!is_due(pass))
                return 0;
        for (size_t i = 0; i < pass->n_slots && go_on; i++) {
                Slot *slot = pass->slots[m->remapping->tidy_turn++ % pass->n_slots];

                if (may_be_tidied(slot))
                        go_on = tidy_slot(pass, slot) && now_nsec() < tidy_until_nsec(begun);
        }
        m->remapping->tidy_nsec = tidy_due_nsec(begun, now_nsec(), manager_quota(m));
        return manager_breathe(m, 0) ? -ECANCELED : 0;
}
