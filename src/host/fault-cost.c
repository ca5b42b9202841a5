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
#include <sys/resource.h>
#include <sys/syscall.h>

/*
 * The pages are private mappings of a file's: the kernel takes the same way when they are written to as with pages of KSM
 * and of a pool. Measured alone and with another thread of ours on another CPU, which has to be told of each.
 */
#define PAGES 16U
#define ROUNDS 9U               /* the middle one counts: what the hypervisor takes shows nowhere */
#define NSEC_MIN 200U
#define NSEC_MAX (1000 * 1000U)
#define LOOK_NSEC_MAX 200U      /* longer than a look at the clock takes: it was interrupted */
#define TRY_NSEC (100 * NSEC_PER_MSEC)  /* for so long rounds are tried in which nobody else had our CPUs */

static int compare(const void *a, const void *b) {
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

        return x < y ? -1 : x > y;
}

static uint64_t thread_switches(void) {
        struct rusage usage;

        (void)getrusage(RUSAGE_THREAD, &usage);
        return (uint64_t)usage.ru_nivcsw + (uint64_t)usage.ru_nvcsw;
}

/* What a write takes, each page being written to once. false: somebody else had the CPU meanwhile. */
static bool write_to(volatile uint8_t *pages, uint32_t *ret) {
        uint64_t switches = thread_switches(), begun = now_nsec();

        for (unsigned i = 0; i < PAGES; i++)
                pages[i * PAGE_BYTES] = 1;
        *ret = (uint32_t)MIN_OF((now_nsec() - begun) / PAGES, (uint64_t)NSEC_MAX);
        return thread_switches() == switches;
}

/* What rounds came to in which nobody else had our CPUs; tried for a while. */
typedef struct Rounds {
        uint64_t until_nsec;
        uint32_t nsec[ROUNDS], lost[ROUNDS];
        uint32_t least;                 /* of all, those that do not count included */
        unsigned n;
} Rounds;

static Rounds rounds_begin(void) { return (Rounds){ .until_nsec = now_nsec() + TRY_NSEC, .least = NSEC_MAX }; }

/* The round at hand is over: whether there is to be another. */
static bool rounds_next(Rounds *rounds, bool undisturbed) {
        rounds->least = MIN_OF(rounds->least, rounds->nsec[rounds->n]);
        rounds->n += undisturbed;
        return rounds->n < ROUNDS && now_nsec() < rounds->until_nsec;
}

static uint32_t middle(uint32_t *nsec, unsigned n) {
        qsort(nsec, n, sizeof *nsec, compare);
        return MAX_OF(nsec[n / 2], NSEC_MIN);
}

static uint32_t rounds_nsec(Rounds *rounds) { return rounds->n > 0 ? middle(rounds->nsec, rounds->n) : rounds->least; }

/* Another thread, that has to run while we measure, and looks at the clock all the time. */
typedef struct Company {
        atomic_bool over;
        atomic_uint_fast64_t turns, lost_nsec;  /* looks; and the time between two that was no look's */
        atomic_uint_fast64_t switches;          /* of it, as of the last such time */
} Company;

typedef struct CompanyLook {
        uint64_t turns, lost_nsec, switches;
} CompanyLook;

/* One that it began after now, so that what happened until now is in it. */
static void look_at_company(const Company *company, uint64_t until, CompanyLook *ret) {
        uint64_t turns = atomic_load(&company->turns);

        while (atomic_load(&company->turns) < turns + 2 && now_nsec() < until)
                ;
        *ret = (CompanyLook){ atomic_load(&company->turns), atomic_load(&company->lost_nsec),
                              atomic_load(&company->switches) };
}

/* What a write takes, and what each takes of the other thread. false: somebody else had one of the CPUs. */
static bool write_in_company(const Company *company, volatile uint8_t *pages, uint64_t until, uint32_t *ret,
                             uint32_t *ret_lost) {
        CompanyLook before, after;
        bool undisturbed;

        look_at_company(company, until, &before);
        undisturbed = write_to(pages, ret);
        look_at_company(company, until, &after);
        *ret_lost = (uint32_t)MIN_OF((after.lost_nsec - before.lost_nsec) / PAGES, (uint64_t)NSEC_MAX);
        return undisturbed && after.turns > before.turns && after.switches == before.switches;
}

/* What a write takes, and what each takes of another thread. company: or NULL. -EAGAIN: it and we never ran together. */
static int measure(const Company *company, uint32_t *ret, uint32_t *ret_lost) {
        _cleanup_close_ int fd = memfd_create("fault-cost", MFD_CLOEXEC);
        Rounds rounds = rounds_begin();
        bool undisturbed;

        if (fd < 0 || ftruncate(fd, (off_t)(PAGES * PAGE_BYTES)) < 0)
                return -errno;
        do {
                volatile uint8_t *pages = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
                uint32_t *nsec = &rounds.nsec[rounds.n], *lost = &rounds.lost[rounds.n];

                if (pages == MAP_FAILED)
                        return -errno;
                for (unsigned i = 0; i < PAGES; i++)
                        (void)pages[i * PAGE_BYTES];
                undisturbed = company ? write_in_company(company, pages, rounds.until_nsec, nsec, lost) :
                                        write_to(pages, nsec);
                (void)munmap((void *)(uintptr_t)pages, PAGES * PAGE_BYTES);
        } while (rounds_next(&rounds, undisturbed));
        if (rounds.n == 0 && company)
                return -EAGAIN;
        *ret = rounds_nsec(&rounds);
        *ret_lost = rounds.n > 0 ? middle(rounds.lost, rounds.n) : 0;
        return 0;
}

static int measure_tracked_in(uint8_t *pages, uint32_t *ret) {
        _cleanup_close_ int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_WP_ASYNC };
        struct uffdio_register reg = { { (uintptr_t)pages, PAGES * PAGE_BYTES }, UFFDIO_REGISTER_MODE_WP, 0 };
        struct uffdio_writeprotect protect = { reg.range, UFFDIO_WRITEPROTECT_MODE_WP };
        Rounds rounds = rounds_begin();
        bool undisturbed;

        if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 || ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
                return -errno;
        do {
                if (ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) < 0)
                        return -errno;
                undisturbed = write_to(pages, &rounds.nsec[rounds.n]);
        } while (rounds_next(&rounds, undisturbed));
        *ret = rounds_nsec(&rounds);
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

                if (now - before > LOOK_NSEC_MAX) {
                        atomic_fetch_add(&company->lost_nsec, now - before);
                        atomic_store(&company->switches, thread_switches());
                        now = now_nsec(); /* that was no interruption */
                }
                atomic_fetch_add(&company->turns, 1);
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

/* The same while another thread runs. -EAGAIN: others want all CPUs, so that the two never ran together. */
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
