/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What lies side by side in processes but apart in the pool (merge/pool-apart.c) is copied to new pages of the pool,
 * one after the other. Then, in one process after the other, what maps the old ones is put back, and mapped to the new
 * ones at once: two things that are done to processes all the time, with all that makes each of them safe. In between
 * the process runs, and may write: the program that maps compares. So the copy is not believed either, and needs no
 * second look.
 *
 * Nobody else does anything in between: the event loop has its turn before and after, when what is taken of the pool
 * is mapped.
 *
 * What saves memory is that in the end nobody maps the old pages, which pool_collect() frees. Where it fails in the
 * first process it is given up. Where it fails in a later one, the others go on: what is plain in that one is merged
 * by the next pass, as all that is plain; what still maps the old pages is alone with them, and is put back when it
 * has been so for long (tidying.c). Where it fails in several both copies stay. What was tried waits longer each time
 * it fails (tidy_again_note()).
 *
 * No page is mapped more often than before: the old ones were by as many, and by nobody else.
 */
#include "daemon/tidying.h"

#include "base/log.h"

#include <string.h>

/* How often in a row nothing may be put back. */
#define TRIES_MAX 4U

static const TidyPlace *place_of(const TidyPlan *plan, const TidyUnit *unit, size_t i) {
        return &plan->places[unit->places + i];
}

static const TidyPart *part_of(const TidyPlan *plan, const TidyUnit *unit, size_t i) {
        return &plan->parts[unit->parts + i];
}

/* Those who map the pages are still those that were seen, and all of them can be called. */
static bool is_ready(const Tidying *t, const TidyPlan *plan, const TidyUnit *unit) {
        for (size_t i = 0; i < unit->n_parts; i++) {
                const TidyPart *part = part_of(plan, unit, i);

                if (!tidying_all_mapped(t, part->page, part->n_pages, (uint32_t)unit->n_places))
                        return false;
        }
        for (size_t i = 0; i < unit->n_places; i++)
                if (!tidying_fitted(t, place_of(plan, unit, i)->member))
                        return false;
        return true;
}

/* They are more of what the chain of each content has. */
static int copy(const Tidying *t, const TidyPlan *plan, const TidyUnit *unit, uint64_t *ret_page) {
        _cleanup_free_ uint8_t *bytes = malloc(unit->n_pages * PAGE_BYTES);
        _cleanup_free_ uint64_t *addresses = calloc(unit->n_places, sizeof *addresses);
        uint64_t keys[POOL_RUN_MAX];
        uint32_t n = 0;

        if (!bytes || !addresses)
                return -ENOMEM;
        for (size_t i = 0; i < unit->n_parts; i++) {
                const TidyPart *part = part_of(plan, unit, i);
                int r = pool_read(t->pool, part->page, part->n_pages, bytes + n * PAGE_BYTES);

                if (r < 0)
                        return r;
                n += part->n_pages;
        }
        for (uint32_t i = 0; i < n; i++)
                keys[i] = domain_key(t->slot->domain, bytes + i * PAGE_BYTES);
        for (size_t i = 0; i < unit->n_places; i++)
                addresses[i] = place_of(plan, unit, i)->address;
        return remapping_fill(t->pool, t->slot->domain->stable, addresses, unit->n_places, bytes, keys, n, ret_page);
}

/* The mappings there are still those of the look, and can become one. */
static bool is_as_planned(const Tidying *t, const TidyPlan *plan, const TidyUnit *unit, const TidyPlace *place) {
        const Member *member = t->members[place->member];
        const Vma *first = vma_list_find(&member->vmas, place->address);
        uint64_t at = place->address;

        for (size_t i = 0; i < unit->n_parts; i++) {
                const TidyPart *part = part_of(plan, unit, i);
                uint64_t start = at, end = at + part->n_pages * PAGE_BYTES;

                while (at < end) {
                        const Vma *vma = vma_list_find(&member->vmas, at);

                        if (!vma || !remap_vma_is(vma, &t->slot->pool->identity) || !tidying_may_move(vma) ||
                            vma->policy || vma->advice != first->advice || vma->mergeable != first->mergeable ||
                            vma->offset + (at - vma->start) != part->page * PAGE_BYTES + (at - start))
                                return false;
                        at = MIN_OF(vma->end, end);
                }
        }
        return true;
}

/* What is beside the place counts too: a mapping that was cut is one more. */
static size_t count_mappings(const Member *member, uint64_t start, uint64_t end) {
        size_t n = 0;

        for (size_t i = vma_list_first(&member->vmas, start - PAGE_BYTES);
             i < member->vmas.n && member->vmas.vmas[i].start < end + PAGE_BYTES; i++)
                n++;
        return n;
}

/* In the ith place. Whether all of it was. *any: something was done. */
static bool move(Tidying *t, const TidyPlan *plan, const TidyUnit *unit, size_t i, uint64_t page, bool *any) {
        const TidyPlace *place = place_of(plan, unit, i);
        Member *member = t->members[place->member];
        uint64_t end = place->address + unit->n_pages * PAGE_BYTES, plain = 0, mapped = 0;
        _cleanup_(ranges_done) Ranges stretch = {};
        size_t before;
        int r;

        if (!tidying_fits(member) || pass_slot(member) != t->slot || manager_refresh_vmas(member) != 0)
                return false;
        r = remap_note_policies(member->target, &member->vmas);
        if ((r != 0 && r != -ENOENT) || !is_as_planned(t, plan, unit, place))
                return false;
        before = count_mappings(member, place->address, end);
        r = ranges_append(&stretch, place->address, end);
        tidying_step(TIDY_STEP_PLANNED, i, member);
        /* A stop has no time for all of it: what was not begun is gone on with at once. */
        for (unsigned tries = 0; r == 0 && plain < unit->n_pages && tries < TRIES_MAX;) {
                uint64_t got = 0;

                r = manager_put_back(t->pass->manager, member, t->slot->pool, &stretch, &got);
                plain += got;
                tries = got > 0 ? 0 : tries + 1;
        }
        tidying_step(TIDY_STEP_PLAIN, i, member);
        if (r == 0 && plain == unit->n_pages)
                r = pass_remap_again(t->pass, member, place->address, unit->n_pages, page, &mapped);
        *any |= plain > 0;
        tidying_note_result(t, member, r, plain > mapped);
        log_debug("process %d: %lu of %u pages at %lx lie in one piece: %lu were put back (%d)", member->target->pid,
                  mapped, unit->n_pages, place->address, plain, r);
        if (mapped < unit->n_pages)
                return false;
        if (!passed_over(member)) {
                size_t after = count_mappings(member, place->address, end);

                member->group->pool_pieces_joined += before - MIN_OF(after, before);
        }
        return true;
}

static void join(Tidying *t, const TidyPlan *plan, const TidyUnit *unit) {
        size_t n_moved = 0;
        bool any = false;
        uint64_t page;
        int r;

        if (!is_ready(t, plan, unit))
                return;
        r = copy(t, plan, unit, &page);
        if (r != 0) {
                log_debug("pool of %s: no %u pages in a row: %s", t->slot->pool->name, unit->n_pages,
                          r == POOL_E_MISFIT ? "none fit all addresses" : strerror(-r));
                return;
        }
        /* Once begun it is gone on with, whoever wants something: left in the middle it would only take memory. */
        for (size_t i = 0; i < unit->n_places && !t->lost && (i == 0 || n_moved > 0); i++) {
                n_moved += move(t, plan, unit, i, page, &any);
                if (n_moved > 0)
                        (void)tidying_breathe(t);
        }
        tidying_tell_tree(t, page, unit->n_pages);
        for (size_t i = 0; i < unit->n_parts; i++) {
                const TidyPart *part = part_of(plan, unit, i);

                tidying_tell_tree(t, part->page, part->n_pages);
                if (any && n_moved < unit->n_places)
                        pool_tidy_moved(t->tidy, part->page, part->n_pages, false, false);
        }
        /* Who could not be called just then is called again by the next look. */
        if (any)
                pool_tidy_moved(t->tidy, page, unit->n_pages, unit->again, n_moved == unit->n_places);
}

static bool is_short_of_mappings(const Tidying *t) {
        size_t max = t->pass->manager->kernel.max_map_count / REMAP_VMAS_SHARE;

        for (uint32_t k = 0; k < t->n; k++) {
                const Member *member = t->members[k];

                if (!passed_over(member) && tidy_short_of_mappings(member->vmas.n, max, member->counts.left_budget))
                        return true;
        }
        return false;
}

void tidying_join(Tidying *t) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        int r;

        if (!tidying_has_time(t))
                return;
        r = pool_tidy_plan(t->tidy, pool_space(t->pool), &t->pieces, is_short_of_mappings(t), &plan);
        if (r < 0)
                log_debug("pool of %s cannot be joined: %s", t->slot->pool->name, strerror(-r));
        for (size_t i = 0; i < plan.n && tidying_has_time(t); i++)
                join(t, &plan, &plan.units[i]);
}
