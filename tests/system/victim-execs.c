/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/*
 * Executes itself again and again, each time from a thread that is not the first, beside others that sleep. It is the best
 * one to be stopped. Each program says a byte of itself, on standard output.
 */
#define SLEEPERS 6
#define SLEEP_MAX_USEC 500

/* Its timeout starts over when it is woken: others are chosen before. */
static void *sleep_on(void *unused) {
        const struct timespec long_time = { .tv_sec = 1000 };
        sigset_t none;

        sigemptyset(&none);
        for (;;)
                sigtimedwait(&none, NULL, &long_time);
        return NULL;
}

static void *execute(void *argv) {
        struct timespec now, soon = {0};

        clock_gettime(CLOCK_MONOTONIC, &now);
        soon.tv_nsec = now.tv_nsec / 100 % SLEEP_MAX_USEC * 1000;
        nanosleep(&soon, NULL);
        execv("/proc/self/exe", argv);
        perror("execv");
        _exit(1);
}

int main(int argc, char **argv) {
        pthread_t thread;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (write(STDOUT_FILENO, "", 1) != 1)
                return perror("write"), 1;
        for (int i = 0; i <= SLEEPERS; i++)
                if (pthread_create(&thread, NULL, i == SLEEPERS ? execute : sleep_on, argv) != 0)
                        return perror("pthread_create"), 1;
        (void)sleep_on(NULL);
        return 0;
}
