/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The victims of the remap hammer: three threads that write, check and restore pages, discard them, map others over them
 * and have the kernel write to them; one that maps and unmaps; one that forks. Every page has a shadow, kept by its owner.
 */
#include "remap-hammer.h"
#include "tests/confine.h"

#include <liburing.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define THREADS 3U
#define WORDS (PAGE_BYTES / sizeof(uint64_t))

static HammerVictim *self;
static uint8_t *area, *home, *shadow;
static int source;      /* a file that holds the first pages of home */

void hammer_pattern(void *page, uint64_t id) {
        uint64_t x = id * 0x9e3779b97f4a7c15 + 0x1234567, *words = page;

        for (unsigned i = 0; i < WORDS; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                words[i] = x;
        }
}

__attribute__((format(printf, 1, 2))) static void bad(const char *format, ...) {
        if (atomic_fetch_add(&self->errors, 1) == 0) {
                va_list ap;

                va_start(ap, format);
                vsnprintf(self->first, sizeof self->first, format, ap);
                va_end(ap);
        }
}

static uint64_t rnd(uint64_t *state) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        return *state >> 11;
}

static uint8_t *at(uint8_t *base, uint64_t page) { return base + page * PAGE_BYTES; }

static void check_page(uint64_t page, const char *what) {
        if (memcmp(at(area, page), at(shadow, page), PAGE_BYTES) == 0)
                return;
        unsigned i = 0;
        while (at(area, page)[i] == at(shadow, page)[i] && i < PAGE_BYTES - 1)
                i++;
        bad("%s: page %lu byte %u is %02x, not %02x", what, page, i, at(area, page)[i], at(shadow, page)[i]);
        memcpy(at(shadow, page), at(area, page), PAGE_BYTES);
}

/* Words that belong to different threads in one page. */
static void joint(uint64_t *state, unsigned thread) {
        uint64_t page = HAMMER_JOINT + rnd(state) % (HAMMER_OUTSIDE - HAMMER_JOINT);
        unsigned word = (unsigned)(rnd(state) % (WORDS / THREADS)) * THREADS + thread, op = (unsigned)(rnd(state) % 10);
        volatile uint64_t *x = (uint64_t *)(void *)at(area, page);
        uint64_t *expected = (uint64_t *)(void *)at(shadow, page), *first = (uint64_t *)(void *)at(home, page);

        if (x[word] != expected[word]) {
                bad("joint: page %lu word %u", page, word);
                expected[word] = x[word];
        }
        if (op < 3)
                x[word] = expected[word] = rnd(state);
        else if (op < 9)
                for (unsigned i = thread; i < WORDS / THREADS * THREADS; i += THREADS)
                        x[i] = expected[i] = first[i];
}

/* Pages that belong to one thread, in groups of eight. */
static void own(uint64_t *state, unsigned thread) {
        uint64_t page = HAMMER_CONSTANT + rnd(state) % (HAMMER_JOINT - HAMMER_CONSTANT), group = page & ~7UL;
        unsigned op = (unsigned)(rnd(state) % 1000), word = (unsigned)(rnd(state) % WORDS);

        if (page / 8 % THREADS != thread)
                return;
        if (op < 420)
                check_page(page, "own");
        else if (op < 600)
                ((volatile uint64_t *)(void *)at(area, page))[word] = ((uint64_t *)(void *)at(shadow, page))[word] = rnd(state);
        else if (op < 900) {
                memcpy(at(area, group), at(home, group), 8 * PAGE_BYTES);
                memcpy(at(shadow, group), at(home, group), 8 * PAGE_BYTES);
        } else if (op < 940) {
                uint64_t n = MIN_OF(1 + rnd(state) % 4, group + 8 - page);

                if (madvise(at(area, page), n * PAGE_BYTES, MADV_DONTNEED) < 0)
                        bad("MADV_DONTNEED: %d", errno);
                memset(at(shadow, page), 0, n * PAGE_BYTES);
                self->discards++;
        } else if (op < 965) {
                off_t offset = (off_t)(rnd(state) % 4096);

                if (pread(source, at(area, page) + word * 7, 64, offset) != 64 ||
                    pread(source, at(shadow, page) + word * 7, 64, offset) != 64)
                        bad("pread: %d", errno);
                self->kernel_writes++;
        } else if (op < 985) {
                if (mmap(at(area, group), 8 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                         -1, 0) == MAP_FAILED)
                        bad("mmap: %d", errno);
                memset(at(shadow, group), 0, 8 * PAGE_BYTES);
                self->replaced++;
        } else
                sched_yield();
}

static void *writer(void *userdata) {
        unsigned thread = (unsigned)(uintptr_t)userdata;
        uint64_t state = 88172645463325252 * (thread + 1) + (uint64_t)getpid();

        while (!self->stop) {
                if (rnd(&state) % 8 == 0)
                        joint(&state, thread);
                else
                        own(&state, thread);
                self->operations++;
        }
        return NULL;
}

/* What is mapped here is merged now and then; unmapped, and mapped anew by whoever comes. */
static void *churner(void *unused) {
        uint64_t state = 777 + (uint64_t)getpid();
        const size_t size = HAMMER_CHURN * PAGE_BYTES;

        for (bool merged = false; !self->stop; merged = !merged) {
                uint64_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                uint64_t x = rnd(&state), until = now_nsec() + rnd(&state) % 400000;

                if (p == MAP_FAILED)
                        continue;
                if (merged) {
                        memcpy(p, home, size);
                        self->churn = (uintptr_t)p;
                } else
                        for (size_t i = 0; i < size / 8; i++)
                                p[i] = x + i;
                while (now_nsec() < until)
                        ;
                if (merged && memcmp(p, home, size) != 0)
                        bad("churn: what was copied");
                for (size_t i = 0; !merged && i < size / 8; i++)
                        if (p[i] != x + i) {
                                bad("churn: what was written, word %zu", i);
                                break;
                        }
                munmap(p, size);
                self->churned++;
        }
        return unused;
}

static int child(void) {
        static const uint8_t zeros[PAGE_BYTES];

        for (uint64_t i = 0; i < HAMMER_CONSTANT; i++)
                if (memcmp(at(area, i), at(home, i), PAGE_BYTES) != 0)
                        return 1;
        at(area, 3)[5] ^= 1;
        if (memcmp(at(area, 3) + 6, at(home, 3) + 6, PAGE_BYTES - 6) != 0)
                return 2;
        madvise(at(area, 8), 16 * PAGE_BYTES, MADV_DONTNEED);
        for (uint64_t i = 8; i < 24; i++)
                if (memcmp(at(area, i), zeros, PAGE_BYTES) != 0)
                        return 3;
        for (uint64_t i = 24; i < HAMMER_CONSTANT; i++)
                if (memcmp(at(area, i), at(home, i), PAGE_BYTES) != 0)
                        return 4;
        return 0;
}

static void *forker(void *unused) {
        while (!self->stop) {
                int status = 0;
                pid_t pid;

                usleep(60000);
                pid = fork();
                if (pid == 0)
                        _exit(child());
                if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
                        bad("child: status %#x", (unsigned)status);
                self->forks++;
        }
        return unused;
}

/* Data that arrives in a registered buffer, past the page tables, and by O_DIRECT. */
static void *receiver(void *unused) {
        uint64_t state = 99 + (uint64_t)getpid();
        const size_t size = (HAMMER_DIRECT - HAMMER_PINNED) * PAGE_BYTES;
        struct iovec buffer = { at(area, HAMMER_PINNED), size };
        struct io_uring ring;
        bool uring = io_uring_queue_init(4, &ring, 0) == 0 && io_uring_register_buffers(&ring, &buffer, 1) == 0;
        char path[] = "/tmp/remap-hammer.XXXXXX";
        int direct = mkostemp(path, O_CLOEXEC | O_DIRECT), ends[2];

        /* Of a pipe that holds it already: io_uring needs no worker for that, which would keep us from being merged. */
        CHECK(pipe2(ends, O_CLOEXEC) == 0, "pipe");
        if (direct >= 0)
                unlink(path);
        if (direct >= 0 && pwrite(direct, home, 64 * PAGE_BYTES, 0) != (ssize_t)(64 * PAGE_BYTES)) {
                close(direct);
                direct = -1;
        }
        while (!self->stop) {
                uint64_t page = rnd(&state) % (HAMMER_DIRECT - HAMMER_PINNED), from = rnd(&state) % 8;
                bool restore = rnd(&state) % 2;

                if (uring) {
                        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
                        struct io_uring_cqe *cqe;
                        uint8_t *to = at(area, HAMMER_PINNED + page);

                        if (write(ends[1], at(home, from), PAGE_BYTES) != (ssize_t)PAGE_BYTES)
                                bad("pipe: %d", errno);
                        io_uring_prep_read_fixed(sqe, ends[0], to, PAGE_BYTES, 0, 0);
                        if (io_uring_submit_and_wait(&ring, 1) != 1 || io_uring_wait_cqe(&ring, &cqe) < 0)
                                bad("io_uring");
                        else {
                                io_uring_cqe_seen(&ring, cqe);
                                if (memcmp(to, at(home, from), PAGE_BYTES) != 0)
                                        bad("a registered buffer: page %lu does not hold what was read", page);
                        }
                        if (restore)
                                memcpy(to, at(home, HAMMER_PINNED + page), PAGE_BYTES);
                        self->pinned++;
                }
                if (direct >= 0) {
                        uint8_t *to = at(area, HAMMER_DIRECT + page);

                        if (pread(direct, to, PAGE_BYTES, (off_t)(from * PAGE_BYTES)) != (ssize_t)PAGE_BYTES ||
                            memcmp(to, at(home, from), PAGE_BYTES) != 0)
                                bad("O_DIRECT: page %lu does not hold what was read", page);
                        if (restore)
                                memcpy(to, at(home, HAMMER_DIRECT + page), PAGE_BYTES);
                        self->direct++;
                }
                usleep((useconds_t)(rnd(&state) % 300));
                for (uint64_t i = HAMMER_LAST; i < HAMMER_PAGES; i++)
                        check_page(i, "last");
                at(area, HAMMER_LAST + page)[7]++;
                at(shadow, HAMMER_LAST + page)[7]++;
                if (restore) {
                        memcpy(at(area, HAMMER_LAST), at(home, HAMMER_LAST), (HAMMER_PAGES - HAMMER_LAST) * PAGE_BYTES);
                        memcpy(at(shadow, HAMMER_LAST), at(home, HAMMER_LAST), (HAMMER_PAGES - HAMMER_LAST) * PAGE_BYTES);
                }
        }
        if (uring)
                io_uring_queue_exit(&ring);
        if (direct >= 0)
                close(direct);
        close(ends[0]);
        close(ends[1]);
        return unused;
}

static uint8_t *map(uint64_t pages) {
        uint8_t *p = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(p != MAP_FAILED, "mmap");
        return p;
}

static void check_all(void) {
        for (uint64_t i = 0; i < HAMMER_CONSTANT; i++)
                check_page(i, "constant, at the end");
        for (uint64_t i = HAMMER_CONSTANT; i < HAMMER_OUTSIDE; i++)
                check_page(i, "at the end");
        for (uint64_t i = HAMMER_LAST; i < HAMMER_PAGES; i++)
                check_page(i, "last, at the end");
}

void hammer_victim_run(HammerVictim *victim) {
        pthread_t threads[THREADS + 3];

        self = victim;
        if (hammer->confined)
                confine();
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
        prctl(PR_SET_DUMPABLE, 1);
        home = map(HAMMER_PAGES);
        shadow = map(HAMMER_PAGES);
        area = mmap(NULL, (HAMMER_PAGES + 2) * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(area != MAP_FAILED, "mmap");
        area += PAGE_BYTES;
        CHECK(mprotect(area, HAMMER_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE) == 0, "mprotect");
        CHECK(madvise(at(area, HAMMER_LAST), (HAMMER_PAGES - HAMMER_LAST) * PAGE_BYTES, MADV_DONTDUMP) == 0, "madvise");
        for (uint64_t i = 0; i < HAMMER_PAGES; i++)
                hammer_pattern(at(home, i), i);
        memcpy(area, home, HAMMER_PAGES * PAGE_BYTES);
        memcpy(shadow, home, HAMMER_PAGES * PAGE_BYTES);
        source = memfd_create("source", MFD_CLOEXEC);
        CHECK(source >= 0 && write(source, home, 65536) == 65536, "source");
        for (uintptr_t i = 0; i < THREADS; i++)
                CHECK(pthread_create(&threads[i], NULL, writer, (void *)i) == 0, "thread");
        CHECK(pthread_create(&threads[THREADS], NULL, churner, NULL) == 0, "thread");
        CHECK(pthread_create(&threads[THREADS + 1], NULL, forker, NULL) == 0, "thread");
        CHECK(pthread_create(&threads[THREADS + 2], NULL, receiver, NULL) == 0, "thread");
        self->area = (uintptr_t)area;
        while (!self->stop)
                usleep(5000);
        for (unsigned i = 0; i < ELEMENTSOF(threads); i++)
                pthread_join(threads[i], NULL);
        check_all();
        self->quiet = true;
        /* What plain anonymous memory can do, once it is that again. */
        while (self->freed == 0)
                usleep(5000);
        check_all();
        if (madvise(area, HAMMER_PAGES * PAGE_BYTES, MADV_FREE) < 0)
                bad("MADV_FREE: %d", errno);
        self->checked = true;
        for (;;)
                pause();
}

static int memory;      /* /proc/PID/mem of the victim */

/* What is away for the moment the file does not wait for, as the system calls do: it fails, and is tried again. */
static bool transfer_page(bool write, uint8_t *local, uint64_t there) {
        for (unsigned tries = 0; tries < 20000; tries++) {
                if ((write ? pwrite(memory, local, PAGE_BYTES, (off_t)there)
                           : pread(memory, local, PAGE_BYTES, (off_t)there)) == (ssize_t)PAGE_BYTES)
                        return true;
                usleep(100);
        }
        return false;
}

/* By either of the two ways there are. */
static bool transfer(bool write, bool by_file, uint8_t *local, uint64_t there, size_t size) {
        struct iovec mine = { local, size }, its = { (void *)there, size };

        for (size_t done = 0; by_file && done < size; done += PAGE_BYTES)
                if (!transfer_page(write, local + done, there + done))
                        return false;
        if (by_file)
                return true;
        return (write ? process_vm_writev(self->pid, &mine, 1, &its, 1, 0)
                      : process_vm_readv(self->pid, &mine, 1, &its, 1, 0)) == (ssize_t)size;
}

/* A page now and then, so that most of them were not written since they were merged; and pages that nobody writes. */
static void touch_outside(uint64_t *state, uint8_t *first, uint8_t *back) {
        uint64_t i = rnd(state) % (HAMMER_PINNED - HAMMER_SPARSE);
        uint8_t *page = at(first, HAMMER_SPARSE - HAMMER_OUTSIDE + i);
        uint64_t there = self->area + (HAMMER_SPARSE + i) * PAGE_BYTES;
        bool by_file = rnd(state) % 2;

        if (!transfer(false, by_file, back, there, PAGE_BYTES) || memcmp(back, page, PAGE_BYTES) != 0)
                bad("from outside: page %lu does not hold what was written", HAMMER_SPARSE + i);
        if (rnd(state) % 3)
                hammer_pattern(page, HAMMER_SPARSE + i);
        else
                page[rnd(state) % PAGE_BYTES]++;
        if (!transfer(true, by_file, page, there, PAGE_BYTES))
                bad("from outside: %d", errno);
}

/* Nobody writes these. By the call that waits for what is away: it is there to find what should be, and is not. */
static void look_from_outside(uint8_t *back) {
        static uint8_t *constant;
        const size_t size = (HAMMER_CONSTANT - 24) * PAGE_BYTES;

        if (!constant) {
                constant = map(HAMMER_CONSTANT - 24);
                for (uint64_t k = 24; k < HAMMER_CONSTANT; k++)
                        hammer_pattern(at(constant, k - 24), k);
        }
        if (!transfer(false, false, back, self->area + 24 * PAGE_BYTES, size) || memcmp(back, constant, size) != 0)
                bad("from outside: pages that nobody writes");
}

/* Writes pages of the victim from outside, and sees whether what it wrote is there. */
void hammer_writer_run(HammerVictim *victim) {
        const size_t size = (HAMMER_SPARSE - HAMMER_OUTSIDE) * PAGE_BYTES;
        uint8_t *first = map(HAMMER_PINNED - HAMMER_OUTSIDE), *data = map(HAMMER_PINNED - HAMMER_OUTSIDE),
                *back = map(HAMMER_CONSTANT);
        uint64_t there = victim->area + HAMMER_OUTSIDE * PAGE_BYTES, state = 4711 + (uint64_t)victim->pid;
        char path[64];

        self = victim;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (uint64_t i = HAMMER_OUTSIDE; i < HAMMER_PINNED; i++)
                hammer_pattern(at(first, i - HAMMER_OUTSIDE), i);
        snprintf(path, sizeof path, "/proc/%d/mem", victim->pid);
        memory = open(path, O_RDWR | O_CLOEXEC);
        CHECK(memory >= 0, "memory");
        for (uint64_t k = 1; !victim->stop; k++) {
                bool by_file = k / 2 % 2;

                memcpy(data, first, size);
                for (size_t i = 0; k % 2 && i < size / PAGE_BYTES; i++)
                        memcpy(at(data, i) + 4000, &k, sizeof k);
                if (!transfer(true, by_file, data, there, size) || !transfer(false, by_file, back, there, size))
                        bad("from outside: %d", errno);
                else if (memcmp(data, back, size) != 0)
                        bad("from outside: what was written is not there");
                victim->outside_writes++;
                look_from_outside(back);
                if (k % 4 == 0)
                        touch_outside(&state, first, back);
        }
        exit(0);
}
