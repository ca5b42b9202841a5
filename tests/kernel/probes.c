/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the probes say is what happened, by count: against faults that this program provokes, processes that it makes,
 * and the kernel's own counting of tracepoints (perf), which shares nothing with ours. With --raw by raw tracepoints.
 * --control leaves the bits of the merged pages unset: the count must then be wrong.
 */
#include "probe/probe.h"
#include "cgroup/tree.h"
#include "host/ksm.h"
#include "tests/test.h"

#include <linux/perf_event.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>

#define PAGES 2048U
#define CPUS_MAX 256

static bool raw, control;

/* Pages that a child maps too, so that each write to one is a fault. */
static uint8_t *shared_pages(pid_t *ret_child) {
        uint8_t *memory = mmap(NULL, (PAGES + BLOCK_PAGES) * PAGE_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(memory != MAP_FAILED, "mmap");
        memory = (uint8_t *)(((uintptr_t)memory + BLOCK_BYTES - 1) & ~(uintptr_t)(BLOCK_BYTES - 1));
        CHECK(madvise(memory, PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0, "NOHUGEPAGE");
        for (unsigned i = 0; i < PAGES; i++)
                memory[i * PAGE_BYTES] = (uint8_t)(i + 1);
        *ret_child = fork();
        CHECK(*ret_child >= 0, "fork");
        if (*ret_child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (;;)
                        pause();
        }
        return memory;
}

static void end_child(pid_t child) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
}

static void set_blocks(Probes *probes, const uint8_t *memory, unsigned step) {
        for (unsigned b = 0; b < PAGES / BLOCK_PAGES; b++) {
                struct probe_block block = { 0 };

                for (unsigned i = 0; i < BLOCK_PAGES && !control; i += step)
                        block.merged[i / 64] |= (uint64_t)1 << i % 64;
                CHECK(probes_block_set(probes, getpid(), (uintptr_t)memory + b * BLOCK_BYTES, &block) == 0, "block");
        }
}

static unsigned left(Probes *probes, const uint8_t *memory) {
        unsigned n = 0;

        for (unsigned b = 0; b < PAGES / BLOCK_PAGES; b++) {
                struct probe_block block;

                if (!probes_block_get(probes, getpid(), (uintptr_t)memory + b * BLOCK_BYTES, &block))
                        continue;
                for (unsigned i = 0; i < PROBE_BLOCK_WORDS; i++)
                        n += (unsigned)__builtin_popcountll(block.merged[i]);
        }
        return n;
}

static uint8_t *race_memory;

static void *race(void *unused) {
        for (unsigned i = 0; i < PAGES; i++)
                race_memory[i * PAGE_BYTES + 64] = 1;
        return NULL;
}

/* Breaks that are provoked are counted, each once: by a write, by the kernel's write, by four threads at once. */
static void test_faults(Probes *probes) {
        const pid_t self = getpid();
        struct probe_target target;
        uint64_t before = probes_cow_breaks(probes);
        pthread_t threads[4];
        uint8_t *memory;
        pid_t child;
        int fds[2];

        CHECK(probes_watch_targets(probes, &self, 1) == 0, "watch");
        memory = shared_pages(&child);
        set_blocks(probes, memory, 3);
        for (unsigned i = 0; i < PAGES; i++)
                CHECK(((volatile uint8_t *)memory)[i * PAGE_BYTES] == (uint8_t)(i + 1), "page %u", i);
        CHECK(probes_cow_breaks(probes) == before, "reading counts");
        for (unsigned round = 0; round < 2; round++) /* the second time they are its own */
                for (unsigned i = 0; i < PAGES; i++)
                        ((volatile uint8_t *)memory)[i * PAGE_BYTES]++;
        const unsigned expected = PAGES / BLOCK_PAGES * DIV_ROUND_UP(BLOCK_PAGES, 3);
        CHECK_AS(control ? TEST_NOTICED : TEST_FAILED, probes_cow_breaks(probes) - before == expected, "%llu of %u counted",
              (unsigned long long)(probes_cow_breaks(probes) - before), expected);
        CHECK(left(probes, memory) == 0, "%u pages are merged still", left(probes, memory));
        end_child(child);

        memory = shared_pages(&child);
        set_blocks(probes, memory, 1);
        before = probes_cow_breaks(probes);
        CHECK(pipe(fds) == 0, "pipe");
        for (unsigned i = 0; i < 100; i++)
                CHECK(write(fds[1], "x", 1) == 1 && read(fds[0], memory + (7 * i + 3) * PAGE_BYTES, 1) == 1, "pipe");
        CHECK(probes_cow_breaks(probes) - before == 100, "%llu of 100 writes by the kernel counted",
              (unsigned long long)(probes_cow_breaks(probes) - before));
        race_memory = memory;
        for (unsigned i = 0; i < 4; i++)
                CHECK(pthread_create(&threads[i], NULL, race, NULL) == 0, "thread");
        for (unsigned i = 0; i < 4; i++)
                pthread_join(threads[i], NULL);
        CHECK(probes_cow_breaks(probes) - before == PAGES, "%llu of %u counted with threads",
              (unsigned long long)(probes_cow_breaks(probes) - before), PAGES);
        end_child(child);
        probes_target(probes, self, &target);
        CHECK(target.cow_breaks == expected + PAGES, "%llu for this process", (unsigned long long)target.cow_breaks);

        memory = shared_pages(&child);
        set_blocks(probes, memory, 1);
        CHECK(left(probes, memory) == PAGES, "set");
        probes_forget_blocks(probes, self);
        CHECK(left(probes, memory) == 0 && probes_blocks(probes, self) == 0, "forgotten");
        CHECK(probes_block_set(probes, getppid(), (uintptr_t)memory, &(struct probe_block){ { 1 } }) == -ESRCH, "a stranger");
        set_blocks(probes, memory, 1);
        CHECK(probes_blocks(probes, self) == PAGES / BLOCK_PAGES, "%zu blocks", probes_blocks(probes, self));
        CHECK(probes_watch_targets(probes, NULL, 0) == 0 && left(probes, memory) == 0, "blocks outlive their process");
        end_child(child);
        printf("faults: %u provoked, %u counted\n", expected + PAGES, expected + PAGES);
}

typedef struct Seen {
        unsigned kinds[4], others;
        uint64_t cgroup;
        uint32_t forked;
} Seen;

static void on_event(void *userdata, const struct probe_event *event) {
        Seen *seen = userdata;

        if (event->kind > PROBE_EVENT_ATTACH || (event->cgroup && event->cgroup != seen->cgroup))
                seen->others++;
        else
                seen->kinds[event->kind]++;
        if (event->kind == PROBE_EVENT_FORK)
                seen->forked = event->tgid;
}

/* A process that moves in, forks, runs another program and ends; and one elsewhere that does the same. */
static void test_roster(Probes *probes) {
        _cleanup_free_ char *root = NULL;
        Seen seen = { 0 };
        char path[512], word[16];
        struct stat st;
        pid_t child;
        int status, fd, fds[2];
        uint32_t grandchild = 0;

        CHECK(cgroup_find_root(&root) == 0, "no cgroup v2");
        snprintf(path, sizeof path, "%s/ksmd-user-test-probes-%d", root, getpid());
        CHECK(mkdir(path, 0755) == 0, "%s", path);
        CHECK(stat(path, &st) == 0, "%s", path);
        seen.cgroup = st.st_ino;
        CHECK(probes_watch_cgroups(probes, &seen.cgroup, 1) == 0, "watch");
        CHECK(pipe(fds) == 0, "pipe");
        for (unsigned inside = 0; inside < 2; inside++) {
                child = fork();
                CHECK(child >= 0, "fork");
                if (child == 0) {
                        char procs[600];

                        snprintf(procs, sizeof procs, "%s/cgroup.procs", path);
                        if (inside) {
                                fd = open(procs, O_WRONLY);
                                if (fd < 0 || write(fd, "0", 1) != 1)
                                        _exit(1);
                        }
                        pid_t forked = fork();
                        if (forked == 0) {
                                execl("/bin/true", "true", NULL);
                                _exit(1);
                        }
                        if (inside && write(fds[1], &forked, sizeof forked) != sizeof forked)
                                _exit(1);
                        waitpid(forked, NULL, 0);
                        _exit(0);
                }
                CHECK(waitpid(child, &status, 0) == child && status == 0, "the child");
        }
        CHECK(read(fds[0], &grandchild, sizeof grandchild) == sizeof grandchild, "grandchild");
        probes_read_events(probes, on_event, &seen);
        CHECK(rmdir(path) == 0, "%s", path);
        CHECK(seen.kinds[PROBE_EVENT_EXEC] == 1, "%u exec", seen.kinds[PROBE_EVENT_EXEC]);
        CHECK(seen.kinds[PROBE_EVENT_EXIT] == 2, "%u exit", seen.kinds[PROBE_EVENT_EXIT]);
        CHECK(seen.kinds[PROBE_EVENT_FORK] == 1, "%u fork", seen.kinds[PROBE_EVENT_FORK]);
        CHECK(raw || seen.forked == grandchild, "forked %u, not %u", seen.forked, grandchild);
        CHECK(raw ? seen.kinds[PROBE_EVENT_ATTACH] >= 1 : seen.kinds[PROBE_EVENT_ATTACH] == 1, "%u attach",
              seen.kinds[PROBE_EVENT_ATTACH]);
        CHECK(seen.others == 0, "%u of others", seen.others);
        CHECK(probes_watch_cgroups(probes, NULL, 0) == 0, "watch");
        snprintf(word, sizeof word, "%s", raw ? "raw" : "typed");
        printf("roster (%s): fork, exec, exit and attach seen, of nobody else\n", word);
}

/* The kernel's count of a tracepoint, on every CPU; of those that pass the filter. */
typedef struct Perf {
        int fds[CPUS_MAX];
        int n;
} Perf;

static bool perf_open(Perf *perf, const char *tracefs, const char *tracepoint, const char *filter) {
        struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT, .size = sizeof attr };
        char path[300], text[32] = "";
        int fd;

        snprintf(path, sizeof path, "%s/events/%s/id", tracefs, tracepoint);
        fd = open(path, O_RDONLY);
        if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
                return false;
        close(fd);
        attr.config = strtoull(text, NULL, 10);
        perf->n = get_nprocs();
        for (int i = 0; i < perf->n; i++) {
                perf->fds[i] = (int)syscall(SYS_perf_event_open, &attr, -1, i, -1, 0UL);
                if (perf->fds[i] < 0)
                        return false;
                CHECK(!filter || ioctl(perf->fds[i], PERF_EVENT_IOC_SET_FILTER, filter) == 0, "%s", filter);
        }
        return true;
}

static uint64_t perf_count(const Perf *perf) {
        uint64_t sum = 0, one;

        for (int i = 0; i < perf->n; i++) {
                CHECK(read(perf->fds[i], &one, sizeof one) == sizeof one, "perf");
                sum += one;
        }
        return sum;
}

static void perf_close(Perf *perf) {
        for (int i = 0; i < perf->n; i++)
                close(perf->fds[i]);
}

/* Of each reason, whoever made them. */
static uint64_t all_flushes(Probes *probes, uint64_t ret_reasons[static PROBE_FLUSH_REASONS], uint64_t *ret_own) {
        struct probe_flushes flushes;
        uint64_t sum = 0;

        probes_flushes(probes, &flushes);
        *ret_own = 0;
        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++) {
                ret_reasons[i] = 0;
                for (unsigned by = 0; by < PROBE_BY_N; by++)
                        ret_reasons[i] += flushes.count[by][i].flushes;
                sum += ret_reasons[i];
                *ret_own += flushes.count[PROBE_BY_DAEMON][i].flushes;
        }
        return sum;
}

static bool stop_toucher;

static void *touch(void *memory) {
        while (!__atomic_load_n(&stop_toucher, __ATOMIC_RELAXED))
                (void)*(volatile uint8_t *)memory;
        return NULL;
}

static bool apart(uint64_t ours, uint64_t theirs) { return ours * 20 < theirs * 19 || theirs * 20 < ours * 19; }

/* Two threads, one of which takes its writes away again and again. Whether we count as many as perf, in sum and of each
 * reason: what comes between the two readings is a few, but not on a machine that lets us wait there. */
static bool compare_flushes(Probes *probes, const char *tracefs) {
        uint8_t *memory = mmap(NULL, 16 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t of[2][PROBE_FLUSH_REASONS], own[2], ours[2], theirs[PROBE_FLUSH_REASONS], all = 0;
        Perf perf[PROBE_FLUSH_REASONS];
        pthread_t thread;

        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++) {
                char filter[32];

                snprintf(filter, sizeof filter, "reason == %u", i);
                if (!perf_open(&perf[i], tracefs, "tlb/tlb_flush", filter)) {
                        printf("flushes: nothing to compare with (no tracefs, or no perf)\n");
                        return true;
                }
        }
        CHECK(memory != MAP_FAILED, "mmap");
        memset(memory, 1, 16 * PAGE_BYTES);
        stop_toucher = false;
        CHECK(pthread_create(&thread, NULL, touch, memory) == 0, "thread");
        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++)
                theirs[i] = perf_count(&perf[i]);
        ours[0] = all_flushes(probes, of[0], &own[0]);
        for (unsigned i = 0; i < 5000; i++) {
                CHECK(mprotect(memory, 16 * PAGE_BYTES, PROT_READ) == 0, "mprotect");
                CHECK(mprotect(memory, 16 * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0, "mprotect");
                memory[0]++;
        }
        ours[1] = all_flushes(probes, of[1], &own[1]);
        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++) {
                theirs[i] = perf_count(&perf[i]) - theirs[i];
                of[1][i] -= of[0][i];
                perf_close(&perf[i]);
                if (theirs[i] + of[1][i] > 0)
                        printf("flushes, reason %u: perf counts %llu, the probe %llu\n", i, (unsigned long long)theirs[i],
                               (unsigned long long)of[1][i]);
                all += theirs[i];
        }
        __atomic_store_n(&stop_toucher, true, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
        printf("flushes: perf counts %llu, the probe %llu, of them ours %llu\n", (unsigned long long)all,
               (unsigned long long)(ours[1] - ours[0]), (unsigned long long)(own[1] - own[0]));
        CHECK(all >= 5000, "nothing was flushed");
        CHECK(own[1] - own[0] >= 5000, "not by us");
        CHECK(of[1][PROBE_FLUSH_REMOTE_SEND] + of[1][PROBE_FLUSH_LOCAL_MM] >= 5000, "not for these reasons");
        munmap(memory, 16 * PAGE_BYTES);
        for (unsigned i = 0; i < PROBE_FLUSH_REASONS; i++)
                if (MAX_OF(of[1][i], theirs[i]) >= 1000 && apart(of[1][i], theirs[i]))
                        return false;
        return !apart(ours[1] - ours[0], all);
}

static void test_flushes(Probes *probes, const char *tracefs) {
        for (unsigned i = 0; i < 5; i++)
                if (compare_flushes(probes, tracefs))
                        return;
        CHECK(false, "more than 5 %% apart");
}

/* Faults as fast as they come, until the probes have enough of it; 0: they bear it. The fastest there are, that cost a probe
 * a look-up: the kernel may not write to a page that is there, for which it needs no memory. */
static uint64_t storm(Probes *probes, uint64_t now) {
        const uint64_t deadline = now_nsec() + 20 * NSEC_PER_SEC;
        uint8_t *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
        uint64_t ends = UINT64_MAX;

        CHECK(page != MAP_FAILED && zero >= 0, "page");
        *(volatile uint8_t *)page = 1;
        CHECK(mprotect(page, PAGE_BYTES, PROT_READ) == 0, "mprotect");
        while (ends == UINT64_MAX && now_nsec() < deadline) {
                for (unsigned i = 0; i < 10000; i++)
                        CHECK(read(zero, page, 1) < 0 && errno == EFAULT, "it was written to");
                probes_read_events(probes, NULL, NULL);
                ends = probes_rest(probes, now);
        }
        close(zero);
        munmap(page, PAGE_BYTES);
        return ends == UINT64_MAX ? 0 : ends - now;
}

static uint64_t flushes_of_all(Probes *probes) {
        uint64_t reasons[PROBE_FLUSH_REASONS], own;

        return all_flushes(probes, reasons, &own);
}

/* One at least, of this CPU. */
static void flush(void) {
        uint8_t *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(page != MAP_FAILED, "page");
        *(volatile uint8_t *)page = 1;
        CHECK(mprotect(page, PAGE_BYTES, PROT_READ) == 0, "mprotect");
        munmap(page, PAGE_BYTES);
}

/* Probes that would take too much rest, longer each time, count nothing meanwhile, and count again. */
static void test_rest(Probes *probes) {
        uint64_t now = now_nsec(), rested = 0, before, after;
        unsigned rests = 0;

        CHECK(setpriority(PRIO_PROCESS, 0, -20) == 0, "priority"); /* so that the faults do come fast */
        for (uint64_t expected = PROBES_REST_MIN_NSEC; rests < 7; expected = MIN_OF(2 * expected, PROBES_REST_MAX_NSEC)) {
                uint64_t took = storm(probes, now);

                CHECK(took == expected, "rest %u is of %llu ms, not %llu", rests, (unsigned long long)(took / NSEC_PER_MSEC),
                      (unsigned long long)(expected / NSEC_PER_MSEC));
                CHECK(probes_state(probes, PROBE_FAULTS).resting && !probes_state(probes, PROBE_ROSTER).resting, "who rests");
                before = flushes_of_all(probes);
                flush();
                CHECK(flushes_of_all(probes) == before, "counted while resting");
                CHECK(probes_rest(probes, now + took - 1) == now + took, "the rest ends early");
                rested += took;
                now += took;
                CHECK(probes_rest(probes, now) == UINT64_MAX, "the rest does not end");
                CHECK(probes_rested(probes, now) == rested, "rested %llu ms of %llu",
                      (unsigned long long)(probes_rested(probes, now) / NSEC_PER_MSEC), (unsigned long long)(rested / NSEC_PER_MSEC));
                CHECK(probes_have(probes, PROBE_FAULTS) && !probes_state(probes, PROBE_FAULTS).resting, "attached again");
                after = flushes_of_all(probes);
                flush();
                CHECK(flushes_of_all(probes) > after, "not counted after the rest");
                rests++;
        }
        /* A later storm is another one. */
        now += 3600 * NSEC_PER_SEC;
        CHECK(storm(probes, now) == PROBES_REST_MIN_NSEC, "a later storm is taken for the same");
        CHECK(probes_rest(probes, now + PROBES_REST_MIN_NSEC) == UINT64_MAX, "the rest does not end");
        /* What is not a storm does not wake anybody. */
        for (unsigned i = 0; i < 100; i++) {
                usleep(5000);
                probes_read_events(probes, NULL, NULL);
                CHECK(probes_rest(probes, now_nsec()) == UINT64_MAX, "they rest for nothing");
        }
        CHECK(setpriority(PRIO_PROCESS, 0, 0) == 0, "priority");
        printf("rest: %u times in a storm, from %llu to %llu s\n", rests, PROBES_REST_MIN_NSEC / NSEC_PER_SEC + 0ULL,
               PROBES_REST_MAX_NSEC / NSEC_PER_SEC + 0ULL);
}

/* A page that merges is counted once, with as many others as the kernel's own counter has. */
static void test_ksm(Probes *probes, const char *tracefs) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        struct probe_ksm before, after;
        const uint64_t bytes = 256 * PAGE_BYTES;
        uint64_t deadline = now_nsec() + 20 * NSEC_PER_SEC, kernels;
        uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char state[64];
        Perf perf;

        snprintf(state, sizeof state, "/run/ksmd-user-test-probes.%d", getpid());
        if (!probes_have(probes, PROBE_KSM) || ksm_new(NULL, state, &ksm) < 0 ||
            !perf_open(&perf, tracefs, "ksm/ksm_merge_with_ksm_page", NULL)) {
                TEST_SKIP_PART("ksm: this kernel has no tracepoints to compare");
                return;
        }
        CHECK(memory != MAP_FAILED, "mmap");
        memset(memory, 7, bytes);
        CHECK(madvise(memory, bytes, MADV_MERGEABLE) == 0, "MERGEABLE");
        probes_ksm(probes, &before);
        CHECK(ksm_set(ksm, "pages_to_scan", 1000) == 0 && ksm_set(ksm, "sleep_millisecs", 1) == 0, "knobs");
        CHECK(ksm_set(ksm, "run", 1) == 0, "run");
        do {
                usleep(20000);
                probes_ksm(probes, &after);
        } while (after.count[PROBE_KSM_MERGED] - before.count[PROBE_KSM_MERGED] < 256 && now_nsec() < deadline);
        usleep(50000);
        CHECK(ksm_restore(ksm) == 0, "knobs");
        probes_ksm(probes, &after);
        kernels = perf_count(&perf);
        perf_close(&perf);
        uint64_t merged = after.count[PROBE_KSM_MERGED] - before.count[PROBE_KSM_MERGED], all = 0;
        for (unsigned i = PROBE_KSM_MERGED; i <= PROBE_KSM_OTHER_ERROR; i++)
                all += i == PROBE_KSM_ZERO ? 0 : after.count[i] - before.count[i];
        printf("ksm: %llu merged, %llu attempts, perf counts %llu, %llu scans\n", (unsigned long long)merged,
               (unsigned long long)all, (unsigned long long)kernels,
               (unsigned long long)(after.count[PROBE_KSM_SCANS] - before.count[PROBE_KSM_SCANS]));
        CHECK(merged >= 256, "not all merged");
        CHECK(all == kernels, "not as many as the kernel counts");
        CHECK(after.count[PROBE_KSM_SCANS] > before.count[PROBE_KSM_SCANS], "no scan");
        munmap(memory, bytes);
}

int main(int argc, char **argv) {
        _cleanup_(probes_freep) Probes *probes = NULL;
        ProbeOptions options = { .memory_bytes = (uint64_t)1 << 30 };
        const char *tracefs = "/sys/kernel/tracing";

        for (int i = 1; i < argc; i++) {
                raw |= strcmp(argv[i], "--raw") == 0;
                control |= strcmp(argv[i], "--control") == 0;
        }
        setvbuf(stdout, NULL, _IOLBF, 0);
        test_need_root();
        test_lock_ksm();
        options.raw_only = raw;
        options.typed_only = !raw;
        CHECK(probes_new(&options, &probes) == 0, "probes");
        for (unsigned i = 0; i < _PROBE_MAX; i++) {
                ProbeState state = probes_state(probes, (ProbeId)i);

                printf("%s: %s%s%s\n", probe_name((ProbeId)i), probe_way_name(state.way), state.error ? ": " : "",
                       state.error ? probe_error_name(state.error) : "");
        }
        if (!probes_have(probes, PROBE_FAULTS))
                TEST_SKIP("no probes here: %s", probe_error_name(probes_state(probes, PROBE_FAULTS).error));
        test_faults(probes);
        if (probes_have(probes, PROBE_ROSTER))
                test_roster(probes);
        /* Where nobody sees it. */
        CHECK(unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "namespace");
        (void)mount("tracefs", tracefs, "tracefs", 0, NULL);
        test_flushes(probes, tracefs);
        test_rest(probes);
        test_faults(probes); /* they count as before */
        test_ksm(probes, tracefs);
        (void)umount(tracefs);
        return 0;
}
