/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Promises: the BPF iterator task_vma gives the mappings that maps shows, with the bits that smaps shows as VmFlags; in each
 * execve(2) the count of programs grows. And what is made of it (src/target/vma-reader.c): the same list as from smaps, for
 * every kind of mapping that can be made, for every process here; none at all when the program, the process or its number
 * changed in between; and smaps wherever a bit was not learnt.
 *
 * With an argument it is a control, of a build that leaves out (VMA_LEAVE_OUT) what the named test is about.
 */
#include "../test.h"

#include "vmas-compare.h"

#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define PLACE ((char *)0x100000000000)
#define MANY 60000U
#define CHURN_READS 300U
/* struct clone_args, 5.5 */
#define CLONE_ARGS_WORDS 11
#define CLONE_ARGS_EXIT_SIGNAL 4
#define CLONE_ARGS_SET_TID 8

static Probes *probes;
static VmaReader reader;

/* --- what happens while mappings are read --- */

static enum { NEVER, BEFORE_MAPS, AFTER_MAPS } armed;
static void (*happen)(void);
static unsigned n_opened;

int __real_openat64(int directory, const char *path, int flags, mode_t mode);
int __wrap_openat64(int directory, const char *path, int flags, mode_t mode);
int __wrap_openat64(int directory, const char *path, int flags, mode_t mode) {
        int fd;

        if (strcmp(path, "maps") == 0 && armed == BEFORE_MAPS) {
                armed = NEVER;
                happen();
        }
        fd = __real_openat64(directory, path, flags, mode);
        if (strcmp(path, "maps") == 0 && armed == AFTER_MAPS) {
                armed = NEVER;
                happen();
        }
        n_opened += strcmp(path, "maps") == 0;
        return fd;
}

/* --- processes --- */

typedef struct Victim {
        pid_t pid;
        int say, hear;          /* our ends */
        Target *target;
} Victim;

static void hear(const Victim *v) {
        char c;

        CHECK(read(v->hear, &c, 1) == 1, "the victim is gone");
}

static void say(const Victim *v) { CHECK(write(v->say, "x", 1) == 1); }

static void open_target(Victim *v) {
        CHECK(target_new(v->pid, &v->target) == 0);
        v->target->vma_reader = &reader;
}

/* main: what the child does, with its ends as standard input and output; it says when it is ready. */
static Victim begin(void (*child)(void)) {
        int to[2], from[2];
        Victim v = {};

        CHECK(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0);
        v.pid = fork();
        CHECK(v.pid >= 0);
        if (v.pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                dup2(to[0], STDIN_FILENO);
                dup2(from[1], STDOUT_FILENO);
                child();
                _exit(1);
        }
        close(to[0]);
        close(from[1]);
        v.say = to[1];
        v.hear = from[0];
        hear(&v);
        open_target(&v);
        return v;
}

static void end(Victim *v) {
        kill(v->pid, SIGKILL);
        waitpid(v->pid, NULL, __WALL);
        close(v->say);
        close(v->hear);
        v->target = target_free(v->target);
}

static void ready(void) { CHECK(write(STDOUT_FILENO, "x", 1) == 1); }

static bool await(void) {
        char c;

        return read(STDIN_FILENO, &c, 1) == 1;
}

static char *map_at(char *place, int protection) {
        char *p = mmap(place, BLOCK_BYTES, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

        CHECK(p == place, "mmap");
        return p;
}

/* --- the same as smaps --- */

/* Reads both; whoever changes meanwhile is read again. false: it never was the same twice, or cannot be read. */
static bool compare(Target *target, unsigned tries, const char *what) {
        for (unsigned try = 0; try < tries; try++) {
                _cleanup_(vma_list_done) VmaList list = {}, smaps = {};
                uint64_t before, after;
                const char *difference;
                const Vma *vma;
                int r;

                if (target_maps_fingerprint(target, &before) != 0)
                        return false;
                r = vma_reader_read(&reader, target, try % 2, &list);
                if (target_read_vmas(target, try % 2, &smaps) != 0 || target_maps_fingerprint(target, &after) != 0)
                        return false;
                if (r != 0 || before != after) {
                        CHECK(r >= 0 && r != VMA_E_UNSURE, "%s: %d", what, r);
                        continue;
                }
                difference = vmas_differ(&list, &smaps, &vma);
                CHECK(!difference, "%s: %s of %llx", what, difference, (unsigned long long)vma->start);
                return true;
        }
        return false;
}

static void test_examples(void) {
        _cleanup_(target_freep) Target *target = NULL;
        pid_t pid;

        CHECK(vma_examples_begin(&pid) == 0);
        CHECK(target_new(pid, &target) == 0);
        CHECK(compare(target, 1, "examples") && compare(target, 2, "examples"));
        vma_examples_end(pid);
        CHECK(!compare(target, 1, "ended"));
}

static void test_all_processes(void) {
        DIR *proc = opendir("/proc");
        unsigned n = 0, n_same = 0;

        CHECK(proc);
        for (const struct dirent *entry; (entry = readdir(proc));) {
                _cleanup_(target_freep) Target *target = NULL;

                if (atoi(entry->d_name) <= 0 || target_new(atoi(entry->d_name), &target) != 0)
                        continue;
                n++;
                n_same += compare(target, 4, target->comm);
        }
        closedir(proc);
        printf("%u processes, of %u both are the same\n", n, n_same);
        CHECK(n_same > 2);
}

static void many(void) {
        char *p = mmap(NULL, MANY * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(p != MAP_FAILED);
        for (size_t i = 0; i < MANY; i += 2)
                CHECK(mprotect(p + i * PAGE_BYTES, PAGE_BYTES, i % 4 ? PROT_READ : PROT_NONE) == 0);
        for (size_t i = 1; i < MANY; i += 6)
                p[i * PAGE_BYTES] = 1;
        ready();
        await();
}

static void test_many(void) {
        _cleanup_(vma_list_done) VmaList list = {}, smaps = {};
        Victim v = begin(many);
        uint64_t since = now_nsec(), half;

        CHECK(target_read_vma_flags(v.target, false, &list) == 0);
        half = now_nsec();
        CHECK(target_read_vmas(v.target, false, &smaps) == 0);
        printf("%zu mappings: %llu us, smaps %llu us\n", list.n, (unsigned long long)(half - since) / 1000,
               (unsigned long long)(now_nsec() - half) / 1000);
        CHECK(list.n > MANY && list.uncounted);
        CHECK(compare(v.target, 2, "many"));
        end(&v);
}

/* --- a bit that was not learnt --- */

static void map_secrets(void) {
        CHECK(syscall(SYS_mlock, map_at(PLACE, PROT_READ | PROT_WRITE), BLOCK_BYTES) == 0);
        CHECK(madvise(map_at(PLACE + 2 * BLOCK_BYTES, PROT_READ | PROT_WRITE), BLOCK_BYTES, MADV_DONTDUMP) == 0);
}

static void locked(void) {
        map_secrets();
        ready();
        await();
}

static VmaSkip skip_at(const VmaList *list, const char *place) {
        const Vma *vma = vma_list_find(list, (uintptr_t)place);

        CHECK(vma);
        return vma->skip;
}

static void test_forgotten(void) {
        const VmaBits all = reader.bits;
        Victim v = begin(locked);
        uint64_t unsure = reader.n_unsure;
        unsigned n_needed = 0;

        CHECK(compare(v.target, 1, "locked"));
        for (unsigned bit = 0; bit < 64; bit++) {
                _cleanup_(vma_list_done) VmaList list = {}, smaps = {};

                if (!(all.known >> bit & 1))
                        continue;
                reader.bits.known = all.known & ~((uint64_t)1 << bit);
                CHECK(target_read_vma_flags(v.target, false, &list) == 0 && target_read_vmas(v.target, false, &smaps) == 0);
                CHECK(list.n == smaps.n);
                for (size_t i = 0; i < list.n; i++)
                        CHECK_HARMLESS(list.vmas[i].skip == smaps.vmas[i].skip || smaps.vmas[i].skip == VMA_SKIP_DEVICE,
                                       "bit %u forgotten: %llx is %s, and %s in smaps", bit, (unsigned long long)list.vmas[i].start,
                                       vma_skip_name(list.vmas[i].skip), vma_skip_name(smaps.vmas[i].skip));
                CHECK(skip_at(&list, PLACE) == VMA_SKIP_LOCKED && skip_at(&list, PLACE + 2 * BLOCK_BYTES) == VMA_SKIP_DONTDUMP);
                n_needed += !list.uncounted;
        }
        reader.bits = all;
        printf("%d bits learnt, %u of them needed for a simple process\n", __builtin_popcountll(all.known), n_needed);
        CHECK(n_needed >= 8 && reader.n_unsure - unsure == n_needed);
        CHECK(compare(v.target, 1, "locked"));
        end(&v);
}

/* --- another program, none, another process --- */

/* Two programs that look the same in maps: one has at PLACE what may be read, the other what may not. */
static int program(const char *kind) {
        map_at(PLACE, PROT_READ | PROT_WRITE);
        if (strcmp(kind, "secret") == 0)
                CHECK(syscall(SYS_mlock, PLACE, BLOCK_BYTES) == 0);
        PLACE[0] = 1;
        ready();
        if (!await())
                return 1;
        execl("/proc/self/exe", "program", strcmp(kind, "secret") == 0 ? "public" : "secret", NULL);
        return 1;
}

static void run_program(void) {
        CHECK(personality(ADDR_NO_RANDOMIZE) >= 0);
        execl("/proc/self/exe", "program", "public", NULL);
}

static Victim victim;

static void do_exec(void) {
        say(&victim);
        hear(&victim);
}

static void do_exit(void) {
        kill(victim.pid, SIGKILL);
        CHECK(waitpid(victim.pid, NULL, 0) == victim.pid);
}

/* Another process gets the number. */
static void do_reuse(void) {
        uint64_t args[CLONE_ARGS_WORDS] = { [CLONE_ARGS_EXIT_SIGNAL] = SIGCHLD };
        pid_t tid = victim.pid;
        long r;

        do_exit();
        args[CLONE_ARGS_SET_TID] = (uintptr_t)&tid;
        args[CLONE_ARGS_SET_TID + 1] = 1;
        r = syscall(SYS_clone3, args, sizeof args);
        if (r == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (;;)
                        pause();
        }
        CHECK(r == tid, "the number cannot be had again");
}

static int read_while(int when, void (*what)(void), VmaList *ret) {
        int r;

        armed = when;
        happen = what;
        n_opened = 0;
        r = vma_reader_read(&reader, victim.target, false, ret);
        CHECK(armed == NEVER && n_opened == 1, "nothing happened");
        return r;
}

static void test_exec(int when) {
        _cleanup_(vma_list_done) VmaList list = {}, again = {};
        int r;

        victim = begin(run_program);
        CHECK(compare(victim.target, 1, "public"));
        r = read_while(when, do_exec, &list);
        CHECK_HARMLESS(r == VMA_E_CHANGED, "%d: %s is what may not be read", r,
                       r == 0 ? vma_skip_name(skip_at(&list, PLACE)) : "nothing");
        armed = when;
        CHECK(target_read_vma_flags(victim.target, false, &again) == 0);
        CHECK(skip_at(&again, PLACE) == VMA_OK); /* which by now is public again */
        CHECK(again.uncounted && compare(victim.target, 1, "public"));
        end(&victim);
}

static void test_end(int when, void (*what)(void)) {
        VmaList list = {};

        victim = begin(run_program);
        CHECK(read_while(when, what, &list) != 0);
        CHECK(target_read_vma_flags(victim.target, false, &list) == TARGET_E_GONE);
        end(&victim);
}

/* --- who maps and unmaps all the time --- */

static void churning(void) {
        map_secrets();
        ready();
        for (unsigned i = 0;; i++) {
                char *p = mmap(NULL, (1 + i % 5) * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

                usleep(i % 64 ? 0 : 2000);
                munmap(p, (1 + i % 5) * PAGE_BYTES);
        }
}

static void test_churn(void) {
        Victim v = begin(churning);
        uint64_t read_before = reader.n_read, changed_before = reader.n_changed;

        for (unsigned i = 0; i < CHURN_READS; i++) {
                _cleanup_(vma_list_done) VmaList list = {};

                CHECK(target_read_vma_flags(v.target, false, &list) == 0);
                CHECK(skip_at(&list, PLACE) == VMA_SKIP_LOCKED && skip_at(&list, PLACE + 2 * BLOCK_BYTES) == VMA_SKIP_DONTDUMP);
        }
        printf("of a process that maps all the time: read %llu times, changed meanwhile %llu\n",
               (unsigned long long)(reader.n_read - read_before), (unsigned long long)(reader.n_changed - changed_before));
        end(&v);
}

int main(int argc, char **argv) {
        ProbeOptions options = { .typed_only = true, .memory_bytes = (uint64_t)1 << 30 };
        const char *control = argc > 1 ? argv[1] : "";

        if (strcmp(argv[0], "program") == 0)
                return program(argv[1]);
        test_need_root();
        setvbuf(stdout, NULL, _IOLBF, 0);
        CHECK(probes_new(&options, &probes) == 0, "probes");
        if (!probes_have(probes, PROBE_VMAS))
                TEST_SKIP("no such probe here: %s", probe_error_name(probes_state(probes, PROBE_VMAS).error));
        vma_reader_open(&reader, probes, true);
        CHECK(probes_have(probes, PROBE_VMAS), "%s", probe_error_name(probes_state(probes, PROBE_VMAS).error));
        if (strcmp(control, "forgotten") != 0 && strcmp(control, "exec") != 0) {
                test_examples();
                test_all_processes();
                test_many();
                test_end(BEFORE_MAPS, do_exit);
                test_end(AFTER_MAPS, do_exit);
                test_end(BEFORE_MAPS, do_reuse);
                test_end(AFTER_MAPS, do_reuse);
                test_exec(AFTER_MAPS);
                test_churn();
        }
        if (strcmp(control, "exec") != 0)
                test_forgotten();
        if (strcmp(control, "forgotten") != 0)
                test_exec(BEFORE_MAPS);
        vma_reader_close(&reader);
        probes_free(probes);
        return 0;
}
