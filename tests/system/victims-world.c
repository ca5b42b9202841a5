/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include "tests/confine.h"

#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* What happens around a process: children, ends, job control, sandboxes, namespaces, debuggers. */
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif

/* A fork between the mapping of a region and its MADV_DONTFORK, some ten microseconds, takes the region along; the next
 * remote_adopt() of the child removes it. That must stay rare. */
static uint64_t inherited;

static void *fork_thread(void *arg) {
        for (unsigned n = 0; now_nsec() < victim_end_nsec; n++) {
                pid_t child = fork();
                CHECK(child >= 0);
                if (child == 0) {
                        if (victim_has_region())
                                _exit(3);
                        victim_check_memory("child");
                        victim_memory_step();
                        victim_memory_check();
                        if (n % 4 == 0)
                                execl("/bin/true", "true", NULL);
                        _exit(0);
                }
                int status;
                CHECK(waitpid(child, &status, 0) == child);
                if (status == 3 << 8)
                        inherited++;
                else
                        CHECK(status == 0, "child ended with %#x", status);
                victim_rounds++;
                victim_memory_tick();
        }
        return NULL;
}

/* One thread forks while another is the one to be stopped; then the other way round. */
void victim_forkexec(void) {
        pthread_t thread;
        uint64_t end = victim_end_nsec;
        victim_ready();
        victim_end_nsec = now_nsec() + (end - now_nsec()) / 2;
        CHECK(pthread_create(&thread, NULL, fork_thread, NULL) == 0);
        pthread_join(thread, NULL);
        victim_end_nsec = end;
        fork_thread(NULL);
        printf("%lu of %lu children inherited a region\n", inherited, victim_rounds);
        /* A fork between mapping the region and MADV_DONTFORK takes it along: some percent at this pace of stops. */
        CHECK_AS(TEST_FAILED, inherited * 5 <= victim_rounds);
}

void victim_vfork(void) {
        victim_ready();
        while (victim_goes_on()) {
                pid_t child = vfork();
                if (child == 0) {
                        execl("/bin/sleep", "sleep", "0.003", NULL);
                        _exit(127);
                }
                int status;
                CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "child ended with %#x", status);
        }
}

/* The process named ready is replaced by its children, each of which ends in the middle of things. The visitor takes
 * whoever is there; the parent sees every one end as it meant to, at once. */
void victim_exit(void) {
        victim_ready();
        while (victim_goes_on()) {
                pid_t child = fork();
                CHECK(child >= 0);
                if (child == 0) {
                        pthread_t thread;
                        CHECK(pthread_create(&thread, NULL, (void *(*)(void *))(void (*)(void))usleep, (void *)1000) == 0);
                        usleep(500);
                        victim_memory_check();
                        if (getpid() % 3 == 0)
                                execl("/bin/sh", "sh", "-c", "exit 7", NULL);
                        _exit(7);
                }
                int status;
                printf("child %d\n", child);
                fflush(stdout);
                CHECK(waitpid(child, &status, 0) == child);
                CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "child ended with %#x", status);
        }
}

void victim_stopcont(void) {
        pid_t parent = getpid(), teaser = fork();
        CHECK(teaser >= 0);
        if (teaser == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                while (now_nsec() < victim_end_nsec) {
                        usleep(3000);
                        CHECK(kill(parent, SIGSTOP) == 0);
                        for (int i = 0;; i++) {
                                char path[64], text[512];
                                snprintf(path, sizeof path, "/proc/%d/stat", parent);
                                FILE *f = fopen(path, "re");
                                CHECK(f && fgets(text, sizeof text, f));
                                fclose(f);
                                char state = strrchr(text, ')')[2];
                                if (state == 'T')
                                        break;
                                CHECK(i < 2000, "SIGSTOP has no effect: state %c", state);
                                usleep(1000);
                        }
                        usleep(3000);
                        CHECK(kill(parent, SIGCONT) == 0);
                }
                _exit(0);
        }
        victim_ready();
        while (victim_goes_on())
                usleep(300);
        int status;
        CHECK(TEMP_FAILURE_RETRY(waitpid(teaser, &status, 0)) == teaser && status == 0, "teaser ended with %#x", status);
}

static void write_cgroup(const char *dir, const char *file, const char *text) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, file);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), "%s", path);
        close(fd);
}

void victim_frozen(void) {
        /* Below its own cgroup: who manages that manages this one too. */
        static const char *const roots[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
        char dir[512] = "", own[256] = "", line[256], pid[16];
        FILE *f = fopen("/proc/self/cgroup", "re");
        CHECK(f);
        while (fgets(line, sizeof line, f))
                sscanf(line, "0::/%255[^\n]", own);
        fclose(f);
        for (size_t i = 0; i < ELEMENTSOF(roots); i++) {
                snprintf(dir, sizeof dir, "%s/%s/cgroup.procs", roots[i], own);
                if (access(dir, W_OK) == 0) {
                        snprintf(dir, sizeof dir, "%s/%s/frozen-%d", roots[i], own, getpid());
                        break;
                }
                dir[0] = '\0';
        }
        if (!dir[0] || mkdir(dir, 0755) < 0)
                TEST_SKIP("no cgroup v2 to freeze");
        pid_t teaser = fork();
        CHECK(teaser >= 0);
        snprintf(pid, sizeof pid, "%d", getpid());
        if (teaser == 0) {
                while (now_nsec() < victim_end_nsec) {
                        usleep(5000);
                        write_cgroup(dir, "cgroup.freeze", "1");
                        usleep(20000);
                        write_cgroup(dir, "cgroup.freeze", "0");
                }
                _exit(0);
        }
        write_cgroup(dir, "cgroup.procs", pid);
        victim_ready();
        while (victim_goes_on())
                usleep(300);
        int status;
        CHECK(TEMP_FAILURE_RETRY(waitpid(teaser, &status, 0)) == teaser && status == 0, "teaser ended with %#x", status);
        char *slash = strrchr(dir, '/');
        *slash = '\0';
        write_cgroup(dir, "cgroup.procs", pid);
        *slash = '/';
        CHECK(rmdir(dir) == 0);
}

/* What is marked for merging in part is several mappings to the kernel, which mremap() does not grow: EFAULT. C libraries
 * then copy (realloc), and so do we; it is the one thing about marking that a process can see. */
static uint64_t copied;

static char *grow(char *p, size_t from, size_t to) {
        char *grown = mremap(p, from, to, MREMAP_MAYMOVE);
        if (grown != MAP_FAILED)
                return grown;
        CHECK(errno == EFAULT);
        copied++;
        grown = mmap(NULL, to, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(grown != MAP_FAILED);
        memcpy(grown, p, from);
        CHECK(munmap(p, from) == 0);
        return grown;
}

void victim_churn(void) {
        const size_t bytes = 256 * PAGE_BYTES;
        victim_churn_permille = 500;
        victim_ready();
        while (victim_goes_on()) {
                char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                CHECK(p != MAP_FAILED);
                for (size_t i = 0; i < bytes; i += PAGE_BYTES)
                        p[i] = (char)(i >> PAGE_SHIFT);
                CHECK(madvise(p + bytes / 2, bytes / 4, MADV_DONTNEED) == 0);
                CHECK(munmap(p + bytes - bytes / 8, bytes / 8) == 0);
                CHECK(munmap(p + bytes / 4, bytes - bytes / 8 - bytes / 4) == 0);
                p = grow(p, bytes / 4, bytes / 2 + bytes);
                for (size_t i = 0; i < bytes / 4; i += PAGE_BYTES)
                        CHECK(p[i] == (char)(i >> PAGE_SHIFT));
                CHECK(munmap(p, bytes / 2 + bytes) == 0);
        }
        printf("%lu times copied instead of grown\n", copied);
}

/* Allows only what a quiet loop needs. */
void victim_filter(void) {
        static const long allowed[] = {SYS_read, SYS_write, SYS_clock_nanosleep, SYS_restart_syscall, SYS_rt_sigreturn,
                                       SYS_exit_group, SYS_clock_gettime};
        struct sock_filter filter[2 * ELEMENTSOF(allowed) + 2];
        size_t n = 0;
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        for (size_t i = 0; i < ELEMENTSOF(allowed); i++) {
                filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i], 0, 1);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        }
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
        struct sock_fprog program = {.len = (unsigned short)n, .filter = filter};
        victim_ready();
        victim_may_call = false;
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
        struct timespec ts = {.tv_nsec = 500000};
        while (victim_goes_on())
                clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL);
        _exit(0); /* its maps cannot be read from inside any more */
}

/* Answers rt_sigreturn(2) with an error. */
static void refuse_return(void) {
        struct sock_filter filter[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigreturn, 0, 1),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {.len = ELEMENTSOF(filter), .filter = filter};
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

void victim_noreturn(void) {
        refuse_return();
        victim_ready();
        while (victim_goes_on())
                usleep(300);
}

static void *never_return(void *refused) {
        refuse_return();
        *(_Atomic bool *)refused = true;
        for (;;)
                usleep(300);
        return NULL;
}

void victim_noreturn_thread(void) {
        static _Atomic bool refused;
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, never_return, &refused) == 0);
        while (!refused)
                usleep(300);
        victim_ready();
        while (victim_goes_on())
                usleep(300);
}

void victim_container(void) {
        confine_by_filter();
        victim_ready();
        while (victim_goes_on())
                usleep(300);
}

void victim_strict(void) {
        int fds[2];
        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        pid_t feeder = fork();
        CHECK(feeder >= 0);
        if (feeder == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                while (now_nsec() < victim_end_nsec) {
                        usleep(1000);
                        CHECK(write(fds[1], "x", 1) == 1);
                }
                CHECK(write(fds[1], "e", 1) == 1);
                _exit(0);
        }
        victim_may_call = false;
        victim_ready();
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) == 0);
        for (char byte = 'x'; byte == 'x'; victim_memory_step())
                if (syscall(SYS_read, fds[0], &byte, 1) != 1)
                        syscall(SYS_exit, 1);
        victim_memory_check();
        syscall(SYS_exit, 0);
}

void victim_mdwe(void) {
        if (prctl(PR_SET_MDWE, 1, 0, 0, 0) < 0)
                TEST_SKIP("no PR_SET_MDWE (6.3)");
        CHECK(mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
        victim_ready();
        while (victim_goes_on())
                usleep(500);
}

/* Runs in a child that is the first process of its own namespaces; the visitor is told of that child. */
void victim_namespaces(void) {
        int pipe_fds[2];
        CHECK(pipe2(pipe_fds, O_CLOEXEC) == 0);
        if (unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID) < 0)
                TEST_SKIP("unshare: %s", strerror(errno));
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                CHECK(getpid() == 1);
                while (victim_goes_on())
                        usleep(500);
                _exit(0);
        }
        printf("child %d\n", child);
        victim_ready();
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0, "child ended with %#x", status);
}

/* Another user than the visitor, with nothing it may do but what everybody may. */
void victim_nobody(void) {
        CHECK(setgroups(0, NULL) == 0 && setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0);
        CHECK(prctl(PR_SET_DUMPABLE, 1) == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
        victim_ready();
        while (victim_goes_on())
                usleep(500);
}

/* A child traced by us, as by a debugger: its stops are ours, and only ours. */
void victim_traced(void) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                CHECK(ptrace(PTRACE_TRACEME, 0, 0, 0) == 0);
                for (;;) {
                        raise(SIGUSR1);
                        usleep(1000);
                }
        }
        for (bool told = false; victim_goes_on();) {
                int status;
                CHECK(waitpid(child, &status, 0) == child);
                CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGUSR1 && status >> 16 == 0, "a strange stop: %#x", status);
                if (!told) { /* not before it is traced: until then it may well be called */
                        printf("child %d\n", child);
                        victim_ready();
                        told = true;
                }
                CHECK(ptrace(PTRACE_CONT, child, 0, 0) == 0);
        }
        kill(child, SIGKILL);
        CHECK(waitpid(child, NULL, 0) == child);
}

/* A program from beside ours, which the visitor is told of. */
static pid_t start_other(const char *name, int output) {
        char path[4096];
        ssize_t n = readlink("/proc/self/exe", path, sizeof path - 16);
        CHECK(n > 0);
        path[n] = '\0';
        strcpy(strrchr(path, '/') + 1, name);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                dup2(output, STDOUT_FILENO);
                execl(path, name, NULL);
                _exit(127);
        }
        usleep(100000);
        printf("child %d\n", child);
        return child;
}

static void end_other(pid_t child) {
        CHECK(waitpid(child, NULL, WNOHANG) == 0, "it ended");
        kill(child, SIGKILL);
        CHECK(waitpid(child, NULL, 0) == child);
}

/* Nothing of it can be borrowed: it has to be refused, and goes on. */
void victim_bare(void) {
        pid_t child = start_other("victim-bare", STDOUT_FILENO);
        victim_ready();
        while (victim_goes_on())
                usleep(1000);
        end_other(child);
}

/* Its threads execute it anew; whoever is left standing, or waits for somebody, says nothing any more. */
void victim_execs(void) {
        int fds[2];
        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        pid_t child = start_other("victim-execs", fds[1]);
        struct pollfd said = {.fd = fds[0], .events = POLLIN};
        victim_ready();
        while (victim_goes_on()) {
                char bytes[64];
                bool goes_on = poll(&said, 1, 4000) == 1;
                int status = 0;
                if (!goes_on && waitpid(child, &status, WNOHANG) == 0)
                        kill(child, SIGKILL); /* its visitor may wait for it, too */
                CHECK(goes_on, "it does not go on (ended with %#x)", status);
                CHECK(read(fds[0], bytes, sizeof bytes) > 0);
        }
        end_other(child);
}
