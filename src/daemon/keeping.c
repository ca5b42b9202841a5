/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The keeper and the pools. Both come into being when the first section asks for route remap, or are found when a
 * daemon that died left them; both outlive us while any process maps a page of a pool.
 *
 * A pool has the name of its domain in it. A domain that a section names and one that is named after its cgroup must
 * never be taken for one another: the prefix tells.
 */
#include "daemon/remapping.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/log.h"
#include "daemon/notify.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define LEARN_PAGES 256U
#define KEEPER_WAIT_MAX_NSEC (16 * NSEC_PER_SEC)
#define PAGE_FIRST_NSEC 3000U
#define RANGE_UNITS 8U
#define RANGE_UNITS_UNDOING 24U         /* it waits for the keeper in each range */

static RemapPool *pool_done(RemapPool *pool) {
        if (!pool)
                return NULL;
        pool_free(pool->pool);
        pool_tidy_done(&pool->tidy);
        free(pool->name);
        free(pool);
        return NULL;
}
DEFINE_CLEANUP(RemapPool, pool_done)

static Remapping *remapping_free(Remapping *remapping) {
        if (!remapping)
                return NULL;
        loop_source_free(remapping->source);
        for (size_t i = 0; i < remapping->n_pools; i++)
                pool_done(remapping->pools[i]);
        free(remapping->pools);
        keeper_free(remapping->keeper);
        free(remapping);
        return NULL;
}
DEFINE_CLEANUP(Remapping, remapping_free)

void manager_close_keeper(Manager *m) { m->remapping = remapping_free(m->remapping); }

static void settle_begin(void *userdata) {
        const Manager *m = userdata;

        keeper_sync_begin(m->remapping->keeper);
}

static int settle(void *userdata) {
        const Manager *m = userdata;

        return keeper_sync_end(m->remapping->keeper);
}

RemapBatch remapping_batch(Manager *m, const RemapGuard *guard, RemapRange *ranges, size_t n, uint64_t units,
                           bool undo) {
        const StopPace *pace = &m->remapping->pace[undo];

        return (RemapBatch){
                .ranges = ranges,
                .n = n,
                .guard = guard,
                .pool_fd = -EBADF,
                .settle_begin = settle_begin,
                .settle = settle,
                .userdata = m,
                .run_nsec = stop_pace_begin_nsec(pace),
                .expect_nsec = stop_pace_ran_nsec(pace, units),
        };
}

void remapping_learn(Remapping *remapping, const RemapBatch *batch, bool undo) {
        StopPace *pace = &remapping->pace[undo];
        uint64_t units = 0;

        for (size_t i = 0; i < batch->n; i++)
                if (batch->ranges[i].result != REMAP_NOT_BEGUN)
                        units += stop_pace_units(pace, batch->ranges[i].n_pages);
        stop_pace_learn(pace, units, batch->stop_nsec, batch->ran_nsec);
}

uint64_t remapping_pool_bytes(const RemapPool *pool) {
        return pool_space(pool->pool)->allocated * sizeof(uint32_t) + pool->tidy.allocated * sizeof(uint16_t);
}

RemapPool *remapping_find_pool(const Remapping *remapping, const Vma *vma) {
        for (size_t i = 0; remapping && vma->file && i < remapping->n_pools; i++)
                if (remap_vma_is(vma, &remapping->pools[i]->identity))
                        return remapping->pools[i];
        return NULL;
}

static int add_pool(Remapping *remapping, Pool *pool, const char *name, RemapPool **ret) {
        _cleanup_(pool_donep) RemapPool *one = calloc(1, sizeof *one);

        if (!one) {
                pool_free(pool);
                return -ENOMEM;
        }
        one->pool = pool;
        one->name = strdup(name);
        pool_identity(pool, &one->identity.dev, &one->identity.inode);
        if (!one->name || GROW(remapping->pools, remapping->n_pools, remapping->pools_allocated) < 0)
                return -ENOMEM;
        if (ret)
                *ret = one;
        remapping->pools[remapping->n_pools++] = TAKE_PTR(one);
        return 0;
}

static int take_over_pool(void *userdata, const KeeperItem *item, int mount_fd) {
        Remapping *remapping = userdata;
        _cleanup_free_ char *name = NULL;
        Pool *pool = NULL;
        int r = pool_domain(mount_fd, &name);

        if (r == 0)
                r = pool_open(name, mount_fd, 256, &pool);
        if (r == 0)
                r = pool_recount(pool);
        if (r < 0) {
                pool_free(pool);
                log_warning("a pool that the keeper holds cannot be opened: %s", strerror(-r));
                return r == -EBADMSG ? 0 : r;
        }
        return add_pool(remapping, pool, name, NULL);
}

/* Beside us in a build, else where it is installed. */
static char *find_program(void) {
        static const char *const places[] = { "..", "../../src" };
        char self[PATH_MAX], *path = NULL;
        ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
        char *slash;

        if (n <= 0)
                return NULL;
        self[n] = 0;
        slash = strrchr(self, '/');
        if (!slash)
                return NULL;
        *slash = 0;
        for (size_t i = 0; i < ELEMENTSOF(places); i++) {
                if (asprintf(&path, "%s/%s/ksmd-user-keeper", self, places[i]) < 0)
                        return NULL;
                if (access(path, X_OK) == 0)
                        return path;
                free(path);
        }
        return NULL;
}

static int on_keeper(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Manager *m = userdata;

        if (keeper_dispatch(m->remapping->keeper) < 0) {
                loop_source_free(m->remapping->source);
                m->remapping->source = NULL;
                (void)manager_keeper_ready(m); /* who faults waits until it is back */
        }
        return 0;
}

static int watch(Manager *m, Remapping *remapping) {
        loop_source_free(remapping->source);
        remapping->source = NULL;
        return loop_add_io(m->loop, keeper_fd(remapping->keeper), POLLIN, on_keeper, m, &remapping->source);
}

static bool is_reached(const Remapping *remapping) {
        return remapping->source && keeper_fd(remapping->keeper) >= 0;
}

bool manager_keeper_ready(Manager *m) {
        Remapping *remapping = m->remapping;
        int r;

        if (!remapping)
                return false;
        if (is_reached(remapping))
                return true;
        r = keeper_recover(remapping->keeper);
        if (r == 0)
                r = watch(m, remapping);
        if (r == 0)
                log_info("the keeper is reached again");
        else if (r != remapping->error)
                log_warning("the keeper cannot be reached: %s", strerror(-r));
        remapping->error = r;
        return r == 0;
}

void manager_tend_keeper(Manager *m) {
        uint64_t now = now_nsec();

        if (m->remapping && is_reached(m->remapping) && !m->keeper_missed) {
                m->keeper_wait_nsec = 0;
                return;
        }
        if ((!m->remapping && !m->keeper_missed) || now < m->keeper_next_nsec)
                return;
        notify_watchdog(); /* it may take seconds */
        if (m->keeper_missed)
                manager_find_remapped(m);
        else
                (void)manager_keeper_ready(m);
        m->keeper_wait_nsec = MAX_OF(2 * m->keeper_wait_nsec, NSEC_PER_SEC);
        m->keeper_wait_nsec = MIN_OF(m->keeper_wait_nsec, KEEPER_WAIT_MAX_NSEC);
        m->keeper_next_nsec = now_nsec() + m->keeper_wait_nsec;
}

int manager_open_keeper(Manager *m, const char **ret_reason) {
        _cleanup_(remapping_freep) Remapping *remapping = NULL;
        _cleanup_free_ char *program = NULL;
        int r;

        if (m->remapping)
                return 0;
        *ret_reason = "route remap: out of memory";
        remapping = calloc(1, sizeof *remapping);
        if (!remapping)
                return -ENOMEM;
        for (int undo = 0; undo <= 1; undo++)
                remapping->pace[undo] = stop_pace_first(PAGE_FIRST_NSEC, undo ? RANGE_UNITS_UNDOING : RANGE_UNITS);
        program = find_program();
        r = keeper_new(m->state_dir, program, &remapping->keeper);
        if (r < 0) {
                KeeperSeen seen;

                *ret_reason = r == -ENOENT ? "route remap: ksmd-user-keeper is missing"
                            : r == -EPROTO ? "route remap: a keeper of another version runs, and is needed"
                                           : "route remap: the keeper cannot be started";
                if (r == -EPROTO && keeper_look(m->state_dir, &seen) == 0)
                        log_error("the keeper that runs speaks version %u of the protocol, and this daemon version %u: "
                                  "nothing is remapped until the processes that it guards have ended, or the daemon "
                                  "that remapped them has put them back", seen.protocol, seen.our_protocol);
                else
                        log_warning("the keeper cannot be used: %s", strerror(-r));
                return r;
        }
        r = keeper_pools(remapping->keeper, take_over_pool, remapping);
        if (r == 0)
                r = watch(m, remapping);
        if (r < 0) {
                *ret_reason = "route remap: the pools of before cannot be taken over";
                return r;
        }
        /* A program of the daemon before may not have ended yet. */
        if (remapping->n_pools > 0)
                remapping->uncertain_until_nsec = now_nsec() + UNCERTAIN_NSEC;
        m->remapping = TAKE_PTR(remapping);
        return 0;
}

static uint32_t max_sharing(const Manager *m) { return m->conf->daemon.max_page_sharing ?: 256; }

void manager_limit_pools(Manager *m) {
        for (size_t i = 0; m->remapping && i < m->remapping->n_pools; i++)
                pool_set_max_sharing(m->remapping->pools[i]->pool, max_sharing(m));
}

const char *manager_open_pool(void *userdata, Slot *slot) {
        Manager *m = userdata;
        _cleanup_free_ char *name = NULL;
        const char *reason = NULL;
        Pool *pool = NULL;
        int r;

        if (slot->pool)
                return NULL;
        if (!m->zero)
                return "this kernel cannot move pages out of a process (UFFDIO_MOVE, 6.8)";
        reason = policy_nodes_problem(m->conf, m->numa.n_nodes);
        if (reason)
                return reason;
        if (manager_open_keeper(m, &reason) < 0)
                return reason;
        if (asprintf(&name, "%s:%s", slot->own ? "cgroup" : "domain", slot->name) < 0)
                return "out of memory";
        for (size_t i = 0; i < m->remapping->n_pools; i++)
                if (strcmp(m->remapping->pools[i]->name, name) == 0) {
                        slot->pool = m->remapping->pools[i];
                        pool_set_max_sharing(slot->pool->pool, max_sharing(m));
                        return NULL;
                }
        if (!manager_keeper_ready(m))
                return "route remap: the keeper cannot be reached";
        r = pool_new(name, max_sharing(m), &pool, &reason);
        if (r < 0) {
                log_warning("no pool can be made: %s: %s", reason, strerror(-r));
                return reason;
        }
        r = keeper_pool_add(m->remapping->keeper, pool_mount_fd(pool));
        if (r < 0)
                pool_free(pool);
        else
                r = add_pool(m->remapping, pool, name, &slot->pool);
        return r < 0 ? "route remap: the keeper does not take the pool" : NULL;
}

/* Its pages never change while they are mapped, so what is read here is what they hold. */
void manager_learn_pool(Slot *slot) {
        const PoolSpace *space = pool_space(slot->pool->pool);
        _cleanup_free_ uint8_t *bytes = malloc(LEARN_PAGES * PAGE_BYTES);

        for (uint64_t page = 0, n; bytes && page < space->n; page += n) {
                n = 1;
                if (space->sharers[page] >= POOL_RESERVED)
                        continue;
                while (n < LEARN_PAGES && page + n < space->n && space->sharers[page + n] < POOL_RESERVED)
                        n++;
                if (pool_read(slot->pool->pool, page, (uint32_t)n, bytes) < 0)
                        continue;
                for (uint64_t i = 0; i < n; i++) {
                        uint64_t key = domain_key(slot->domain, bytes + i * PAGE_BYTES);

                        if (key != 0)
                                (void)stable_insert(slot->domain->stable, key, page + i,
                                                    MAX_OF(space->sharers[page + i], 1U));
                }
                notify_watchdog();
        }
}

static bool is_used(const Manager *m, const RemapPool *pool) {
        for (size_t i = 0; i < m->roster.n_slots; i++)
                if (m->roster.slots[i]->pool == pool)
                        return true;
        return false;
}

/* The sharers of a page as the pool counts them; a content nobody maps is there until it is collected. */
static uint32_t sharers_of(void *userdata, uint64_t key, uint64_t frame) {
        const PoolSpace *space = pool_space(userdata);

        return frame < space->n && space->sharers[frame] < POOL_RESERVED ? MAX_OF(space->sharers[frame], 1U) : 0;
}

void manager_tend_pools(Manager *m, uint64_t n_pages) {
        Remapping *remapping = m->remapping;

        if (!remapping || now_nsec() < remapping->uncertain_until_nsec)
                return;
        for (size_t i = 0; i < remapping->n_pools; i++) {
                RemapPool *pool = remapping->pools[i];
                uint64_t freed = 0;
                int r = pool_collect(pool->pool, n_pages, &freed);

                if (r < 0)
                        log_warning("pool of %s: %s", pool->name, strerror(-r));
                if (freed > 0)
                        log_debug("pool of %s: %lu pages freed", pool->name, freed);
        }
        for (size_t s = 0; s < m->roster.n_slots; s++)
                if (m->roster.slots[s]->pool && m->roster.slots[s]->domain)
                        domain_count_sharers(m->roster.slots[s]->domain, sharers_of, m->roster.slots[s]->pool->pool);
        for (size_t i = 0; i < remapping->n_pools;) {
                RemapPool *pool = remapping->pools[i];
                PoolStats stats;
                int r;

                if (is_used(m, pool) || pool_stats(pool->pool, &stats) < 0 || stats.pages > 0 ||
                    !manager_keeper_ready(m)) {
                        i++;
                        continue;
                }
                r = keeper_pool_drop(remapping->keeper, pool->name);
                if (r < 0 && r != -ENOENT)
                        log_warning("pool of %s: %s", pool->name, strerror(-r));
                pool_done(pool);
                remapping->pools[i] = remapping->pools[--remapping->n_pools];
        }
}

uint64_t manager_pool_pages(const Manager *m) {
        uint64_t most = 0;

        for (size_t i = 0; m->remapping && i < m->remapping->n_pools; i++)
                most = MAX_OF(most, pool_space(m->remapping->pools[i]->pool)->n);
        return most;
}

static bool maps_a_pool(const Remapping *remapping, pid_t pid) {
        _cleanup_free_ char *text = NULL;
        char path[64];

        snprintf(path, sizeof path, "/proc/%d/maps", pid);
        if (read_file(AT_FDCWD, path, &text, NULL) < 0)
                return false;
        for (size_t i = 0; i < remapping->n_pools; i++) {
                const RemapIdentity *pool = &remapping->pools[i]->identity;
                char mark[64];

                snprintf(mark, sizeof mark, " %02x:%02x %lu ", major(pool->dev), minor(pool->dev), pool->inode);
                if (strstr(text, mark))
                        return true;
        }
        return false;
}

static void add_orphan(Manager *m, pid_t pid) {
        Member *member = roster_find_member(&m->roster, pid);

        if (roster_find_leaving(&m->roster, pid) || (member && member->group->slot->domain))
                return;
        if (member) /* of a domain that merges nothing: no pass comes to it */
                roster_expel(&m->roster, member);
        else if (roster_add_orphan(&m->roster, pid) != 0)
                return;
        log_info("process %d was remapped by an earlier daemon and is not merged any more: undoing it", pid);
}

void manager_find_remapped(Manager *m) {
        const char *reason;
        _cleanup_free_ char *path = NULL;
        _cleanup_closedir_ DIR *proc = NULL;
        int r = 0;

        m->keeper_missed = false;
        if (asprintf(&path, "%s/keeper", m->state_dir) < 0)
                return;
        if (!m->remapping)
                r = access(path, F_OK) < 0 ? -ENOENT : manager_open_keeper(m, &reason);
        if (r < 0) {
                m->keeper_missed = r != -ENOENT && r != -EPROTO; /* those will be the same the next time */
                return;
        }
        if (m->remapping->n_pools > 0)
                (void)open_directory(AT_FDCWD, "/proc", &proc);
        for (const struct dirent *entry; proc && (entry = readdir(proc));) {
                pid_t pid = dirent_pid(entry);

                if (pid > 0 && maps_a_pool(m->remapping, pid))
                        add_orphan(m, pid);
        }
        manager_tend_pools(m, 0);
}
