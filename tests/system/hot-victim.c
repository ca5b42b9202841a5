/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two processes with the same contents, of which a share is written anew on command, the same in both, so that all of it
 * could be merged again each time. They check every byte, and count for themselves how many of the pages that they are
 * about to write are merged then: by the frames behind them.
 *
 *   hot-victim --mib N --hot PERCENT [--scatter] [--cgroup DIRECTORY]
 *
 * --scatter: the hot pages lie evenly among the others; else together, at the end. Prints "process PID ADDRESS PAGES HOT"
 * for each, then "ready". Obeys lines on its standard input:
 *   write   writes the hot pages: "ok MERGED", so many of them were merged when they were written
 *   check   "ok" or "bad"
 *   count   "ok HOT COLD": pages that are merged now
 * Ends with its standard input.
 */
#include "tests/test.h"

#include <getopt.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define PROCESSES 2U
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))
#define KPAGEFLAGS_KSM ((uint64_t)1 << 21)
#define PAGEMAP_PFN (((uint64_t)1 << 55) - 1)

static uint64_t pages, hot, *memory;
static unsigned percent = 20, round_number;
static bool scatter;
static int pagemap_fd, flags_fd;

typedef struct Answer {
        uint64_t hot, cold;
        bool ok;
} Answer;

static bool is_hot(uint64_t page) {
        return scatter ? page * percent / 100 != (page + 1) * percent / 100 : page >= pages - hot;
}

static uint64_t word_of(uint64_t page) {
        uint64_t x = (page + 1) * 0x9E3779B97F4A7C15ULL ^ (is_hot(page) ? round_number * 0xBF58476D1CE4E5B9ULL : 0);
        return (x ^ x >> 29) | 1;
}

static void fill(uint64_t page) {
        uint64_t x = word_of(page);

        for (unsigned i = 0; i < PAGE_WORDS; i++)
                memory[page * PAGE_WORDS + i] = x + i;
}

static bool intact(void) {
        for (uint64_t page = 0; page < pages; page++) {
                uint64_t x = word_of(page);

                for (unsigned i = 0; i < PAGE_WORDS; i++)
                        if (memory[page * PAGE_WORDS + i] != x + i)
                                return false;
        }
        return true;
}

static bool is_merged(uint64_t page) {
        uint64_t entry, flags, at = (uintptr_t)memory / PAGE_BYTES + page;

        CHECK(pread(pagemap_fd, &entry, sizeof entry, (off_t)(at * sizeof entry)) == sizeof entry, "pagemap");
        CHECK(entry & PAGEMAP_PFN, "no frame numbers");
        CHECK(pread(flags_fd, &flags, sizeof flags, (off_t)((entry & PAGEMAP_PFN) * sizeof flags)) == sizeof flags, "flags");
        return flags & KPAGEFLAGS_KSM;
}

static Answer obey(char command) {
        Answer answer = { .ok = true };

        if (command == 'w')
                round_number++;
        for (uint64_t page = 0; page < pages && command != 'c'; page++) {
                bool merged = command == 'w' && !is_hot(page) ? false : is_merged(page);

                answer.hot += merged && is_hot(page);
                answer.cold += merged && !is_hot(page);
                if (command == 'w' && is_hot(page))
                        fill(page);
        }
        if (command == 'c')
                answer.ok = intact();
        return answer;
}

static _Noreturn void serve(int commands, int answers, const char *cgroup) {
        char command, path[512];
        int fd;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (cgroup) {
                snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
                fd = open(path, O_WRONLY | O_CLOEXEC);
                CHECK(fd >= 0 && write(fd, "0", 1) == 1, "%s", path);
                close(fd);
        }
        pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        flags_fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
        CHECK(pagemap_fd >= 0 && flags_fd >= 0, "pagemap");
        memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED && madvise(memory, pages * PAGE_BYTES, MADV_NOHUGEPAGE) == 0, "mmap");
        for (uint64_t page = 0; page < pages; page++)
                fill(page);
        CHECK(write(answers, &memory, sizeof memory) == sizeof memory, "answer");
        while (read(commands, &command, 1) == 1) {
                Answer answer = obey(command);

                CHECK(write(answers, &answer, sizeof answer) == sizeof answer, "answer");
        }
        exit(0);
}

int main(int argc, char **argv) {
        static const struct option names[] = {
                { "mib", required_argument, NULL, 'm' },    { "hot", required_argument, NULL, 'h' },
                { "scatter", no_argument, NULL, 's' },      { "cgroup", required_argument, NULL, 'c' }, {},
        };
        int commands[PROCESSES][2], answers[PROCESSES][2];
        const char *cgroup = NULL;
        pid_t pids[PROCESSES];
        char line[32];

        for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;)
                switch (c) {
                case 'm': pages = strtoul(optarg, NULL, 10) * ((1 << 20) / PAGE_BYTES); break;
                case 'h': percent = (unsigned)strtoul(optarg, NULL, 10); break;
                case 's': scatter = true; break;
                case 'c': cgroup = optarg; break;
                default: return 2;
                }
        CHECK(pages > 0 && percent <= 100, "--mib, --hot");
        hot = pages * percent / 100;
        for (unsigned i = 0; i < PROCESSES; i++) {
                CHECK(pipe2(commands[i], O_CLOEXEC) == 0 && pipe2(answers[i], O_CLOEXEC) == 0, "pipe");
                pids[i] = fork();
                CHECK(pids[i] >= 0, "fork");
                if (pids[i] == 0)
                        serve(commands[i][0], answers[i][1], cgroup);
                close(commands[i][0]);
                close(answers[i][1]);
        }
        for (unsigned i = 0; i < PROCESSES; i++) {
                void *where;

                CHECK(read(answers[i][0], &where, sizeof where) == sizeof where, "process");
                printf("process %d %p %llu %llu\n", pids[i], where, (unsigned long long)pages, (unsigned long long)hot);
        }
        puts("ready");
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                Answer sum = { .ok = true };
                char command = strncmp(line, "check", 5) == 0 ? 'c' : line[0] == 'w' ? 'w' : 'n';

                for (unsigned i = 0; i < PROCESSES; i++)
                        CHECK(write(commands[i][1], &command, 1) == 1, "process");
                for (unsigned i = 0; i < PROCESSES; i++) {
                        Answer one;

                        CHECK(read(answers[i][0], &one, sizeof one) == sizeof one, "process %d", pids[i]);
                        sum.hot += one.hot;
                        sum.cold += one.cold;
                        sum.ok = sum.ok && one.ok;
                }
                printf("%s %llu %llu\n", sum.ok ? "ok" : "bad", (unsigned long long)sum.hot, (unsigned long long)sum.cold);
                fflush(stdout);
        }
        for (unsigned i = 0; i < PROCESSES; i++) {
                kill(pids[i], SIGKILL);
                waitpid(pids[i], NULL, 0);
        }
        return 0;
}
