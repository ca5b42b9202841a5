/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

/* The parts of a remote call that decide: on text and bytes, no process is touched. */

static const char maps_text[] =
        "00400000-00401000 r-xp 00000000 fe:00 12 /opt/go program\n"
        "c000000000-c000400000 rw-p 00000000 00:00 0 \n"
        "7f0000000000-7f0000001000 ---p 00000000 00:00 0 \n"
        "7f0000001000-7f0000801000 rw-p 00000000 00:00 0 \n"
        "7f1000000000-7f1000100000 r-xp 00001000 fe:00 13 /usr/lib/x86_64-linux-gnu/libc.so.6\n"
        "7f2000000000-7f2000001000 rw-s 00000000 00:05 14 /dev/zero (deleted)\n"
        "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]\n"
        "7ffc00030000-7ffc00032000 r-xp 00000000 00:00 0 [vdso]\n";

static void parse(RemoteMaps *ret) {
        char *text = strdup(maps_text);
        assert_int_equal(remote_maps_parse(text, ret), 0);
        free(text);
}

static void test_maps(void **state) {
        _cleanup_(remote_maps_done) RemoteMaps maps = {.fd = -EBADF};
        parse(&maps);
        assert_int_equal(maps.n, 8);
        assert_true(maps.maps[0].exec && !maps.maps[0].write && !maps.maps[0].libc && maps.maps[0].inode == 12);
        assert_false(maps.maps[2].read || maps.maps[2].write || maps.maps[2].exec);
        assert_true(maps.maps[4].libc && maps.maps[4].offset == 0x1000);
        assert_true(maps.maps[5].shared);
        assert_true(maps.maps[6].main_stack && maps.maps[7].vdso);
        RemoteMap map;
        assert_true(remote_maps_find(&maps, 0x400fff, &map) && map.start == maps.maps[0].start);
        assert_false(remote_maps_find(&maps, 0x401000, &map));
        assert_false(remote_maps_find(&maps, 0, &map));
        assert_false(remote_maps_find(&maps, UINT64_MAX, &map));
        assert_true(remote_maps_find_or_next(&maps, 0x400fff, &map) && map.start == maps.maps[0].start);
        assert_true(remote_maps_find_or_next(&maps, 0x401000, &map) && map.start == maps.maps[1].start);
        assert_true(remote_maps_find_or_next(&maps, 0, &map) && map.start == maps.maps[0].start);
        assert_false(remote_maps_find_or_next(&maps, UINT64_MAX, &map));
        char bad[] = "nonsense\n";
        RemoteMaps none = {.fd = -EBADF};
        assert_int_equal(remote_maps_parse(bad, &none), -EINVAL);
}

/* What is asked for one address is what the whole file says. */
static void test_maps_query(void **state) {
        _cleanup_(remote_maps_done) RemoteMaps all = {.fd = -EBADF}, open = {.fd = -EBADF};
        _cleanup_(target_freep) Target *target = NULL;
        assert_int_equal(target_new(getpid(), &target), 0);
        assert_int_equal(remote_maps_open(target, &open), 0);
        assert_int_equal(remote_maps_read(target, &all), 0);
        unsigned same = 0, next = 0;
        for (size_t i = 0; i < all.n; i++) {
                const RemoteMap *a = &all.maps[i];
                RemoteMap b;
                if (i > 0 && a->start > all.maps[i - 1].end && !a->main_stack)
                        next += remote_maps_find_or_next(&open, all.maps[i - 1].end, &b) && b.start == a->start;
                /* Reading the list may have moved the heap's end, or mapped a buffer. */
                if (!remote_maps_find(&open, a->end - 1, &b) || b.start != a->start || b.end != a->end)
                        continue;
                same++;
                assert_true(a->inode == b.inode && a->dev == b.dev && a->main_stack == b.main_stack);
                assert_true(a->read == b.read && a->write == b.write && a->exec == b.exec && a->shared == b.shared);
                assert_true(a->vdso == b.vdso && a->libc == b.libc && (!a->inode || a->offset == b.offset));
        }
        assert_true(same > 5 && next > 0);
        RemoteMap none;
        assert_false(remote_maps_find(&open, 0, &none));
}

static void test_stack_floor(void **state) {
        _cleanup_(remote_maps_done) RemoteMaps maps = {.fd = -EBADF};
        parse(&maps);
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x7ffc00020000, 0), 0x7ffc00000000);
        /* Only the first thread lives on [stack]; a stack pointer elsewhere is refused. */
        assert_int_equal(remote_stack_floor(-1, &maps, false, 0x7ffc00020000, 0), 0);
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x401000, 0), 0);
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x7f2000000800, 0), 0);
        /* A goroutine's stack in the heap: no control block above it. */
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0xc000010000, 0xc000020000), 0);
        assert_int_equal(remote_stack_floor(-1, &maps, false, 0xc000010000, 0x7f0000800700), 0);
        /* The control block is where it should be, but does not point to itself: it cannot even be read here. */
        assert_int_equal(remote_stack_floor(-1, &maps, false, 0x7f0000700000, 0x7f0000800700), 0);
}

/* Marked pages in the middle of a stack make it several mappings. */
static void test_stack_floor_in_pieces(void **state) {
        RemoteMap map[] = {
                {.start = 0x7000, .end = 0x8000},
                {.start = 0x10000, .end = 0x20000, .read = true, .write = true},
                {.start = 0x20000, .end = 0x21000, .read = true, .write = true},
                {.start = 0x21000, .end = 0x22000, .read = true, .write = true, .main_stack = true},
        };
        RemoteMaps maps = {.maps = map, .n = ELEMENTSOF(map), .fd = -EBADF};
        for (uint64_t sp = 0x1f000; sp < 0x22000; sp += 0x800)
                assert_int_equal(remote_stack_floor(-1, &maps, true, sp, 0), 0x10000);
        assert_int_equal(remote_stack_floor(-1, &maps, false, 0x21800, 0), 0);
        map[2].exec = true; /* not a piece of it */
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x21800, 0), 0x21000);
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x1f000, 0), 0);
}

/* This process as its own target: a real thread stack laid out as the C library does. */
static void test_stack_floor_of_thread(void **state) {
        _cleanup_close_ int memfd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
        assert_true(memfd >= 0);
        const size_t bytes = 64 * PAGE_BYTES;
        char *area = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(area != MAP_FAILED);
        RemoteMap map[2] = {
                {.start = (uint64_t)area, .end = (uint64_t)area + PAGE_BYTES},
                {.start = (uint64_t)area + PAGE_BYTES, .end = (uint64_t)area + bytes, .read = true, .write = true},
        };
        RemoteMaps maps = {.maps = map, .n = 2, .fd = -EBADF};
        assert_int_equal(mprotect(area + PAGE_BYTES, bytes - PAGE_BYTES, PROT_READ | PROT_WRITE), 0);
        uint64_t block = (uint64_t)area + bytes - 2304, sp = block - 8192;
        assert_int_equal(remote_stack_floor(memfd, &maps, false, sp, block), 0);
        memcpy(area + bytes - 2304, &block, sizeof block);
        assert_int_equal(remote_stack_floor(memfd, &maps, false, sp, block), map[1].start);
        assert_int_equal(remote_stack_floor(memfd, &maps, false, block + 64, block), 0);
        RemoteMap split[4] = {map[0], map[1], map[1], map[1]};
        split[1].end = split[2].start = sp - 64;
        split[2].end = split[3].start = block - 4096;
        maps.maps = split;
        maps.n = 4;
        assert_int_equal(remote_stack_floor(memfd, &maps, false, sp, block), map[1].start);
        split[0].read = true; /* no guard below: somebody's memory */
        assert_int_equal(remote_stack_floor(memfd, &maps, false, sp, block), 0);
        munmap(area, bytes);
}

/* Marks split a stack: the pieces are one stack all the same, wherever in it the stack pointer is. */
static void test_stack_floor_of_pieces(void **state) {
        static const char text[] =
                "7ffc00000000-7ffc00004000 rw-p 00000000 00:00 0 \n"
                "7ffc00004000-7ffc00005000 rw-p 00000000 00:00 0 \n"
                "7ffc00005000-7ffc00021000 rw-p 00000000 00:00 0 [stack]\n"
                "7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0 \n"
                "7ffd00002000-7ffd00003000 rw-p 00000000 00:00 0 [stack]\n";
        _cleanup_(remote_maps_done) RemoteMaps maps = {.fd = -EBADF};
        _cleanup_free_ char *copy = strdup(text);
        assert_int_equal(remote_maps_parse(copy, &maps), 0);
        for (uint64_t sp = 0x7ffc00000010; sp < 0x7ffc00021000; sp += 0x1000)
                assert_int_equal(remote_stack_floor(-1, &maps, true, sp, 0x7f0000000000), 0x7ffc00000000);
        assert_int_equal(remote_stack_floor(-1, &maps, false, 0x7ffc00000010, 0x7f0000000000), 0);
        /* With a gap between they are not. */
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x7ffd00002010, 0x7f0000000000), 0x7ffd00002000);
        assert_int_equal(remote_stack_floor(-1, &maps, true, 0x7ffd00000010, 0x7f0000000000), 0);
}

static void test_sleeps(void **state) {
        const uint64_t none[6] = {}, forever[6] = {0, 0, 0, UINT64_MAX}, waitall[6] = {0, 0, 0, MSG_WAITALL},
                       submits[6] = {3, 1, 1}, two[6] = {1, 2, 2}, uring_one[6] = {3, 0, 1}, uring_two[6] = {3, 0, 2};
        assert_int_equal(remote_sleep_class(-1, none), REMOTE_SLEEP_NONE);
        assert_int_equal(remote_sleep_class(SYS_futex, none), REMOTE_SLEEP_EXACT);
        assert_int_equal(remote_sleep_class(SYS_epoll_pwait, none), REMOTE_SLEEP_AGAIN);
        assert_int_equal(remote_sleep_class(SYS_epoll_pwait, forever), REMOTE_SLEEP_EXACT);
        assert_int_equal(remote_sleep_class(SYS_recvfrom, none), REMOTE_SLEEP_AGAIN);
        assert_int_equal(remote_sleep_class(SYS_recvfrom, waitall), REMOTE_SLEEP_REFUSE);
        assert_int_equal(remote_sleep_class(SYS_io_uring_enter, none), REMOTE_SLEEP_AGAIN);
        assert_int_equal(remote_sleep_class(SYS_io_uring_enter, submits), REMOTE_SLEEP_REFUSE);
        assert_int_equal(remote_sleep_class(SYS_io_uring_enter, uring_one), REMOTE_SLEEP_AGAIN);
        assert_int_equal(remote_sleep_class(SYS_io_uring_enter, uring_two), REMOTE_SLEEP_REFUSE);
        assert_int_equal(remote_sleep_class(SYS_io_getevents, none), REMOTE_SLEEP_AGAIN);
        assert_int_equal(remote_sleep_class(SYS_io_getevents, two), REMOTE_SLEEP_REFUSE);
        assert_int_equal(remote_sleep_class(SYS_write, none), REMOTE_SLEEP_REFUSE);
        /* Repeating these would do something twice, or to a descriptor that is somebody else's by now. */
        assert_false(remote_sleep_repeatable(SYS_close));
        assert_false(remote_sleep_repeatable(SYS_write));
        assert_false(remote_sleep_repeatable(SYS_connect));
        assert_true(remote_sleep_repeatable(SYS_epoll_pwait));
        assert_true(remote_sleep_repeatable(SYS_read));
        assert_true(remote_sleep_repeatable(SYS_rt_sigtimedwait));
        assert_true(remote_sleep_repeatable(SYS_ppoll));
        assert_true(remote_sleep_repeatable(SYS_pselect6));
}

static pid_t start_child(int *ret_held) {
        int fds[2];
        char byte;
        assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
        pid_t pid = fork();
        if (pid == 0) {
                close(fds[1]);
                _exit((int)read(fds[0], &byte, 1)); /* 0, when the other end is closed */
        }
        close(fds[0]);
        *ret_held = fds[1];
        return pid;
}

/* ptrace(2) says EPERM of all three; only one of them is an answer for ever. */
static void test_seize_refused(void **state) {
        RemoteThreadStatus status = {.state = 'S', .seccomp = -1};
        Remote remote = {};
        for (int traced = 0; traced < 2; traced++) {
                _cleanup_(target_freep) Target *target = NULL;
                RemoteThread *thread = NULL;
                siginfo_t info;
                int held;
                pid_t pid = start_child(&held);
                assert_int_equal(target_new(pid, &target), 0);
                if (traced)
                        assert_int_equal(ptrace(PTRACE_SEIZE, pid, 0, 0), 0);
                else {
                        close(held);
                        assert_int_equal(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
                }
                assert_int_equal(remote_thread_seize(&remote, target, pid, &status, NULL, &thread),
                                 traced ? REMOTE_E_TRACED : REMOTE_E_GONE);
                if (traced)
                        close(held);
                assert_int_equal(waitpid(pid, NULL, 0), pid);
        }
        remote_collect_done(&remote);
}

/* A fault is the thread's own until its registers are ours. */
static void test_keep_signal(void **state) {
        static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGUSR1};
        for (size_t i = 0; i < ELEMENTSOF(signals); i++)
                for (RemoteStage stage = REMOTE_STAGE_SEIZED; stage <= REMOTE_STAGE_PARKED; stage++) {
                        RemoteThread thread = {.stage = stage};
                        remote_thread_keep_signal(&thread, signals[i] << 8 | 0x7f);
                        bool kept = stage == REMOTE_STAGE_SEIZED || signals[i] == SIGUSR1;
                        assert_int_equal(thread.inject, kept ? signals[i] : 0);
                }
        RemoteThread thread = {.stage = REMOTE_STAGE_SEIZED};
        remote_thread_keep_signal(&thread, (SIGTRAP | 0x80) << 8 | 0x7f);
        remote_thread_keep_signal(&thread, PTRACE_EVENT_STOP << 16 | SIGSTOP << 8 | 0x7f);
        assert_int_equal(thread.inject, 0);
}

/* What cannot be looked at is taken for what must be left alone; what is gone is not. */
static void test_fails_closed(void **state) {
        _cleanup_(target_freep) Target *target = NULL;
        struct rlimit before, none = {};
        assert_int_equal(target_new(getpid(), &target), 0);
        assert_false(target_has_userfaultfd(target));
        assert_false(remote_must_sleep_on(target, getpid())); /* it runs */
        assert_false(remote_must_sleep_on(target, 0));
        assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
        none.rlim_max = before.rlim_max;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
        bool has = target_has_userfaultfd(target), must = remote_must_sleep_on(target, getpid());
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
        assert_true(has && must);
}

static void test_percentile(void **state) {
        RemoteStats stats = {};
        assert_int_equal(remote_stop_percentile(&stats, 990), 0);
        stats.stops = 100;
        stats.stop_histogram[14] = 98; /* 128.. */
        stats.stop_histogram[20] = 2;  /* 1024.. */
        stats.stop_nsec_max = 1100 * NSEC_PER_USEC;
        assert_int_equal(remote_stop_percentile(&stats, 500), 128 * 1414 * NSEC_PER_USEC / 1000);
        assert_int_equal(remote_stop_percentile(&stats, 980), 128 * 1414 * NSEC_PER_USEC / 1000);
        assert_int_equal(remote_stop_percentile(&stats, 990), 1100 * NSEC_PER_USEC);
}

#if defined(__x86_64__)
static void test_snippets(void **state) {
        const uint8_t glibc[] = {0x90, 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x05, 0xc3};
        const uint8_t musl[] = {0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05};
        assert_int_equal(remote_arch_find_sigreturn(glibc, sizeof glibc), 1);
        assert_int_equal(remote_arch_find_sigreturn(musl, sizeof musl), 0);
        assert_int_equal(remote_arch_find_call(glibc, sizeof glibc), 10);
        assert_int_equal(remote_arch_find_call(musl, sizeof musl), -1);
        assert_true((size_t)(remote_stub_end - remote_stub_start) + sizeof(RemoteHead) <= REMOTE_REGION_HEAD_BYTES);
}

/* What was found in a process is verified, and not looked for again, however many others there are. */
static void test_code_kept(void **state) {
        static const uint8_t call[REMOTE_ARCH_SNIPPET_MAX] = {0x0f, 0x05, 0xc3};
        static const uint8_t sigreturn[REMOTE_ARCH_SNIPPET_MAX] = {0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05};
        const RemoteCode kept = {(uintptr_t)call, (uintptr_t)sigreturn};
        _cleanup_(target_freep) Target *target = NULL;
#ifdef __SANITIZE_THREAD__
        skip(); /* its shadow lies where regions would */
#endif
        assert_int_equal(target_new(getpid(), &target), 0);
        target->code = kept;
        for (int good = 1; good >= 0; good--) {
                _cleanup_(remote_visit_done) RemoteVisit visit = {.target = target, .memfd = -EBADF, .maps.fd = -EBADF};
                target->code.call += good ? 0 : 1;
                assert_int_equal(remote_visit_prepare(target, &visit), 0);
                assert_int_equal(visit.code.call == kept.call && visit.code.sigreturn == kept.sigreturn, good);
                assert_true(remote_code_verify(visit.memfd, &visit.code));
                assert_int_equal(target->code.call, visit.code.call);
        }
}

static void test_repair(void **state) {
        RemoteRegs regs = {.nr = SYS_epoll_wait, .r = {.rax = (uint64_t)-EINTR}};
        assert_true(remote_arch_repair(&regs));
        assert_int_equal(remote_arch_result(&regs), -514);
        assert_false(remote_arch_repair(&regs));
        regs = (RemoteRegs){.nr = SYS_close, .r = {.rax = (uint64_t)-EINTR}};
        assert_false(remote_arch_repair(&regs));
        regs = (RemoteRegs){.nr = -1, .r = {.rax = (uint64_t)-EINTR}}; /* not in a call: a number like any other */
        assert_false(remote_arch_repair(&regs));
}
#endif

/* A program of random instructions, of which the kernel and we must think the same. It begins by letting every other call
 * pass, and ends in an error that says what the accumulator held. */
#define CALL SYS_getpgid
#define RANDOM_INSTRUCTIONS 24

static size_t make_program(struct sock_filter ret[static RANDOM_INSTRUCTIONS + 8]) {
        static const uint16_t alu[] = {BPF_ADD, BPF_SUB, BPF_MUL, BPF_AND, BPF_OR, BPF_XOR};
        static const uint16_t jumps[] = {BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET};
        size_t n = 0;
        ret[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        ret[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CALL, 1, 0);
        ret[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        for (unsigned cell = 0; cell < 2; cell++) /* the kernel wants cells to be written before they are read */
                ret[n++] = (struct sock_filter)BPF_STMT(BPF_ST, cell);
        for (unsigned left = RANDOM_INSTRUCTIONS; left > 0; left--) {
                uint32_t k = random() % 2 ? (uint32_t)random() % 16 : (uint32_t)random() * 3;
                uint8_t jt = (uint8_t)((unsigned)random() % MIN_OF(left, 5U));
                uint8_t jf = (uint8_t)((unsigned)random() % MIN_OF(left, 5U));
                uint16_t x = random() % 2 ? BPF_X : BPF_K;
                struct sock_filter one = {.k = k};
                switch (random() % 10) {
                case 0:
                case 1: /* of the arguments, not where it was called from */
                        one.code = BPF_LD | BPF_W | BPF_ABS;
                        one.k = 16 + k % 12 * 4;
                        break;
                case 2:
                        one.code = random() % 2 ? BPF_LD | BPF_MEM : BPF_LDX | BPF_MEM;
                        one.k = k % 2;
                        break;
                case 3:
                        one.code = random() % 2 ? BPF_ST : BPF_STX;
                        one.k = k % 2;
                        break;
                case 4:
                        one.code = BPF_MISC | (random() % 2 ? BPF_TAX : BPF_TXA);
                        break;
                case 5:
                        one.code = BPF_ALU | (random() % 2 ? BPF_LSH : BPF_RSH) | BPF_K;
                        one.k = k % 32;
                        break;
                case 6:
                        one.code = random() % 2 ? BPF_LDX | BPF_IMM : BPF_LDX | BPF_W | BPF_LEN;
                        break;
                case 7:
                        one.code = random() % 4 ? BPF_ALU | alu[(size_t)random() % ELEMENTSOF(alu)] | x : BPF_ALU | BPF_NEG;
                        break;
                default:
                        one.code = BPF_JMP | jumps[(size_t)random() % ELEMENTSOF(jumps)] | x;
                        one.jt = jt;
                        one.jf = jf;
                }
                ret[n++] = one;
        }
        ret[n++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xfff);
        ret[n++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_OR | BPF_K, SECCOMP_RET_ERRNO);
        ret[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_A, 0);
        return n;
}

/* The error that the kernel answers with: in a child, which has the filter from then on. */
static int ask_kernel(const struct sock_filter *program, size_t n, const struct seccomp_data *data) {
        struct sock_fprog prog = {.len = (unsigned short)n, .filter = (struct sock_filter *)(uintptr_t)program};
        int fds[2], answer = -1, status;
        assert_int_equal(pipe(fds), 0);
        pid_t pid = fork();
        if (pid == 0) {
                if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) < 0)
                        _exit(1);
                errno = 0;
                answer = syscall(CALL, data->args[0], data->args[1], data->args[2], data->args[3], data->args[4],
                                 data->args[5]) < 0 ? errno : 0;
                _exit(write(fds[1], &answer, sizeof answer) != sizeof answer);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
        assert_int_equal(read(fds[0], &answer, sizeof answer), sizeof answer);
        close(fds[0]);
        close(fds[1]);
        return answer;
}

static void test_filter(void **state) {
        struct sock_filter program[RANDOM_INSTRUCTIONS + 8];
        unsigned different = 0;
        srandom(1);
        for (int i = 0; i < 400; i++) {
                struct seccomp_data data = {.nr = CALL, .arch = REMOTE_ARCH_AUDIT};
                for (int k = 0; k < 6; k++)
                        data.args[k] = (uint64_t)random() << 31 ^ (uint64_t)random();
                size_t n = make_program(program);
                bool only_nr;
                uint32_t action = remote_filter_run(program, n, &data, &only_nr);
                assert_int_equal(action & SECCOMP_RET_ACTION_FULL, SECCOMP_RET_ERRNO);
                assert_int_equal(action & SECCOMP_RET_DATA, ask_kernel(program, n, &data));
                different += (action & SECCOMP_RET_DATA) != 0;
                data.nr = SYS_getpid;
                assert_int_equal(remote_filter_run(program, n, &data, &only_nr), SECCOMP_RET_ALLOW);
                assert_true(only_nr);
        }
        assert_true(different > 200);

        /* One that looks at an argument, and one that ends nowhere, as the kernel would not take it. */
        const struct sock_filter look[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
                                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        struct seccomp_data data = {};
        bool only_nr = true;
        assert_int_equal(remote_filter_run(look, 2, &data, &only_nr), SECCOMP_RET_ALLOW);
        assert_false(only_nr);
        assert_int_equal(remote_filter_run(look, 1, &data, &only_nr), SECCOMP_RET_KILL_PROCESS);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_maps), cmocka_unit_test(test_maps_query),
                cmocka_unit_test(test_stack_floor), cmocka_unit_test(test_stack_floor_in_pieces),
                cmocka_unit_test(test_stack_floor_of_thread),
                cmocka_unit_test(test_stack_floor_of_pieces),
                cmocka_unit_test(test_sleeps),
                cmocka_unit_test(test_seize_refused),
                cmocka_unit_test(test_keep_signal),
                cmocka_unit_test(test_fails_closed),
                cmocka_unit_test(test_percentile),
#if defined(__x86_64__)
                cmocka_unit_test(test_snippets),
                cmocka_unit_test(test_code_kept),
                cmocka_unit_test(test_repair),
                cmocka_unit_test(test_filter),
#endif
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
