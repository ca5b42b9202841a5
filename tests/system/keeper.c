/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The keeper, killed again and again while processes discard, write and read guarded pages, have the kernel write to
 * them, and fork children that do the same: each checks every byte it reads.
 *
 *     keeper KEEPER [all|control [KILLS]]
 *
 * control: the keeper is left alone; for a build of it that leaves a safeguard out, and has to be found out.
 */
#include "../kernel/guard-child.h"

#include "base/io.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define VICTIMS 2
#define THREADS 3
#define PAGES 384U
#define FORK_PAGES 64U          /* the first ones: only children change them, each its own */
#define KILLS 200U
#define STALL_NSEC (10 * NSEC_PER_SEC)

enum { OPS, CHECKS, DISCARDS, FORKS, WRONG, NO_FORKS, FORKING, N_COUNTERS };
typedef struct Counters {
        uint64_t n[N_COUNTERS];
} Counters;
static Counters *counters;      /* one a victim */
static Counters *own;

static void count(int what) { __atomic_fetch_add(&own->n[what], 1, __ATOMIC_RELAXED); }
static uint64_t counted(const Counters *of, int what) { return __atomic_load_n(&of->n[what], __ATOMIC_ACQUIRE); }

static uint64_t rnd(uint64_t *state) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        return *state >> 16;
}

static void wrong(const char *what, uint64_t page) {
        if (__atomic_fetch_add(&own->n[WRONG], 1, __ATOMIC_RELAXED) == 0)
                fprintf(stderr, "wrong: %s, page %lu\n", what, page);
}

static bool stopping(void) { return __atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE) != 0; }

/* What a page must hold: the number of a content, or nothing but zeros. */
#define ZERO UINT64_MAX
static bool holds(uint64_t page, uint64_t number) {
        return number == ZERO ? page_is_zero((void *)area_page(page)) : page_is((void *)area_page(page), number);
}

static void kernel_writes(int fds[static 2], uint64_t page, uint64_t number) {
        uint64_t data[PAGE_BYTES / sizeof(uint64_t)];

        page_fill(data, number);
        CHECK(write(fds[1], data, sizeof data) == sizeof data);
        CHECK(read(fds[0], (void *)area_page(page), sizeof data) == sizeof data);
}

/* Pages page % THREADS == thread are this thread's. */
static void *hammer(void *argument) {
        uint64_t thread = (uintptr_t)argument, state = 88172645463325252ULL * (thread + 1) + (uint64_t)getpid();
        uint64_t expected[PAGES];
        int fds[2];

        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        for (uint64_t i = 0; i < PAGES; i++)
                expected[i] = pool_first + i;
        while (!stopping()) {
                uint64_t page = FORK_PAGES + rnd(&state) % ((PAGES - FORK_PAGES) / THREADS) * THREADS + thread;
                unsigned op = (unsigned)(rnd(&state) % 100);

                if (page >= PAGES)
                        continue;
                count(OPS);
                if (op < 50) {
                        if (!holds(page, expected[page]))
                                wrong("a thread's own", page);
                        count(CHECKS);
                } else if (op < 75) {
                        CHECK(madvise((void *)area_page(page), PAGE_BYTES, MADV_DONTNEED) == 0);
                        expected[page] = ZERO;
                        count(DISCARDS);
                } else if (op < 90) {
                        expected[page] = rnd(&state);
                        page_fill((void *)area_page(page), expected[page]);
                } else {
                        expected[page] = rnd(&state);
                        kernel_writes(fds, page, expected[page]);
                }
        }
        for (uint64_t page = FORK_PAGES + thread; page < PAGES; page++)
                if (page % THREADS == (FORK_PAGES + thread) % THREADS && !holds(page, expected[page]))
                        wrong("at the end", page);
        close(fds[0]);
        close(fds[1]);
        return NULL;
}

/* In a child: everything is as it was, what it discards is gone, what it writes is its own; and in a child of it. */
static int child_main(unsigned generations, uint64_t state) {
        uint64_t discarded = 1 + rnd(&state) % (FORK_PAGES - 1);
        int status;
        pid_t pid;

        for (uint64_t page = 0; page < FORK_PAGES; page += 1 + rnd(&state) % 7)
                if (!holds(page, pool_first + page))
                        return 1;
        if (madvise((void *)area_page(discarded), PAGE_BYTES, MADV_DONTNEED) != 0 || !holds(discarded, ZERO))
                return 2;
        page_fill((void *)area_page(0), 4711);
        if (generations > 0) {
                pid = fork();
                if (pid == 0) {
                        if (!holds(0, 4711) || !holds(discarded, ZERO))
                                _exit(3);
                        if (madvise((void *)area_page(0), PAGE_BYTES, MADV_DONTNEED) != 0 || !holds(0, ZERO))
                                _exit(4);
                        _exit(0);
                }
                if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
                        return 5;
        }
        return holds(0, 4711) && holds(discarded, ZERO) ? 0 : 6;
}

static void *forker(void *unused) {
        uint64_t state = 777 + (uint64_t)getpid();

        while (!stopping()) {
                int status;
                pid_t pid;

                __atomic_store_n(&own->n[FORKING], 1, __ATOMIC_SEQ_CST);
                if (__atomic_load_n(&own->n[NO_FORKS], __ATOMIC_SEQ_CST)) {
                        __atomic_store_n(&own->n[FORKING], 0, __ATOMIC_SEQ_CST);
                        usleep(500);
                        continue;
                }
                pid = fork();
                if (pid == 0)
                        _exit(child_main((unsigned)rnd(&state) % 2, state));
                CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
                if (status != 0)
                        wrong("in a child, exit status", (uint64_t)status);
                count(FORKS);
                __atomic_store_n(&own->n[FORKING], 0, __ATOMIC_SEQ_CST);
        }
        return NULL;
}

static long order_hammer(long victim) {
        pthread_t threads[THREADS + 1];

        own = &counters[victim];
        for (uintptr_t i = 0; i < THREADS; i++)
                CHECK(pthread_create(&threads[i], NULL, hammer, (void *)i) == 0);
        CHECK(pthread_create(&threads[THREADS], NULL, forker, NULL) == 0);
        for (unsigned i = 0; i <= THREADS; i++)
                CHECK(pthread_join(threads[i], NULL) == 0);
        return (long)own->n[WRONG];
}

static void await_progress(void) {
        Counters before[VICTIMS];
        uint64_t deadline = now_nsec() + STALL_NSEC;

        memcpy(before, counters, sizeof before);
        for (unsigned i = 0; i < VICTIMS; i++)
                while (counted(&counters[i], DISCARDS) < before[i].n[DISCARDS] + 2 ||
                       (!counters[i].n[NO_FORKS] && counted(&counters[i], FORKS) <= before[i].n[FORKS])) {
                        CHECK(now_nsec() < deadline, "victim %u stands still: %lu discards, %lu before; %lu forks, %lu before",
                              i, counted(&counters[i], DISCARDS), before[i].n[DISCARDS], counted(&counters[i], FORKS),
                              before[i].n[FORKS]);
                        (void)keeper_dispatch(keeper);
                        usleep(200);
                }
}

static void allow_forks(bool allow) {
        for (unsigned i = 0; i < VICTIMS; i++)
                __atomic_store_n(&counters[i].n[NO_FORKS], !allow, __ATOMIC_SEQ_CST);
        for (unsigned i = 0; !allow && i < VICTIMS; i++)
                for (unsigned tries = 0; __atomic_load_n(&counters[i].n[FORKING], __ATOMIC_SEQ_CST); tries++) {
                        CHECK(tries < 50000, "a child does not end");
                        usleep(200);
                }
}

static pid_t parent_of(pid_t pid) {
        _cleanup_free_ char *text = NULL;
        char path[64];

        snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
        if (read_file(AT_FDCWD, path, &text, NULL) < 0)
                return -1;
        pid = (pid_t)atoi(strrchr(text, ')') + 4);
        snprintf(path, sizeof path, "/proc/%d/comm", (int)pid);
        free(TAKE_PTR(text));
        /* Whose own parent was killed just now is somebody else's child for a moment. */
        return read_file(AT_FDCWD, path, &text, NULL) == 0 && strncmp(text, "ksmd-keeper", 11) == 0 ? pid : -1;
}

static void recover(void) {
        int r = -ENOTCONN;

        for (unsigned i = 0; i < 100 && r < 0; i++) {
                r = keeper_recover(keeper);
                if (r < 0)
                        usleep(10000);
        }
        CHECK(r == 0, "%s", strerror(-r));
}

static void stats_of(KeeperStats *ret) {
        while (keeper_stats(keeper, ret) < 0)
                recover();
}

/* Kills the serving process, the one that starts it again, or both. */
static void kill_once(unsigned which) {
        KeeperStats stats;
        pid_t holder;

        stats_of(&stats);
        holder = parent_of(stats.pid);
        if (which == 2)
                allow_forks(false); /* a child's guard has no copy with us for some microseconds */
        usleep((useconds_t)(random() % 6000));
        (void)keeper_dispatch(keeper);
        if (which >= 1 && holder > 1)
                (void)kill(holder, SIGKILL);
        if (which != 1)
                (void)kill(stats.pid, SIGKILL);
        if (which == 2) {
                for (unsigned i = 0; i < 500 && kill(stats.pid, 0) == 0; i++) /* or it waits for its parent to look */
                        usleep(200);
                allow_forks(true); /* they wait for the next one */
        }
        recover();
        await_progress();
}

static void check_privileges(pid_t pid) {
        static const char *const lines[] = { "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000",
                "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000",
                "NoNewPrivs:\t1", "Seccomp:\t2" };
        _cleanup_free_ char *status = NULL;
        char path[300], link[300];
        DIR *directory;

        snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
        CHECK(read_file(AT_FDCWD, path, &status, NULL) == 0);
        for (size_t i = 0; i < ELEMENTSOF(lines); i++)
                CHECK(strstr(status, lines[i]), "%s", lines[i]);
        CHECK(getpriority(PRIO_PROCESS, (id_t)pid) == -20);
        snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
        directory = opendir(path);
        CHECK(directory);
        for (const struct dirent *entry; (entry = readdir(directory));) {
                static const char *const kinds[] = { "/dev/null", "anon_inode:[userfaultfd]", "anon_inode:[eventpoll]",
                        "anon_inode:[pidfd]", "pidfd:", "socket:" };
                ssize_t n = readlinkat(dirfd(directory), entry->d_name, link, sizeof link - 1);
                bool known = n <= 0 || atoi(entry->d_name) <= STDERR_FILENO || false;

                link[MAX_OF(n, (ssize_t)0)] = 0;
                for (size_t i = 0; i < ELEMENTSOF(kinds); i++)
                        known |= strncmp(link, kinds[i], strlen(kinds[i])) == 0;
                CHECK(known || strcmp(link, "/") == 0, "%s is open", link);
        }
        closedir(directory);
}

static int count_items(void *userdata, const KeeperItem *item, int uffd) {
        CHECK(guard_id(uffd) == item->id && guard_kind(uffd) == item->kind);
        *(unsigned *)userdata += item->owner.pid != 0;
        return 0;
}

/* A daemon that begins anew finds guards and pool. */
static void restart_daemon(const char *program) {
        _cleanup_(pool_freep) Pool *again = NULL;
        _cleanup_close_ int mount = -EBADF;
        PoolStats before, after;
        unsigned items = 0;
        char page[PAGE_BYTES];

        keeper = keeper_free(keeper);
        CHECK(keeper_new(guard_directory, program, &keeper) == 0);
        CHECK(keeper_list(keeper, count_items, &items) == 0 && items == VICTIMS, "%u", items);
        CHECK(keeper_pool_get(keeper, "other", &mount) == -ENOENT);
        CHECK(keeper_pool_get(keeper, "test", &mount) == 0);
        CHECK(pool_open("other", mount, 256, &again) == -EBADMSG);
        CHECK(pool_open("test", mount, 256, &again) == 0);
        CHECK(pool_stats(pool, &before) == 0 && pool_stats(again, &after) == 0);
        CHECK(after.frames == before.frames && after.pages == before.frames, "%lu, were %lu", after.pages,
              before.frames);
        CHECK(pool_read(again, pool_first + 3, 1, page) == 0 && page_is(page, pool_first + 3));
        CHECK(pool_recount(again) == 0 && pool_stats(again, &after) == 0 && after.mappings > 0);
}

/* Whoever is killed here, what it took along has to be asked for again by the next one. */
static void kill_storm(unsigned kills) {
        for (unsigned i = 0; i < kills; i++)
                kill_once(i % 10 < 7 ? 0 : i % 10 < 9 ? 1 : 2);
}

int main(int argc, char **argv) {
        const char *mode = argc > 2 ? argv[2] : "all";
        bool control = strcmp(mode, "control") == 0;
        Guarded victims[VICTIMS];
        KeeperStats stats;
        unsigned kills = KILLS;
        uint64_t sums[N_COUNTERS] = { 0 };

        CHECK(argc >= 2);
        if (argc > 3)
                kills = (unsigned)atoi(argv[3]);
        counters = mmap(NULL, VICTIMS * sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(counters != MAP_FAILED);
        guard_test_begin(PAGES, argv[1]);
        stats_of(&stats);
        check_privileges(stats.pid);
        CHECK(parent_of(stats.pid) > 0);
        check_privileges(parent_of(stats.pid));
        for (unsigned i = 0; i < VICTIMS; i++) { /* all have their area at the same address: they are forks */
                uint64_t start = shared->start;
                victims[i] = guarded_start(PAGES, true);
                CHECK(i == 0 || shared->start == start);
        }
        for (unsigned i = 0; i < VICTIMS; i++)
                child_begin_order(&victims[i].child, order_hammer, i);
        await_progress();
        if (control) /* long enough for whatever is left out */
                for (unsigned i = 0; i < 50; i++)
                        await_progress();
        else {
                kill_storm(kills / 2);
                restart_daemon(argv[1]);
                kill_storm(kills / 2);
        }
        stats_of(&stats);
        check_privileges(stats.pid);
        __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
        alarm(60); /* one that stands still does not end */
        for (unsigned i = 0; i < VICTIMS; i++) {
                CHECK_HARMLESS(child_end_order(&victims[i].child) == 0, "victim %u read %lu wrong bytes", i,
                      counters[i].n[WRONG]);
                for (unsigned k = 0; k < ELEMENTSOF(sums); k++)
                        sums[k] += counters[i].n[k];
        }
        printf("%lu operations, %lu checks, %lu discards, %lu forks; %lu restarts of the last keeper\n", sums[OPS],
               sums[CHECKS], sums[DISCARDS], sums[FORKS], stats.restarts);
        for (unsigned i = 0; i < VICTIMS; i++)
                guarded_stop(&victims[i]);
        guard_test_end();
        return 0;
}
