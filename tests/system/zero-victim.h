/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "test.h"

#include <sys/types.h>

/*
 * A process that checks every byte of its memory while zero pages are taken out of it: three threads, each of which owns
 * pages; an outsider, another process, that owns pages too and writes them by process_vm_writev(2) and
 * /proc/PID/mem; io_uring's worker threads, which write and discard; reads by the kernel; mappings that come and go; children.
 */
#define ZERO_VICTIM_PAGES 2048U
#define ZERO_VICTIM_STILL 64U   /* behind those: never written after the start, compared in children */
#define ZERO_VICTIM_CHURN 16U

typedef struct ZeroVictim {     /* shared with whoever runs the test */
        pid_t pid;
        char *memory;           /* in the victim; NULL: not ready yet */
        char *volatile churn;   /* a mapping that comes and goes */
        volatile bool stop;
        volatile uint64_t errors, operations, checks, written_outside, worker_reads, fixed_reads,
                worker_discards, direct_reads, forks, churns;
        volatile uint64_t outside_refused; /* the kernel would not do it just then */
        char first[160];        /* error */
        char expected[ZERO_VICTIM_PAGES][4096];
} ZeroVictim;

/* Starts one; mapped shared. forks: it has children all the while. */
ZeroVictim *zero_victim_start(bool forks);
/* Ends it and the outsider. 0, or the exit status that is due: TEST_NOTICED, something was not as it must be, and was
 * printed; TEST_FAILED, one of them does not end. */
int zero_victim_end(ZeroVictim *victim);
