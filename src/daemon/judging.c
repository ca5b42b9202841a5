/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where judgement (merge/judge.h) gets what it goes by. Merged pages that a process wrote to are known from two sides:
 *
 *   - the census looks at the frame behind every page that is marked, so it sees which pages became merged, and which
 *     were and are on a frame of their own now: always there, after every burst, and later and later where little happens;
 *   - the probe is told by the census which pages are merged and clears the bit of each that is written to: known within
 *     a second, and a page that broke and was merged again between two looks, too. It may rest, or be missing.
 *
 * A break that the census finds and the probe did not see is counted there: each once, whoever saw it.
 *
 * Between the look at a page and telling the probe of it the page may be written to; the probe then expects a write
 * that was, and counts one too many should the page be written to after it was protected anew. The next census puts it
 * right.
 */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"

#include <string.h>

static bool equal(const PageSet a, const PageSet b) { return memcmp(a, b, sizeof(PageSet)) == 0; }

static uint16_t turn_now(const Manager *m) { return (uint16_t)(now_nsec() / m->conf->daemon.pay_back_nsec); }

static void note_losses(Manager *m, Member *member, int losses) {
        if (losses > 0 && m->conf->daemon.judgement)
                member->unmark = true;
}

/* Where nothing is told any more the probe forgets the block. */
static void set_told(const Manager *m, const Member *member, Block *block, const PageSet merged) {
        JudgeRecord *record = block->judge;
        struct probe_block now;

        memcpy(now.merged, merged, sizeof now.merged);
        if (probes_block_set(m->probes, member->target->pid, block->addr, &now) == 0)
                memcpy(record->told, merged, sizeof record->told);
        else
                memset(record->told, 0, sizeof record->told);
        block->told = page_set_any(record->told);
}

/* What the probe saw break since it was told, or since this was asked last. */
static bool collect(const Manager *m, const Member *member, Block *block, PageSet ret_broken) {
        struct probe_block now;
        PageSet left;

        if (!block->told || !probes_block_get(m->probes, member->target->pid, block->addr, &now))
                return false;
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                ret_broken[i] = block->judge->told[i] & ~now.merged[i];
                left[i] = block->judge->told[i] & now.merged[i];
        }
        if (page_set_any(left))
                memcpy(block->judge->told, left, sizeof left);
        else
                set_told(m, member, block, left);
        return page_set_any(ret_broken);
}

static void tell(const Manager *m, const Member *member, Block *block) {
        const JudgeRecord *record = block->judge;

        if (!equal(record->told, record->merged) && probes_have(m->probes, PROBE_FAULTS))
                set_told(m, member, block, record->merged);
}

/* A block was looked at, as far as it is marked. */
static void end_block(JudgeLooking *looking) {
        Manager *m = looking->manager;
        Block *block = TAKE_PTR(looking->block);
        PageSet broken = { 0 };
        int losses;

        if (!block)
                return;
        if (block->judge)
                (void)collect(m, looking->member, block, broken);
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                m->breaks_found += (unsigned)__builtin_popcountll(looking->broken[i] & ~broken[i]);
                looking->broken[i] |= broken[i] & looking->looked[i];
        }
        losses = judge_look(block, m->turn, looking->looked, looking->merged, looking->broken, m->conf->daemon.judgement);
        if (!block->judge || losses < 0)
                return;
        /* What is marked no more was taken apart by us, or by the process. */
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                block->judge->merged[i] &= looking->looked[i];
                block->judge->young[0][i] &= looking->looked[i];
                block->judge->young[1][i] &= looking->looked[i];
        }
        block->judge->looked = m->looks;
        note_losses(m, looking->member, losses);
        tell(m, looking->member, block);
}

static void begin_block(JudgeLooking *looking, uint64_t addr) {
        looking->block = space_find(&looking->member->space, addr);
        looking->addr = addr;
        memset(looking->looked, 0, sizeof looking->looked);
        memset(looking->merged, 0, sizeof looking->merged);
        memset(looking->broken, 0, sizeof looking->broken);
}

void manager_looked(void *userdata, const CensusLook *look) {
        JudgeLooking *looking = userdata;
        const Block *block;

        if (!looking->block || looking->addr != look->block) {
                end_block(looking);
                begin_block(looking, look->block);
        }
        block = looking->block;
        if (!block)
                return;
        for (unsigned page = look->first; page < look->first + look->n; page++)
                page_set_add(looking->looked, page);
        for (unsigned i = 0; i < BLOCK_PAGES / 64; i++) {
                uint64_t natural = block->zeropage[i] & ~block->given[i]; /* was so before it was marked */
                uint64_t before = block->judge ? block->judge->merged[i] : 0;

                looking->merged[i] |= look->merged[i] | (look->zeropage[i] & ~(natural & ~before));
        }
        /* Of what was merged and does not look so: a frame that only this page maps still is KSM's, too. */
        for (unsigned page = look->first; block->judge && page < look->first + look->n; page++) {
                if (!page_set_has(block->judge->merged, page) || page_set_has(looking->merged, page))
                        continue;
                switch (census_page(looking->frames, look->entries[page - look->first])) {
                case CENSUS_MERGED:
                        page_set_add(looking->merged, page);
                        break;
                case CENSUS_OTHER:
                        page_set_add(looking->broken, page);
                        break;
                case CENSUS_ABSENT:
                        break;
                }
        }
}

void manager_end_looking(JudgeLooking *looking) {
        Manager *m = looking->manager;
        Member *member = looking->member;

        end_block(looking);
        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];

                if (!block->judge || block->judge->looked == m->looks)
                        continue;
                judge_drop(block);
                tell(m, member, block);
        }
}

static void collect_member(Manager *m, Member *member) {
        struct probe_target met;

        probes_target(m->probes, member->target->pid, &met);
        if (met.cow_breaks == member->breaks_seen)
                return;
        member->breaks_seen = met.cow_breaks;
        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];
                PageSet broken;

                if (!block->judge || !collect(m, member, block, broken))
                        continue;
                note_losses(m, member, judge_broken(block, m->turn, broken, m->conf->daemon.judgement));
        }
}

static void foreach_member(Manager *m, void (*handler)(Manager *m, Member *member)) {
        for (size_t i = 0; i < m->roster.n_groups; i++)
                for (size_t k = 0; k < m->roster.groups[i]->n_members; k++) {
                        Member *member = m->roster.groups[i]->members[k];

                        if (!member->gone && member->space_ready)
                                handler(m, member);
                }
}

static void turn_member(Manager *m, Member *member) {
        for (size_t b = 0; b < member->space.n; b++)
                if (member->space.blocks[b]->judge)
                        (void)judge_turn(member->space.blocks[b], m->turn, m->conf->daemon.judgement);
}

static void let_go(Manager *m, Member *member) {
        for (size_t b = 0; b < member->space.n; b++)
                if (member->space.blocks[b]->judge)
                        (void)judge_turn(member->space.blocks[b], m->turn, false);
}

/* Those that ksmd and we asked other CPUs for: the rest interrupts nobody. */
static uint64_t own_flushes(const Manager *m) {
        struct probe_flushes flushes;

        manager_flushes(m, &flushes);
        return flushes.count[PROBE_BY_KSMD][PROBE_FLUSH_REMOTE_SEND].flushes +
               flushes.count[PROBE_BY_DAEMON][PROBE_FLUSH_REMOTE_SEND].flushes;
}

static void note_costs(Manager *m) {
        uint64_t flushes = m->running_wait ? m->judge_budget.flushes : own_flushes(m);

        judge_budget_note(&m->judge_budget, now_nsec(), manager_cow_breaks(m), flushes, m->running,
                          m->conf->daemon.break_quota);
}

void manager_judge(Manager *m) {
        uint16_t turn = turn_now(m);
        uint64_t breaks = probes_cow_breaks(m->probes);

        if (breaks != m->breaks_seen)
                foreach_member(m, collect_member);
        m->breaks_seen = breaks;
        if (turn != m->turn) {
                m->turn = turn;
                foreach_member(m, turn_member);
        }
        note_costs(m);
        if (m->breaks_too_dear) /* until it is not, though nobody asks */
                (void)manager_breaks_wait_nsec(m);
}

void manager_forget_judgement(Manager *m) {
        m->turn = turn_now(m);
        foreach_member(m, let_go);
}

static void untell(Manager *m, Member *member) {
        for (size_t b = 0; b < member->space.n; b++) {
                Block *block = member->space.blocks[b];

                if (!block->told)
                        continue;
                memset(block->judge->told, 0, sizeof block->judge->told);
                block->told = false;
        }
        member->breaks_seen = 0;
}

void manager_untell(const Manager *m, const Member *member) {
        const PageSet nothing = { 0 };

        if (probes_blocks(m->probes, member->target->pid) == 0)
                return;
        for (size_t b = 0; b < member->space.n; b++)
                if (member->space.blocks[b]->told)
                        set_told(m, member, member->space.blocks[b], nothing);
}

void manager_forget_told(Manager *m) { foreach_member(m, untell); }

uint64_t manager_breaks_wait_nsec(Manager *m) {
        uint64_t wait = 0;

        note_costs(m);
        if (m->conf->daemon.judgement && !m->once)
                wait = judge_budget_wait_nsec(&m->judge_budget, m->conf->daemon.break_quota);
        m->breaks_too_dear = wait > 0;
        return wait;
}

uint64_t manager_cow_breaks(const Manager *m) { return m->breaks_found + probes_cow_breaks(m->probes); }

void manager_count_judged(const Manager *m, const Member *member, JudgeCounts *ret) {
        *ret = (JudgeCounts){ 0 };
        for (size_t b = 0; member->space_ready && b < member->space.n; b++)
                judge_count(member->space.blocks[b], m->turn, ret);
}
