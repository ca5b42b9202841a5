/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What giving zero pages back costs, for runs of 8, 64 and 512 pages with a unique page between them, against ksmd with
 * use_zero_pages on the same memory, marked as a whole and marked where it is zero. CPU time of both sides is the
 * scheduler's (schedstat, and our thread's clock); a target's own is what the calls made in it take. Memory is
 * filled anew before each. Puts KSM's settings back. JSON lines; exits 1 when a page costs more than is required (1.5 us at runs
 * of 64 and more) or ksmd costs less.
 *
 * Usage: bench-zero-cost [--threads N] [--mib N]
 */
#include "base/io.h"
#include "merge/zero.h"
#include "tests/test.h"

#include <dirent.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define KSM "/sys/kernel/mm/ksm/"
#define REQUIRED_NSEC 1500

static unsigned n_threads = 1, mib = 64, run_pages;
static pid_t ksmd;

static uint64_t read_number(const char *path) {
        _cleanup_free_ char *text = NULL;

        CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0, "%s", path);
        return strtoull(text, NULL, 10);
}

static uint64_t ksm_get(const char *name) {
        char path[128];

        snprintf(path, sizeof path, KSM "%s", name);
        return read_number(path);
}

static void ksm_set(const char *name, uint64_t value) {
        char path[128], text[32];

        snprintf(path, sizeof path, KSM "%s", name);
        snprintf(text, sizeof text, "%lu", value);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        CHECK(fd >= 0 && write(fd, text, strlen(text)) > 0, "%s", path);
        close(fd);
}

static uint64_t cpu_of(pid_t pid) {
        char path[64];
        uint64_t sum = 0;

        snprintf(path, sizeof path, "/proc/%d/task", pid);
        DIR *tasks = opendir(path);
        for (const struct dirent *entry; tasks && (entry = readdir(tasks));) {
                if (entry->d_name[0] == '.')
                        continue;
                snprintf(path, sizeof path, "/proc/%d/task/%.16s/schedstat", pid, entry->d_name);
                sum += read_number(path);
        }
        if (tasks)
                closedir(tasks);
        return sum;
}

static uint64_t own_cpu(void) {
        struct timespec ts;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
        return (uint64_t)ts.tv_sec * NSEC_PER_SEC + (uint64_t)ts.tv_nsec;
}

/* A target: fills its memory when told to ('f'), marks all of it ('m') or what is zero ('z'), unmarks ('u'). */
typedef struct Child {
        pid_t pid;
        int command, answer;
        uint64_t address, pages, zero;
} Child;

static bool is_zero(uint64_t page) { return page % (run_pages + 1) != run_pages; }

static void *sleep_on(void *unused) {
        pause();
        return NULL;
}

static void serve(uint64_t pages, int command, int answer) {
        uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char what;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        CHECK(memory != MAP_FAILED && madvise(memory, pages * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
        for (unsigned i = 1; i < n_threads; i++) {
                pthread_t thread;
                CHECK(pthread_create(&thread, NULL, sleep_on, NULL) == 0);
        }
        CHECK(write(answer, &memory, sizeof memory) == sizeof memory);
        while (read(command, &what, 1) == 1) {
                for (uint64_t page = 0; what == 'f' && page < pages; page++) {
                        memset(memory + page * 512, 0, PAGE_BYTES);
                        if (!is_zero(page))
                                memory[page * 512 + page % 512] = page + 1;
                }
                for (uint64_t page = 0, end; what == 'z' && page < pages; page = end + 1) {
                        end = MIN_OF(page + run_pages, pages);
                        madvise(memory + page * 512, (end - page) * PAGE_BYTES, MADV_MERGEABLE);
                }
                if (what == 'm' || what == 'u')
                        madvise(memory, pages * PAGE_BYTES, what == 'm' ? MADV_MERGEABLE : MADV_UNMERGEABLE);
                CHECK(write(answer, &what, 1) == 1);
        }
        _exit(0);
}

static Child start(void) {
        Child child = { .pages = (uint64_t)mib << 8 };
        int commands[2], answers[2];

        CHECK(pipe2(commands, O_CLOEXEC) == 0 && pipe2(answers, O_CLOEXEC) == 0);
        child.pid = fork();
        CHECK(child.pid >= 0);
        if (child.pid == 0)
                serve(child.pages, commands[0], answers[1]);
        child.command = commands[1];
        child.answer = answers[0];
        CHECK(read(child.answer, &child.address, sizeof child.address) == sizeof child.address);
        for (uint64_t page = 0; page < child.pages; page++)
                child.zero += is_zero(page);
        return child;
}

static void tell(const Child *child, char what) {
        CHECK(write(child->command, &what, 1) == 1 && read(child->answer, &what, 1) == 1);
}

static double measure_given(const Child *child) {
        _cleanup_(remote_freep) Remote *remote = NULL;
        _cleanup_(zero_freep) Zero *zero = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(zero_plan_done) ZeroPlan plan = {};
        _cleanup_(vma_list_done) VmaList vmas = {};
        BlockTable table = {};
        ZeroResult result = {};
        ZeroRules rules = { .minimum_run_pages = 1 };
        RemoteStats stats;

        CHECK(remote_new(&remote) == 0);
        int r = zero_new(remote, &zero);
        if (r == -EOPNOTSUPP)
                TEST_SKIP("no UFFDIO_MOVE (6.8)");
        CHECK(r == 0 && target_new(child->pid, &target) == 0 && target_open_memory(target) == 0);
        CHECK(target_read_vmas(target, false, &vmas) == 0);
        Space space = { .target = target, .table = &table };
        CHECK(space_refresh(&space, &vmas) == 0);
        for (uint64_t page = 0; page < child->pages; page++) {
                uint64_t at = child->address + page * PAGE_BYTES;
                if (is_zero(page))
                        page_set_add(space_find(&space, at)->zero, (unsigned)(at % BLOCK_BYTES / PAGE_BYTES));
        }
        uint64_t ours = own_cpu(), theirs = cpu_of(child->pid), begun = now_nsec();
        CHECK(zero_plan_make(&space, &vmas, &rules, &plan) == 0);
        for (unsigned tries = 0; result.pages_given < plan.pages && tries < 50; tries++) {
                ZeroPlan rest = { .runs = plan.runs + result.runs, .n = plan.n - result.runs };
                r = zero_give_back(zero, &space, NULL, &rest, NULL, NULL, &result);
                CHECK(r >= 0, "%s", strerror(-r));
                usleep(r > 0 ? 1000 : 0);
        }
        uint64_t wall = now_nsec() - begun;
        ours = own_cpu() - ours;
        theirs = cpu_of(child->pid) - theirs;
        remote_stats(remote, &stats);
        CHECK(result.pages_given >= plan.pages * 99 / 100, "%lu of %lu given back", result.pages_given, plan.pages);
        double each = (double)(ours + theirs) / (double)result.pages_given;
        printf("{\"what\": \"zero\", \"run\": %u, \"threads\": %u, \"pages\": %lu, \"nsec_a_page\": %.0f, \"daemon\": %.0f, "
               "\"target\": %.0f, \"stops\": %lu, \"stop_p50_usec\": %lu, \"stop_p99_usec\": %lu, \"wall_msec\": %.1f}\n",
               run_pages, n_threads, result.pages_given, each, (double)ours / (double)result.pages_given,
               (double)theirs / (double)result.pages_given, stats.stops, remote_stop_percentile(&stats, 500) / 1000,
               remote_stop_percentile(&stats, 990) / 1000, (double)wall / 1e6);
        space_done(&space);
        block_table_done(&table);
        return each;
}

static double measure_ksmd(const Child *child, char mark, const char *what) {
        uint64_t begun, cpu, before = ksm_get("ksm_zero_pages"), wanted = child->zero * 99 / 100;

        tell(child, mark);
        cpu = cpu_of(ksmd);
        begun = now_nsec();
        ksm_set("run", 1);
        while (ksm_get("ksm_zero_pages") - before < wanted && now_nsec() - begun < 60 * NSEC_PER_SEC)
                usleep(500);
        ksm_set("run", 0);
        cpu = cpu_of(ksmd) - cpu;
        uint64_t merged = ksm_get("ksm_zero_pages") - before;
        CHECK(merged >= wanted, "%lu of %lu", merged, wanted);
        printf("{\"what\": \"%s\", \"run\": %u, \"pages\": %lu, \"nsec_a_page\": %.0f}\n", what, run_pages, merged,
               (double)cpu / (double)merged);
        tell(child, 'u');
        return (double)cpu / (double)merged;
}

static pid_t find_ksmd(void) {
        for (pid_t pid = 2; pid < 1000; pid++) {
                char path[32], name[16] = "";
                snprintf(path, sizeof path, "/proc/%d/comm", pid);
                int fd = open(path, O_RDONLY | O_CLOEXEC);
                if (fd >= 0 && read(fd, name, sizeof name - 1) > 0 && strcmp(name, "ksmd\n") == 0) {
                        close(fd);
                        return pid;
                }
                safe_close(fd);
        }
        TEST_SKIP("no ksmd is to be seen");
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "threads", required_argument, NULL, 't' }, { "mib", required_argument, NULL, 'm' }, {}
        };
        bool missed = false;

        for (int o; (o = getopt_long(argc, argv, "", options, NULL)) >= 0;)
                if (o == 't')
                        n_threads = (unsigned)atoi(optarg);
                else if (o == 'm')
                        mib = (unsigned)atoi(optarg);
                else
                        return 2;
        test_need_root();
        test_lock_ksm();
        ksmd = find_ksmd();
        ksm_set("run", 2);
        ksm_set("run", 0);
        ksm_set("use_zero_pages", 1);
        ksm_set("sleep_millisecs", 0);
        ksm_set("pages_to_scan", 20000);
        for (run_pages = 8; run_pages <= 512; run_pages *= 8) {
                Child child = start();
                tell(&child, 'f');
                double given = measure_given(&child);
                tell(&child, 'f');
                double whole = measure_ksmd(&child, 'm', "ksmd, all marked");
                tell(&child, 'f');
                double directed = measure_ksmd(&child, 'z', "ksmd, zero marked");
                missed |= (run_pages >= 64 && given > REQUIRED_NSEC) || given > MIN_OF(whole, directed);
                kill(child.pid, SIGKILL);
                waitpid(child.pid, NULL, 0);
        }
        return missed;
}
