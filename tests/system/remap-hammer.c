/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Merges and unmerges the memory of victims (remap-hammer-victim.c) as fast as it can be done, by the programs of route
 * remap (merge/remap.h), while they write, discard, map, fork and have the kernel write to it; every byte is checked. Built
 * with the sources of the route and of remote calls (REMAP_TEST, REMOTE_TEST): single safeguards can be left out, whose
 * absence the victims then must notice, and the engine can be killed at random or at each step of the protocol.
 */
#include "remap-hammer.h"

#include "merge/remap.h"
#include "steps.h"
#include "tests/test.h"

#include <dirent.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/mount.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

/* The victims never rest, and there are more of their threads than CPUs. */
#define PATIENCE_NSEC (60 * NSEC_PER_MSEC)

HammerShared *hammer;
unsigned remote_test_leave_out, remap_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;

static int end_at_step = -1;
static bool end_in_program;
static unsigned long end_after;
int pool_ro;
struct stat pool_stat;
static RemapGuard guards[HAMMER_VICTIMS];

void remote_test_step(RemoteStep step) {
        if ((int)step == end_at_step && end_after-- == 0)
                raise(SIGKILL);
        /* Somewhere in the program, or right behind it. SIGALRM, which nobody handles, ends us as SIGKILL does. */
        if (step == REMOTE_STEP_PROGRAM && end_in_program && end_after-- == 0) {
                const struct itimerval soon = { .it_value.tv_usec = 1 + random() % 2500 };

                setitimer(ITIMER_REAL, &soon, NULL);
        }
}

static void make_pool(void) {
        int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);

        CHECK(fs >= 0, "fsopen");
        if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "noswap", NULL, 0) < 0)
                TEST_SKIP("tmpfs without noswap");
        CHECK(syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "huge", "never", 0) == 0, "huge");
        CHECK(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0, "tmpfs");
        int mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
        CHECK(mount >= 0, "fsmount");
        int rw = openat(mount, "pool", O_RDWR | O_CREAT | O_CLOEXEC, 0400);
        pool_ro = openat(mount, "pool", O_RDONLY | O_CLOEXEC);
        CHECK(rw >= 0 && pool_ro >= 0 && ftruncate(rw, (off_t)1 << 40) == 0 && fstat(rw, &pool_stat) == 0, "pool");
        for (uint64_t i = 0; i < HAMMER_PAGES; i++) {
                uint8_t page[PAGE_BYTES] __attribute__((aligned(8)));

                hammer_pattern(page, i);
                CHECK(pwrite(rw, page, sizeof page, (off_t)(i * PAGE_BYTES)) == sizeof page, "pool");
        }
        close(rw);
        close(mount);
        close(fs);
}

void read_maps(pid_t pid, Maps *maps) {
        char path[64], line[512];

        snprintf(path, sizeof path, "/proc/%d/maps", pid);
        FILE *file = fopen(path, "re");
        maps->n = 0;
        while (file && maps->n < ELEMENTSOF(maps->maps) && fgets(line, sizeof line, file)) {
                Map *map = &maps->maps[maps->n];
                char perms[5];

                if (sscanf(line, "%lx-%lx %4s %lx %*s %lu", &map->start, &map->end, perms, &map->offset, &map->inode) != 5)
                        continue;
                map->usable = strcmp(perms, "rw-p") == 0;
                maps->n++;
        }
        if (file)
                fclose(file);
}

static bool is_pool(const Map *map) { return map->inode == pool_stat.st_ino && map->usable; }
static bool is_plain(const Map *map) { return map->inode == 0 && map->usable; }

static const Map *find_map(const Maps *maps, uint64_t address) {
        for (size_t i = 0; i < maps->n; i++)
                if (maps->maps[i].start <= address && address < maps->maps[i].end)
                        return &maps->maps[i];
        return NULL;
}

static size_t count_maps(const Maps *maps, const HammerVictim *victim, bool pool) {
        size_t n = 0;

        for (size_t i = 0; i < maps->n; i++)
                n += pool ? is_pool(&maps->maps[i])
                          : maps->maps[i].start < victim->area + HAMMER_PAGES * PAGE_BYTES && maps->maps[i].end > victim->area;
        return n;
}

static size_t count_fds(pid_t pid) {
        char path[64];
        size_t n = 0;

        snprintf(path, sizeof path, "/proc/%d/fd", pid);
        DIR *dir = opendir(path);
        while (dir && readdir(dir))
                n++;
        if (dir)
                closedir(dir);
        return n;
}

/* Both add to the batch what is where they say, as far as it is still there. */
static void add_merge(RemapBatch *batch, const HammerVictim *victim, const Maps *maps, uint64_t start, uint64_t page,
                      uint32_t n_pages) {
        const Map *map = find_map(maps, start);

        if (!map || !is_plain(map) || batch->n == REMAP_BATCH_MAX)
                return;
        n_pages = (uint32_t)MIN_OF((uint64_t)n_pages, (map->end - start) / PAGE_BYTES);
        batch->ranges[batch->n++] = (RemapRange){
                .start = start,
                .n_pages = n_pages,
                .page = page,
                .alone = random() % 4 != 0,
                .advice = start >= victim->area + HAMMER_LAST * PAGE_BYTES &&
                                          start < victim->area + HAMMER_PAGES * PAGE_BYTES
                                  ? VMA_DONTDUMP
                                  : 0,
        };
}

static void add_undo(RemapBatch *batch, const HammerVictim *victim, const Maps *maps, const Map *map) {
        const Map *below = find_map(maps, map->start - 1), *above = find_map(maps, map->end);
        bool last = map->start >= victim->area + HAMMER_LAST * PAGE_BYTES &&
                    map->start < victim->area + HAMMER_PAGES * PAGE_BYTES;

        const RemapRange *last_range = batch->n > 0 ? &batch->ranges[batch->n - 1] : NULL;
        bool follows = last_range && last_range->start + last_range->n_pages * PAGE_BYTES == map->start;

        if (batch->n == REMAP_BATCH_MAX)
                return;
        if (map->start == victim->area + HAMMER_LAST * PAGE_BYTES)
                below = NULL; /* its neighbour is dumped */
        if (map->end == victim->area + HAMMER_LAST * PAGE_BYTES)
                above = NULL;
        batch->ranges[batch->n++] = (RemapRange){
                .start = map->start,
                .n_pages = (uint32_t)((map->end - map->start) / PAGE_BYTES),
                .advice = last ? VMA_DONTDUMP : 0,
                .neighbour = below && (is_plain(below) || follows) ? map->start - PAGE_BYTES :
                             above && is_plain(above) ? map->end :
                                                        0,
        };
}

static void count_results(const RemapBatch *batch, int r, bool undo) {
        hammer->batches++;
        hammer->stop_nsec += batch->stop_nsec;
        if (batch->stop_nsec > hammer->stop_nsec_max)
                hammer->stop_nsec_max = batch->stop_nsec;
        hammer->outcomes[r]++;
        if (r != 0)
                return;
        for (size_t i = 0; i < batch->n; i++)
                switch (batch->ranges[i].result) {
                case REMAP_DONE:
                        if (undo)
                                hammer->undone += batch->ranges[i].n_pages;
                        else {
                                hammer->merged += batch->ranges[i].n_pages;
                                hammer->runs++;
                        }
                        break;
                case REMAP_BUSY: hammer->busy++; break;
                case REMAP_DIFFERENT: hammer->different++; break;
                case REMAP_CHANGED: hammer->changed++; break;
                case REMAP_REFUSED: hammer->refused++; break;
                case REMAP_FAILED: hammer->failed++; break;
                case REMAP_UNGUARDED: hammer->unguarded++; break;
                case REMAP_MOVED: hammer->moved++; break;
                default: break;
                }
}

static int merge_some(Remote *remote, Target *target, const HammerVictim *victim, const Maps *maps,
                      const RemapGuard *guard) {
        RemapRange ranges[REMAP_BATCH_MAX];
        RemapBatch batch = { .ranges = ranges, .guard = guard, .pool_fd = pool_ro, .settle = hammer_guard_sync,
                             .patience_nsec = PATIENCE_NSEC, .run_nsec = 2 * PATIENCE_NSEC };
        uint64_t page = random() % 3 ? (uint64_t)random() % 200 : HAMMER_OUTSIDE + (uint64_t)random() % 30;
        uint64_t churn = victim->churn;

        while (page < HAMMER_PAGES && batch.n < 24) {
                uint32_t n = 1 + (uint32_t)random() % 32;

                if (random() % 4)
                        add_merge(&batch, victim, maps, victim->area + page * PAGE_BYTES, page,
                                  (uint32_t)MIN_OF((uint64_t)n, HAMMER_PAGES - page));
                page += n + (uint32_t)random() % 100;
        }
        if (batch.n > 0 && churn && random() % 4 == 0) {
                batch.n = 0;
                add_merge(&batch, victim, maps, churn, 0, HAMMER_CHURN);
        }
        if (batch.n == 0)
                return 0;
        int r = remap_merge(remote, target, &batch);
        count_results(&batch, r, false);
        return r;
}

/* A page that was written and is being written from outside, or by io_uring or O_DIRECT, cannot be put back: half of the
 * time the route is told to leave what was written, the other half it is not asked for such pages. */
static bool written_too;

static bool may_be_written(const HammerVictim *victim, const Map *map) {
        return !written_too || map->end <= victim->area + HAMMER_OUTSIDE * PAGE_BYTES ||
               map->start >= victim->area + HAMMER_LAST * PAGE_BYTES;
}

static int undo_some(Remote *remote, Target *target, const HammerVictim *victim, const Maps *maps,
                     const RemapGuard *guard, bool all) {
        RemapRange ranges[REMAP_BATCH_MAX];
        RemapBatch batch = { .ranges = ranges, .guard = guard, .pool_fd = -EBADF,
                             .pool_dev = pool_stat.st_dev, .pool_inode = pool_stat.st_ino, .settle = hammer_guard_sync,
                             .patience_nsec = PATIENCE_NSEC, .run_nsec = 2 * PATIENCE_NSEC };

        written_too = all || random() % 2;
        batch.written_too = written_too;
        for (size_t i = 0; i < maps->n && batch.n < 24; i++)
                if (is_pool(&maps->maps[i]) && (all || (random() % 3 == 0 && may_be_written(victim, &maps->maps[i]))))
                        add_undo(&batch, victim, maps, &maps->maps[i]);
        if (batch.n == 0)
                return 0;
        int r = remap_undo(remote, target, &batch);
        if (r == 0 && all)
                for (size_t i = 0; i < batch.n; i++)
                        if (ranges[i].result != REMAP_DONE)
                                printf("  %lx of %u pages: %s, %d\n", ranges[i].start, ranges[i].n_pages,
                                       remap_result_name(ranges[i].result), ranges[i].error);
        count_results(&batch, r, true);
        return r;
}

static void engine_step(Remote *remote, Target *const targets[], Maps *maps) {
        unsigned v = (unsigned)random() % HAMMER_VICTIMS;
        const HammerVictim *victim = &hammer->victims[v];
        int r;

        read_maps(victim->pid, maps);
        if (random() % 100 < (long)(10 + count_maps(maps, victim, true)))
                r = undo_some(remote, targets[v], victim, maps, &guards[v], false);
        else
                r = merge_some(remote, targets[v], victim, maps, &guards[v]);
        CHECK(r >= 0, "%s", strerror(-r));
        if (r == REMOTE_E_GONE || r == REMOTE_E_UNFIT || r == REMOTE_E_DENIED)
                usleep(1000);
        remote_reap(remote);
}

static void open_targets(Target *targets[static HAMMER_VICTIMS]) {
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                CHECK(target_new(hammer->victims[v].pid, &targets[v]) == 0, "victim");
}

_Noreturn static void engine_run(unsigned seed, uint64_t until_nsec) {
        static Maps maps;
        Target *targets[HAMMER_VICTIMS];
        Remote *remote;

        srandom(seed);
        CHECK(remote_new(&remote) == 0, "remote");
        open_targets(targets);
        while (now_nsec() < until_nsec)
                engine_step(remote, targets, &maps);
        remote_free(remote);
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                target_free(targets[v]);
        exit(0);
}

static void run_killed(bool steps, uint64_t until) {
        const uint64_t last = until + (steps ? STEPS_PATIENCE_NSEC : 0);
        Steps ended = {};

        for (unsigned i = 0; now_nsec() < until || (now_nsec() < last && !steps_are_complete(&ended)); i++) {
                int step = steps ? (int)(i % _REMOTE_STEP_MAX) : -1, status;

                if (steps && !steps_wants(&ended, (unsigned)step, now_nsec() >= until))
                        continue;
                pid_t pid = fork();
                CHECK(pid >= 0, "fork");
                if (pid == 0) {
                        end_at_step = step;
                        end_in_program = !steps;
                        end_after = steps ? i / _REMOTE_STEP_MAX % 5 : i % 2;
                        engine_run(i + 1, now_nsec() + NSEC_PER_SEC / 2);
                }
                CHECK(waitpid(pid, &status, 0) == pid, "engine");
                CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGALRM : status == 0, "the engine ended with %#x", status);
                hammer->kills += WIFSIGNALED(status);
                if (steps && WIFSIGNALED(status))
                        ended.reached[step]++;
                for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                        CHECK_HARMLESS(waitpid(hammer->victims[v].pid, &status, WNOHANG) == 0,
                                       "a victim died at step %d: %#x", step, status);
        }
        CHECK(hammer->kills > 0, "nobody was killed");
        if (steps)
                steps_check(&ended);
}

static uint64_t errors(void) {
        uint64_t n = 0;

        for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                n += hammer->victims[v].errors;
        return n;
}

static void report(void) {
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++) {
                const HammerVictim *x = &hammer->victims[v];

                printf("victim %u: %lu errors %s%s%s; %lu operations, %lu discards, %lu replaced, %lu read(2), %lu outside, "
                       "%lu forks, %lu churned, %lu io_uring, %lu O_DIRECT\n",
                       v, x->errors, x->errors ? "(" : "", x->first, x->errors ? ")" : "", x->operations, x->discards,
                       x->replaced, x->kernel_writes, x->outside_writes, x->forks, x->churned, x->pinned, x->direct);
        }
        printf("%lu pages merged in %lu runs, %lu put back, in %lu batches; left: %lu busy, %lu different, %lu changed, %lu refused, "
               "%lu failed, %lu unguarded, %lu moved; stop mean %lu max %lu us; %lu kills; "
               "guard: %lu faults, %lu zeros, %lu forks, %lu remaps, %lu syncs\n",
               hammer->merged, hammer->runs, hammer->undone, hammer->batches, hammer->busy, hammer->different,
               hammer->changed, hammer->refused, hammer->failed, hammer->unguarded, hammer->moved,
               hammer->stop_nsec / (hammer->batches + 1) / 1000, hammer->stop_nsec_max / 1000, hammer->kills, hammer->faults,
               hammer->zeros, hammer->guard_forks, hammer->guard_remaps, hammer->syncs);
        for (int i = 0; i < (int)ELEMENTSOF(hammer->outcomes); i++)
                if (hammer->outcomes[i])
                        printf("%s %lu ", remote_error_name(i), hammer->outcomes[i]);
        printf("\n");
}

/* Everything is put back; a victim that is stuck shows here. */
static void undo_everything(size_t maps_before[static HAMMER_VICTIMS], size_t fds_before[static HAMMER_VICTIMS]) {
        static Maps maps;
        Target *targets[HAMMER_VICTIMS];
        Remote *remote;

        CHECK(remote_new(&remote) == 0, "remote");
        open_targets(targets);
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++) {
                HammerVictim *victim = &hammer->victims[v];
                TargetSkip skip;
                unsigned tries = 0;
                int r = 0;

                /* Now nobody writes any more past the page tables. */
                victim->stop = true;
                waitpid(victim->writer, NULL, 0);
                while (!victim->quiet)
                        usleep(1000);

                for (;; tries++) {
                        read_maps(victim->pid, &maps);
                        if (count_maps(&maps, victim, true) == 0)
                                break;
                        if (tries == 1999)
                                report();
                        CHECK(tries < 2000, "victim %u: %zu mappings of the pool are left, %s", v,
                              count_maps(&maps, victim, true), remote_error_name(r));
                        r = undo_some(remote, targets[v], victim, &maps, &guards[v], true);
                        CHECK(r >= 0, "%s", strerror(-r));
                        if (r > 0)
                                usleep(1000);
                        remote_reap(remote);
                }
                for (tries = 0; (r = remote_adopt(remote, targets[v], NULL, &skip)) != 0; tries++) {
                        CHECK(tries < 500, "victim %u cannot be called: %s", v, remote_error_name(r));
                        usleep(2000);
                }
                victim->freed = 1;
                for (tries = 0; !victim->checked; tries++) {
                        CHECK(tries < 2000, "victim %u does not end", v);
                        usleep(5000);
                }
                read_maps(victim->pid, &maps);
                printf("victim %u: %zu mappings of its area, %zu before; %zu descriptors, %zu before\n", v,
                       count_maps(&maps, victim, false), maps_before[v], count_fds(victim->pid), fds_before[v]);
                for (size_t i = 0; i < maps.n; i++)
                        CHECK(!remote_region_has(maps.maps[i].start), "a region is left at %lx", maps.maps[i].start);
                for (size_t i = 0; i < maps.n && count_maps(&maps, victim, false) > maps_before[v]; i++)
                        if (maps.maps[i].start < victim->area + HAMMER_PAGES * PAGE_BYTES && maps.maps[i].end > victim->area)
                                printf("  pages %lu to %lu\n", (maps.maps[i].start - victim->area) / PAGE_BYTES,
                                       (maps.maps[i].end - victim->area) / PAGE_BYTES);
        }
        remote_free(remote);
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                target_free(targets[v]);
}

static void start_victims(void) {
        Target *targets[HAMMER_VICTIMS];
        Remote *remote;

        for (unsigned v = 0; v < HAMMER_VICTIMS; v++) {
                HammerVictim *victim = &hammer->victims[v];

                victim->pid = fork();
                CHECK(victim->pid >= 0, "fork");
                if (victim->pid == 0) {
                        victim->pid = getpid();
                        hammer_victim_run(victim);
                }
                while (!victim->area)
                        usleep(1000);
                victim->writer = fork();
                if (victim->writer == 0)
                        hammer_writer_run(victim);
        }
        CHECK(remote_new(&remote) == 0, "remote");
        open_targets(targets);
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++) {
                int r;

                for (unsigned tries = 0; (r = remap_guard_make(remote, targets[v], &guards[v])) != 0; tries++) {
                        CHECK(r > 0 && tries < 5000, "no guard: %d", r);
                        usleep(2000);
                }
                hammer_guard_add(guards[v].zero, false);
                hammer_guard_add(guards[v].mute, true);
        }
        remote_free(remote);
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++)
                target_free(targets[v]);
}

int main(int argc, char **argv) {
        double seconds = 10;
        bool measuring = false, confined = false;
        bool kill_at_random = false, kill_at_steps = false;
        size_t maps_before[HAMMER_VICTIMS], fds_before[HAMMER_VICTIMS];
        static Maps maps;
        static const struct option options[] = {
                { "seconds", required_argument, NULL, 's' },    { "leave-out", required_argument, NULL, 'l' },
                { "leave-out-remote", required_argument, NULL, 'r' }, { "kill", no_argument, NULL, 'k' },
                { "kill-steps", no_argument, NULL, 'K' },       { "measure", no_argument, NULL, 'm' },
                { "confined", no_argument, NULL, 'c' },
                {},
        };

        for (int o; (o = getopt_long(argc, argv, "", options, NULL)) >= 0;)
                switch (o) {
                case 's': seconds = atof(optarg); break;
                case 'l': remap_test_leave_out = (unsigned)strtoul(optarg, NULL, 0); break;
                case 'r': remote_test_leave_out = (unsigned)strtoul(optarg, NULL, 0); break;
                case 'k': kill_at_random = true; break;
                case 'K': kill_at_steps = true; break;
                case 'm': measuring = true; break;
                case 'c': confined = true; break;
                default: return 2;
                }
        remote_test_leave_out |= REMOTE_GUARD_CALM; /* it is a hammer */
        test_need_root();
        setlinebuf(stdout);
        hammer = mmap(NULL, sizeof *hammer, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(hammer != MAP_FAILED, "mmap");
        hammer->confined = confined;
        make_pool();
        hammer_guard_start();
        for (uint32_t run = 8; measuring && run <= 512; run *= 8)
                hammer_measure(MIN_OF(run, 511U));
        if (measuring)
                return 0;
        start_victims();
        for (unsigned v = 0; v < HAMMER_VICTIMS; v++) {
                read_maps(hammer->victims[v].pid, &maps);
                maps_before[v] = count_maps(&maps, &hammer->victims[v], false);
                fds_before[v] = count_fds(hammer->victims[v].pid);
        }
        uint64_t until = now_nsec() + (uint64_t)(seconds * 1e9);
        if (kill_at_random || kill_at_steps)
                run_killed(kill_at_steps, until);
        else {
                int status;
                pid_t pid = fork();

                if (pid == 0)
                        engine_run(42, until);
                while (waitpid(pid, &status, WNOHANG) == 0 && !errors())
                        usleep(10000);
                if (errors()) {
                        kill(pid, SIGKILL);
                        report();
                        CHECK_HARMLESS(!errors(), "wrong bytes");
                }
                CHECK(status == 0, "the engine ended with %#x", status);
        }
        undo_everything(maps_before, fds_before);
        report();
        CHECK_HARMLESS(errors() == 0, "wrong bytes");
        CHECK(hammer->merged > 0 && hammer->undone > 0, "nothing was done");
        return 0;
}
