/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Route remap's programs beside those that no stop of the target holds up, each made to come at the one moment that its
 * safeguard is there for, which the hammer never hit:
 *
 *   writer   writes through /proc/PID/mem. It found its page before that was moved, and copies into it when it was compared
 *            (REMAP_GUARD_BARRIER). A kernel that is not preempted between the two serves interrupts there: thousands of
 *            timers that end at once on the writer's CPU hold it up for longer than the program takes.
 *   answer   the keeper, which read two threads' faults on one page, answers the second when the page is being put back
 *            (RemapSettle). It is a build of it that waits before that answer (SERVE_LEAVE_OUT_HASTE).
 *   worker   one of io_uring's, which discards pages while they are away (RemapBatch.workers).
 *   caller   us: time is up before the program has come to its first range (REMAP_GUARD_FIRST).
 *   frozen   the program itself, in a process that is frozen in the middle of it. We lose sight of it, and the pool's pages,
 *            which nobody maps, are freed and hold something else when it goes on (REMAP_GUARD_LATE).
 *
 * Built with the sources of the route (REMAP_TEST): with --leave-out the victim must notice.
 */
#include "base/io.h"
#include "cgroup/tree.h"
#include "keeper/keeper.h"
#include "merge/pool.h"
#include "merge/remap.h"
#include "target/remote-internal.h"
#include "tests/keeper-directory.h"
#include "tests/test.h"

#include <getopt.h>
#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

#define AREA_PAGES 16384U
#define RUN_PAGES 16U
#define TIMERS 2048U
/* A write that took this long was held up. */
#define LONG_NSEC (200 * NSEC_PER_USEC)
#define HELD_UP_MIN 10U           /* writers: fewer prove nothing */
#define PATIENCE_NSEC (15 * NSEC_PER_SEC)
#define ROUNDS 8U

unsigned remote_test_leave_out, remap_test_leave_out = REMAP_GUARD_HASTE;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;

/* Called at the next step of this kind but so many. */
static RemoteStep at_step = _REMOTE_STEP_MAX;
static unsigned steps_before;
static void (*do_at_step)(void);

void remote_test_step(RemoteStep step) {
        if (step == at_step && steps_before-- == 0) {
                at_step = _REMOTE_STEP_MAX;
                do_at_step();
        }
}

typedef struct Order {
        uint64_t asked, done;   /* counted; done by the victim, or one of its threads */
        uint64_t page;
} Order;

/* Between the processes; each word has one writer. */
typedef struct Shared {
        uint8_t *area;          /* the victim's */
        uint64_t current;       /* writer: the page that is merged now */
        Order look;             /* at the page: its stamp must be this */
        uint64_t stamp;
        uint64_t storm_nsec;    /* the writer is held up from then on */
        Order discard, check, touch[2];
        uint64_t errors;        /* the victim's: what it found wrong, … */
        char first[128];        /* … and where at first */
        uint64_t held_up, written, discarded;
        bool stop;
} Shared;

static Shared *shared;
static uint64_t content[RUN_PAGES][PAGE_BYTES / sizeof(uint64_t)]; /* the pool's pages */
static int pool;
static struct stat pool_stat;

static void order(Order *one, uint64_t page) {
        one->page = page;
        __atomic_store_n(&one->asked, one->asked + 1, __ATOMIC_RELEASE);
}

static bool is_asked(const Order *one) { return __atomic_load_n(&one->asked, __ATOMIC_ACQUIRE) != one->done; }
static void is_done(Order *one) { __atomic_store_n(&one->done, one->done + 1, __ATOMIC_RELEASE); }

static void await_order(const Order *one) {
        for (uint64_t until = now_nsec() + 20 * NSEC_PER_SEC; __atomic_load_n(&one->done, __ATOMIC_ACQUIRE) != one->asked;) {
                CHECK(now_nsec() < until, "the victim does not answer");
                usleep(10);
        }
}

static uint64_t *page_at(uint64_t page) { return (uint64_t *)(void *)(shared->area + page * PAGE_BYTES); }

#define bad(...)                                                                        \
        do {                                                                            \
                if (shared->errors++ == 0)                                              \
                        snprintf(shared->first, sizeof shared->first, __VA_ARGS__);     \
        } while (0)

static void stay_on(int cpu) {
        cpu_set_t cpus;

        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
                TEST_SKIP("needs two CPUs");
}

static void make_pool(void) {
        char path[32];
        int fd = memfd_create("pool", MFD_CLOEXEC);

        for (uint64_t i = 0; i < RUN_PAGES; i++)
                for (size_t k = 0; k < ELEMENTSOF(content[i]); k++)
                        content[i][k] = (i + 1) * 0x9e3779b97f4a7c15 + k;
        CHECK(fd >= 0 && write(fd, content, sizeof content) == sizeof content && fstat(fd, &pool_stat) == 0, "pool");
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        pool = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(pool >= 0, "pool");
        close(fd);
}

static void fill(uint64_t first, uint64_t n) {
        for (uint64_t i = first; i < first + n; i++)
                memcpy(page_at(i), content[i % RUN_PAGES], PAGE_BYTES);
}

/* Page k of the run is as it was, but for these words. */
static void check_page(uint64_t page, const uint64_t *first_words, size_t n) {
        const uint64_t *is = page_at(page), *was = content[page % RUN_PAGES];

        if (memcmp(is, first_words, n * sizeof *is) != 0 ||
            memcmp(is + n, was + n, PAGE_BYTES - n * sizeof *is) != 0)
                bad("page %lu begins with %lx", page, is[0]);
}

/* -- the target, its guard, one run -- */

typedef struct Engine {
        Remote *remote;
        Target *target;
        RemapGuard guard;
        Keeper *keeper;
        uint64_t results[_REMAP_RESULT_MAX];
        uint64_t workers;       /* batches that were given up for them */
} Engine;

static int settle(void *userdata) { return keeper_sync(((Engine *)userdata)->keeper); }

/* So that the program is between blocking the page and moving it, where it is given time, when the writer is held up. */
static int await_storm(void *userdata) {
        uint64_t begun = now_nsec(), at = __atomic_load_n(&shared->storm_nsec, __ATOMIC_ACQUIRE);

        at -= 100 * NSEC_PER_USEC + (uint64_t)random() % (200 * NSEC_PER_USEC);
        if (at > begun && at < begun + 8 * NSEC_PER_MSEC)
                remote_nap(at - begun);
        return 0;
}

static Engine engine_new(pid_t pid, const char *keeper) {
        Engine engine = { .guard = REMAP_GUARD_NONE };
        KeeperOwner owner = { .pid = pid };
        int r = REMOTE_E_BUSY;

        CHECK(remote_new(&engine.remote) == 0 && target_new(pid, &engine.target) == 0, "target");
        for (unsigned i = 0; i < 1000 && r == REMOTE_E_BUSY; i++, usleep(1000))
                r = remap_guard_make(engine.remote, engine.target, &engine.guard);
        if (r == -ENOENT || r == -EOPNOTSUPP)
                TEST_SKIP("no /dev/userfaultfd");
        CHECK(r == 0, "guard: %d", r);
        if (!keeper)
                return engine;
        keeper_directory_make();
        CHECK(keeper_new(keeper_directory, keeper, &engine.keeper) == 0, "keeper");
        CHECK(keeper_add(engine.keeper, engine.guard.zero, &owner) == 0, "keeper");
        CHECK(keeper_add(engine.keeper, engine.guard.mute, &owner) == 0, "keeper");
        return engine;
}

static void engine_done(Engine *engine) {
        remote_free(engine->remote);
        target_free(engine->target);
        remap_guard_done(&engine->guard);
        keeper_free(engine->keeper);
}

static RemapRange range_of(uint64_t page, uint32_t n_pages) {
        return (RemapRange){ .start = (uintptr_t)page_at(page), .n_pages = n_pages, .page = page % RUN_PAGES };
}

/* Merges them, or puts them back; no stop, no result: false. */
static bool run_ranges(Engine *engine, bool undo, RemapRange *ranges, size_t n, uint64_t run_nsec) {
        RemapBatch batch = {
                .ranges = ranges,
                .n = n,
                .guard = &engine->guard,
                .pool_fd = pool,
                .pool_dev = pool_stat.st_dev,
                .pool_inode = pool_stat.st_ino,
                .written_too = true,
                .settle = engine->keeper ? settle : await_storm,
                .userdata = engine,
                .patience_nsec = 10 * NSEC_PER_MSEC,
                .run_nsec = run_nsec,
        };
        int r = undo ? remap_undo(engine->remote, engine->target, &batch) : remap_merge(engine->remote, engine->target, &batch);

        CHECK(r == 0 || r == REMOTE_E_BUSY || r == REMOTE_E_LOST, "%d", r);
        engine->workers += batch.workers > 0 && ranges->result == REMAP_NOT_BEGUN;
        for (size_t i = 0; i < n; i++)
                engine->results[ranges[i].result]++;
        return r == 0;
}

static RemapResult run(Engine *engine, bool undo, uint64_t page, uint32_t n_pages) {
        RemapRange range = range_of(page, n_pages);

        (void)run_ranges(engine, undo, &range, 1, 50 * NSEC_PER_MSEC);
        return range.result;
}

static void run_until_done(Engine *engine, bool undo, uint64_t page, uint32_t n_pages) {
        for (unsigned i = 0; run(engine, undo, page, n_pages) != REMAP_DONE; i++, usleep(1000))
                CHECK(i < 1000, "%s", undo ? "it cannot be put back" : "it cannot be merged");
}

static void report(const Engine *engine) {
        for (unsigned i = 0; i < _REMAP_RESULT_MAX; i++)
                if (engine->results[i])
                        printf("%lu %s, ", engine->results[i], remap_result_name((RemapResult)i));
        printf("%lu left alone for workers; %lu written, %lu held up, %lu discarded; %lu errors %s\n", engine->workers,
               shared->written, shared->held_up, shared->discarded, shared->errors, shared->first);
        fflush(stdout);
}

static pid_t start(void (*main)(void)) {
        pid_t pid = fork();

        CHECK(pid >= 0, "fork");
        if (pid > 0)
                return pid;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        main();
        _exit(0);
}

static pid_t start_victim(void (*main)(void)) {
        pid_t pid = start(main);

        while (!__atomic_load_n(&shared->area, __ATOMIC_ACQUIRE)) {
                CHECK(waitpid(pid, NULL, WNOHANG) == 0, "the victim ended");
                usleep(1000);
        }
        return pid;
}

/* The victim's memory; it is ready when the others see it. */
static void map_area(void) {
        uint8_t *area = mmap(NULL, AREA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
        CHECK(area != MAP_FAILED, "area");
        for (uint64_t i = 0; i < AREA_PAGES; i++)
                memcpy(area + i * PAGE_BYTES, content[i % RUN_PAGES], PAGE_BYTES);
        __atomic_store_n(&shared->area, area, __ATOMIC_RELEASE);
}

/* -- the late writer -- */

static void writer_victim(void) {
        map_area();
        for (;; usleep(20))
                if (is_asked(&shared->look)) {
                        check_page(shared->look.page, &shared->stamp, 1);
                        is_done(&shared->look);
                }
}

typedef struct Storm {
        int timers[TIMERS];
        uint64_t arming_nsec;   /* how long that takes */
} Storm;

/* All of them end at the same time, on this CPU. */
static uint64_t storm_arm(Storm *storm) {
        uint64_t begun = now_nsec(), end = begun + storm->arming_nsec * 5 / 4 + (uint64_t)random() % NSEC_PER_MSEC;
        const struct itimerspec at = { .it_value = { (time_t)(end / NSEC_PER_SEC), (long)(end % NSEC_PER_SEC) } };

        __atomic_store_n(&shared->storm_nsec, end, __ATOMIC_RELEASE);
        for (size_t i = 0; i < TIMERS; i++)
                CHECK(timerfd_settime(storm->timers[i], TFD_TIMER_ABSTIME, &at, NULL) == 0, "timer");
        storm->arming_nsec = now_nsec() - begun;
        return end;
}

/* One page, whose first word is another each time, and every other time the pool's. Was it held up, the victim looks. */
static void write_once(int memory, uint64_t page, uint64_t k) {
        uint64_t data[PAGE_BYTES / sizeof(uint64_t)], begun;

        memcpy(data, content[page % RUN_PAGES], sizeof data);
        if (k % 2)
                data[0] = k;
        do /* what is away for the moment fails */
                begun = now_nsec();
        while (pwrite(memory, data, sizeof data, (off_t)(uintptr_t)page_at(page)) != sizeof data);
        shared->written++;
        if (now_nsec() - begun < LONG_NSEC)
                return;
        shared->held_up++;
        shared->stamp = data[0];
        order(&shared->look, page);
        await_order(&shared->look);
}

static void writer(void) {
        const struct rlimit many = { 2 * TIMERS, 2 * TIMERS };
        static Storm storm = { .arming_nsec = 4 * NSEC_PER_MSEC };
        char path[64];
        int memory;

        stay_on(1);
        snprintf(path, sizeof path, "/proc/%d/mem", (int)shared->current);
        shared->current = 0;
        CHECK((memory = open(path, O_RDWR | O_CLOEXEC)) >= 0, "memory");
        CHECK(setrlimit(RLIMIT_NOFILE, &many) == 0, "descriptors");
        for (size_t i = 0; i < TIMERS; i++)
                CHECK((storm.timers[i] = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)) >= 0, "timer");
        for (uint64_t k = 0; !shared->stop;) {
                uint64_t end = storm_arm(&storm), page = __atomic_load_n(&shared->current, __ATOMIC_ACQUIRE);

                while (now_nsec() < end)
                        write_once(memory, page, ++k);
        }
}

/* Goes on for a while where few were held up: how many are hangs on when the CPUs are to be had. */
static bool late_writer_goes_on(uint64_t until) {
        uint64_t now = now_nsec();

        return shared->errors == 0 && (now < until || (shared->held_up <= HELD_UP_MIN && now < until + PATIENCE_NSEC));
}

static void late_writer(uint64_t until) {
        pid_t victim = start_victim(writer_victim);
        Engine engine = engine_new(victim, NULL);
        pid_t pid;

        shared->current = (uint64_t)victim;
        pid = start(writer);
        while (shared->written == 0)
                usleep(1000);
        while (late_writer_goes_on(until)) {
                uint64_t page = shared->current;

                if (page == AREA_PAGES - 1)
                        break;
                if (__atomic_load_n(&shared->storm_nsec, __ATOMIC_ACQUIRE) < now_nsec() + NSEC_PER_MSEC) {
                        usleep(50); /* too late for this one: the stop takes so long */
                        continue;
                }
                if (run(&engine, false, page, 1) == REMAP_DONE)
                        __atomic_store_n(&shared->current, page + 1, __ATOMIC_RELEASE);
        }
        shared->stop = true;
        CHECK(waitpid(pid, NULL, 0) == pid, "writer");
        report(&engine);
        CHECK_HARMLESS(shared->errors == 0, "a write was lost");
        /* Of thousands held up there none was between its look and its copy; why is not known. */
        if (!remap_guards(REMAP_GUARD_BARRIER) && !test_has_zero_page())
                TEST_SKIP("in a guest of PVM (it has no zero page) no writer is held up at the one moment");
        CHECK(shared->held_up > HELD_UP_MIN && engine.results[REMAP_DIFFERENT] > 0, "nobody was held up");
        engine_done(&engine);
        kill(victim, SIGKILL);
        CHECK(waitpid(victim, NULL, 0) == victim, "victim");
}

/* -- the late answer -- */

#define DISCARDED 3U            /* page of the run */

static void *toucher(void *userdata) {
        Order *touch = userdata;

        for (;; usleep(100))
                if (is_asked(touch)) {
                        page_at(touch->page)[touch - shared->touch] = touch->asked;
                        is_done(touch);
                }
        return NULL;
}

static void answer_victim(void) {
        pthread_t thread;

        map_area();
        for (size_t i = 0; i < 2; i++)
                CHECK(pthread_create(&thread, NULL, toucher, &shared->touch[i]) == 0, "thread");
        for (;; usleep(100)) {
                if (is_asked(&shared->discard)) {
                        CHECK(madvise(page_at(shared->discard.page), PAGE_BYTES, MADV_DONTNEED) == 0, "discard");
                        is_done(&shared->discard);
                }
                if (is_asked(&shared->check)) {
                        const uint64_t words[3] = { shared->touch[0].done, shared->touch[1].done, 0 };
                        uint64_t first = shared->check.page;

                        for (uint64_t i = first; i < first + RUN_PAGES; i++)
                                if (i != first + DISCARDED)
                                        check_page(i, content[i % RUN_PAGES], 3);
                        if (memcmp(page_at(first + DISCARDED), words, sizeof words) != 0)
                                bad("page %lu: %lu and %lu instead of %lu and %lu", first + DISCARDED,
                                    page_at(first + DISCARDED)[0], page_at(first + DISCARDED)[1], words[0], words[1]);
                        is_done(&shared->check);
                }
        }
}

/* Both threads wait for one page's fault to be answered, and the keeper reads of both at once. */
static void touch_together(pid_t server, uint64_t page) {
        CHECK(kill(server, SIGSTOP) == 0, "keeper");
        for (size_t i = 0; i < 2; i++)
                order(&shared->touch[i], page);
        usleep(20000);
        CHECK(shared->touch[0].done != shared->touch[0].asked, "nobody waits");
        CHECK(kill(server, SIGCONT) == 0, "keeper");
        for (size_t i = 0; i < 2; i++)
                await_order(&shared->touch[i]);
}

static void late_answer(const char *program) {
        pid_t victim = start_victim(answer_victim);
        Engine engine = engine_new(victim, program);
        KeeperStats stats;

        CHECK(keeper_stats(engine.keeper, &stats) == 0, "keeper");
        for (uint64_t i = 0; i < ROUNDS && shared->errors == 0; i++) {
                uint64_t first = i * RUN_PAGES;

                run_until_done(&engine, false, first, RUN_PAGES);
                order(&shared->discard, first + DISCARDED);
                await_order(&shared->discard);
                touch_together(stats.pid, first + DISCARDED);
                run_until_done(&engine, true, first, RUN_PAGES);
                order(&shared->check, first);
                await_order(&shared->check);
        }
        report(&engine);
        CHECK_HARMLESS(shared->errors == 0, "the victim's memory is another");
        kill(victim, SIGKILL);
        CHECK(waitpid(victim, NULL, 0) == victim, "victim");
        engine_done(&engine);
}

/* -- the worker -- */

#define DISCARDS 1024U

/* Fills pages, has a worker discard them, which takes it a while, and looks at what is there. */
static void worker_victim(void) {
        static const uint64_t zeros[PAGE_BYTES / sizeof(uint64_t)];
        struct io_uring ring;

        map_area();
        CHECK(io_uring_queue_init(DISCARDS, &ring, 0) == 0, "ring");
        while (!shared->stop) {
                struct io_uring_cqe *cqe;

                CHECK(mmap(page_at(0), DISCARDS * PAGE_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page_at(0), "area"); /* what is merged goes */
                fill(0, DISCARDS);
                for (uint64_t i = 0; i < DISCARDS; i++) {
                        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

                        io_uring_prep_madvise(sqe, page_at(i), PAGE_BYTES, MADV_DONTNEED);
                        sqe->flags |= IOSQE_ASYNC;
                }
                CHECK(io_uring_submit(&ring) == (int)DISCARDS, "ring");
                for (uint64_t i = 0; i < DISCARDS; i++) {
                        while (io_uring_peek_cqe(&ring, &cqe) != 0)
                                usleep(20);
                        if (cqe->res != 0)
                                bad("discarding: %d", cqe->res);
                        io_uring_cqe_seen(&ring, cqe);
                }
                for (uint64_t i = 0; i < DISCARDS; i++)
                        if (memcmp(page_at(i), zeros, PAGE_BYTES) != 0)
                                bad("page %lu is there again", i);
                shared->discarded += DISCARDS;
        }
        io_uring_queue_exit(&ring);
        fill(0, DISCARDS);
        is_done(&shared->check);
        for (;;)
                pause();
}

static void late_worker(uint64_t until, const char *program) {
        pid_t victim = start_victim(worker_victim);
        Engine engine = engine_new(victim, program);

        while (shared->discarded == 0) /* from then on it has one all the time: an idle one stays for seconds */
                usleep(1000);
        while (now_nsec() < until && shared->errors == 0)
                (void)run(&engine, false, (uint64_t)random() % (DISCARDS / RUN_PAGES) * RUN_PAGES, RUN_PAGES);
        report(&engine);
        CHECK_HARMLESS(shared->errors == 0, "what a worker discarded is there");
        CHECK(engine.workers > 0 && engine.results[REMAP_DONE] == 0, "it had no workers");
        order(&shared->check, 0);
        shared->stop = true;
        await_order(&shared->check);
        run_until_done(&engine, false, 0, RUN_PAGES); /* it is one like others without them */
        kill(victim, SIGKILL);
        CHECK(waitpid(victim, NULL, 0) == victim, "victim");
        engine_done(&engine);
}

/* -- the late caller -- */

static void caller_victim(void) {
        map_area();
        for (;; usleep(100))
                if (is_asked(&shared->check)) {
                        for (uint64_t i = 0; i < 2 * RUN_PAGES; i++)
                                check_page(shared->check.page + i, content[i % RUN_PAGES], 1);
                        is_done(&shared->check);
                }
}

/* Two ranges: as many stops as there are ranges are enough. */
static void run_hurried(Engine *engine, bool undo, uint64_t first) {
        RemapRange ranges[] = { range_of(first, RUN_PAGES), range_of(first + RUN_PAGES, RUN_PAGES) };

        for (size_t done = 0; done < ELEMENTSOF(ranges);) {
                if (!run_ranges(engine, undo, ranges + done, ELEMENTSOF(ranges) - done, 1))
                        continue;
                CHECK_AS(remap_guards(REMAP_GUARD_FIRST) ? TEST_FAILED : TEST_NOTICED,
                         ranges[done].result != REMAP_NOT_BEGUN, "a stop for nothing");
                while (done < ELEMENTSOF(ranges) && ranges[done].result == REMAP_DONE)
                        done++;
        }
}

static void late_caller(const char *program) {
        pid_t victim = start_victim(caller_victim);
        Engine engine = engine_new(victim, program);

        for (uint64_t i = 0; i < ROUNDS && shared->errors == 0; i++) {
                uint64_t first = 2 * i * RUN_PAGES;

                for (int undo = 0; undo <= 1; undo++) {
                        run_hurried(&engine, undo, first);
                        order(&shared->check, first);
                        await_order(&shared->check);
                }
        }
        report(&engine);
        CHECK_HARMLESS(shared->errors == 0, "the victim's memory is another");
        CHECK(engine.results[REMAP_NOT_BEGUN] > 0, "time was never up");
        kill(victim, SIGKILL);
        CHECK(waitpid(victim, NULL, 0) == victim, "victim");
        engine_done(&engine);
}

/* -- the late program -- */

#define LOOK_AWAY_NSEC (50 * NSEC_PER_MSEC)

static char cgroup[512];
static pid_t cgroup_owner;

static const char *cgroup_file(const char *name) {
        static char path[600];

        snprintf(path, sizeof path, "%s/%s", cgroup, name);
        return path;
}

static void set_frozen(bool frozen) {
        const char *wanted = frozen ? "frozen 1" : "frozen 0";

        CHECK(write_text(AT_FDCWD, cgroup_file("cgroup.freeze"), frozen ? "1" : "0") == 0, "%s", cgroup);
        for (unsigned i = 0;; i++, usleep(1000)) {
                _cleanup_free_ char *events = NULL;

                CHECK(read_file(AT_FDCWD, cgroup_file("cgroup.events"), &events, NULL) == 0, "%s", cgroup);
                if (strstr(events, wanted))
                        return;
                CHECK(i < 10000, "not %s", wanted);
        }
}

static void freeze(void) { set_frozen(true); }

static void cgroup_remove(void) {
        if (getpid() != cgroup_owner)
                return;
        (void)write_text(AT_FDCWD, cgroup_file("cgroup.freeze"), "0");
        (void)write_text(AT_FDCWD, cgroup_file("cgroup.kill"), "1");
        for (unsigned i = 0; i < 100 && rmdir(cgroup) < 0 && errno == EBUSY; i++)
                usleep(10000);
}

static void cgroup_make(pid_t pid) {
        _cleanup_free_ char *root = NULL;
        char text[16];

        if (cgroup_find_root(&root) < 0)
                TEST_SKIP("no cgroup v2 to freeze");
        snprintf(cgroup, sizeof cgroup, "%s/ksmd-user-late-%d", root, getpid());
        snprintf(text, sizeof text, "%d", pid);
        CHECK(mkdir(cgroup, 0755) == 0, "%s", cgroup);
        cgroup_owner = getpid();
        CHECK(atexit(cgroup_remove) == 0, "%s", cgroup);
        CHECK(write_text(AT_FDCWD, cgroup_file("cgroup.procs"), text) == 0, "%s", cgroup);
}

/* The run's contents in new pages of the pool, as the daemon fills them. */
static uint64_t fill_pool(Pool *one, uint64_t address) {
        uint64_t page;

        CHECK(pool_alloc(one, RUN_PAGES, &address, 1, &page) == 0, "pool");
        CHECK(pool_write(one, page, RUN_PAGES, content) == 0, "pool");
        CHECK(pool_take(one, page, RUN_PAGES, address) == 0, "pool");
        pool_drop(one, page, RUN_PAGES);
        return page;
}

/* false: they were not all freed. */
static bool fill_with_others(Pool *one, uint64_t page) {
        uint8_t others[RUN_PAGES * PAGE_BYTES];

        if (pool_alloc_at(one, page, RUN_PAGES, NULL, 0) != 0)
                return false;
        memset(others, 0x5a, sizeof others);
        CHECK(pool_write(one, page, RUN_PAGES, others) == 0, "pool");
        return true;
}

/* Frozen when it is asked whether the pages are the same, so before it maps any; or right after that. */
static bool freeze_in_program(Engine *engine, uint64_t first, uint64_t page, bool before) {
        RemapRange range = range_of(first, RUN_PAGES);

        range.page = page;
        do_at_step = freeze;
        for (unsigned i = 0; i < 1000; i++, usleep(1000)) {
                at_step = before ? REMOTE_STEP_ASKED : REMOTE_STEP_ANSWERED;
                steps_before = 1;
                remote_reap(engine->remote);
                if (!run_ranges(engine, false, &range, 1, 50 * NSEC_PER_MSEC) && at_step == _REMOTE_STEP_MAX)
                        return true;
                if (range.result == REMAP_DONE)
                        return false; /* it was frozen behind its last step, or could not be lost */
        }
        CHECK(false, "it never came to be merged");
        return false;
}

static void late_program(const char *program) {
        pid_t victim = start_victim(caller_victim);
        Engine engine = engine_new(victim, program);
        unsigned n_lost = 0, n_freed = 0;
        Pool *one = NULL;

        CHECK(pool_new("late", 256, &one, NULL) == 0, "pool");
        pool = pool_target_fd(one);
        remote_test_program_wait_nsec = LOOK_AWAY_NSEC;
        cgroup_make(victim);
        for (uint64_t i = 0; i < 2 * ROUNDS && shared->errors == 0; i++) {
                uint64_t first = 2 * i * RUN_PAGES, page = fill_pool(one, (uintptr_t)page_at(first)), freed = 0;

                if (freeze_in_program(&engine, first, page, i % 2 == 0)) {
                        n_lost++;
                        pool_note_lost(one);
                        CHECK(pool_collect(one, UINT64_MAX, &freed) == 0, "pool");
                        n_freed += fill_with_others(one, page);
                }
                set_frozen(false);
                order(&shared->check, first);
                for (unsigned k = 0; k < 1000 && is_asked(&shared->check); k++, usleep(1000))
                        remote_reap(engine.remote); /* it takes our interrupt now, which has come too late */
                await_order(&shared->check);
        }
        printf("%u lost, the pages of %u were freed\n", n_lost, n_freed);
        report(&engine);
        CHECK_HARMLESS(shared->errors == 0, "the victim's memory is another");
        CHECK(n_freed >= ROUNDS, "it was hardly ever frozen in the program");
        kill(victim, SIGKILL);
        CHECK(waitpid(victim, NULL, 0) == victim, "victim");
        engine_done(&engine);
        pool_free(one);
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "seconds", required_argument, NULL, 's' }, { "leave-out", required_argument, NULL, 'l' }, {},
        };
        double seconds = 5;

        for (int o; (o = getopt_long(argc, argv, "", options, NULL)) >= 0;)
                switch (o) {
                case 's': seconds = atof(optarg); break;
                case 'l': remap_test_leave_out |= (unsigned)strtoul(optarg, NULL, 0); break;
                default: return 2;
                }
        const char *what = optind < argc ? argv[optind] : "", *program = optind + 1 < argc ? argv[optind + 1] : NULL;
        uint64_t until = now_nsec() + (uint64_t)(seconds * 1e9);

        test_need_root();
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED, "shared");
        make_pool();
        CHECK(setpriority(PRIO_PROCESS, 0, -20) == 0, "nice"); /* all of them are to be there at the one moment */
        if (strcmp(what, "writer") == 0) {
                stay_on(1);
                stay_on(0); /* the victim is never on the writer's CPU: that would have to answer when pages are moved */
                late_writer(until);
        } else if (strcmp(what, "answer") == 0 && program)
                late_answer(program);
        else if (strcmp(what, "worker") == 0 && program)
                late_worker(until, program);
        else if (strcmp(what, "caller") == 0 && program)
                late_caller(program);
        else if (strcmp(what, "frozen") == 0 && program)
                late_program(program);
        else
                return fprintf(stderr, "usage: remap-late [--seconds S] [--leave-out MASK] "
                                       "writer|answer KEEPER|worker KEEPER|caller KEEPER|frozen KEEPER\n"), 2;
        return 0;
}
