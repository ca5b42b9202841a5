/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * A target that makes the instruction that we borrow a loop, right before we take our region away by it: it is waited for
 * once, the target goes on, and the next visit finds everything as it was. Built with the remote sources of its own
 * (REMOTE_TEST), whose steps tell when.
 */
#define ONE_WAIT_NSEC (REMOTE_STEP_NSEC + REMOTE_STEP_NSEC / 2)

unsigned remote_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static int memfd;
static RemoteCode code;
static unsigned tries;
static uint8_t before[2];

void remote_test_step(RemoteStep step) {
        if (step == REMOTE_STEP_UNMAP_REGS && tries++ == 0)
                CHECK(pread(memfd, before, sizeof before, (off_t)code.call) == sizeof before &&
                      pwrite(memfd, "\xeb\xfe", 2, (off_t)code.call) == 2);
}

int main(void) {
        _cleanup_(remote_freep) Remote *remote = NULL;
        _cleanup_(target_freep) Target *target = NULL;
        RemoteCall call = { .nr = SYS_getppid };
        char path[64];
        size_t done;
        uint64_t *rounds = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

        test_need_root();
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

        int r = REMOTE_E_BUSY;
        for (int i = 0; i < 1000 && r == REMOTE_E_BUSY; i++, usleep(1000))
                r = remote_call(remote, target, &call, 1, &done);
        CHECK(r == 0 && call.ret == getpid(), "%s", remote_error_name(r));
        _cleanup_(remote_maps_done) RemoteMaps maps = { .fd = -EBADF };
        CHECK(remote_maps_read(target, &maps) == 0);
        for (size_t i = 0; i < maps.n; i++)
                CHECK(!remote_region_has(maps.maps[i].start), "a region was left behind");
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
        return 0;
}
