/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What faults cost, measured by a thread that loses its CPU in the middle of most rounds: that is not taken for the price.
 * --control: the same when nobody tells that a CPU was lost.
 */
#include "host/fault-cost.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/time.h>

#define MEASUREMENTS 10U
#define ROUND_WRITES 16U        /* about */
/* What is measured differs by less than twice from one time to the next; with a loss in it, it is four times as much. */
#define DIFFERENCE 3U

static bool control;
static uint64_t lose_nsec;

int __real_getrusage(int who, struct rusage *ret);
int __wrap_getrusage(int who, struct rusage *ret);
int __wrap_getrusage(int who, struct rusage *ret) {
        int r = __real_getrusage(who, ret);

        if (control)
                ret->ru_nvcsw = ret->ru_nivcsw = 0;
        return r;
}

static void lose_cpu(int signal) {
        struct timespec time = { .tv_nsec = (long)lose_nsec };

        (void)signal;
        (void)nanosleep(&time, NULL);
}

/* A round and a half after it came back the CPU is lost again, for twice as long. */
static void lose_cpu_often(uint32_t write_nsec) {
        uint64_t every = (uint64_t)write_nsec * ROUND_WRITES * 3 / 2;
        struct itimerval timer = {};

        lose_nsec = 2 * every;
        timer.it_interval.tv_usec = (suseconds_t)((every + lose_nsec) / NSEC_PER_USEC);
        timer.it_value = timer.it_interval;
        CHECK(signal(SIGALRM, lose_cpu) != SIG_ERR);
        CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

int main(int argc, char *argv[]) {
        HostFaultCost alone, cost;

        control = argc > 1 && strcmp(argv[1], "--control") == 0;
        CHECK(host_fault_cost(&alone) == 0);
        printf("a break %u ns, a flush %u ns, a tracked write %u ns\n", alone.break_nsec, alone.flush_nsec, alone.write_nsec);
        lose_cpu_often(alone.break_nsec);
        for (unsigned i = 0; i < MEASUREMENTS; i++) {
                CHECK(host_fault_cost(&cost) == 0);
                printf("interrupted: %u, %u, %u\n", cost.break_nsec, cost.flush_nsec, cost.write_nsec);
                CHECK_AS(control ? TEST_NOTICED : TEST_FAILED, cost.break_nsec < DIFFERENCE * alone.break_nsec);
                if (cost.flush_nsec > 0) /* the other thread ran as well */
                        CHECK(cost.break_nsec > alone.break_nsec / DIFFERENCE);
        }
        return 0;
}
