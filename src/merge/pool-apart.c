/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What lies side by side in processes but apart in the pool, because it was merged at different times: each piece is a
 * mapping of its own. Copied to consecutive new pages, and mapped from there by everybody, it is one.
 *
 * What one process maps alone is of no use in the pool however it lies (pool-tidy.c).
 *
 * Everybody: who stays on the old pages has them kept for him, and the copy saves nothing. So all that map a page have
 * to be known (as many as the kernel counts: nobody has written or discarded it, and no child of a moment ago has it),
 * and have to go on in the same way. All pieces are cut wherever any of them begins or ends. What is left of them,
 * sections, are the same for everybody or have no page in common: those at one place of the pool are a group. A group
 * is followed by another if that follows it in all places, which makes chains of groups; a unit is a stretch of a
 * chain.
 */
#include "merge/pool-tidy.h"

#include <string.h>

/* Mappings of a pool that begin and end everywhere else in each process fall into too many sections. */
#define SECTIONS_A_PIECE 4U
#define SECTIONS_MIN 4096U

/* A process with more than 1/SHORT_SHARE of the mappings that it may have is short of them. */
#define SHORT_SHARE 2U

#define NONE UINT32_MAX

typedef struct Section {
        uint64_t address, page;
        uint32_t n_pages;
        uint32_t member;
        uint32_t group;
        bool joins;                     /* goes on where the section before it ends */
        bool open_before, open_behind;  /* its mapping goes on there, with something that was written */
} Section;

/* Sections of the same pages. */
typedef struct Group {
        uint32_t first, n;              /* in the order of pages */
        uint32_t next, before;          /* the group that follows, comes before in all places; NONE */
        uint32_t runs_in, runs_out;     /* places where the mapping goes on before, behind it */
        bool complete;                  /* nobody else maps any of the pages, and not one process alone */
} Group;

typedef struct Draft {
        const PoolTidy *tidy;
        const PoolSpace *space;
        Section *sections;              /* by member, and by address */
        uint32_t *order;                /* of them, by page */
        uint32_t n, allocated, n_groups;
        Group *groups;
        uint32_t pages_a_mapping;
        TidyPlan *plan;
} Draft;

static void draft_done(Draft *draft) {
        free(draft->sections);
        free(draft->order);
        free(draft->groups);
}

void tidy_plan_done(TidyPlan *plan) {
        free(plan->units);
        free(plan->parts);
        free(plan->places);
        *plan = (TidyPlan){};
}

bool tidy_short_of_mappings(uint64_t mappings, uint64_t mappings_max, uint64_t left) {
        return left > 0 || mappings > mappings_max / SHORT_SHARE;
}

static int by_value(const void *a, const void *b) {
        const uint64_t *x = a, *y = b;

        return *x < *y ? -1 : *x > *y;
}

static int by_page(const void *a, const void *b, void *userdata) {
        const Section *sections = userdata;
        uint32_t i = *(const uint32_t *)a, k = *(const uint32_t *)b;

        if (sections[i].page != sections[k].page)
                return sections[i].page < sections[k].page ? -1 : 1;
        return i < k ? -1 : i > k;
}

/* The first cut behind a page. */
static size_t cut_behind(const uint64_t *cuts, size_t n, uint64_t page) {
        size_t low = 0, high = n;

        while (low < high) {
                size_t middle = low + (high - low) / 2;

                if (cuts[middle] <= page)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low;
}

/* 0 sections: there are too many. */
static int cut(Draft *d, const TidyPieces *pieces) {
        _cleanup_free_ uint64_t *cuts = calloc(2 * pieces->n + 1, sizeof *cuts);
        size_t n_cuts = 0, max = MAX_OF(pieces->n * SECTIONS_A_PIECE, (size_t)SECTIONS_MIN);

        if (!cuts)
                return -ENOMEM;
        max = MIN_OF(max, (size_t)NONE - 1);
        for (size_t i = 0; i < pieces->n; i++) {
                cuts[2 * i] = pieces->pieces[i].page;
                cuts[2 * i + 1] = pieces->pieces[i].page + pieces->pieces[i].n_pages;
        }
        qsort(cuts, 2 * pieces->n, sizeof *cuts, by_value);
        for (size_t i = 0; i < 2 * pieces->n; i++)
                if (n_cuts == 0 || cuts[n_cuts - 1] != cuts[i])
                        cuts[n_cuts++] = cuts[i];
        for (size_t i = 0; i < pieces->n; i++) {
                const TidyPiece *piece = &pieces->pieces[i];
                size_t at = cut_behind(cuts, n_cuts, piece->page);

                for (uint64_t done = 0, n; done < piece->n_pages; done += n) {
                        n = cuts[at++] - piece->page - done;
                        if (d->n == max) {
                                d->n = 0;
                                return 0;
                        }
                        if (GROW(d->sections, d->n, d->allocated) < 0)
                                return -ENOMEM;
                        d->sections[d->n++] = (Section){
                                .address = piece->address + done * PAGE_BYTES,
                                .page = piece->page + done,
                                .n_pages = (uint32_t)n,
                                .member = piece->member,
                                .joins = done > 0 || piece->joins,
                                .open_before = done == 0 && !piece->first,
                                .open_behind = done + n == piece->n_pages && !piece->last,
                        };
                }
        }
        return 0;
}

static bool all_mapped_by(const PoolSpace *space, const Section *section, uint32_t sharers) {
        for (uint64_t page = section->page; page < section->page + section->n_pages; page++)
                if (page >= space->n || space->sharers[page] != sharers)
                        return false;
        return sharers <= space->max_sharing;
}

static int group(Draft *d) {
        d->order = calloc((size_t)d->n + 1, sizeof *d->order);
        d->groups = calloc((size_t)d->n + 1, sizeof *d->groups);
        if (!d->order || !d->groups)
                return -ENOMEM;
        for (uint32_t i = 0; i < d->n; i++)
                d->order[i] = i;
        if (d->n > 1)
                qsort_r(d->order, d->n, sizeof *d->order, by_page, d->sections);
        for (uint32_t i = 0, n; i < d->n; i += n) {
                const Section *section = &d->sections[d->order[i]];

                for (n = 1; i + n < d->n && d->sections[d->order[i + n]].page == section->page; n++)
                        ;
                for (uint32_t k = 0; k < n; k++)
                        d->sections[d->order[i + k]].group = d->n_groups;
                d->groups[d->n_groups++] = (Group){
                        .first = i,
                        .n = n,
                        .next = NONE,
                        .before = NONE,
                        .complete = n > 1 && all_mapped_by(d->space, section, n),
                };
        }
        return 0;
}

/* What comes behind the section in its process, as its own mapping could go on; NULL: nothing does. */
static const Section *behind(const Draft *d, const Section *section) {
        const Section *next = section + 1;

        return next < d->sections + d->n && next->joins && next->member == section->member ? next : NULL;
}

static const Section *section_of(const Draft *d, const Group *group, uint32_t i) {
        return &d->sections[d->order[group->first + i]];
}

static void link_groups(Draft *d) {
        for (uint32_t g = 0; g < d->n_groups; g++) {
                Group *group = &d->groups[g];
                uint32_t follows = 0;
                const Section *next = behind(d, section_of(d, group, 0));
                Group *other = next ? &d->groups[next->group] : NULL;

                for (uint32_t i = 0; i < group->n; i++) {
                        const Section *section = section_of(d, group, i), *one = behind(d, section);

                        group->runs_in += section->open_before;
                        group->runs_out += section->open_behind;
                        if (!one)
                                continue;
                        follows += other == &d->groups[one->group];
                        if (one->page == section->page + section->n_pages) {
                                group->runs_out++;
                                d->groups[one->group].runs_in++;
                        }
                }
                if (follows == group->n && other != group && other->n == group->n && group->complete &&
                    other->complete) {
                        group->next = next->group;
                        other->before = g;
                }
        }
}

static bool was_moved(const Draft *d, const Section *section) {
        for (uint64_t page = section->page; page < section->page + section->n_pages; page++)
                if (page < d->tidy->n && d->tidy->notes[page] & TIDY_NOTE_MOVED)
                        return true;
        return false;
}

static int add_unit(Draft *d, uint32_t first, uint32_t last, TidyUnit unit) {
        TidyPlan *plan = d->plan;
        const Group *group = &d->groups[first];
        bool waits;

        unit.parts = plan->n_parts;
        unit.places = plan->n_places;
        for (uint32_t g = first;; g = d->groups[g].next) {
                const Section *section = section_of(d, &d->groups[g], 0);
                TidyPart *part = plan->n_parts > unit.parts ? &plan->parts[plan->n_parts - 1] : NULL;

                unit.again |= was_moved(d, section);
                if (part && part->page + part->n_pages == section->page)
                        part->n_pages += section->n_pages;
                else if (GROW(plan->parts, plan->n_parts, plan->parts_allocated) < 0)
                        return -ENOMEM;
                else
                        plan->parts[plan->n_parts++] = (TidyPart){ section->page, section->n_pages };
                if (g == last)
                        break;
        }
        waits = unit.again && tidy_again_waits(&d->tidy->again, d->tidy->look);
        if (waits) {
                plan->n_parts = unit.parts;
                return 0;
        }
        for (uint32_t i = 0; i < group->n; i++) {
                const Section *section = section_of(d, group, i);

                if (GROW(plan->places, plan->n_places, plan->places_allocated) < 0)
                        return -ENOMEM;
                plan->places[plan->n_places++] = (TidyPlace){ section->address, section->member };
        }
        unit.n_parts = plan->n_parts - unit.parts;
        unit.n_places = group->n;
        if (GROW(plan->units, plan->n, plan->allocated) < 0)
                return -ENOMEM;
        plan->units[plan->n++] = unit;
        return 0;
}

/* The stretch that begins with the group and saves most; *ret_last: its end. False: none is worth it. */
static bool best_from(const Draft *d, uint32_t first, uint32_t *ret_last, TidyUnit *ret) {
        const Group *group = &d->groups[first];
        uint64_t joined = 0, n_pages = section_of(d, group, 0)->n_pages;
        /* Cut off from what it goes on from, or goes on with, it is one mapping more there. */
        uint64_t lost_before = group->runs_in;
        bool found = false;

        for (uint32_t g = first; d->groups[g].next != NONE;) {
                uint32_t next = d->groups[g].next;
                const Section *section = section_of(d, &d->groups[g], 0), *behind = section_of(d, &d->groups[next], 0);
                uint64_t lost = lost_before + d->groups[next].runs_out;

                n_pages += behind->n_pages;
                if (n_pages > POOL_RUN_MAX || n_pages * group->n > TIDY_UNIT_PAGES_MAX)
                        break;
                joined += behind->page != section->page + section->n_pages ? group->n : 0;
                g = next;
                if (joined <= lost || joined - lost < ret->saved ||
                    n_pages * group->n > (joined - lost) * d->pages_a_mapping)
                        continue;
                ret->saved = joined - lost;
                ret->n_pages = (uint32_t)n_pages;
                *ret_last = g;
                found = true;
        }
        return found;
}

static int walk_chain(Draft *d, uint32_t first) {
        for (uint32_t g = first; g != NONE; g = d->groups[g].next) {
                TidyUnit unit = {};
                uint32_t last = g;

                if (!best_from(d, g, &last, &unit))
                        continue;
                int r = add_unit(d, g, last, unit);
                if (r < 0)
                        return r;
                g = last;
        }
        return 0;
}

static int more_saved_first(const void *a, const void *b) {
        const TidyUnit *x = a, *y = b;
        uint64_t x_pages = (uint64_t)x->n_pages * x->n_places, y_pages = (uint64_t)y->n_pages * y->n_places;

        if (x->saved * y_pages != y->saved * x_pages)
                return x->saved * y_pages > y->saved * x_pages ? -1 : 1;
        return x->parts < y->parts ? -1 : x->parts > y->parts;
}

int pool_tidy_plan(const PoolTidy *tidy, const PoolSpace *space, const TidyPieces *pieces, bool short_of_mappings,
                   TidyPlan *ret) {
        _cleanup_(tidy_plan_done) TidyPlan plan = {};
        _cleanup_(draft_done) Draft draft = {
                .tidy = tidy,
                .space = space,
                .plan = &plan,
                .pages_a_mapping = short_of_mappings ? POOL_RUN_MAX : TIDY_PAGES_A_MAPPING,
        };
        int r = pieces->n > 1 ? cut(&draft, pieces) : 0;

        if (r == 0)
                r = group(&draft);
        if (r == 0)
                link_groups(&draft);
        for (uint32_t g = 0; g < draft.n_groups && r == 0; g++)
                if (draft.groups[g].before == NONE)
                        r = walk_chain(&draft, g);
        if (r < 0)
                return r;
        if (plan.n > 1)
                qsort(plan.units, plan.n, sizeof *plan.units, more_saved_first);
        *ret = plan;
        plan = (TidyPlan){};
        return 0;
}
