/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "host/fault-cost.h"

#include "base/clock.h"
#include "base/io.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

/*
 * The pages are private mappings of a file's: the kernel takes the same way when they are written to as with pages of KSM
 * and of a pool. Measured alone and with another thread of ours on another CPU, which has to be told of each.
 */
#define PAGES 16U
#define ROUNDS 9U               /* the middle one counts: in some somebody else had the CPU */
#define NSEC_MIN 200U
#define NSEC_MAX (1000 * 1000U)
#define START_NSEC (20 * NSEC_PER_MSEC)

static int compare(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
        return x < y ? -1 : x > y;
}

static int measure(uint32_t *ret) {
        _cleanup_close_ int fd = memfd_create("fault-cost", MFD_CLOEXEC);
        uint64_t nsec[ROUNDS];

        if (fd < 0 || ftruncate(fd, (off_t)(PAGES * PAGE_BYTES)) < 0)
                return -errno;
        for (unsigned round = 0; round < ROUNDS; round++) {
                volatile uint8_t *pages = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
                uint64_t begun;

                if (pages == MAP_FAILED)
                        return -errno;
                for (unsigned i = 0; i < PAGES; i++)
                        (void)pages[i * PAGE_BYTES];
                begun = now_nsec();
                for (unsigned i = 0; i < PAGES; i++)
                        pages[i * PAGE_BYTES] = 1;
                nsec[round] = (now_nsec() - begun) / PAGES;
                (void)munmap((void *)(uintptr_t)pages, PAGES * PAGE_BYTES);
        }
        qsort(nsec, ROUNDS, sizeof *nsec, compare);
        uint64_t middle = nsec[ROUNDS / 2];
        middle = MAX_OF(middle, (uint64_t)NSEC_MIN);
        *ret = (uint32_t)MIN_OF(middle, (uint64_t)NSEC_MAX);
        return 0;
}

typedef struct Company {
        atomic_bool there, over;
} Company;

static void *keep_company(void *userdata) {
        Company *company = userdata;

        atomic_store(&company->there, true);
        while (!atomic_load_explicit(&company->over, memory_order_relaxed))
                ;
        return NULL;
}

/* A thread on another CPU than ours; -ENODEV: there is none. */
static int begin_company(Company *company, pthread_t *ret) {
        pthread_attr_t attr;
        sigset_t all, before;
        cpu_set_t cpus;
        int r;

        if (sched_getaffinity(0, sizeof cpus, &cpus) < 0)
                return -errno;
        CPU_CLR((size_t)sched_getcpu(), &cpus);
        if (CPU_COUNT(&cpus) == 0)
                return -ENODEV;
        r = -pthread_attr_init(&attr);
        if (r < 0)
                return r;
        r = -pthread_attr_setaffinity_np(&attr, sizeof cpus, &cpus);
        if (r == 0) {
                sigfillset(&all);
                pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are not for that thread */
                r = -pthread_create(ret, &attr, keep_company, company);
                pthread_sigmask(SIG_SETMASK, &before, NULL);
        }
        pthread_attr_destroy(&attr);
        return r;
}

/* As above, while another thread runs: if it gets a CPU in time. */
static int measure_in_company(uint32_t *ret) {
        Company company = {};
        pthread_t thread;
        int r = begin_company(&company, &thread);

        if (r < 0)
                return measure(ret);
        for (uint64_t until = now_nsec() + START_NSEC; !atomic_load(&company.there) && now_nsec() < until;)
                ;
        r = measure(ret);
        atomic_store(&company.over, true);
        pthread_join(thread, NULL);
        return r;
}

int host_fault_cost(HostFaultCost *ret) {
        uint32_t alone, together;
        int r = measure(&alone);

        if (r == 0)
                r = measure_in_company(&together);
        if (r < 0)
                return r;
        *ret = (HostFaultCost){
                .break_nsec = MAX_OF(alone, together),
                .flush_nsec = MAX_OF(together > alone ? together - alone : 0, NSEC_MIN),
        };
        return 0;
}
