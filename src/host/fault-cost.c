/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "host/fault-cost.h"

#include "base/clock.h"
#include "base/io.h"
#include "host/uapi.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/*
 * The pages are private mappings of a file's: the kernel takes the same way when they are written to as with pages of KSM
 * and of a pool. Measured alone and with another thread of ours on another CPU, which has to be told of each.
 */
#define PAGES 16U
#define ROUNDS 9U               /* the middle one counts: in some somebody else had the CPU */
#define NSEC_MIN 200U
#define NSEC_MAX (1000 * 1000U)
#define LOOK_NSEC_MAX 200U      /* longer than a look at the clock takes: it was interrupted */
#define COMPANY_NSEC (100 * NSEC_PER_MSEC)      /* for so long it is tried to run together with another thread */

static int compare(const void *a, const void *b) {
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

        return x < y ? -1 : x > y;
}

/* What a write takes, each page being written to once. */
static uint32_t write_to(volatile uint8_t *pages) {
        uint64_t begun = now_nsec();

        for (unsigned i = 0; i < PAGES; i++)
                pages[i * PAGE_BYTES] = 1;
        return (uint32_t)MIN_OF((now_nsec() - begun) / PAGES, (uint64_t)NSEC_MAX);
}

static uint32_t middle(uint32_t nsec[static ROUNDS]) {
        qsort(nsec, ROUNDS, sizeof *nsec, compare);
        return MAX_OF(nsec[ROUNDS / 2], NSEC_MIN);
}

/* Another thread, that has to run while we measure, and looks at the clock all the time. */
typedef struct Company {
        atomic_bool over;
        atomic_uint_fast64_t turns, lost_nsec;  /* looks; and the time between two that was no look's */
} Company;

/* What a write takes, and what each takes of another thread. company: NULL, or rounds count in which that ran. -EAGAIN:
 * there were too few. */
static int measure(const Company *company, uint32_t *ret, uint32_t *ret_lost) {
        _cleanup_close_ int fd = memfd_create("fault-cost", MFD_CLOEXEC);
        uint64_t until = now_nsec() + COMPANY_NSEC;
        uint32_t nsec[ROUNDS], lost[ROUNDS] = { 0 };

        if (fd < 0 || ftruncate(fd, (off_t)(PAGES * PAGE_BYTES)) < 0)
                return -errno;
        for (unsigned round = 0; round < ROUNDS;) {
                volatile uint8_t *pages = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
                uint64_t turns = 0, before = 0;

                if (pages == MAP_FAILED)
                        return -errno;
                for (unsigned i = 0; i < PAGES; i++)
                        (void)pages[i * PAGE_BYTES];
                if (company) {
                        turns = atomic_load(&company->turns);
                        before = atomic_load(&company->lost_nsec);
                }
                nsec[round] = write_to(pages);
                if (company)
                        lost[round] = (uint32_t)MIN_OF((atomic_load(&company->lost_nsec) - before) / PAGES, (uint64_t)NSEC_MAX);
                if (!company || atomic_load(&company->turns) > turns)
                        round++;
                (void)munmap((void *)(uintptr_t)pages, PAGES * PAGE_BYTES);
                if (company && now_nsec() > until && round < ROUNDS)
                        return -EAGAIN;
        }
        *ret = middle(nsec);
        *ret_lost = middle(lost);
        return 0;
}

static int measure_tracked_in(uint8_t *pages, uint32_t *ret) {
        _cleanup_close_ int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_WP_ASYNC };
        struct uffdio_register reg = { { (uintptr_t)pages, PAGES * PAGE_BYTES }, UFFDIO_REGISTER_MODE_WP, 0 };
        struct uffdio_writeprotect protect = { reg.range, UFFDIO_WRITEPROTECT_MODE_WP };
        uint32_t nsec[ROUNDS];

        if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 || ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
                return -errno;
        for (unsigned round = 0; round < ROUNDS; round++) {
                if (ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) < 0)
                        return -errno;
                nsec[round] = write_to(pages);
        }
        *ret = middle(nsec);
        return 0;
}

static int measure_tracked(uint32_t *ret) {
        uint8_t *pages = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                              -1, 0);
        int r;

        if (pages == MAP_FAILED)
                return -errno;
        r = measure_tracked_in(pages, ret);
        (void)munmap(pages, PAGES * PAGE_BYTES);
        return r;
}

static void *keep_company(void *userdata) {
        Company *company = userdata;
        uint64_t before = now_nsec();

        while (!atomic_load_explicit(&company->over, memory_order_relaxed)) {
                uint64_t now = now_nsec();

                if (now - before > LOOK_NSEC_MAX)
                        atomic_fetch_add_explicit(&company->lost_nsec, now - before, memory_order_relaxed);
                atomic_fetch_add_explicit(&company->turns, 1, memory_order_relaxed);
                before = now;
        }
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

/* As above, while another thread runs. -EAGAIN: others want all CPUs, so that the two never ran together. */
static int measure_in_company(uint32_t *ret, uint32_t *ret_lost) {
        Company company = {};
        pthread_t thread;
        int r = begin_company(&company, &thread);

        if (r < 0)
                return measure(NULL, ret, ret_lost); /* one CPU: there is nobody to be interrupted */
        r = measure(&company, ret, ret_lost);
        atomic_store(&company.over, true);
        pthread_join(thread, NULL);
        return r;
}

int host_fault_cost(HostFaultCost *ret) {
        uint32_t alone, together = 0, lost = 0, tracked = 0;
        int r = measure(NULL, &alone, &lost);

        if (r == 0)
                r = measure_in_company(&together, &lost);
        if (r < 0 && r != -EAGAIN)
                return r;
        (void)measure_tracked(&tracked);
        *ret = (HostFaultCost){
                .break_nsec = MAX_OF(alone, together),
                .flush_nsec = r == -EAGAIN ? 0 : lost,
                .write_nsec = tracked,
        };
        return 0;
}
