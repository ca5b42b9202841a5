/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Promises: a pidfd and an open directory of /proc stay bound to their process when its pid is given to another; a
 * signal 0 through a pidfd fails once the process was reaped (pidfd_open(2), pidfd_send_signal(2), Linux 5.3).
 *
 * A pid is reused on purpose (/proc/sys/kernel/ns_last_pid, in a pid namespace of the test's own): after target_new(),
 * and also right in the middle of it, which is why target.c is compiled in here with its open(2) wrapped. The negative
 * control takes out the check that makes the middle safe.
 */
#include "../test.h"

#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static int (*before_open)(void);
static bool without_check;

static int wrapped_open(const char *path, int flags) {
        if (before_open)
                CHECK(before_open() == 0);
        before_open = NULL;
        return open(path, flags);
}

static long wrapped_syscall(long nr, long a, long b, long c, long d) {
        if (without_check && nr == SYS_pidfd_send_signal)
                return 0;
        return syscall(nr, a, b, c, d);
}

#define FIRST_4(a, b, c, d, ...) (long)(a), (long)(b), (long)(c), (long)(d)
#define open(path, flags) wrapped_open(path, flags)
#define syscall(nr, ...) wrapped_syscall(nr, FIRST_4(__VA_ARGS__, 0, 0, 0))
#include "../../src/target/target.c"
#undef open
#undef syscall

static volatile char *marker; /* at the same address in all of them */
static pid_t victim;

static void set_last_pid(pid_t pid) {
        char text[16];

        snprintf(text, sizeof text, "%d", pid);
        CHECK(write_text(AT_FDCWD, "/proc/sys/kernel/ns_last_pid", text) == 0, "ns_last_pid");
}

/* A child called and marked name, with the given pid unless 0. */
static pid_t spawn(const char *name, pid_t want) {
        int ready[2];
        pid_t pid;
        char c;

        CHECK(pipe(ready) == 0);
        if (want)
                set_last_pid(want - 1);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                prctl(PR_SET_NAME, name);
                *marker = name[0];
                CHECK(write(ready[1], "x", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(!want || pid == want, "pid %d, wanted %d", pid, want);
        close(ready[1]);
        CHECK(read(ready[0], &c, 1) == 1);
        close(ready[0]);
        return pid;
}

static void end(pid_t pid) {
        CHECK(kill(pid, SIGKILL) == 0);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

static int reuse_victim(void) {
        end(victim);
        CHECK(spawn("new", victim) == victim);
        return 0;
}

static char read_marker(int memfd) {
        char c = 0;

        return pread(memfd, &c, 1, (off_t)(uintptr_t)marker) == 1 ? c : 0;
}

static void test_reuse_afterwards(void) {
        _cleanup_(target_freep) Target *old = NULL, *new = NULL;
        TargetSkip skip;
        VmaList vmas;
        char path[32];
        bool ask;
        int fd;

        victim = spawn("old", 0);
        CHECK(target_new(victim, &old) == 0);
        CHECK(strcmp(old->comm, "old") == 0, "%s", old->comm);
        CHECK(target_open_memory(old) == 0);
        CHECK(target_alive(old) && read_marker(old->memfd) == 'o');
        CHECK(reuse_victim() == 0);

        /* The number does lead to the other one: what follows is worth something. */
        snprintf(path, sizeof path, "/proc/%d/mem", victim);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0 && read_marker(fd) == 'n');
        close(fd);

        CHECK(!target_alive(old));
        CHECK(read_marker(old->memfd) == 0);
        CHECK(target_inspect(old, 0, &skip, &ask) == TARGET_E_GONE);
        CHECK(target_read_vmas(old, false, &vmas) == TARGET_E_GONE);
        CHECK(target_open_memory(old) == TARGET_E_GONE);
        CHECK(target_new(victim, &new) == 0 && strcmp(new->comm, "new") == 0);
        CHECK(target_alive(new));
        end(victim);
        CHECK(!target_alive(new));
}

static void test_reuse_in_the_middle(bool negative_control) {
        _cleanup_(target_freep) Target *target = NULL;
        int r;

        victim = spawn("old", 0);
        before_open = reuse_victim;
        without_check = negative_control;
        r = target_new(victim, &target);
        without_check = false;
        if (negative_control)
                CHECK(r == 0 && strcmp(target->comm, "new") == 0 && !target_alive(target), "the control: %d", r);
        else
                CHECK(r == TARGET_E_GONE && !target, "%d", r);
        end(victim);
}

/* A zombie holds its number: it is told as what it is until it is reaped. */
static void test_zombie(void) {
        _cleanup_(target_freep) Target *target = NULL, *again = NULL;
        TargetSkip skip = TARGET_OK;
        siginfo_t info;
        VmaList vmas;
        bool ask;

        victim = spawn("old", 0);
        CHECK(kill(victim, SIGKILL) == 0);
        CHECK(waitid(P_PID, (id_t)victim, &info, WEXITED | WNOWAIT) == 0);
        CHECK(target_new(victim, &target) == 0);
        CHECK(!target_alive(target));
        CHECK(target_inspect(target, 0, &skip, &ask) == 0 && skip == TARGET_SKIP_ZOMBIE, "%s", target_skip_name(skip));
        CHECK(target_read_vmas(target, false, &vmas) == TARGET_E_GONE);
        CHECK(waitpid(victim, NULL, 0) == victim);
        CHECK(target_inspect(target, 0, &skip, &ask) == TARGET_E_GONE);
        CHECK(target_new(victim, &again) == TARGET_E_GONE);
}

/* After execve(2) the memory descriptors show neither the old program nor the new one. */
static void test_exec(void) {
        _cleanup_(target_freep) Target *target = NULL;
        VmaList vmas;
        uint64_t entry;
        int go[2];
        char c;
        pid_t pid;

        CHECK(pipe2(go, O_CLOEXEC) == 0);
        pid = fork();
        if (pid == 0) {
                *marker = 'o';
                if (read(go[0], &c, 1) == 1)
                        execl("/bin/sleep", "sleep", "1000", NULL);
                _exit(1);
        }
        close(go[0]);
        CHECK(target_new(pid, &target) == 0 && target_open_memory(target) == 0);
        while (read_marker(target->memfd) != 'o')
                usleep(1000);
        CHECK(write(go[1], "x", 1) == 1);
        close(go[1]);
        for (;;) { /* until it is sleep's memory that smaps shows */
                const Vma *vma;

                CHECK(target_read_vmas(target, false, &vmas) == 0);
                vma = vma_list_find(&vmas, (uintptr_t)marker);
                vma_list_done(&vmas);
                if (!vma)
                        break;
                usleep(1000);
        }
        CHECK(target_alive(target));
        usleep(20000); /* the old memory goes a moment after the new one came */
        CHECK(pread(target->memfd, &c, 1, (off_t)(uintptr_t)marker) <= 0);
        CHECK(pread(target->pagemapfd, &entry, sizeof entry, 0) <= 0);
        CHECK(target_open_memory(target) == 0);
        end(pid);
}

/* With its own user, pid and mount namespaces, and an empty /proc: from outside it is a process like others. */
static void test_other_namespaces(void) {
        _cleanup_(target_freep) Target *target = NULL;
        TargetSkip skip = TARGET_OK;
        int ready[2];
        VmaList vmas;
        bool ask;
        char c;
        pid_t pid;

        CHECK(pipe(ready) == 0);
        pid = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0);
        if (pid < 0)
                TEST_SKIP("no user namespaces");
        if (pid == 0) {
                *marker = 'i';
                CHECK(write(ready[1], mount("none", "/proc", "tmpfs", 0, NULL) == 0 ? "x" : "-", 1) == 1);
                for (;;)
                        pause();
        }
        CHECK(read(ready[0], &c, 1) == 1);
        CHECK(target_new(pid, &target) == 0);
        CHECK(target_inspect(target, 0, &skip, &ask) == 0);
        CHECK(skip == TARGET_SKIP_SELF, "%s", target_skip_name(skip)); /* the same program as this one */
        CHECK(target_read_vmas(target, false, &vmas) == 0);
        CHECK(vma_list_find(&vmas, (uintptr_t)marker) != NULL);
        vma_list_done(&vmas);
        CHECK(target_open_memory(target) == 0 && read_marker(target->memfd) == 'i');
        end(pid);
        CHECK(!target_alive(target));
}

static void test_no_process(void) {
        Target *target = NULL;

        CHECK(target_new(4000000, &target) == TARGET_E_GONE && !target);
        CHECK(target_free(NULL) == NULL);
}

static void inside(void) {
        CHECK(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0);
        CHECK(mount("proc", "/proc", "proc", 0, NULL) == 0);
        if (access("/proc/sys/kernel/ns_last_pid", W_OK) < 0)
                TEST_SKIP("no ns_last_pid (CONFIG_CHECKPOINT_RESTORE)");
        test_reuse_afterwards();
        test_reuse_in_the_middle(false);
        test_reuse_in_the_middle(true);
        test_zombie();
        test_exec();
        test_other_namespaces();
        test_no_process();
}

int main(void) {
        int status;
        pid_t pid;

        test_need_root();
        marker = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(marker != MAP_FAILED);
        if (unshare(CLONE_NEWPID | CLONE_NEWNS) < 0)
                TEST_SKIP("no pid namespaces");
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                inside();
                _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status), "status %#x", status);
        _exit(WEXITSTATUS(status)); /* exit(3)'s leak check wants to fork, into a pid namespace without init */
}
