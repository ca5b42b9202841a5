/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A daemon's part before a keeper that systemd started, for nspawn/units: holds guards of two processes, one of which
 * forked a child that lives, and does one thing for each line on standard input, answering with one line:
 *
 *     hold       makes processes and pool, hands the guards over; "held": how many descriptors
 *     discard    all three discard one more page and read it; "zeros", or "stale": they see what it held
 *     leave      the daemon ends: no connection, no copy of any guard
 *     return     the next one: finds every guard, whose it is, and the pool
 *     end        the processes end, the pool is given back
 *     abandon    ends at once, where guards are lost
 */
#include "../kernel/guard-child.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define STATE_DIR "/run/ksmd-user"
#define VICTIMS 2
#define PAGES 64U
#define NOTE 0x5eedU

/* Shared.counters: 0 to 2 are guarded_remap()'s. */
enum { ASKED = 3, ANSWERED, SAW_ZEROS };

static Guarded victims[VICTIMS];
static uint32_t n_discarded;
static bool child_found;

static bool discard(uint64_t page) { return order_discard((long)page) == 0 && order_is_zero((long)page); }

/* A child that discards a page whenever it is told. */
static long order_fork(long unused) {
        pid_t pid = fork();

        if (pid != 0)
                return pid;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (uint64_t n = 1;; n++) {
                while (__atomic_load_n(&shared->counters[ASKED], __ATOMIC_ACQUIRE) < n)
                        usleep(1000);
                shared->counters[SAW_ZEROS] = discard(n - 1);
                __atomic_store_n(&shared->counters[ANSWERED], n, __ATOMIC_RELEASE);
        }
}

static KeeperOwner owner_of(unsigned victim) {
        const Target *target = victims[victim].child.target;

        return (KeeperOwner){ .pid = target->pid, .start_ticks = target->start_ticks, .note = { NOTE, victim } };
}

static void hold(void) {
        guard_test_begin(PAGES, NULL);
        /* All of them before the first guard: they would inherit copies. */
        for (unsigned i = 0; i < VICTIMS; i++)
                victims[i].child = child_start();
        CHECK(keeper_new(STATE_DIR, NULL, &keeper) == 0);
        CHECK(keeper_pool_add(keeper, pool_mount_fd(pool)) == 0);
        for (unsigned i = 0; i < VICTIMS; i++) {
                KeeperOwner owner = owner_of(i);
                uint64_t start = shared->start;

                guarded_map_area(&victims[i].child, PAGES);
                CHECK(i == 0 || shared->start == start);
                guarded_guard(&victims[i], true);
                CHECK(keeper_add(keeper, victims[i].guard, &owner) == 0);
                guarded_remap(&victims[i], 0, PAGES, pool_first);
        }
        CHECK(child_order(&victims[0].child, order_fork, 0) > 0);
        printf("held %u\n", VICTIMS + 1 + 1 + 1); /* the child, the pool, the keeper's table */
}

static void discard_all(void) {
        bool zeros = true;

        for (unsigned i = 0; i < VICTIMS; i++) {
                CHECK(child_order(&victims[i].child, order_discard, n_discarded) == 0);
                zeros &= child_order(&victims[i].child, order_is_zero, n_discarded) == 1;
        }
        n_discarded++;
        __atomic_store_n(&shared->counters[ASKED], n_discarded, __ATOMIC_RELEASE);
        for (unsigned i = 0; __atomic_load_n(&shared->counters[ANSWERED], __ATOMIC_ACQUIRE) < n_discarded; i++) {
                CHECK(i < 10000, "the child stands still");
                usleep(1000);
        }
        zeros &= shared->counters[SAW_ZEROS] != 0;
        for (unsigned i = 0; i < VICTIMS && zeros; i++)
                CHECK_HARMLESS(child_order(&victims[i].child, order_check_pool, PAGES) == n_discarded);
        puts(zeros ? "zeros" : "stale");
}

static void leave(void) {
        keeper = keeper_free(keeper);
        for (unsigned i = 0; i < VICTIMS; i++)
                victims[i].guard = safe_close(victims[i].guard);
        puts("left");
}

static int find(void *userdata, const KeeperItem *item, int uffd) {
        CHECK(guard_id(uffd) == item->id && guard_kind(uffd) == GUARD_ZERO && item->kind == GUARD_ZERO);
        for (unsigned i = 0; i < VICTIMS; i++) {
                KeeperOwner owner = owner_of(i);

                if (item->id != victims[i].id)
                        continue;
                CHECK(item->parent == 0 && memcmp(&item->owner, &owner, sizeof owner) == 0);
                CHECK(victims[i].guard < 0, "listed twice");
                victims[i].guard = fcntl(uffd, F_DUPFD_CLOEXEC, 3);
                return 0;
        }
        CHECK(item->parent == victims[0].id && item->owner.pid == 0 && !child_found);
        child_found = true;
        return 0;
}

static void come_back(void) {
        _cleanup_close_ int mount = -EBADF;

        CHECK(keeper_new(STATE_DIR, NULL, &keeper) == 0);
        child_found = false;
        CHECK(keeper_list(keeper, find, NULL) == 0 && child_found);
        for (unsigned i = 0; i < VICTIMS; i++)
                CHECK(victims[i].guard >= 0, "victim %u is not known", i);
        CHECK(keeper_pool_get(keeper, "test", &mount) == 0);
        puts("back");
}

static void end(void) {
        for (unsigned i = 0; i < VICTIMS; i++)
                guarded_stop(&victims[i]);
        CHECK(keeper_pool_drop(keeper, "test") == 0);
        keeper = keeper_free(keeper);
        guard_test_end();
        puts("ended");
}

int main(void) {
        static const struct {
                const char *name;
                void (*run)(void);
        } commands[] = { { "hold", hold }, { "discard", discard_all }, { "leave", leave }, { "return", come_back },
                         { "end", end } };
        char line[64];

        setvbuf(stdout, NULL, _IOLBF, 0);
        while (fgets(line, sizeof line, stdin)) {
                line[strcspn(line, "\n")] = 0;
                if (strcmp(line, "abandon") == 0)
                        return 0;
                for (size_t i = 0; i < ELEMENTSOF(commands); i++)
                        if (strcmp(line, commands[i].name) == 0)
                                commands[i].run();
        }
        return 0;
}
