/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "test.h"

/*
 * Processes that check themselves while something is done to them: `victims KIND SECONDS`. Each says "ready" when it may
 * be visited, with a range of its own memory for harmless advice, and ends with a line of counts. What is not as it must be
 * from then on was done to it: it ends with TEST_NOTICED and a reason.
 */
typedef struct Victim {
        const char *kind;
        void (*run)(void);
        const char *what;
} Victim;

extern int victim_failed;       /* the exit status of a CHECK() here */
#undef CHECK
#define CHECK(condition, ...) test_check(victim_failed, condition, #condition, __VA_ARGS__)

extern uint64_t victim_end_nsec;
extern uint64_t victim_rounds;
extern bool victim_tolerates_eintr;     /* its visitor is killed now and then: the one thing that may be seen */
extern uint64_t victim_eintrs;

/* victims-memory.c: memory that is worth merging, always changing, and checked byte by byte. */
extern bool victim_may_call;            /* system calls on it: no longer under a filter */
extern unsigned victim_churn_permille;  /* of the changes: by munmap, mremap, madvise, or the kernel's hand */
void victim_memory_new(void);
void victim_memory_tick(void);          /* checks and changes a little, at most once in a millisecond */
void victim_memory_step(void);          /* the same at once, without any call */
void victim_memory_check(void);         /* all of it, in a child too */
void victim_memory_report(void);

static inline bool victim_goes_on(void) {
        victim_rounds++;
        victim_memory_tick();
        return now_nsec() < victim_end_nsec;
}
void victim_ready(void);
bool victim_has_region(void);                   /* of a remote call */
void victim_check_memory(const char *who);      /* no mapping in it that is not its own */

void victim_eintr(void);
void victim_registers(void);
void victim_rseq(void);
void victim_sigtrap(void);
void victim_signals(void);
void victim_threads64(void);
void victim_forkexec(void);
void victim_vfork(void);
void victim_exit(void);
void victim_stopcont(void);
void victim_frozen(void);
void victim_churn(void);
void victim_files(void);
void victim_closer(void);
void victim_container(void);
void victim_filter(void);
void victim_noreturn(void);
void victim_noreturn_thread(void);
void victim_strict(void);
void victim_mdwe(void);
void victim_namespaces(void);
void victim_nobody(void);
void victim_traced(void);
void victim_bare(void);
void victim_execs(void);
