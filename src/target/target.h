/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/vma.h"

#include <sys/types.h>

/*
 * One process. Identity is the pidfd, plus a descriptor of its /proc directory opened while the pidfd said it was
 * alive: both stay bound to that process for ever, so a reused pid can fool nobody. What takes a bare pid
 * (process_vm_readv, ptrace) is bracketed by target_alive(): alive afterwards means the number was ours throughout.
 */
typedef enum TargetSkip {
        TARGET_OK,
        TARGET_SKIP_SELF,               /* the daemon, its helpers, ksmctl */
        TARGET_SKIP_KERNEL_THREAD,
        TARGET_SKIP_ZOMBIE,
        TARGET_SKIP_COMPAT32,           /* 32-bit code */
        TARGET_SKIP_TRACED,             /* a debugger is attached */
        TARGET_SKIP_NOT_DUMPABLE,       /* PR_SET_DUMPABLE 0: it keeps secrets */
        TARGET_SKIP_YOUNG,              /* younger than MinimumAge */
        TARGET_SKIP_FROZEN,             /* its cgroup is frozen: may be read, cannot be called */
        TARGET_SKIP_STOPPED,            /* job control stopped it: may be read, cannot be called */
        TARGET_SKIP_SHADOW_STACK,       /* user shadow stacks: a remote call cannot return through them */
        TARGET_SKIP_DENIED,             /* the kernel refuses us (LSM, missing capability) */
        TARGET_SKIP_UNCALLABLE,         /* no thread could be stopped or no stub be placed */
        _TARGET_SKIP_MAX,
} TargetSkip;

enum {
        TARGET_E_GONE = 1,              /* the process ended */
        TARGET_E_DENIED,                /* the kernel refuses us */
};

/* Addresses in a process of a system call instruction followed by a return, and of a complete rt_sigreturn, which remote
 * calls borrow. */
typedef struct RemoteCode {
        uint64_t call, sigreturn;
} RemoteCode;

typedef struct Target {
        pid_t pid;
        int pidfd;              /* poll(2)s readable when the process has ended */
        int procfd;             /* O_PATH of /proc/PID */
        int memfd;              /* /proc/PID/mem for reading; -EBADF until target_open_memory() */
        int pagemapfd;
        uint64_t stood_nsec;    /* for how long it has stood by our stops so far (target/remote.h) */
        RemoteCode code;        /* as found by the first remote call, verified by each; zeros: not yet */
        uint64_t start_ticks;   /* stat field 22: with the pid, a name for files of ours that outlive us */
        char comm[16];
        struct VmaReader *vma_reader; /* borrowed; NULL: target_read_vma_flags() reads smaps */
} Target;

/* Opens the process. TARGET_E_GONE, TARGET_E_DENIED, -errno. The caller owns *ret. */
int target_new(pid_t pid, Target **ret);
Target *target_free(Target *target);
DEFINE_CLEANUP(Target, target_free)

bool target_alive(const Target *target);

/* Looks at what can be told without touching it: TARGET_OK or the reason to leave it alone now. minimum_age_nsec 0: any
 * age. Whether a process owned by root is dumpable cannot be told from outside: *ret_ask_dumpable then says that
 * remote_adopt() has to ask it. */
int target_inspect(Target *target, uint64_t minimum_age_nsec, TargetSkip *ret, bool *ret_ask_dumpable);

/* Opens memfd and pagemapfd. TARGET_E_GONE, TARGET_E_DENIED, -errno. */
int target_open_memory(Target *target);
void target_close_memory(Target *target);

int target_read_vmas(Target *target, bool include_dontdump, VmaList *ret); /* TARGET_E_GONE, TARGET_E_DENIED, -errno */

/* The same for who goes by flags alone: uncounted, where the kernel tells them without a look at pages
 * (target/vma-reader.h). */
int target_read_vma_flags(Target *target, bool include_dontdump, VmaList *ret);

/* The entries (host/pagemap.h) of up to n_pages pages from start on. *ret_n: of how many, one at least. TARGET_E_GONE: of
 * none; -errno. */
int target_read_pagemap(const Target *target, uint64_t start, size_t n_pages, uint64_t *ret_entries, size_t *ret_n);

/* execve(2) replaced the program since target_open_memory(): what was known of its memory is void. */
bool target_image_replaced(const Target *target);

/* A number that changes when the mappings do (the text of /proc/PID/maps): far cheaper than reading them with their
 * flags, which may change without it. TARGET_E_GONE, TARGET_E_DENIED, -errno. */
int target_maps_fingerprint(Target *target, uint64_t *ret);

/* It holds a userfaultfd of its own, or looks as if it will: not to be tracked by one of ours. Reads every link of
 * /proc/PID/fd (0.6 us each). Also true if they cannot be read. */
bool target_has_userfaultfd(const Target *target);

const char *target_skip_name(TargetSkip skip);
