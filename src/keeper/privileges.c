/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/privileges.h"

#include "base/io.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define AUDIT_ARCH_HERE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define AUDIT_ARCH_HERE AUDIT_ARCH_AARCH64
#endif

/* All threads of a target stand while the daemon, which is at SCHED_FIFO 2 meanwhile, waits for our word, and the one
 * that runs its program, lent 1, for the daemon's: so we come first. Where that is refused, the best of the rest. */
#define PRIORITY_FIFO 3
#define PRIORITY_NICE (-20)

void privileges_lock_memory(void) { (void)mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT); }

void privileges_prepare(void) {
        const struct sched_param first = { .sched_priority = PRIORITY_FIFO };
        struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };

        (void)setpriority(PRIO_PROCESS, 0, PRIORITY_NICE);
        (void)sched_setscheduler(0, SCHED_FIFO, &first);
        (void)write_text(AT_FDCWD, "/proc/self/oom_score_adj", "-1000");
        (void)setrlimit(RLIMIT_MEMLOCK, &limit);
        if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
                limit.rlim_cur = limit.rlim_max;
                (void)setrlimit(RLIMIT_NOFILE, &limit);
        }
        privileges_lock_memory();
}

static int drop_capabilities(void) {
        struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
        struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = { 0 };

        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
                return -errno;
        for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
                if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EPERM)
                        return -errno;
        return syscall(SYS_capset, &header, none) == 0 ? 0 : -errno;
}

/* What serving needs, whatever its arguments. */
static const int allowed[] = {
        SYS_read, SYS_pread64, SYS_write, SYS_close, SYS_fcntl, SYS_pipe2, SYS_lseek, SYS_newfstatat, SYS_fstat, SYS_fstatfs,
        SYS_getdents64, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
#ifdef SYS_epoll_wait
        SYS_epoll_wait,
#endif
        SYS_accept4, SYS_recvmsg, SYS_sendmsg, SYS_getsockopt, SYS_clock_gettime, SYS_clock_nanosleep,
        SYS_restart_syscall, SYS_rt_sigreturn, SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise, SYS_mlockall, SYS_wait4,
        SYS_getpid, SYS_getppid, SYS_gettid, SYS_pidfd_open, SYS_exit, SYS_exit_group,
};

/* An argument of a call: allowed where, of the bits in mask, exactly those of value are set. */
static const struct {
        int call;
        unsigned argument;
        uint32_t mask, value;
} conditional[] = {
        { SYS_ioctl, 1, UINT32_MAX, (uint32_t)UFFDIO_ZEROPAGE },
        { SYS_ioctl, 1, UINT32_MAX, (uint32_t)UFFDIO_WAKE },
        { SYS_ioctl, 1, UINT32_MAX, (uint32_t)UFFDIO_WRITEPROTECT },
#ifdef KEEPER_TEST
        { SYS_ioctl, 1, UINT32_MAX, (uint32_t)UFFDIO_CONTINUE },
#endif
        { SYS_openat, 2, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY },
        { SYS_mmap, 2, PROT_EXEC, 0 },
        { SYS_clone, 0, UINT32_MAX, CLONE_FILES | SIGCHLD },
        { SYS_prctl, 0, UINT32_MAX, PR_SET_NAME },
};

/* The rest is refused, not killed for: who waits for an answer is better served by a keeper that goes on. */
static int install_filter(void) {
        struct sock_filter filter[4 + 2 * ELEMENTSOF(allowed) + 7 * ELEMENTSOF(conditional) + 1];
        struct sock_fprog program = { .filter = filter };
        unsigned short n = 0;

        filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_HERE, 1, 0);
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        for (size_t i = 0; i < ELEMENTSOF(allowed); i++) {
                filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i], 0, 1);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        }
        for (size_t i = 0; i < ELEMENTSOF(conditional); i++) {
                uint32_t argument = (uint32_t)(offsetof(struct seccomp_data, args) +
                                               conditional[i].argument * sizeof(uint64_t)); /* its lower half */
                filter[n++] =
                        (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)conditional[i].call, 0, 5);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_ALU | BPF_AND | BPF_K, conditional[i].mask);
                filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, conditional[i].value, 0, 1);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        }
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
        program.len = n;
        return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0 ? 0 : -errno;
}

int privileges_drop(void) {
        int r;

        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
                return -errno;
        r = drop_capabilities();
        if (r < 0)
                return r;
        if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
                return -errno;
        return install_filter();
}
