/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/roster.h"

#include "base/clock.h"
#include "base/log.h"

#include <poll.h>
#include <string.h>

static Member *member_free(Member *member) {
        if (!member)
                return NULL;
        loop_source_free(member->exit_source);
        track_free(member->track);
        track_free(member->past_track);
        selection_done(&member->todo);
        if (member->space_ready)
                space_done(&member->space);
        marks_done(&member->marks);
        remap_guard_done(&member->guard);
        ranges_done(&member->own);
        vma_list_done(&member->vmas);
        target_free(member->target);
        free(member);
        return NULL;
}

static Group *group_free(Group *group) {
        if (!group)
                return NULL;
        for (size_t i = 0; i < group->n_members; i++)
                member_free(group->members[i]);
        free(group->members);
        free(group->path);
        free(group);
        return NULL;
}

static Slot *slot_free(Slot *slot) {
        if (!slot)
                return NULL;
        domain_free(slot->domain);
        census_notes_done(&slot->notes);
        free(slot->name);
        free(slot);
        return NULL;
}

DEFINE_CLEANUP(Member, member_free)
DEFINE_CLEANUP(Group, group_free)
DEFINE_CLEANUP(Slot, slot_free)

/* auto: as many as KSM takes by itself. */
static uint32_t max_sharing(const Conf *conf) { return conf->daemon.max_page_sharing ?: 256; }

static const Numa *kept_apart(const Roster *roster) {
        return roster->apart ? roster->numa : NULL;
}

static bool advise_taken(const Roster *roster) {
        for (size_t i = 0; i < roster->n_slots; i++)
                if (!roster->slots[i]->dry_run && !roster->slots[i]->idle_reason &&
                    roster->slots[i]->route == CONF_ROUTE_ADVISE)
                        return true;
        return false;
}

static bool advise_claimed(const Conf *conf) {
        for (size_t i = 0; i < conf->n_cgroups; i++)
                if (conf->cgroups[i].route == CONF_ROUTE_ADVISE && conf->cgroups[i].merge == CONF_MERGE_YES)
                        return true;
        return false;
}

/* KSM has one merge space for the whole host: others would meet it there. Who asks for it by name comes before who
 * leaves the route open; else the first domain gets it. */
static const char *idle_reason(const Roster *roster, ConfRoute route) {
        if (route == CONF_ROUTE_ZERO)
                return roster->zero_available ? NULL
                                              : "this kernel cannot move pages out of a process (UFFDIO_MOVE, 6.8)";
        if (!roster->ksm_available)
                return "this kernel has no usable KSM";
        if (advise_taken(roster) || (route == CONF_ROUTE_AUTO && advise_claimed(roster->conf)))
                return "route advise belongs to another domain: KSM has one merge space for the whole host";
        return NULL;
}

/* What the domain does. Where the route is left open and KSM is not to be had, zero pages are given back at least. */
static void choose_route(const Roster *roster, Slot *slot) {
        bool remap = slot->asked == CONF_ROUTE_REMAP && !slot->dry_run;
        const char *reason = remap ? roster->pools.open(roster->pools.userdata, slot)
                                   : idle_reason(roster, slot->asked);

        slot->zero_reason = NULL;
        slot->route = remap ? CONF_ROUTE_REMAP : slot->asked == CONF_ROUTE_ZERO ? CONF_ROUTE_ZERO : CONF_ROUTE_ADVISE;
        slot->idle_reason = slot->dry_run ? "dry run" : reason;
        if (slot->dry_run || !reason || slot->asked != CONF_ROUTE_AUTO || !roster->zero_available)
                return;
        slot->route = CONF_ROUTE_ZERO;
        slot->zero_reason = reason;
        slot->idle_reason = NULL;
}

static int open_domain(const Roster *roster, Slot *slot) {
        bool remap = slot->route == CONF_ROUTE_REMAP;
        int r = domain_new(max_sharing(roster->conf), roster->scan_threads,
                           remap ? NULL : kept_apart(roster), &slot->domain);

        /* What may get KSM one day is matched already. */
        if (r == 0)
                slot->domain->zeros_only = slot->route == CONF_ROUTE_ZERO &&
                                           !(slot->zero_reason && roster->ksm_available);
        if (r == 0 && remap) {
                domain_use_pool(slot->domain);
                roster->pools.learn(slot);
        }
        return r;
}

static bool is_called(const Slot *slot, const char *name) {
        return !roster_guards(ROSTER_GUARD_DOMAIN) || strcmp(slot->name, name) == 0;
}

static bool is_idle(const Slot *slot) { return slot->idle_reason && !slot->dry_run; }

/* Whether the section's cgroups of that domain belong there. A domain named after its cgroup, whose path is not ours to
 * choose, must not meet one that the configuration names outright; nor what is asked to be merged otherwise now what is
 * still to be undone of before. */
static bool slot_serves(const Slot *slot, const ConfCgroup *section, const char *domain) {
        return is_called(slot, domain) && slot->own == conf_domain_is_each(section) &&
               slot->dry_run == (section->merge == CONF_MERGE_DRY_RUN) &&
               (slot->asked == section->route ||
                (slot->route == CONF_ROUTE_ADVISE && !is_idle(slot) &&
                 (section->route == CONF_ROUTE_AUTO || section->route == CONF_ROUTE_ADVISE)));
}

static int slot_get(Roster *roster, const ConfCgroup *section, const char *name, Slot **ret) {
        bool dry = section->merge == CONF_MERGE_DRY_RUN;
        _cleanup_(slot_freep) Slot *slot = NULL;
        int r;

        for (size_t i = 0; i < roster->n_slots; i++)
                if (slot_serves(roster->slots[i], section, name)) {
                        *ret = roster->slots[i];
                        return 0;
                }
        r = GROW(roster->slots, roster->n_slots, roster->slots_allocated);
        if (r < 0)
                return r;
        slot = calloc(1, sizeof *slot);
        if (!slot || !(slot->name = strdup(name)))
                return -ENOMEM;
        slot->dry_run = dry;
        slot->own = conf_domain_is_each(section);
        slot->asked = section->route;
        choose_route(roster, slot);
        if (dry || !slot->idle_reason) {
                r = open_domain(roster, slot);
                if (r < 0)
                        return r;
        }
        if (slot->idle_reason && !dry)
                log_warning("domain %s merges nothing: %s", name, slot->idle_reason);
        if (slot->zero_reason)
                log_info("domain %s: only zero pages are given back: %s", name, slot->zero_reason);
        *ret = roster->slots[roster->n_slots++] = TAKE_PTR(slot);
        return 0;
}

Group *roster_find_group(const Roster *roster, const char *path) {
        for (size_t i = 0; i < roster->n_groups; i++)
                if (strcmp(roster->groups[i]->path, path) == 0)
                        return roster->groups[i];
        return NULL;
}

bool roster_is_blocked(const Roster *roster, const char *path) {
        for (size_t i = 0; i < roster->n_blocked; i++)
                if (strcmp(roster->blocked[i], path) == 0)
                        return true;
        return false;
}

/* The section of a cgroup may have been another so far. */
static void group_configure(Group *group, const ConfCgroup *section) {
        group->minimum_run_pages = section->minimum_run_pages;
        group->huge_page_split = section->huge_page_split;
        for (size_t k = 0; k < group->n_members; k++) {
                Member *member = group->members[k];

                if (group->include_dontdump != section->include_dontdump) {
                        member->vmas_nsec = member->refreshed_nsec = 0; /* its mappings were read by the other rule */
                        member->look_again = true;
                        member->skipped_due_nsec = 0;
                }
                if (group->track != section->track) {
                        member->track_tried = false;
                        member->look_again = true; /* asleep, too, it is let go at once */
                }
        }
        group->include_dontdump = section->include_dontdump;
        group->track = section->track;
}

static int group_add(Roster *roster, const ConfCgroup *section, const char *path) {
        _cleanup_(group_freep) Group *group = NULL;
        _cleanup_free_ char *domain = NULL;
        int r;

        r = policy_domain(section, path, &domain);
        if (r < 0)
                return r;
        r = GROW(roster->groups, roster->n_groups, roster->groups_allocated);
        if (r < 0)
                return r;
        group = calloc(1, sizeof *group);
        if (!group || !(group->path = strdup(path)))
                return -ENOMEM;
        r = slot_get(roster, section, domain, &group->slot);
        if (r < 0)
                return r;
        (void)cgroup_id(roster->tree, path, &group->id);
        group->slot->n_groups++;
        group_configure(group, section);
        roster->groups[roster->n_groups++] = TAKE_PTR(group);
        log_debug("cgroup %s is managed (domain %s)", path, domain);
        return 0;
}

/* Makes sure that a member can always be moved to the leaving without asking for memory. */
static int reserve_leaving(Roster *roster) {
        size_t want = roster->n_leaving + roster_count_members(roster) + 1;

        while (roster->leaving_allocated < want) {
                size_t n = roster->leaving_allocated;
                int r = GROW(roster->leaving, n, roster->leaving_allocated);
                if (r < 0)
                        return r;
        }
        return 0;
}

static void member_leave(Roster *roster, Member *member) {
        member->leaving = true;
        member->left = member->group ? member->group->id : 0;
        roster->leaving[roster->n_leaving++] = member;
}

static void group_leave(Roster *roster, size_t i) {
        Group *group = roster->groups[i];

        for (size_t k = 0; k < group->n_members; k++)
                member_leave(roster, group->members[k]);
        group->n_members = 0;
        group->slot->n_groups--;
        memmove(roster->groups + i, roster->groups + i + 1, (roster->n_groups - i - 1) * sizeof(Group *));
        roster->n_groups--;
        /* The members that leave must not point to it any more. */
        for (size_t k = 0; k < roster->n_leaving; k++)
                if (roster->leaving[k]->group == group)
                        roster->leaving[k]->group = NULL;
        group_free(group);
}

/* NULL: it is not to be managed. */
static const ConfCgroup *section_of(const Roster *roster, const char *path) {
        const ConfCgroup *section = policy_find(roster->conf, path);

        return section && section->merge != CONF_MERGE_NO ? section : NULL;
}

static void take_in(Roster *roster, const ConfCgroup *section, const char *path) {
        if (roster->dismissed || roster_find_group(roster, path) || roster_is_blocked(roster, path))
                return;
        if (group_add(roster, section, path) < 0)
                log_error("cgroup %s: out of memory, left alone", path);
}

static void on_cgroup(void *userdata, const char *path, bool appeared) {
        Roster *roster = userdata;
        const ConfCgroup *section;

        if (!roster->tree) /* it is being read: take_in_all() comes */
                return;
        if (appeared) {
                section = section_of(roster, path);
                if (section)
                        take_in(roster, section, path);
                return;
        }
        for (size_t i = 0; i < roster->n_groups; i++)
                if (strcmp(roster->groups[i]->path, path) == 0) {
                        log_debug("cgroup %s is gone", path);
                        group_leave(roster, i);
                        return;
                }
}

static int on_exit_of_target(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Member *member = userdata;

        member->gone = true;
        loop_source_set_events(source, 0);
        return 0;
}

static void member_open_space(Member *member) {
        Slot *slot = member->group->slot;

        if (slot->domain) {
                member->space = (Space){ .target = member->target, .table = &slot->domain->blocks, .owner = member };
                member->space_ready = true;
        }
}

/* In neither list yet; there is room among the leaving for it. */
static int member_new(Roster *roster, pid_t pid, Member **ret) {
        _cleanup_(member_freep) Member *member = NULL;
        int r = reserve_leaving(roster);

        if (r < 0)
                return r;
        member = calloc(1, sizeof *member);
        if (!member)
                return -ENOMEM;
        member->guard = REMAP_GUARD_NONE;
        r = target_new(pid, &member->target);
        if (r != 0)
                return r;
        member->target->vma_reader = roster->vma_reader;
        *ret = TAKE_PTR(member);
        return 0;
}

static int member_add(Roster *roster, Group *group, pid_t pid, size_t at) {
        _cleanup_(member_freep) Member *member = NULL;
        int r;

        if (roster_find_leaving(roster, pid))
                return -EBUSY;
        r = GROW(group->members, group->n_members, group->members_allocated);
        if (r < 0)
                return r;
        r = member_new(roster, pid, &member);
        if (r != 0)
                return r;
        member->group = group;
        r = loop_add_io(roster->loop, member->target->pidfd, POLLIN, on_exit_of_target, member, &member->exit_source);
        if (r < 0)
                return r;
        member_open_space(member);
        memmove(group->members + at + 1, group->members + at, (group->n_members - at) * sizeof(Member *));
        group->members[at] = TAKE_PTR(member);
        group->n_members++;
        return 0;
}

int roster_add_orphan(Roster *roster, pid_t pid) {
        Member *member;
        int r = member_new(roster, pid, &member);

        if (r == 0)
                member_leave(roster, member);
        return r;
}

static void group_lose(Roster *roster, Group *group, size_t i) {
        member_leave(roster, group->members[i]);
        memmove(group->members + i, group->members + i + 1, (group->n_members - i - 1) * sizeof(Member *));
        group->n_members--;
}

static void group_refresh(Roster *roster, Group *group) {
        _cleanup_free_ pid_t *pids = NULL;
        size_t n = 0, i = 0, k = 0;
        int r;

        r = cgroup_processes(roster->tree, group->path, &pids, &n);
        if (r < 0) {
                if (r != -ENOENT && r != -ENODEV)
                        log_debug("cgroup %s: its processes cannot be read: %s", group->path, strerror(-r));
                return; /* a cgroup that vanished is reported by the tree */
        }
        while (i < group->n_members || k < n) {
                Member *member = i < group->n_members ? group->members[i] : NULL;

                if (member && (member->gone || k >= n || member->target->pid < pids[k])) {
                        group_lose(roster, group, i);
                } else if (!member || member->target->pid > pids[k]) {
                        r = member_add(roster, group, pids[k], i);
                        if (r == 0)
                                i++;
                        else if (r < 0 && r != -EBUSY)
                                log_debug("process %d: %s", pids[k], strerror(-r));
                        k++;
                } else {
                        i++;
                        k++;
                }
        }
}

void roster_expel(Roster *roster, Member *member) {
        Group *group = member->group;

        for (size_t i = 0; i < group->n_members; i++)
                if (group->members[i] == member) {
                        group_lose(roster, group, i);
                        return;
                }
}

void roster_refresh(Roster *roster) {
        for (size_t i = 0; i < roster->n_groups; i++)
                group_refresh(roster, roster->groups[i]);
}

void roster_refresh_cgroup(Roster *roster, uint64_t id) {
        for (size_t i = 0; i < roster->n_groups; i++)
                if (roster->groups[i]->id == id && id != 0)
                        group_refresh(roster, roster->groups[i]);
}

typedef struct Candidate {
        const ConfCgroup *section;
        const char *path;
} Candidate;

typedef struct Candidates {
        const Roster *roster;
        Candidate *candidates;
        size_t n, allocated;
} Candidates;

static void add_candidate(void *userdata, const char *path, bool appeared) {
        Candidates *all = userdata;
        const ConfCgroup *section = section_of(all->roster, path);

        if (!section)
                return;
        if (GROW(all->candidates, all->n, all->allocated) < 0)
                log_error("cgroup %s: out of memory, left alone", path);
        else
                all->candidates[all->n++] = (Candidate){ section, path };
}

/* All cgroups there are, in the order of the sections: which domain comes first must not depend on the order of
 * directories. */
static void take_in_all(Roster *roster) {
        Candidates all = { .roster = roster };

        cgroup_tree_foreach(roster->tree, add_candidate, &all);
        for (size_t i = 0; i < roster->conf->n_cgroups; i++)
                for (size_t k = 0; k < all.n; k++)
                        if (all.candidates[k].section == &roster->conf->cgroups[i])
                                take_in(roster, all.candidates[k].section, all.candidates[k].path);
        free(all.candidates);
        roster_refresh(roster);
}

static void unblock(Roster *roster) {
        for (size_t i = 0; i < roster->n_blocked; i++)
                free(roster->blocked[i]);
        roster->n_blocked = 0;
}

/* Who left it before and is not undone yet, as when it was unmerged before a reload. */
static void await_those_left(Roster *roster, uint64_t id, uint64_t unmerge) {
        for (size_t i = 0; i < roster->n_leaving; i++) {
                Member *member = roster->leaving[i];

                if (member->left != id || id == 0)
                        continue;
                member->unmerge = unmerge;
                if (member->given_up)
                        member->undo_at_nsec = 0; /* asked once more, so that who waits is told */
        }
}

int roster_block(Roster *roster, const char *path, uint64_t unmerge) {
        char *copy;
        int r;

        for (size_t i = 0; i < roster->n_groups; i++) {
                if (strcmp(roster->groups[i]->path, path) != 0)
                        continue;
                r = GROW(roster->blocked, roster->n_blocked, roster->blocked_allocated);
                if (r < 0)
                        return r;
                copy = strdup(path);
                if (!copy)
                        return -ENOMEM;
                roster->blocked[roster->n_blocked++] = copy;
                group_refresh(roster, roster->groups[i]); /* who was forked a moment ago leaves with the others */
                for (size_t k = 0; k < roster->groups[i]->n_members; k++)
                        roster->groups[i]->members[k]->unmerge = unmerge;
                await_those_left(roster, roster->groups[i]->id, unmerge);
                group_leave(roster, i);
                return 0;
        }
        return -ENOENT;
}

void roster_set_apart(Roster *roster, bool apart) {
        roster->apart = apart;
        for (size_t i = 0; i < roster->n_slots; i++)
                if (roster->slots[i]->domain && !roster->slots[i]->pool)
                        domain_set_numa(roster->slots[i]->domain, kept_apart(roster));
        for (size_t i = 0; i < roster->n_groups; i++)
                for (size_t k = 0; k < roster->groups[i]->n_members; k++) {
                        select_all(&roster->groups[i]->members[k]->space);
                        roster->groups[i]->members[k]->look_again = true;
                }
}

void roster_reconfigure(Roster *roster, const Conf *conf) {
        roster_refresh(roster); /* who was forked a moment ago leaves with the others */
        roster->conf = conf;
        unblock(roster);
        for (size_t i = 0; i < roster->n_slots; i++)
                if (roster->slots[i]->domain)
                        stable_set_max_sharing(roster->slots[i]->domain->stable, max_sharing(conf));
        for (size_t i = 0; i < roster->n_groups;) {
                Group *group = roster->groups[i];
                const ConfCgroup *section = section_of(roster, group->path);
                _cleanup_free_ char *domain = NULL;

                if (section && policy_domain(section, group->path, &domain) == 0 &&
                    slot_serves(group->slot, section, domain)) {
                        group_configure(group, section);
                        i++;
                } else
                        group_leave(roster, i);
        }
        roster->ask_again = true;
        roster_prune_slots(roster);
        roster->ask_again = false;
        take_in_all(roster);
}

void roster_dismiss(Roster *roster) {
        roster->dismissed = true;
        roster_refresh(roster);
        while (roster->n_groups > 0)
                group_leave(roster, roster->n_groups - 1);
}

void roster_drop(Roster *roster, Member *member) {
        for (size_t i = 0; i < roster->n_leaving; i++)
                if (roster->leaving[i] == member) {
                        roster->leaving[i] = roster->leaving[--roster->n_leaving];
                        member_free(member);
                        return;
                }
}

/* A domain that waited for KSM gets it once the one that had it is gone, its processes undone. */
static void slot_admit(Roster *roster, Slot *slot) {
        bool waited = slot->idle_reason;

        choose_route(roster, slot);
        if (slot->idle_reason || (slot->route == CONF_ROUTE_ZERO && !waited))
                return;
        if (waited && open_domain(roster, slot) < 0) {
                slot->idle_reason = "out of memory";
                return;
        }
        log_info("domain %s is merged from now on", slot->name);
        for (size_t i = 0; i < roster->n_groups; i++)
                for (size_t k = 0; roster->groups[i]->slot == slot && k < roster->groups[i]->n_members; k++) {
                        if (waited)
                                member_open_space(roster->groups[i]->members[k]);
                        roster->groups[i]->members[k]->touched = true; /* planned anew, by the other route */
                }
}

static void admit_waiting(Roster *roster) {
        for (size_t i = 0; i < roster->n_slots; i++) {
                Slot *slot = roster->slots[i];

                /* What a pool lacks does not come by itself. */
                if ((is_idle(slot) && (slot->asked != CONF_ROUTE_REMAP || roster->ask_again)) || slot->zero_reason)
                        slot_admit(roster, slot);
        }
}

void roster_prune_slots(Roster *roster) {
        for (size_t i = 0; i < roster->n_slots;) {
                Slot *slot = roster->slots[i];
                bool used = slot->n_groups > 0;

                for (size_t k = 0; k < roster->n_leaving && !used; k++)
                        used = slot->domain && roster->leaving[k]->space.table == &slot->domain->blocks;
                if (used) {
                        i++;
                        continue;
                }
                slot_free(slot);
                memmove(roster->slots + i, roster->slots + i + 1, (roster->n_slots - i - 1) * sizeof(Slot *));
                roster->n_slots--;
        }
        admit_waiting(roster);
}

Member *roster_find_member(const Roster *roster, pid_t pid) {
        for (size_t i = 0; i < roster->n_groups; i++)
                for (size_t k = 0; k < roster->groups[i]->n_members; k++) {
                        Member *member = roster->groups[i]->members[k];
                        if (member->target->pid == pid && !member->gone)
                                return member;
                }
        return NULL;
}

Member *roster_find_leaving(const Roster *roster, pid_t pid) {
        for (size_t i = 0; i < roster->n_leaving; i++)
                if (roster->leaving[i]->target->pid == pid)
                        return roster->leaving[i];
        return NULL;
}

size_t roster_count_members(const Roster *roster) {
        size_t n = 0;

        for (size_t i = 0; i < roster->n_groups; i++)
                n += roster->groups[i]->n_members;
        return n;
}

int roster_init(Roster *roster, Loop *loop, const Conf *conf, const char *root, const Numa *numa, bool ksm_available,
                bool zero_available, VmaReader *vma_reader, const RosterPools *pools) {
        int r;

        *roster = (Roster){ .loop = loop, .conf = conf, .numa = numa, .ksm_available = ksm_available,
                            .zero_available = zero_available, .vma_reader = vma_reader, .pools = *pools,
                            .apart = !conf->daemon.merge_across_nodes,
                            .scan_threads = conf->daemon.scan_threads };
        r = cgroup_tree_new(root, on_cgroup, roster, &roster->tree);
        if (r < 0)
                return r;
        take_in_all(roster);
        return 0;
}

void roster_done(Roster *roster) {
        for (size_t i = 0; i < roster->n_leaving; i++)
                member_free(roster->leaving[i]);
        for (size_t i = 0; i < roster->n_groups; i++)
                group_free(roster->groups[i]);
        for (size_t i = 0; i < roster->n_slots; i++)
                slot_free(roster->slots[i]);
        unblock(roster);
        free(roster->blocked);
        free(roster->leaving);
        free(roster->groups);
        free(roster->slots);
        cgroup_tree_free(roster->tree);
        *roster = (Roster){ 0 };
}
