/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "tests/test.h"

#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

/* What tests confine their victims by. */

/* As container engines have it: what is not known to be harmless is refused, userfaultfd(2) and io_uring with it. */
static inline void confine_by_filter(void) {
        static const unsigned refused[] = { SYS_userfaultfd, SYS_io_uring_setup, SYS_ptrace, SYS_keyctl, SYS_add_key,
                                            SYS_bpf };
        struct sock_filter filter[2 * ELEMENTSOF(refused) + 2];
        size_t n = 0;

        filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        for (size_t i = 0; i < ELEMENTSOF(refused); i++) {
                filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, refused[i], 0, 1);
                filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
        }
        filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog program = { .len = (unsigned short)n, .filter = filter };
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0,
              "filter");
        CHECK(syscall(SYS_userfaultfd, 1) < 0 && errno == EPERM, "the filter");
}

/* Nobody in particular, in a user namespace of his own, under such a filter; otherwise as before. */
static inline void confine(void) {
        CHECK(setgroups(0, NULL) == 0 && setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0, "nobody");
        CHECK(unshare(CLONE_NEWUSER) == 0, "user namespace");
        confine_by_filter();
        CHECK(prctl(PR_SET_DUMPABLE, 1) == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0, "prctl");
}
