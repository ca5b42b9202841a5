/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What this kernel lets us do, found by doing it: version numbers lie (backports, configuration, seccomp filters,
 * security modules, lost capabilities), a call that worked does not.
 *
 * Everything is tried on a page of our own, or on a child made for the purpose that does nothing but wait to be killed.
 * Nothing is left behind: no knob is written, no process touched that is not ours.
 */

#include "host/kernel.h"

#include "base/io.h"
#include "host/ksm.h"
#include "host/pagemap.h"
#include "host/uapi.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>

/* Newer than the headers of Debian 12. */
#define GET_RSEQ_CONFIGURATION 0x420f /* Linux 5.13 */
#define GET_SYSCALL_USER_DISPATCH 0x4211 /* Linux 6.4 */
#define ADVICE_MERGEABLE 12
#define ADVICE_COLLAPSE 25 /* Linux 6.1 */

#define MAP_COUNT_USUAL 65530U
#define PROBE_WORD 0x6b736d642d757365ULL

/* What follows when it works, and when it does not. */
typedef enum FeatureId {
        F_PAGE_SIZE, F_PAGEMAP, F_KPAGEFLAGS, F_KPAGECOUNT, F_READV, F_MEM, F_PIDFD, F_PIDFD_GETFD, F_PTRACE,
        F_SUSPEND_SECCOMP, F_RSEQ, F_DISPATCH, F_MADVISE, F_COLLAPSE, F_IO_URING, F_PAGEMAP_SCAN, F_UFFD, F_WP_ASYNC,
        F_MOVE, F_ZERO_PAGE, F_FAULTS, F_KSM,
        F_KSM_WRITABLE, F_KSM_OURS, F_KSM_ALONE, F_KSM_ZERO, F_KSM_SMART, F_KSM_ADVISOR, F_NODES, F_CGROUP,
        F_CGROUP_ONLY, F_SWAP, F_MAP_COUNT, N_FEATURES,
} FeatureId;

static const struct {
        const char *name;
        bool required;
        const char *works, *absent;
} texts[N_FEATURES] = {
        [F_PAGE_SIZE] = { "4 KiB pages", true, "Pages are the size this program is built for.",
                "The daemon refuses to start: it handles base pages of 4 KiB only." },
        [F_PAGEMAP] = { "page frame numbers in /proc/PID/pagemap", true,
                "Frames shared already are read once, and savings are counted in frames.",
                "Nothing can be scanned: without CAP_SYS_ADMIN shared frames cannot be told from exclusive ones." },
        [F_KPAGEFLAGS] = { "/proc/kpageflags", true, "Pages that KSM merged are recognised.",
                "Merged, huge and zero pages cannot be recognised, so nothing can be scanned." },
        [F_KPAGECOUNT] = { "/proc/kpagecount", false, "How often a frame is mapped is known.",
                "A frame that processes outside the scan map too counts as if it were not shared with them." },
        [F_READV] = { "process_vm_readv", false, "Exclusively mapped pages are read the fast way.",
                "All pages are read through /proc/PID/mem, which takes about a third longer." },
        [F_MEM] = { "/proc/PID/mem", true, "Shared pages are read without breaking their sharing.",
                "Nothing can be scanned: reading shared pages any other way would unshare them." },
        [F_PIDFD] = { "pidfd_open", true, "A process is never mistaken for a later one with its number.",
                "The daemon refuses to start: a reused process number could not be noticed (Linux 5.3)." },
        [F_PIDFD_GETFD] = { "pidfd_getfd", false, "Descriptors can be taken out of a target.",
                "Which pages were written is not known: all is read again now and then (Linux 5.6)." },
        [F_PTRACE] = { "ptrace", true, "Targets can be asked to mark their own memory.",
                "Nothing can be marked: a security module (yama ptrace_scope=3) or a filter refuses ptrace." },
        [F_SUSPEND_SECCOMP] = { "PTRACE_O_SUSPEND_SECCOMP", false,
                "Targets under seccomp filters that refuse what a call needs can be merged.",
                "Targets under a seccomp filter that refuses madvise are left alone." },
        [F_RSEQ] = { "PTRACE_GET_RSEQ_CONFIGURATION", false,
                "A thread is not interrupted inside a restartable sequence.",
                "Threads that use restartable sequences are left alone (Linux 5.13)." },
        [F_DISPATCH] = { "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", false,
                "Targets that dispatch their own system calls are recognised.",
                "Targets that dispatch their own system calls (Wine) cannot be recognised: do not opt them in." },
        [F_MADVISE] = { "process_madvise(MADV_MERGEABLE)", false,
                "Memory is marked from outside, no thread is stopped.",
                "Memory is marked by the target itself: one of its threads is stopped for it (all mainline kernels)." },
        [F_COLLAPSE] = { "process_madvise(MADV_COLLAPSE)", false,
                "Huge pages that were split and hold nothing merged any more are made whole again.",
                "Huge pages that were split for merging stay split until khugepaged comes along (Linux 6.1)." },
        [F_IO_URING] = { "io_uring", true, "The event loop can run.",
                "The daemon cannot start: see the sysctl kernel.io_uring_disabled, or the service's seccomp filter." },
        [F_PAGEMAP_SCAN] = { "PAGEMAP_SCAN", false, "Page kinds are looked up by range.",
                "Every page of a mapping is looked up one by one, 40 ns each, present or not (Linux 6.7)." },
        [F_UFFD] = { "userfaultfd of a process's own faults", false,
                "Targets can make one for us, whatever their privileges.",
                "Written pages cannot be tracked: a filter or security module refuses it, or Linux before 5.11." },
        [F_WP_ASYNC] = { "tracking by PAGEMAP_SCAN and userfaultfd WP_ASYNC", false,
                "Only pages that were written are read again.",
                "Which pages were written is not known: what does not change is read again now and then, in "
                "samples that grow seldom, and what changes is found later (Linux 6.7)." },
        [F_MOVE] = { "UFFDIO_MOVE", false, "Routes zero and remap have the guard they need.",
                "Routes zero and remap cannot be used (Linux 6.8)." },
        [F_ZERO_PAGE] = { "the zero page", false, "Memory that was given back takes no page until it is written.",
                "Memory that was given back takes a page again when it is read: the kernel maps no zero page in its place "
                "(guests of PVM; s390 with storage keys)." },
        [F_FAULTS] = { "page faults as fast as the CPU's", false, "A write to a merged page costs some microseconds.",
                "A write to a merged page costs as much as ten elsewhere, and so does what routes zero and remap do: a hypervisor "
                "shadows the page tables. Route=advise suits best, with a longer PayBack=." },
        [F_KSM] = { "KSM", false, "Route advise can be used.",
                "Route advise cannot be used: the kernel is built without CONFIG_KSM, or /sys is not mounted." },
        [F_KSM_WRITABLE] = { "KSM can be controlled", false, "ksmd is run in bursts and rests otherwise.",
                "Route advise cannot be used: /sys/kernel/mm/ksm is read-only here." },
        [F_KSM_OURS] = { "KSM is left to us (run is 0)", false, "ksmd runs only while something is to be merged.",
                "KSM's run is 1 (somebody runs ksmd, or the daemon merges at this moment) or 2 (somebody had all "
                "of it unmerged): what somebody set stays so until he writes 0." },
        [F_KSM_ALONE] = { "nobody uses KSM yet", false, "Only what this daemon marks is merged.",
                "All processes with memory in KSM share its one merge space: the daemon's targets and any others." },
        [F_KSM_ZERO] = { "KSM use_zero_pages", false, "All-zero pages become the kernel's zero page.",
                "All-zero pages are merged like any others (Linux 4.12)." },
        [F_KSM_SMART] = { "KSM smart_scan", false, "ksmd skips marked pages that never find a twin.",
                "ksmd looks at every marked page in every burst (Linux 6.7)." },
        [F_KSM_ADVISOR] = { "KSM advisor is off", false, "pages_to_scan holds what is written to it.",
                "The advisor is switched off for each burst and on again after it, and then starts to learn anew." },
        [F_NODES] = { "merging across NUMA nodes", false, "Equal pages merge wherever they are.",
                "Pages merge only within a NUMA node (KSM's merge_across_nodes is 0)." },
        [F_CGROUP] = { "cgroup v2", true, "Cgroups can be opted in.",
                "Nothing can be opted in: no cgroup v2 hierarchy is mounted at /sys/fs/cgroup or its unified/." },
        [F_CGROUP_ONLY] = { "unified cgroup hierarchy", false, "All processes are where their controllers are.",
                "The layout is hybrid: patterns match the paths below the v2 mount (unified/), not those of v1." },
        [F_SWAP] = { "no swap", false, "Nothing that is read can be swapped in by it.",
                "Pages that are swapped out are neither read nor merged." },
        [F_MAP_COUNT] = { "vm.max_map_count is not lowered", false, "Marking may split mappings up to a quarter of it.",
                "It is below the kernel's default of 65530: less can be marked in processes with many mappings." },
};

typedef struct Probe {
        HostKernel *host;
        uint64_t *page;         /* holds PROBE_WORD, in the child too */
        int null_fd;            /* an open descriptor the child has too */
        pid_t child;
        int pidfd;
} Probe;

/* 1: it worked; 0: the kernel does not know it; -errno: it knows it but refused. */
static int state_of(bool worked) {
        if (worked)
                return 1;
        switch (errno) {
        case ENOSYS:
        case EINVAL:
        case ENOTTY:
        case ENOENT:
        case ENXIO:
        case ESRCH:
        case EIO: /* ptrace(2), of a request it does not know */
        case EOPNOTSUPP:
                return 0;
        default:
                return -errno;
        }
}

/* Returns whether it works, for the flag beside it. */
static bool set(HostKernel *host, FeatureId id, int state) {
        host->features[id] = (HostFeature){
                .name = texts[id].name,
                .state = state,
                .required = texts[id].required,
                .follows = state > 0 ? texts[id].works : texts[id].absent,
        };
        return state > 0;
}

static int open_read_u64(const char *path, uint64_t index, uint64_t *ret) {
        _cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n;

        if (fd < 0)
                return state_of(false);
        n = pread(fd, ret, sizeof *ret, (off_t)(index * sizeof *ret));
        if (n < 0)
                return state_of(false);
        return n == sizeof *ret;
}

static void probe_frames(Probe *p) {
        HostKernel *host = p->host;
        uint64_t entry = 0, pfn, value;
        int state;

        state = open_read_u64("/proc/self/pagemap", (uint64_t)(uintptr_t)p->page / PAGE_BYTES, &entry);
        pfn = entry & PAGEMAP_PFN;
        if (state > 0 && pfn == 0)
                state = -EPERM; /* the kernel shows 0 to those it does not trust */
        host->pagemap_pfns = set(host, F_PAGEMAP, state);
        host->kpageflags = set(host, F_KPAGEFLAGS, open_read_u64("/proc/kpageflags", pfn, &value));
        (void)set(host, F_KPAGECOUNT, open_read_u64("/proc/kpagecount", pfn, &value));
}

/* What is read before it is written is nobody's own page. */
static void probe_zero_page(HostKernel *host) {
        volatile uint64_t *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t entry = 0;
        int state;

        if (page == MAP_FAILED) {
                (void)set(host, F_ZERO_PAGE, -errno);
                return;
        }
        state = *page == 0 ? open_read_u64("/proc/self/pagemap", (uint64_t)(uintptr_t)page / PAGE_BYTES, &entry) : 0;
        (void)set(host, F_ZERO_PAGE, state > 0 ? !(entry & PAGEMAP_EXCLUSIVE) : state);
        munmap((void *)page, PAGE_BYTES);
}

static void probe_pagemap_scan(Probe *p) {
        _cleanup_close_ int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        PagemapRegion region;
        PagemapScan scan = {
                .size = sizeof scan,
                .start = (uint64_t)(uintptr_t)p->page,
                .end = (uint64_t)(uintptr_t)p->page + PAGE_BYTES,
                .vec = (uint64_t)(uintptr_t)&region,
                .vec_len = 1,
                .category_mask = PAGEMAP_SCAN_PRESENT,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };
        bool worked = fd >= 0 && ioctl(fd, PAGEMAP_SCAN_IOCTL, &scan) == 1;

        p->host->pagemap_scan = set(p->host, F_PAGEMAP_SCAN, state_of(worked));
}

/* As a target makes it: of faults in user mode only, which needs no privilege. */
static int try_userfaultfd(uint64_t features) {
        _cleanup_close_ int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        struct uffdio_api api = { .api = UFFD_API, .features = features };

        if (fd < 0)
                return state_of(false);
        return state_of(ioctl(fd, UFFDIO_API, &api) == 0);
}

/* Protects a page, writes to it, has the kernel write to it, and asks each time whether it was written. */
static int try_tracking(Probe *p) {
        _cleanup_close_ int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        _cleanup_close_ int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        _cleanup_close_ int random = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        struct uffdio_api api = { .api = UFFD_API, .features = UAPI_UFFD_WP_ASYNC };
        struct uffdio_register reg = { { (uintptr_t)p->page, PAGE_BYTES }, UFFDIO_REGISTER_MODE_WP, 0 };
        PagemapRegion region;
        PagemapScan scan = {
                .size = sizeof scan,
                .flags = PAGEMAP_SCAN_PROTECT,
                .start = (uintptr_t)p->page,
                .end = (uintptr_t)p->page + PAGE_BYTES,
                .vec = (uintptr_t)&region,
                .vec_len = 1,
                .category_mask = PAGEMAP_SCAN_WPALLOWED | PAGEMAP_SCAN_WRITTEN | PAGEMAP_SCAN_PRESENT,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };
        static const int expected[] = { 1, 0, 1, 1 };

        if (uffd < 0 || pagemap < 0 || random < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 ||
            ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
                return state_of(false);
        for (size_t i = 0; i < ELEMENTSOF(expected); i++) {
                int n;

                if (i == 2)
                        *(volatile uint64_t *)p->page = PROBE_WORD;
                if (i == 3 && read(random, p->page + 1, sizeof *p->page) != sizeof *p->page)
                        return state_of(false);
                n = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan);
                if (n < 0)
                        return state_of(false);
                if (n != expected[i])
                        return 0;
        }
        return 1;
}

static int try_io_uring(void) {
        struct io_uring_params params = {};
        int fd = (int)syscall(SYS_io_uring_setup, 1, &params);

        if (fd < 0)
                return state_of(false);
        safe_close(fd);
        return 1;
}

static int child_main(pid_t parent) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (getppid() == parent)
                pause();
        return 0;
}

static void probe_reading(Probe *p) {
        uint64_t word = 0;
        struct iovec local = { &word, sizeof word }, remote = { p->page, sizeof word };
        _cleanup_close_ int fd = -EBADF;
        char path[32];
        ssize_t n;

        n = process_vm_readv(p->child, &local, 1, &remote, 1, 0);
        p->host->process_vm_readv = set(p->host, F_READV, state_of(n == sizeof word && word == PROBE_WORD));
        word = 0;
        snprintf(path, sizeof path, "/proc/%d/mem", (int)p->child);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        n = fd < 0 ? -1 : pread(fd, &word, sizeof word, (off_t)(uintptr_t)p->page);
        p->host->proc_mem = set(p->host, F_MEM, state_of(n == sizeof word && word == PROBE_WORD));
}

static void probe_pidfd(Probe *p) {
        struct iovec remote = { p->page, PAGE_BYTES };
        int fd;

        p->pidfd = (int)syscall(SYS_pidfd_open, p->child, 0);
        p->host->pidfd = set(p->host, F_PIDFD, state_of(p->pidfd >= 0));
        if (p->pidfd < 0)
                errno = ENOSYS;
        fd = p->pidfd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, p->pidfd, p->null_fd, 0);
        p->host->pidfd_getfd = set(p->host, F_PIDFD_GETFD, state_of(fd >= 0));
        safe_close(fd);
        /* Mainline answers EINVAL: the advice may not be given to others. */
        p->host->process_madvise_mergeable = set(p->host, F_MADVISE, state_of(p->pidfd >= 0 &&
                syscall(SYS_process_madvise, p->pidfd, &remote, 1, ADVICE_MERGEABLE, 0) == (long)PAGE_BYTES));
        /* The advice is looked at before the ranges are. */
        remote.iov_len = 0;
        set(p->host, F_COLLAPSE, state_of(p->pidfd >= 0 &&
                syscall(SYS_process_madvise, p->pidfd, &remote, 1, ADVICE_COLLAPSE, 0) == 0));
}

static void probe_ptrace(Probe *p) {
        HostKernel *host = p->host;
        char config[64]; /* either of the two structures; neither is that large */
        int status;

        host->suspend_seccomp = set(host, F_SUSPEND_SECCOMP,
                state_of(ptrace(PTRACE_SEIZE, p->child, NULL, PTRACE_O_SUSPEND_SECCOMP) == 0));
        host->ptrace = host->suspend_seccomp || ptrace(PTRACE_SEIZE, p->child, NULL, NULL) == 0;
        if (host->ptrace)
                host->ptrace = ptrace(PTRACE_INTERRUPT, p->child, NULL, NULL) == 0 &&
                               waitpid(p->child, &status, __WALL) == p->child && WIFSTOPPED(status);
        (void)set(host, F_PTRACE, state_of(host->ptrace));
        if (!host->ptrace) {
                (void)set(host, F_RSEQ, state_of(false));
                (void)set(host, F_DISPATCH, state_of(false));
                return;
        }
        (void)set(host, F_RSEQ, state_of(ptrace(GET_RSEQ_CONFIGURATION, p->child, 24, config) >= 0));
        (void)set(host, F_DISPATCH, state_of(ptrace(GET_SYSCALL_USER_DISPATCH, p->child, 32, config) >= 0));
}

static void probe_child(Probe *p) {
        static const FeatureId ids[] = { F_READV, F_MEM, F_PIDFD, F_PIDFD_GETFD, F_PTRACE, F_SUSPEND_SECCOMP, F_RSEQ,
                                         F_DISPATCH, F_MADVISE };
        pid_t self = getpid();

        p->child = fork();
        if (p->child < 0) {
                int state = -errno;
                for (size_t i = 0; i < ELEMENTSOF(ids); i++)
                        (void)set(p->host, ids[i], state);
                return;
        }
        if (p->child == 0)
                _exit(child_main(self));
        probe_reading(p);
        probe_pidfd(p);
        probe_ptrace(p);
        (void)kill(p->child, SIGKILL);
        while (waitpid(p->child, NULL, __WALL) == p->child || errno == EINTR)
                ; /* until it is gone: a ptrace stop may still be waiting to be told */
        p->pidfd = safe_close(p->pidfd);
}

/* Nobody may have marked anything, before it can be said that nobody has. */
static void probe_ksm_alone(HostKernel *host) {
        _cleanup_closedir_ DIR *proc = NULL;
        int r = open_directory(AT_FDCWD, "/proc", &proc);
        bool tells;

        if (r < 0) {
                (void)set(host, F_KSM_ALONE, r);
                return;
        }
        for (const struct dirent *entry; (entry = readdir(proc));) {
                KsmProcess process;

                if (dirent_pid(entry) == 0)
                        continue;
                r = ksm_process(dirfd(proc), entry->d_name, &process) ?: r;
                host->n_ksm_processes += process.offers;
        }
        tells = ksm_tells_offers(dirfd(proc));
        (void)set(host, F_KSM_ALONE, host->n_ksm_processes > 0 ? 0 : r < 0 ? r : tells ? 1 : -ENODATA);
        if (host->n_ksm_processes == 0 && r == 0 && !tells)
                host->features[F_KSM_ALONE].follows =
                        "Who has offered memory that ksmd has not come to yet cannot be told (Linux 6.17); he would share the "
                        "one merge space.";
}

static void probe_ksm(HostKernel *host) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        KsmKnobs knobs = {};
        int r, fd;

        r = ksm_new(NULL, NULL, &ksm);
        if (r == 0)
                r = ksm_knobs(ksm, &knobs);
        host->ksm = set(host, F_KSM, r == 0 ? 1 : r == -ENOENT ? 0 : r);
        fd = open("/sys/kernel/mm/ksm/run", O_WRONLY | O_CLOEXEC);
        host->ksm_writable = set(host, F_KSM_WRITABLE, state_of(fd >= 0));
        safe_close(fd);
        host->ksm_zero_pages = set(host, F_KSM_ZERO,
                                   state_of(access("/sys/kernel/mm/ksm/use_zero_pages", F_OK) == 0));
        (void)set(host, F_KSM_SMART, state_of(access("/sys/kernel/mm/ksm/smart_scan", F_OK) == 0));
        (void)set(host, F_KSM_OURS, host->ksm && knobs.run == 0);
        (void)set(host, F_KSM_ADVISOR, !knobs.advisor);
        (void)set(host, F_NODES, host->n_nodes <= 1 || knobs.merge_across_nodes == 1);
        probe_ksm_alone(host);
}

static unsigned count_nodes(void) {
        _cleanup_closedir_ DIR *nodes = NULL;
        unsigned n = 0;

        if (open_directory(AT_FDCWD, "/sys/devices/system/node", &nodes) < 0)
                return 1;
        for (const struct dirent *entry; (entry = readdir(nodes));)
                n += strncmp(entry->d_name, "node", 4) == 0 && entry->d_name[4] >= '0' && entry->d_name[4] <= '9';
        return MAX_OF(n, 1U);
}

static bool is_cgroup2(const char *path) {
        struct statfs fs;
        return statfs(path, &fs) == 0 && fs.f_type == CGROUP2_SUPER_MAGIC;
}

bool host_has_swap(void) {
        struct sysinfo info;
        return sysinfo(&info) == 0 && info.totalswap > 0;
}

static void probe_host(HostKernel *host) {
        struct sysinfo info;
        struct utsname name;
        uint64_t count = 0;
        long cpus;

        if (uname(&name) == 0)
                snprintf(host->release, sizeof host->release, "%.64s", name.release);
        if (sysinfo(&info) == 0)
                host->memory_bytes = (uint64_t)info.totalram * info.mem_unit;
        host->swap = host_has_swap();
        cpus = sysconf(_SC_NPROCESSORS_ONLN);
        host->n_cpus = cpus > 0 ? (unsigned)cpus : 1;
        host->n_nodes = count_nodes();
        (void)set(host, F_SWAP, !host->swap);
        if (read_u64(AT_FDCWD, "/proc/sys/vm/max_map_count", &count) < 0 || count > UINT32_MAX)
                count = MAP_COUNT_USUAL;
        host->max_map_count = (unsigned)count;
        (void)set(host, F_MAP_COUNT, count >= MAP_COUNT_USUAL);
        (void)set(host, F_CGROUP, is_cgroup2("/sys/fs/cgroup") || is_cgroup2("/sys/fs/cgroup/unified"));
        (void)set(host, F_CGROUP_ONLY, is_cgroup2("/sys/fs/cgroup"));
}

void host_kernel_probe(HostKernel *ret) {
        Probe probe = { .host = ret, .null_fd = -EBADF, .pidfd = -EBADF };
        void *page;

        _Static_assert(N_FEATURES <= ELEMENTSOF(ret->features), "room for every feature");
        memset(ret, 0, sizeof *ret);
        ret->n_features = N_FEATURES;
        ret->page_size_supported = set(ret, F_PAGE_SIZE, sysconf(_SC_PAGESIZE) == (long)PAGE_BYTES);
        probe_host(ret);
        probe_zero_page(ret);
        int r = host_fault_cost(&ret->fault_cost);
        (void)set(ret, F_FAULTS, r < 0 ? r : ret->fault_cost.break_nsec < HOST_BREAK_DEAR_NSEC);
        probe_ksm(ret);
        ret->io_uring = set(ret, F_IO_URING, try_io_uring());
        (void)set(ret, F_UFFD, try_userfaultfd(0));
        ret->uffd_move = set(ret, F_MOVE, try_userfaultfd(UAPI_UFFD_MOVE));

        page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page != MAP_FAILED) {
                probe.page = page;
                *probe.page = PROBE_WORD;
                probe.null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
                probe_frames(&probe);
                probe_pagemap_scan(&probe);
                ret->uffd_wp_async = set(ret, F_WP_ASYNC, try_tracking(&probe));
                probe_child(&probe);
                safe_close(probe.null_fd);
                (void)munmap(page, PAGE_BYTES);
        }
        for (size_t i = 0; i < N_FEATURES; i++) /* what could not even be tried */
                if (!ret->features[i].name)
                        (void)set(ret, (FeatureId)i, -ENOMEM);
        /* A kernel that takes the advice from outside needs no ptrace. */
        if (ret->process_madvise_mergeable)
                ret->features[F_PTRACE].required = false;
}
