/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include <dirent.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>

uint64_t victim_end_nsec, victim_rounds, victim_eintrs;
bool victim_tolerates_eintr;
int victim_failed = TEST_FAILED;

static const Victim victims[] = {
        {"eintr", victim_eintr, "dies of EINTR and of timeouts that come early"},
        {"registers", victim_registers, "all registers, flags, red zone, vector and x87 state"},
        {"rseq", victim_rseq, "per-CPU counters kept by restartable sequences add up"},
        {"sigtrap", victim_sigtrap, "SIGTRAP stays blocked and ignored"},
        {"signals", victim_signals, "queued signals arrive once each and in order"},
        {"threads64", victim_threads64, "64 busy threads"},
        {"forkexec", victim_forkexec, "children inherit nothing foreign"},
        {"vfork", victim_vfork, "vfork in a loop"},
        {"exit", victim_exit, "processes that end at any moment"},
        {"stopcont", victim_stopcont, "job control works as ever"},
        {"frozen", victim_frozen, "its cgroup is frozen and thawed"},
        {"churn", victim_churn, "munmap, mremap, MADV_DONTNEED"},
        {"files", victim_files, "descriptors have the numbers they must have"},
        {"closer", victim_closer, "a thread closes what it does not know"},
        {"container", victim_container, "a seccomp filter that refuses userfaultfd(2)"},
        {"filter", victim_filter, "a seccomp filter that kills on what it does not know"},
        {"noreturn", victim_noreturn, "a seccomp filter that refuses rt_sigreturn(2)"},
        {"noreturn-thread", victim_noreturn_thread, "the same, of another thread"},
        {"strict", victim_strict, "seccomp strict mode"},
        {"mdwe", victim_mdwe, "PR_SET_MDWE: no memory writable and executable"},
        {"namespaces", victim_namespaces, "other pid, mount and user namespaces"},
        {"nobody", victim_nobody, "another user, without privileges"},
        {"bare", victim_bare, "a static program without a C library"},
        {"execs", victim_execs, "threads execute it anew, again and again"},
        {"traced", victim_traced, "a debugger is attached"},
};

static unsigned long open_fds_before;
static char *own_range;
#define OWN_BYTES (64 * PAGE_BYTES)

static unsigned long count_fds(void) {
        DIR *dir = opendir("/proc/self/fd");
        unsigned long n = 0;
        if (!dir)
                return 0;
        while (readdir(dir))
                n++;
        closedir(dir);
        return n;
}

bool victim_has_region(void) {
        unsigned char resident;
        for (uint64_t slot = 0; slot < 16; slot++) /* mincore() fails on what is not mapped */
                if (mincore((void *)(0x6b736d640000 + slot * 0x100000), PAGE_BYTES, &resident) == 0)
                        return true;
        return false;
}

void victim_check_memory(const char *who) {
        FILE *f = fopen("/proc/self/maps", "re");
        char line[512];
        CHECK(f, "%s", who);
        while (fgets(line, sizeof line, f)) {
                uint64_t start, end, inode;
                char perms[5];
                CHECK(sscanf(line, "%lx-%lx %4s %*x %*s %lu", &start, &end, perms, &inode) == 4);
                bool foreign = start >> 28 == 0x6b736 || (perms[2] == 'x' && !inode && !strchr(line, '['));
                CHECK(!foreign, "%s: a foreign mapping: %s", who, line);
        }
        fclose(f);
}

void victim_ready(void) {
        open_fds_before = count_fds();
        printf("ready %p %lu\n", (void *)own_range, OWN_BYTES);
        fflush(stdout);
        victim_failed = TEST_NOTICED;
}

int main(int argc, char **argv) {
        if (argc != 3) {
                for (size_t i = 0; i < ELEMENTSOF(victims); i++)
                        printf("%-12s %s\n", victims[i].kind, victims[i].what);
                return argc == 1 ? 0 : 2;
        }
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        victim_tolerates_eintr = getenv("VICTIM_TOLERATES_EINTR");
        victim_end_nsec = now_nsec() + (uint64_t)(atof(argv[2]) * 1e9);
        own_range = mmap(NULL, OWN_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(own_range != MAP_FAILED);
        for (uint64_t i = 0; i < OWN_BYTES; i++)
                own_range[i] = (char)(i * 7 + i / PAGE_BYTES);
        victim_memory_new();
        for (size_t i = 0; i < ELEMENTSOF(victims); i++) {
                if (strcmp(victims[i].kind, argv[1]) != 0)
                        continue;
                victims[i].run();
                for (uint64_t n = 0; n < OWN_BYTES; n++)
                        CHECK(own_range[n] == (char)(n * 7 + n / PAGE_BYTES), "byte %lu", n);
                victim_memory_check();
                victim_check_memory(argv[1]);
                CHECK(count_fds() == open_fds_before, "descriptors: %lu, were %lu", count_fds(), open_fds_before);
                printf("%s: %lu rounds, %lu eintr\n", argv[1], victim_rounds, victim_eintrs);
                victim_memory_report();
                return 0;
        }
        fprintf(stderr, "no such kind: %s\n", argv[1]);
        return 2;
}
