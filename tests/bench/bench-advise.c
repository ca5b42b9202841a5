/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What it costs until everything mergeable is merged: ksmd alone with everything marked, against the daemon with ksmd.
 * Same contents (tests/bench/pages), fresh processes for each, one after the other on the same machine.
 *
 *   ksmd      the processes mark all their memory; ksmd flat out (no sleep) until 99 % is merged; its CPU time
 *   directed  (--parts) the processes mark just what is duplicate or zero; the same; what no daemon can do better
 *   floor     (--parts) reading every page by process_vm_readv and hashing it, once
 *   daemon    `ksmd-user --once` with their cgroup opted in: its own CPU time and ksmd's, as the requirement counts.
 *             The calls run in the processes themselves: their CPU time meanwhile is shown, with a ratio that has it
 *
 * CPU times are the scheduler's (schedstat, getrusage). What is merged is counted in frames, from the page maps of all
 * processes, by code of this file; both must reach 99 %. One JSON line for each measurement and each comparison; exits
 * 1 when a requirement is not met. Unmerges what is merged on this machine before each run (run = 2), and puts KSM's
 * settings back in the end.
 *
 * Usage: bench-advise [--quick] [--mib N] [--parts] PAGES [DAEMON]
 */

#include "base/io.h"
#include "tests/test.h"

#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <xxhash.h>

#define PROCESSES 4U
#define KSM "/sys/kernel/mm/ksm/"
#define ENOUGH 0.99
#define PATIENCE_NSEC (120 * NSEC_PER_SEC)

static const char *const knobs[] = { "run", "sleep_millisecs", "pages_to_scan", "use_zero_pages" };
static uint64_t knobs_found[ELEMENTSOF(knobs)];
static const char *pages_program, *daemon_program;
static unsigned mib = 256;
static char cgroup[256], cgroup_kill[272], directory[] = "/tmp/bench-advise.XXXXXX";
static pid_t daemon_pid, ksmd;

/* Signed: the kernel's ksm_zero_pages falls below zero when merged zero pages go in certain ways. */
static uint64_t ksm_get(const char *name) {
        _cleanup_free_ char *text = NULL;
        char path[128];

        snprintf(path, sizeof path, KSM "%s", name);
        CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0, "%s", path);
        return (uint64_t)strtoll(text, NULL, 10);
}

static void ksm_set(const char *name, uint64_t value) {
        char path[128], text[32];

        snprintf(path, sizeof path, KSM "%s", name);
        snprintf(text, sizeof text, "%" PRIu64, value);
        CHECK(write_text(AT_FDCWD, path, text) == 0, "%s", path);
}

static void clean_up(void) {
        const struct timespec msec = { .tv_nsec = NSEC_PER_MSEC };

        if (daemon_pid > 0) {
                kill(daemon_pid, SIGKILL); /* else it would go on turning knobs */
                waitpid(daemon_pid, NULL, 0);
        }
        test_remove_directory(directory);
        if (!*cgroup)
                return;
        (void)write_text(AT_FDCWD, cgroup_kill, "1");
        for (int i = 0; i < 200 && rmdir(cgroup) < 0 && errno == EBUSY; i++)
                nanosleep(&msec, NULL);
}

/* CPU time of a process or kernel thread that sleeps now. */
static uint64_t cpu_nsec(pid_t pid) {
        char path[64];
        _cleanup_free_ char *text = NULL;

        snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
        CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0, "%s", path);
        return strtoull(text, NULL, 10);
}

static pid_t find_ksmd(void) {
        for (pid_t pid = 2; pid < 1000; pid++) {
                char path[64];
                _cleanup_free_ char *text = NULL;

                snprintf(path, sizeof path, "/proc/%d/comm", pid);
                if (read_file(AT_FDCWD, path, &text, NULL) == 0 && strcmp(text, "ksmd\n") == 0)
                        return pid;
        }
        TEST_SKIP("no ksmd");
}

typedef struct Spec {
        unsigned duplicate, zero, run;
        double required;
} Spec;

typedef struct Workload {
        pid_t program, pids[PROCESSES];
        FILE *in, *out;
        uint64_t address[PROCESSES], bytes, duplicate_pages, zero_pages;
        uint64_t saveable_pages;        /* over all processes */
} Workload;

static void workload_start(const Spec *spec, Workload *ret) {
        Workload w = {};
        int in[2], out[2];
        char numbers[4][16], line[128];

        snprintf(numbers[0], sizeof numbers[0], "%u", mib);
        snprintf(numbers[1], sizeof numbers[1], "%u", spec->duplicate);
        snprintf(numbers[2], sizeof numbers[2], "%u", spec->zero);
        snprintf(numbers[3], sizeof numbers[3], "%u", spec->run);
        CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0, "pipe");
        w.program = fork();
        CHECK(w.program >= 0, "fork");
        if (w.program == 0) {
                dup2(in[0], 0);
                dup2(out[1], 1);
                execl(pages_program, pages_program, "--mib", numbers[0], "--duplicate", numbers[1], "--zero",
                      numbers[2], "--run", numbers[3], "--cgroup", cgroup, NULL);
                CHECK(false, "%s", pages_program);
        }
        close(in[0]);
        close(out[1]);
        w.in = fdopen(in[1], "w");
        w.out = fdopen(out[0], "r");
        CHECK(w.in && w.out, "fdopen");
        for (unsigned i = 0; i < PROCESSES; i++)
                CHECK(fgets(line, sizeof line, w.out) && sscanf(line, "process %d %" SCNx64 " %" SCNu64, &w.pids[i],
                                                               &w.address[i], &w.bytes) == 3, "%s", line);
        CHECK(fgets(line, sizeof line, w.out) &&
              sscanf(line, "ready %" SCNu64 " %" SCNu64, &w.duplicate_pages, &w.zero_pages) == 2, "%s", line);
        w.saveable_pages = w.duplicate_pages * (PROCESSES - 1) + w.zero_pages * PROCESSES;
        *ret = w;
}

static void workload_command(Workload *w, const char *command) {
        char line[16];

        CHECK(fprintf(w->in, "%s\n", command) > 0 && fflush(w->in) == 0, "%s", command);
        CHECK(fgets(line, sizeof line, w->out) && strcmp(line, "ok\n") == 0, "%s: %s", command, line);
}

static void workload_stop(Workload *w) {
        fclose(w->in);
        fclose(w->out);
        waitpid(w->program, NULL, 0);
}

static uint64_t workload_cpu_nsec(const Workload *w) {
        uint64_t nsec = 0;

        for (unsigned i = 0; i < PROCESSES; i++)
                nsec += cpu_nsec(w->pids[i]);
        return nsec;
}

#define PFN_MASK (((uint64_t)1 << 55) - 1)

static void read_pfns(pid_t pid, uint64_t address, uint64_t pages, uint64_t *ret) {
        char path[64];
        _cleanup_close_ int fd = -EBADF;

        snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0, "%s", path);
        CHECK(pread(fd, ret, pages * 8, (off_t)(address / PAGE_BYTES * 8)) == (ssize_t)(pages * 8), "%s", path);
        for (uint64_t i = 0; i < pages; i++) {
                CHECK(ret[i] >> 63, "page %" PRIu64 " of %d is not present", i, pid);
                ret[i] &= PFN_MASK;
        }
}

static int compare_u64(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
        return x < y ? -1 : x > y;
}

/* Frames saved, of those that could be: pages minus distinct frames; the zero page costs none. */
static double merged_share(const Workload *w) {
        uint64_t pages = w->bytes / PAGE_BYTES, n = pages * PROCESSES, distinct = 0, zero;
        _cleanup_free_ uint64_t *pfns = reallocarray(NULL, n, sizeof *pfns);
        volatile const char *untouched = mmap(NULL, PAGE_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(pfns && untouched != MAP_FAILED, "memory");
        (void)*untouched;
        read_pfns(getpid(), (uint64_t)(uintptr_t)untouched, 1, &zero);
        munmap((void *)(uintptr_t)untouched, PAGE_BYTES);
        for (unsigned i = 0; i < PROCESSES; i++)
                read_pfns(w->pids[i], w->address[i], pages, pfns + i * pages);
        qsort(pfns, n, sizeof *pfns, compare_u64);
        for (uint64_t i = 0; i < n; i++)
                distinct += pfns[i] != zero && (i == 0 || pfns[i] != pfns[i - 1]);
        return (double)(n - distinct) / (double)w->saveable_pages;
}

typedef struct Result {
        uint64_t daemon_nsec, ksmd_nsec, targets_nsec, wall_nsec;
        double merged;
} Result;

static void report(const Spec *spec, const char *mode, const Result *r) {
        uint64_t total = r->daemon_nsec + r->ksmd_nsec + r->targets_nsec;

        printf("{\"mode\":\"%s\",\"mib\":%u,\"duplicate\":%u,\"zero\":%u,\"run\":%u,\"daemon_cpu_nsec\":%" PRIu64
               ",\"ksmd_cpu_nsec\":%" PRIu64 ",\"targets_cpu_nsec\":%" PRIu64 ",\"wall_nsec\":%" PRIu64
               ",\"nsec_per_page\":%.0f,\"merged\":%.4f}\n",
               mode, mib, spec->duplicate, spec->zero, spec->run, r->daemon_nsec, r->ksmd_nsec, r->targets_nsec,
               r->wall_nsec, (double)total / ((double)mib * 256 * PROCESSES), r->merged);
        fflush(stdout);
}

static void unmerge_all(void) {
        ksm_set("run", 2);
        ksm_set("run", 0);
        for (size_t i = 1; i < ELEMENTSOF(knobs); i++)
                ksm_set(knobs[i], knobs_found[i]);
}

static int64_t ksm_saved(void) {
        return (int64_t)(ksm_get("pages_sharing") + ksm_get("ksm_zero_pages"));
}

/* ksmd flat out over what the processes mark at the command. */
static Result run_ksmd(const Spec *spec, const char *mode, const char *command) {
        Workload w;
        Result result = {};
        uint64_t before, wall, marking;
        int64_t wanted;

        unmerge_all();
        workload_start(spec, &w);
        marking = workload_cpu_nsec(&w);
        workload_command(&w, command);
        result.targets_nsec = workload_cpu_nsec(&w) - marking;
        ksm_set("use_zero_pages", 1);
        ksm_set("sleep_millisecs", 0);
        ksm_set("pages_to_scan", 500);
        wanted = ksm_saved() + (int64_t)((double)w.saveable_pages * (ENOUGH + 0.002));
        before = cpu_nsec(ksmd);
        wall = now_nsec();
        ksm_set("run", 1);
        while (ksm_saved() < wanted && now_nsec() - wall < PATIENCE_NSEC)
                usleep(2000);
        result.wall_nsec = now_nsec() - wall;
        ksm_set("run", 0);
        result.ksmd_nsec = cpu_nsec(ksmd) - before;
        result.merged = merged_share(&w);
        workload_stop(&w);
        report(spec, mode, &result);
        return result;
}

static void run_floor(const Spec *spec) {
        static uint8_t buffer[128 << 10];
        Workload w;
        Result result = {};
        uint64_t before = 0, sum = 0;

        workload_start(spec, &w);
        for (int round = 0; round < 2; round++) { /* the first one warms up */
                before = process_cpu_nsec();
                for (unsigned i = 0; i < PROCESSES; i++)
                        for (uint64_t at = 0; at < w.bytes; at += sizeof buffer) {
                                struct iovec local = { buffer, sizeof buffer };
                                struct iovec remote = { (void *)(uintptr_t)(w.address[i] + at), sizeof buffer };
                                CHECK(process_vm_readv(w.pids[i], &local, 1, &remote, 1, 0) == sizeof buffer, "read");
                                for (size_t page = 0; page < sizeof buffer; page += PAGE_BYTES)
                                        sum += XXH3_64bits(buffer + page, PAGE_BYTES);
                        }
        }
        CHECK(sum != 0, "hashes");
        result.daemon_nsec = process_cpu_nsec() - before;
        report(spec, "floor", &result);
        workload_stop(&w);
}

static void write_config(const char *path) {
        _cleanup_free_ char *text = NULL;
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

        CHECK(fd >= 0, "%s", path);
        CHECK(asprintf(&text,
                       "[Daemon]\nSocket=%s/socket\nMinimumAge=0\nCPUQuota=100%%\nCPUQuotaBusy=100%%\nMetadataMax=100%%\n"
                       "[Cgroup %s]\nMerge=yes\nRoute=advise\n", directory, strrchr(cgroup, '/') + 1) > 0, "config");
        CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "%s", path);
        close(fd);
}

static Result run_daemon(const Spec *spec) {
        Workload w;
        Result result = {};
        struct rusage usage;
        char config[64], output[64];
        uint64_t before, targets, wall;
        int status;

        unmerge_all();
        workload_start(spec, &w);
        snprintf(config, sizeof config, "%s/conf", directory);
        snprintf(output, sizeof output, "%s/out.json", directory);
        write_config(config);
        before = cpu_nsec(ksmd);
        targets = workload_cpu_nsec(&w);
        wall = now_nsec();
        daemon_pid = fork();
        CHECK(daemon_pid >= 0, "fork");
        if (daemon_pid == 0) {
                int fd = open(output, O_WRONLY | O_CREAT | O_TRUNC, 0600);
                dup2(fd, 1);
                setenv("RUNTIME_DIRECTORY", directory, 1);
                execl(daemon_program, daemon_program, "--config", config, "--once", NULL);
                CHECK(false, "%s", daemon_program);
        }
        CHECK(wait4(daemon_pid, &status, 0, &usage) == daemon_pid, "wait4");
        daemon_pid = 0;
        result.wall_nsec = now_nsec() - wall;
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s --once: status %x", daemon_program, status);
        result.ksmd_nsec = cpu_nsec(ksmd) - before;
        result.targets_nsec = workload_cpu_nsec(&w) - targets;
        result.daemon_nsec = (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * NSEC_PER_SEC +
                             (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * NSEC_PER_USEC;
        result.merged = merged_share(&w);
        workload_command(&w, "check");
        workload_stop(&w);
        report(spec, "daemon", &result);
        return result;
}

static bool compare(const Spec *spec, const Result *alone, const Result *with) {
        double base = (double)alone->ksmd_nsec, ratio = (double)(with->daemon_nsec + with->ksmd_nsec) / base;
        bool ok = ratio <= spec->required && alone->merged >= ENOUGH && with->merged >= ENOUGH;

        printf("{\"duplicate\":%u,\"zero\":%u,\"run\":%u,\"ratio\":%.3f,\"ratio_with_targets\":%.3f,\"required\":%.2f,"
               "\"ok\":%s}\n", spec->duplicate, spec->zero, spec->run, ratio,
               ratio + (double)with->targets_nsec / base, spec->required, ok ? "true" : "false");
        fflush(stdout);
        return ok;
}

static void make_cgroup(void) {
        _cleanup_free_ char *text = NULL;
        char root[192];

        CHECK(read_file(AT_FDCWD, "/proc/self/mounts", &text, NULL) == 0, "mounts");
        for (const char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
                if (sscanf(line, "%*s %191s cgroup2 ", root) == 1 && strstr(line, " cgroup2 ") &&
                    strstr(line, " cgroup2 ") < line + strcspn(line, "\n")) {
                        char found[256];
                        snprintf(found, sizeof found, "%s/ksmd-user-bench-%d", root, getpid());
                        CHECK(mkdir(found, 0755) == 0, "%s", found);
                        snprintf(cgroup_kill, sizeof cgroup_kill, "%s/cgroup.kill", found);
                        strcpy(cgroup, found);
                        return;
                }
        TEST_SKIP("no cgroup2 is mounted");
}

int main(int argc, char **argv) {
        static const Spec specs[] = {
                { 30, 10, 8, 0.5 }, { 5, 2, 1, 0.2 }, { 30, 10, 1, 0.5 },
                { 30, 10, 64, 0.5 }, { 5, 2, 8, 0.2 }, { 5, 2, 64, 0.2 },
        };
        static const struct option names[] = { { "quick", no_argument, NULL, 'q' }, { "parts", no_argument, NULL, 'p' },
                                               { "mib", required_argument, NULL, 'm' }, {} };
        size_t n = ELEMENTSOF(specs);
        bool parts = false, ok = true;

        for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
                if (c == 'q') {
                        n = 2;
                        mib = 64;
                } else if (c == 'p')
                        parts = true;
                else if (c == 'm')
                        mib = (unsigned)atoi(optarg);
                else
                        return 2;
        }
        CHECK(optind < argc && mib > 0, "usage: bench-advise [--quick] [--mib N] [--parts] PAGES [DAEMON]");
        pages_program = argv[optind];
        daemon_program = argv[optind + 1];
        test_need_root();
        test_lock_ksm();
        if (access(KSM "run", W_OK) < 0)
                TEST_SKIP("no KSM");
        ksmd = find_ksmd();
        for (size_t i = 0; i < ELEMENTSOF(knobs); i++)
                knobs_found[i] = ksm_get(knobs[i]);
        CHECK(mkdtemp(directory), "%s", directory);
        test_at_end(clean_up);
        make_cgroup();
        for (size_t i = 0; i < n; i++) {
                Result alone = run_ksmd(&specs[i], "ksmd", "mark");

                ok = ok && alone.merged >= ENOUGH;
                if (parts) {
                        run_ksmd(&specs[i], "directed", "wanted");
                        run_floor(&specs[i]);
                }
                if (daemon_program) {
                        Result with = run_daemon(&specs[i]);
                        ok = compare(&specs[i], &alone, &with) && ok;
                }
        }
        return ok ? 0 : 1;
}
