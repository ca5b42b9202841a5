/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"
#include "tests/test.h"

#include <pthread.h>
#include <signal.h>
#include <sys/fanotify.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * Targets that could keep us waiting. One makes the instruction that we borrow a loop, right before we take our region away
 * by it: it is waited for once, the target goes on, and the next visit finds everything as it was. In one a thread
 * executes a file that somebody does not let it read: it is given up, until that thread gets on. Built with the remote
 * sources of its own (REMOTE_TEST), whose steps tell when.
 */
#define ONE_WAIT_NSEC (REMOTE_STEP_NSEC + REMOTE_STEP_NSEC / 2)

unsigned remote_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static int memfd, ready[2];
static RemoteCode code;
static unsigned tries;
static uint8_t before[2];

void remote_test_step(RemoteStep step) {
        if (step == REMOTE_STEP_UNMAP_REGS && tries++ == 0)
                CHECK(pread(memfd, before, sizeof before, (off_t)code.call) == sizeof before &&
                      pwrite(memfd, "\xeb\xfe", 2, (off_t)code.call) == 2);
}

static void call_when_possible(Remote *remote, Target *target) {
        RemoteCall call = { .nr = SYS_getppid };
        size_t done;
        int r = REMOTE_E_BUSY;

        for (int i = 0; i < 1000 && r == REMOTE_E_BUSY; i++, usleep(1000))
                r = remote_call(remote, target, &call, 1, &done);
        CHECK(r == 0 && call.ret == getpid(), "%s", remote_error_name(r));
}

static void test_loop(void) {
        _cleanup_(remote_freep) Remote *remote = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        RemoteCall call = { .nr = SYS_getppid };
        char path[64];
        size_t done;
        uint64_t *rounds = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

        CHECK(rounds != MAP_FAILED);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (;; ++*rounds)
                        usleep(1000);
        }
        snprintf(path, sizeof path, "/proc/%d/mem", pid);
        CHECK((memfd = open(path, O_RDWR | O_CLOEXEC)) >= 0);
        CHECK(remote_new(&remote) == 0 && target_new(pid, &target) == 0);
        CHECK(remote_code_find(target, memfd, &code) == 0);

        for (int r = REMOTE_E_BUSY; tries == 0;)
                CHECK((r = remote_call(remote, target, &call, 1, &done)) >= 0, "%s", strerror(-r));
        uint64_t begun = now_nsec(), busy = 0;
        while (remote_has_lingering(remote)) {
                uint64_t now = now_nsec();
                remote_reap(remote);
                busy = MAX_OF(busy, now_nsec() - now);
                CHECK(now - begun < 10 * ONE_WAIT_NSEC, "it is never let go: %u tries", tries);
                usleep(1000);
        }
        CHECK(tries == 1, "%u tries", tries);
        CHECK(pwrite(memfd, before, sizeof before, (off_t)code.call) == sizeof before);
        printf("let go after %lu ms, of which %lu in one piece\n", (now_nsec() - begun) / NSEC_PER_MSEC, busy / NSEC_PER_MSEC);
        uint64_t seen = *(volatile uint64_t *)rounds;
        for (int i = 0; i < 1000 && *(volatile uint64_t *)rounds == seen; i++)
                usleep(10000);
        CHECK(*(volatile uint64_t *)rounds > seen && target_alive(target), "it does not go on");

        call_when_possible(remote, target);
        _cleanup_(remote_maps_done) RemoteMaps maps = { .fd = -EBADF };
        CHECK(remote_maps_read(target, &maps) == 0);
        for (size_t i = 0; i < maps.n; i++)
                CHECK(!remote_region_has(maps.maps[i].start), "a region was left behind");
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

/* This program once more, which says that it runs, and does nothing. */
static void copy_program(char *path) {
        int in = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), out = mkostemp(path, O_CLOEXEC);

        CHECK(in >= 0 && out >= 0 && fchmod(out, 0700) == 0);
        for (ssize_t n; (n = sendfile(out, in, NULL, 1 << 20)) != 0;)
                CHECK(n > 0);
        close(in);
        close(out);
}

static void *execute(void *path) {
        char number[16];

        snprintf(number, sizeof number, "%d", ready[1]);
        execl(path, path, number, NULL);
        _exit(1);
}

/* One thread sleeps, the other executes that. */
static pid_t start_executing(char *path, int monitor) {
        pthread_t thread;
        pid_t pid = fork();

        CHECK(pid >= 0);
        if (pid > 0)
                return pid;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(monitor);
        CHECK(pthread_create(&thread, NULL, execute, path) == 0);
        for (;;)
                pause();
}

/* Without the safeguard: nothing but a death ends it. */
static void check_hangs(Target *target) {
        int status;
        pid_t pid = fork();

        CHECK(pid >= 0);
        if (pid == 0) {
                RemoteCall call = { .nr = SYS_getppid };
                Remote *remote;
                size_t done;

                prctl(PR_SET_PDEATHSIG, SIGKILL);
                remote_test_leave_out = REMOTE_GUARD_COLLECT;
                CHECK(remote_new(&remote) == 0);
                alarm(1);
                (void)remote_call(remote, target, &call, 1, &done);
                _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM, "it came back: %x",
              (unsigned)status);
}

static void test_held_execution(void) {
        _cleanup_(remote_freep) Remote *remote = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        char path[] = "/tmp/remote-hostile-XXXXXX", byte;
        RemoteCall call = { .nr = SYS_getppid };
        struct fanotify_event_metadata event;
        size_t done;
        int monitor = fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC, O_RDONLY | O_CLOEXEC);

        copy_program(path);
        if (monitor < 0 || fanotify_mark(monitor, FAN_MARK_ADD, FAN_ACCESS_PERM, AT_FDCWD, path) < 0) {
                unlink(path);
                TEST_SKIP_PART("a file that cannot be read: no permission events of fanotify(7): %s", strerror(errno));
                return;
        }
        CHECK(pipe(ready) == 0);
        pid_t pid = start_executing(path, monitor);
        CHECK(remote_new(&remote) == 0 && target_new(pid, &target) == 0);
        CHECK(read(monitor, &event, sizeof event) == sizeof event);
        unlink(path);

        check_hangs(target);
        alarm(20);
        uint64_t begun = now_nsec();
        int r = remote_call(remote, target, &call, 1, &done);
        uint64_t took = now_nsec() - begun;
        alarm(0);
        CHECK(r == REMOTE_E_BUSY && took < NSEC_PER_SEC, "%s after %lu ms", remote_error_name(r), took / NSEC_PER_MSEC);
        CHECK(target_alive(target) && !remote_has_lingering(remote));
        printf("given up after %lu ms\n", took / NSEC_PER_MSEC);

        close(monitor); /* which allows it */
        close(event.fd);
        CHECK(read(ready[0], &byte, 1) == 1); /* it has */
        call_when_possible(remote, target);
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

int main(int argc, char **argv) {
        if (argc > 1) { /* executed by test_held_execution() */
                CHECK(write(atoi(argv[1]), "", 1) == 1);
                for (;;)
                        pause();
        }
        test_need_root();
        test_loop();
        test_held_execution();
        return 0;
}
