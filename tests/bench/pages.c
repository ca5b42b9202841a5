/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Memory with known duplicates: N processes, each with the same pages in the same places as the others where the
 * pattern says "duplicate", zeroes where it says "zero", contents found nowhere else for the rest. The pattern comes in
 * runs of R pages and depends on the seed only, so that two runs of the program are the same. No huge pages.
 *
 * Prints one line for each process, "process PID ADDRESS BYTES", then "ready DUPLICATE ZERO" (pages of each kind in
 * each process). Then obeys lines on its standard input, each answered by "ok" or "bad": "mark" (MADV_MERGEABLE on
 * everything, by the processes themselves), "wanted" (the same on the duplicates and zeroes only), "check" (every byte
 * is as it was written), "touch" (a word of each duplicate is written, which changes nothing; "ok" and the nanoseconds of
 * CPU time that one took). Ends with its standard input. --threads: of each process; all but one wake up now and then.
 */

#include "tests/test.h"

#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#define PROCESSES_MAX 64
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))

enum { UNIQUE, DUPLICATE, ZERO };

static struct {
        unsigned processes, mib, duplicate, zero, run, threads;
        uint64_t seed;
        const char *cgroup;
} options = { .processes = 4, .mib = 64, .duplicate = 30, .zero = 10, .run = 8, .threads = 1, .seed = 42 };

static uint64_t mix(uint64_t x) {
        x += 0x9E3779B97F4A7C15ULL;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ULL;
        x = (x ^ x >> 27) * 0x94D049BB133111EBULL;
        return x ^ x >> 31;
}

static int kind_of(uint64_t page) {
        unsigned share = (unsigned)(mix(options.seed ^ page / options.run << 8) % 100);

        return share < options.duplicate ? DUPLICATE : share < options.duplicate + options.zero ? ZERO : UNIQUE;
}

static uint64_t first_word(unsigned process, uint64_t page) {
        return mix(mix(options.seed + page) + (kind_of(page) == UNIQUE ? process + 1 : 0)) | 1;
}

static uint64_t next_word(uint64_t x) {
        x ^= x << 13;
        x ^= x >> 7;
        return x ^ x << 17;
}

static void fill(unsigned process, uint64_t *memory, uint64_t pages) {
        for (uint64_t page = 0; page < pages; page++) {
                uint64_t *words = memory + page * PAGE_WORDS, x = first_word(process, page);

                if (kind_of(page) == ZERO)
                        memset(words, 0, PAGE_BYTES); /* a write: on a frame of its own */
                else
                        for (unsigned i = 0; i < PAGE_WORDS; i++, x = next_word(x))
                                words[i] = x;
        }
}

static bool intact(unsigned process, const uint64_t *memory, uint64_t pages) {
        for (uint64_t page = 0; page < pages; page++) {
                const uint64_t *words = memory + page * PAGE_WORDS;
                uint64_t x = first_word(process, page);

                for (unsigned i = 0; i < PAGE_WORDS; i++, x = next_word(x))
                        if (words[i] != (kind_of(page) == ZERO ? 0 : x))
                                return false;
        }
        return true;
}

static bool mark_wanted(uint64_t *memory, uint64_t pages) {
        for (uint64_t page = 0, end; page < pages; page = end) {
                bool wanted = kind_of(page) != UNIQUE;

                for (end = page + 1; end < pages && (kind_of(end) != UNIQUE) == wanted; end++)
                        ;
                if (wanted && madvise(memory + page * PAGE_WORDS, (end - page) * PAGE_BYTES, MADV_MERGEABLE) < 0)
                        return false;
        }
        return true;
}

/* What was given back is filled again. */
static bool write_zeros(uint64_t *memory, uint64_t pages) {
        for (uint64_t page = 0; page < pages; page++)
                if (kind_of(page) == ZERO)
                        memset(memory + page * PAGE_WORDS, 0, PAGE_BYTES);
        return true;
}

static uint64_t touch(volatile uint64_t *memory, uint64_t pages) {
        struct timespec before, after;
        uint64_t n = 0;

        CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before) == 0, "clock");
        for (uint64_t page = 0; page < pages; page++)
                if (kind_of(page) == DUPLICATE) {
                        memory[page * PAGE_WORDS] = memory[page * PAGE_WORDS];
                        n++;
                }
        CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after) == 0, "clock");
        return ((uint64_t)(after.tv_sec - before.tv_sec) * NSEC_PER_SEC + (uint64_t)after.tv_nsec - (uint64_t)before.tv_nsec) /
               (n + 1) + 1;
}

static void *idle(void *unused) {
        for (;;)
                usleep(20000);
        return NULL;
}

/* One process: answers each byte it reads by a number; 0: something is wrong. */
static _Noreturn void serve(unsigned process, int commands, int answers) {
        uint64_t bytes = (uint64_t)options.mib << 20, *memory;
        char command;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (options.cgroup) {
                char path[512], pid[16];
                snprintf(path, sizeof path, "%s/cgroup.procs", options.cgroup);
                int fd = open(path, O_WRONLY | O_CLOEXEC);
                CHECK(fd >= 0, "%s", path);
                snprintf(pid, sizeof pid, "%d", getpid());
                CHECK(write(fd, pid, strlen(pid)) > 0, "%s", path);
                close(fd);
        }
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED, "mmap");
        CHECK(madvise(memory, bytes, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
        fill(process, memory, bytes / PAGE_BYTES);
        for (unsigned i = 1; i < options.threads; i++) {
                pthread_t thread;
                CHECK(pthread_create(&thread, NULL, idle, NULL) == 0, "thread");
        }
        CHECK(write(answers, &memory, sizeof memory) == sizeof memory, "answer");
        while (read(commands, &command, 1) == 1) {
                uint64_t answer = command == 'm' ? madvise(memory, bytes, MADV_MERGEABLE) == 0 :
                                  command == 'z' ? write_zeros(memory, bytes / PAGE_BYTES) :
                                  command == 'w' ? mark_wanted(memory, bytes / PAGE_BYTES) :
                                  command == 't' ? touch(memory, bytes / PAGE_BYTES) :
                                                   intact(process, memory, bytes / PAGE_BYTES);
                CHECK(write(answers, &answer, sizeof answer) == sizeof answer, "answer");
        }
        exit(0);
}

static unsigned number(const char *text, unsigned min, unsigned max) {
        char *end;
        unsigned long n = strtoul(text, &end, 10);

        CHECK(*text && !*end && n >= min && n <= max, "'%s' is not a number from %u to %u", text, min, max);
        return (unsigned)n;
}

static void parse(int argc, char **argv) {
        static const struct option names[] = {
                { "processes", required_argument, NULL, 'p' }, { "mib", required_argument, NULL, 'm' },
                { "duplicate", required_argument, NULL, 'd' }, { "zero", required_argument, NULL, 'z' },
                { "run", required_argument, NULL, 'r' },       { "seed", required_argument, NULL, 's' },
                { "cgroup", required_argument, NULL, 'c' },    { "threads", required_argument, NULL, 't' },
                {},
        };

        for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;)
                switch (c) {
                case 'p': options.processes = number(optarg, 1, PROCESSES_MAX); break;
                case 'm': options.mib = number(optarg, 1, 1 << 16); break;
                case 'd': options.duplicate = number(optarg, 0, 100); break;
                case 'z': options.zero = number(optarg, 0, 100); break;
                case 'r': options.run = number(optarg, 1, 1 << 20); break;
                case 's': options.seed = number(optarg, 0, UINT32_MAX); break;
                case 'c': options.cgroup = optarg; break;
                case 't': options.threads = number(optarg, 1, 1000); break;
                default: exit(2);
                }
        CHECK(options.duplicate + options.zero <= 100, "more than 100 percent");
}

int main(int argc, char **argv) {
        int commands[PROCESSES_MAX][2], answers[PROCESSES_MAX][2];
        pid_t pids[PROCESSES_MAX];
        uint64_t counts[3] = {};
        char line[32];

        parse(argc, argv);
        for (unsigned i = 0; i < options.processes; i++) {
                CHECK(pipe2(commands[i], O_CLOEXEC) == 0 && pipe2(answers[i], O_CLOEXEC) == 0, "pipe");
                pids[i] = fork();
                CHECK(pids[i] >= 0, "fork");
                if (pids[i] == 0)
                        serve(i, commands[i][0], answers[i][1]);
                close(commands[i][0]);
                close(answers[i][1]);
        }
        for (unsigned i = 0; i < options.processes; i++) {
                void *memory;
                CHECK(read(answers[i][0], &memory, sizeof memory) == sizeof memory, "process %d", pids[i]);
                printf("process %d %p %llu\n", pids[i], memory, (unsigned long long)options.mib << 20);
        }
        for (uint64_t page = 0; page < ((uint64_t)options.mib << 20) / PAGE_BYTES; page++)
                counts[kind_of(page)]++;
        printf("ready %llu %llu\n", (unsigned long long)counts[DUPLICATE], (unsigned long long)counts[ZERO]);
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                uint64_t least = UINT64_MAX, sum = 0;

                for (unsigned i = 0; i < options.processes; i++)
                        CHECK(write(commands[i][1], line, 1) == 1, "process %d", pids[i]);
                for (unsigned i = 0; i < options.processes; i++) {
                        uint64_t one;
                        CHECK(read(answers[i][0], &one, sizeof one) == sizeof one, "process %d", pids[i]);
                        least = MIN_OF(least, one);
                        sum += one;
                }
                if (line[0] == 't')
                        printf("ok %lu\n", (unsigned long)(sum / options.processes));
                else
                        puts(least ? "ok" : "bad");
                fflush(stdout);
        }
        for (unsigned i = 0; i < options.processes; i++) {
                kill(pids[i], SIGKILL);
                waitpid(pids[i], NULL, 0);
        }
        return 0;
}
