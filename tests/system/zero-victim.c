/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "zero-victim.h"

#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define OWNERS 4U       /* page % OWNERS: three threads, and the outsider */
#define OUTSIDER 3U
#define FIXED_PAGES 8U  /* registered with io_uring: pinned; thread 0's among them are read into */
#define DATA_BYTES (64 * PAGE_BYTES)

static ZeroVictim *v;
static char *memory;
static int data_fd, direct_fd;
static char *data;              /* what both files hold */
static char gate[32];

static uint64_t next_random(uint64_t *seed) {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        return *seed;
}

static void __attribute__((format(printf, 1, 2))) wrong(const char *format, ...) {
        va_list ap;
        if (__atomic_fetch_add(&v->errors, 1, __ATOMIC_RELAXED) > 0)
                return;
        va_start(ap, format);
        vsnprintf(v->first, sizeof v->first, format, ap);
        va_end(ap);
}

static char *page_at(unsigned page) { return memory + page * PAGE_BYTES; }

static void check(unsigned page, const char *who) {
        if (memcmp(page_at(page), v->expected[page], PAGE_BYTES) != 0) {
                unsigned at = 0;
                while (page_at(page)[at] == v->expected[page][at] && at < PAGE_BYTES - 1)
                        at++;
                wrong("%s: page %u byte %u is %#x, not %#x (operation %lu)", who, page, at, (uint8_t)page_at(page)[at],
                      (uint8_t)v->expected[page][at], v->operations);
                memcpy(v->expected[page], page_at(page), PAGE_BYTES);
        }
        v->checks++;
}

static int result_of(struct io_uring *ring) {
        struct io_uring_cqe *cqe;
        while (io_uring_wait_cqe(ring, &cqe) == -EINTR)
                ;
        int result = cqe->res;
        io_uring_cqe_seen(ring, cqe);
        return result;
}

/* A worker of io_uring, which nobody can stop, writes into our page. */
static void read_by_worker(struct io_uring *ring, unsigned page, bool fixed, uint64_t random) {
        unsigned at = (unsigned)(random % (PAGE_BYTES - 64)) & ~7U;
        uint64_t from = random >> 20 & 0xfff;
        struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
        if (fixed)
                io_uring_prep_read_fixed(sqe, data_fd, page_at(page) + at, 64, from, 0);
        else
                io_uring_prep_read(sqe, data_fd, page_at(page) + at, 64, from);
        io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
        if (io_uring_submit(ring) != 1)
                wrong("submit");
        int r = result_of(ring);
        if (r != 64)
                wrong("io_uring read: %d", r);
        memcpy(v->expected[page] + at, data + from, 64);
        *(fixed ? &v->fixed_reads : &v->worker_reads) += 1;
}

/* A worker discards our page, at a moment that the doorman chooses: we may stand then. What is discarded stays so. */
static void discard_by_worker(struct io_uring *ring, unsigned page) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
        io_uring_prep_openat(sqe, AT_FDCWD, gate, O_RDONLY | O_CLOEXEC, 0);
        io_uring_sqe_set_flags(sqe, IOSQE_ASYNC | IOSQE_IO_LINK);
        sqe = io_uring_get_sqe(ring);
        io_uring_prep_madvise(sqe, page_at(page), PAGE_BYTES, MADV_DONTNEED);
        io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
        if (io_uring_submit(ring) != 2)
                wrong("submit");
        int passed = result_of(ring), discarded = result_of(ring);
        if (passed < 0 || discarded != 0)
                wrong("io_uring madvise: %d, %d", passed, discarded);
        close(passed);
        memset(v->expected[page], 0, PAGE_BYTES);
        check(page, "after a worker");
        v->worker_discards++;
}

/* Whoever waits at the gate, a FIFO, passes. */
static void run_doorman(void) {
        uint64_t seed = 0x9e3779b97f4a7c15;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
                usleep((useconds_t)(next_random(&seed) % 600));
                int fd = open(gate, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
                if (fd >= 0)
                        close(fd);
        }
}

static void make_gate(void) {
        char path[] = "zero-victim-XXXXXX";
        int fd = mkostemp(path, O_CLOEXEC);
        CHECK(fd >= 0 && unlink(path) == 0 && close(fd) == 0 && mkfifo(path, 0600) == 0);
        fd = open(path, O_PATH | O_CLOEXEC);
        CHECK(fd >= 0 && unlink(path) == 0);
        snprintf(gate, sizeof gate, "/proc/self/fd/%d", fd);
}

static void read_file(unsigned page, bool direct, uint64_t random) {
        unsigned at = direct ? 0 : (unsigned)(random % (PAGE_BYTES - 64)) & ~7U;
        size_t n = direct ? PAGE_BYTES : 64;
        off_t from = direct ? (off_t)(random >> 20 & 0x1f) * (off_t)PAGE_BYTES : (off_t)(random >> 20 & 0xfff);
        if (pread(direct ? direct_fd : data_fd, page_at(page) + at, n, from) != (ssize_t)n)
                wrong("pread: %s", strerror(errno));
        memcpy(v->expected[page] + at, data + from, n);
        v->direct_reads += direct;
}

static void map_anew(unsigned page) {
        if (mmap(page_at(page), PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
            MAP_FAILED)
                wrong("mmap: %s", strerror(errno));
        memset(v->expected[page], 0, PAGE_BYTES);
}

static void *write_thread(void *arg) {
        unsigned me = (unsigned)(uintptr_t)arg;
        uint64_t seed = 0x9e3779b97f4a7c15 * (me + 1) + (uint64_t)getpid();
        struct io_uring ring;
        struct iovec fixed = {memory, FIXED_PAGES * PAGE_BYTES};
        if (io_uring_queue_init(8, &ring, 0) < 0)
                return wrong("io_uring"), NULL;
        if (me == 0 && io_uring_register_buffers(&ring, &fixed, 1) < 0)
                return wrong("registering buffers"), NULL;
        while (!v->stop) {
                uint64_t random = next_random(&seed), what = random % 1000;
                unsigned page = (unsigned)(random >> 32) % (ZERO_VICTIM_PAGES / OWNERS) * OWNERS + me;
                bool pinned = page < FIXED_PAGES;
                random >>= 12;
                v->operations++;
                if (what < 400)
                        check(page, "thread");
                else if (what < 700) {
                        memset(page_at(page), 0, PAGE_BYTES);
                        memset(v->expected[page], 0, PAGE_BYTES);
                } else if (what < 850) {
                        unsigned word = random & 511;
                        ((volatile uint64_t *)(void *)page_at(page))[word] = random;
                        ((uint64_t *)(void *)v->expected[page])[word] = random;
                } else if (what < 900 && !pinned) {
                        if (madvise(page_at(page), PAGE_BYTES, MADV_DONTNEED) < 0)
                                wrong("madvise");
                        memset(v->expected[page], 0, PAGE_BYTES);
                } else if (what < 920 && !pinned)
                        map_anew(page);
                else if (what < 960)
                        read_file(page, false, random);
                else if (what < 970 && direct_fd >= 0)
                        read_file(page, true, random);
                else if (what < 985)
                        read_by_worker(&ring, page, pinned && me == 0, random);
                else if (!pinned)
                        discard_by_worker(&ring, page);
                /* Two CPUs for a dozen threads: who never sleeps can hardly be stopped in time. */
                if (v->operations % 32 == me)
                        usleep(150);
        }
        io_uring_queue_exit(&ring);
        return NULL;
}

/* Zero for a while, then not at another time: what is taken out of the one must not be missing in the other. */
static void *churn_thread(void *unused) {
        for (uint64_t round = 1; !v->stop; round++) {
                char *p = mmap(NULL, ZERO_VICTIM_CHURN * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                volatile uint64_t *words = (volatile uint64_t *)(void *)p;
                size_t n = ZERO_VICTIM_CHURN * PAGE_BYTES / 8;
                uint64_t until = now_nsec() + 200 * NSEC_PER_USEC;
                if (p == MAP_FAILED)
                        continue;
                if (round % 2) {
                        memset(p, 0, ZERO_VICTIM_CHURN * PAGE_BYTES);
                        v->churn = p;
                        while (now_nsec() < until)
                                ;
                } else {
                        for (size_t i = 0; i < n; i++)
                                words[i] = round + i;
                        do
                                for (size_t i = 0; i < n; i += 17)
                                        if (words[i] != round + i) {
                                                wrong("churn: word %zu", i);
                                                break;
                                        }
                        while (now_nsec() < until);
                }
                munmap(p, ZERO_VICTIM_CHURN * PAGE_BYTES);
                v->churns++;
                usleep(300);
        }
        return NULL;
}

static char still(unsigned page, unsigned at) { return page % 3 ? (char)(page * 7 + at + 1) : 0; }

static void check_child(void) {
        for (unsigned page = 0; page < ZERO_VICTIM_STILL; page++)
                for (unsigned at = 0; at < PAGE_BYTES; at += 61)
                        if (page_at(ZERO_VICTIM_PAGES + page)[at] != still(page, at))
                                _exit(1);
        page_at(ZERO_VICTIM_PAGES + 3)[5] ^= 1;
        _exit(0);
}

static void *fork_thread(void *unused) {
        uint64_t seed = (uint64_t)getpid();
        while (!v->stop) {
                int status = 0;
                for (unsigned page = 0; page < ZERO_VICTIM_STILL; page++) { /* alone ours again, so that it can be moved */
                        volatile char *byte = page_at(ZERO_VICTIM_PAGES + page);
                        *byte = *byte;
                }
                usleep((useconds_t)(next_random(&seed) % 1000));
                pid_t child = fork();
                if (child == 0)
                        check_child();
                if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
                        wrong("child: %#x", status);
                v->forks++;
        }
        return NULL;
}

static void run_victim(bool forks) {
        pthread_t threads[5];
        unsigned n = 0;
        size_t bytes = (ZERO_VICTIM_PAGES + ZERO_VICTIM_STILL) * PAGE_BYTES;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        memset(memory, 0, bytes);
        for (unsigned page = 0; page < ZERO_VICTIM_STILL; page++)
                for (unsigned at = 0; at < PAGE_BYTES; at++)
                        page_at(ZERO_VICTIM_PAGES + page)[at] = still(page, at);
        data = malloc(DATA_BYTES);
        for (size_t i = 0; i < DATA_BYTES; i++)
                data[i] = i / PAGE_BYTES % 3 ? (char)(i * 31 + i / PAGE_BYTES) : 0;
        data_fd = memfd_create("data", MFD_CLOEXEC);
        CHECK(write(data_fd, data, DATA_BYTES) == (ssize_t)DATA_BYTES);
        char path[] = "zero-victim-XXXXXX";
        int fd = mkostemp(path, O_CLOEXEC);
        CHECK(fd >= 0 && write(fd, data, DATA_BYTES) == (ssize_t)DATA_BYTES && fsync(fd) == 0);
        direct_fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC); /* a file system may have none */
        unlink(path);
        close(fd);
        v->pid = getpid();
        for (unsigned i = 0; i < OWNERS - 1; i++)
                CHECK(pthread_create(&threads[n++], NULL, write_thread, (void *)(uintptr_t)i) == 0);
        CHECK(pthread_create(&threads[n++], NULL, churn_thread, NULL) == 0);
        if (forks)
                CHECK(pthread_create(&threads[n++], NULL, fork_thread, NULL) == 0);
        __atomic_store_n(&v->memory, memory, __ATOMIC_RELEASE);
        while (!v->stop)
                usleep(2000);
        while (n > 0)
                pthread_join(threads[--n], NULL);
        usleep(100000); /* the outsider ends too */
        for (unsigned page = 0; page < ZERO_VICTIM_PAGES; page++)
                check(page, "at the end");
        _exit(v->errors > 0);
}

/* Writes the pages that are its own, in the victim, from outside, and reads them back. */
static void run_outsider(void) {
        char path[64], page_bytes[PAGE_BYTES];
        uint64_t seed = 88172645463325252;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (!__atomic_load_n(&v->memory, __ATOMIC_ACQUIRE))
                usleep(500);
        snprintf(path, sizeof path, "/proc/%d/mem", v->pid);
        int memfd = open(path, O_RDWR | O_CLOEXEC);
        CHECK(memfd >= 0);
        while (!v->stop) {
                uint64_t random = next_random(&seed);
                if (random % 16 == 0)
                        usleep(100);
                unsigned page = (unsigned)(random >> 32) % (ZERO_VICTIM_PAGES / OWNERS) * OWNERS + OUTSIDER;
                char *there = v->memory + page * PAGE_BYTES;
                struct iovec remote = {there, PAGE_BYTES}, local = {page_bytes, PAGE_BYTES};
                uint64_t word = random >> 16;
                if (random % 10 < 4) {
                        if (process_vm_readv(v->pid, &local, 1, &remote, 1, 0) != (ssize_t)PAGE_BYTES) {
                                v->outside_refused++;
                                continue;
                        }
                        if (memcmp(page_bytes, v->expected[page], PAGE_BYTES) != 0)
                                wrong("outsider: page %u", page);
                        continue;
                }
                if (random % 10 < 7) { /* all of it zero */
                        memset(page_bytes, 0, sizeof page_bytes);
                } else {
                        local = (struct iovec){&word, 8};
                        remote = (struct iovec){there + (random & 511) * 8, 8};
                }
                ssize_t n = random >> 10 & 1 ? process_vm_writev(v->pid, &local, 1, &remote, 1, 0)
                                              : pwrite(memfd, local.iov_base, local.iov_len, (off_t)(uintptr_t)remote.iov_base);
                if (n != (ssize_t)local.iov_len) { /* /proc/PID/mem does not wait for a page that is away */
                        v->outside_refused++;
                        continue;
                }
                memcpy(v->expected[page] + ((char *)remote.iov_base - there), local.iov_base, local.iov_len);
                v->written_outside++;
        }
        _exit(0);
}

static pid_t outsiders[8], doormen[8];
static ZeroVictim *victims[8];

ZeroVictim *zero_victim_start(bool forks) {
        static unsigned n;
        v = mmap(NULL, sizeof *v, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(v != MAP_FAILED && n < ELEMENTSOF(victims));
        make_gate();
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
                run_victim(forks);
        pid_t outsider = fork();
        CHECK(outsider >= 0);
        if (outsider == 0)
                run_outsider();
        doormen[n] = fork();
        CHECK(doormen[n] >= 0);
        if (doormen[n] == 0)
                run_doorman();
        while (!__atomic_load_n(&v->memory, __ATOMIC_ACQUIRE)) {
                CHECK(waitpid(pid, NULL, WNOHANG) == 0, "the victim ended");
                usleep(500);
        }
        victims[n] = v;
        outsiders[n++] = outsider;
        return v;
}

/* Who waits for a page for ever does not. */
static bool await_end(pid_t pid, const char *who, int *ret_status) {
        for (unsigned wait = 0; waitpid(pid, ret_status, WNOHANG) == 0; wait++) {
                if (wait == 10000) {
                        printf("%s does not end\n", who);
                        kill(pid, SIGKILL);
                        waitpid(pid, ret_status, 0);
                        return false;
                }
                usleep(1000);
        }
        return true;
}

int zero_victim_end(ZeroVictim *victim) {
        int status = 0;
        unsigned i = 0;
        while (victims[i] != victim)
                i++;
        victim->stop = true;
        bool ended = await_end(outsiders[i], "who writes from outside", &status);
        ended &= await_end(victim->pid, "the victim", &status);
        kill(doormen[i], SIGKILL);
        waitpid(doormen[i], NULL, 0);
        if (!ended)
                return victim->errors ? TEST_NOTICED : TEST_FAILED;
        printf("victim %d: %lu operations, %lu checks, %lu written outside (%lu refused), %lu + %lu read by workers, "
               "%lu discarded by them, %lu direct, %lu children, %lu mappings, ended with %#x, %lu errors%s%s\n",
               victim->pid, victim->operations, victim->checks, victim->written_outside, victim->outside_refused,
               victim->worker_reads, victim->fixed_reads, victim->worker_discards, victim->direct_reads, victim->forks,
               victim->churns, status, victim->errors, victim->errors ? ": " : "", victim->first);
        return status == 0 && victim->errors == 0 ? 0 : TEST_NOTICED;
}
