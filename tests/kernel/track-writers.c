/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * scan/track misses no write: not one by the kernel on the process's behalf, for nobody, in a user namespace or under
 * a container's filter; and not one of several threads that write, move, drop and fork as fast as they can while scans
 * protect their memory as fast as they can. They check every byte of theirs; we keep a copy, of which only what is
 * reported is ever read again, and which must be the memory in the end. --control: reads before it protects, and must
 * fail.
 */
#include "track-child.h"

#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define AREA_PAGES 4096U
#define THREADS 4U
#define OWN_PAGES (AREA_PAGES / THREADS)
#define DEADLINE_SECONDS 30

static char file_path[] = "track-writers-XXXXXX";
static bool has_file, has_ring;
static struct io_uring ring;
static int pipe_fds[2], sockets[2];

static void *page(uint64_t i) { return (void *)area_page(i); }

static long prepare(long unused) {
        alarm(DEADLINE_SECONDS); /* nothing may block */
        CHECK(pipe2(pipe_fds, O_CLOEXEC) == 0 && socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, sockets) == 0);
        has_ring = io_uring_queue_init(4, &ring, 0) == 0;
        return has_ring;
}

static void feed(int fd) {
        static const char text[PAGE_BYTES] = "written by the kernel";
        CHECK(write(fd, text, sizeof text) == sizeof text);
}

static long by_read(long i) {
        feed(pipe_fds[1]);
        return read(pipe_fds[0], page((uint64_t)i), PAGE_BYTES);
}
static long by_recv(long i) {
        feed(sockets[0]);
        return recv(sockets[1], page((uint64_t)i), PAGE_BYTES, 0);
}
static long by_readv(long i) {
        struct iovec pieces[2] = { { page((uint64_t)i), 100 }, { (char *)page((uint64_t)i) + 100, PAGE_BYTES - 100 } };
        feed(pipe_fds[1]);
        return readv(pipe_fds[0], pieces, 2);
}
static long by_vm_writev(long i) {
        char text[PAGE_BYTES] = "written by the kernel";
        struct iovec from = { text, sizeof text }, to = { page((uint64_t)i), PAGE_BYTES };
        return process_vm_writev(getpid(), &from, 1, &to, 1, 0);
}
static long by_direct_read(long i) {
        int fd = open(file_path, O_RDONLY | O_DIRECT | O_CLOEXEC);
        ssize_t n;

        if (fd < 0)
                return -1;
        n = read(fd, page((uint64_t)i), PAGE_BYTES);
        close(fd);
        return n;
}
static long by_uring(long i) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
        struct io_uring_cqe *cqe;
        long n;

        feed(pipe_fds[1]);
        io_uring_prep_read(sqe, pipe_fds[0], page((uint64_t)i), PAGE_BYTES, 0);
        CHECK(io_uring_submit(&ring) == 1 && io_uring_wait_cqe(&ring, &cqe) == 0);
        n = cqe->res;
        io_uring_cqe_seen(&ring, cqe);
        return n;
}
static long by_signal_mask(long i) {
        return sigprocmask(SIG_BLOCK, NULL, page((uint64_t)i)) == 0 ? (long)PAGE_BYTES : -1;
}

static const struct {
        const char *name;
        long (*run)(long);
} kernel_writes[] = {
        { "read(2)", by_read },         { "recv(2)", by_recv },
        { "readv(2)", by_readv },       { "process_vm_writev(2)", by_vm_writev },
        { "io_uring", by_uring },       { "O_DIRECT", by_direct_read },
        { "sigprocmask(2)", by_signal_mask },
};

static void test_kernel_writes(const char *who) {
        Child child;
        uint64_t word = 7;
        struct iovec from = { &word, sizeof word }, to;
        unsigned n = 0;

        shared->permille = 1000;
        child = child_start();
        child_order(&child, order_map, (long)(16 * PAGE_BYTES));
        child_order(&child, order_write_picked, 0);
        has_ring = child_order(&child, prepare, 0);
        child_adopt(&child);
        for (int round = 0; round < 3; round++) {
                CHECK(child_count_written(&child, shared->start, area_end()) == (round ? 0 : 16));
                for (size_t i = 0; i < ELEMENTSOF(kernel_writes); i++) {
                        Pages pages;

                        if ((kernel_writes[i].run == by_direct_read && !has_file) ||
                            (kernel_writes[i].run == by_uring && !has_ring))
                                continue;
                        n += round == 0;
                        CHECK(child_order(&child, kernel_writes[i].run, (long)i) == (long)PAGE_BYTES, "%s: %s", who,
                              kernel_writes[i].name);
                        pages = child_written(&child, shared->start, area_end(), true);
                        CHECK(pages.count == 1 && pages_have(&pages, area_page(i)), "%s: %s: %zu pages", who,
                              kernel_writes[i].name, pages.count);
                        track_ranges_done(&pages.written);
                }
                /* From outside. */
                to = (struct iovec){ page(9), sizeof word };
                CHECK(process_vm_writev(child.pid, &from, 1, &to, 1, 0) == sizeof word);
                CHECK(child_count_written(&child, area_page(9), area_page(10)) == 1);
        }
        printf("%s: %u kinds of writes by the kernel are reported\n", who, n);
        child_stop(&child);
}

/* Pinned before it was protected: written past the page tables, and not reported (docs/tracking.md). */
static long register_buffer(long i) {
        struct iovec buffer = { page((uint64_t)i), PAGE_BYTES };
        return io_uring_register_buffers(&ring, &buffer, 1);
}
static long write_pinned(long i) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
        struct io_uring_cqe *cqe;
        long n;

        feed(pipe_fds[1]);
        io_uring_prep_read_fixed(sqe, pipe_fds[0], page((uint64_t)i), PAGE_BYTES, 0, 0);
        CHECK(io_uring_submit(&ring) == 1 && io_uring_wait_cqe(&ring, &cqe) == 0);
        n = cqe->res;
        io_uring_cqe_seen(&ring, cqe);
        return n;
}
static void show_pinned(void) {
        Child child = child_tracked(16);

        if (child_order(&child, prepare, 0) && child_order(&child, register_buffer, 3) == 0) {
                (void)child_count_written(&child, shared->start, area_end());
                CHECK(child_order(&child, write_pinned, 3) == (long)PAGE_BYTES);
                printf("a write through a registered buffer is %sreported\n",
                       child_count_written(&child, shared->start, area_end()) ? "" : "not ");
        }
        child_stop(&child);
}

/* The hammer. mirror: what each page holds, by its writer; ours in the parent is the copy. */
static char *mirror;

typedef struct Writer {
        unsigned number;
        uint64_t seed;
        int pipe_fds[2];
        pthread_t thread;
} Writer;
static Writer writers[THREADS];

static uint64_t rnd(Writer *w, uint64_t below) {
        w->seed ^= w->seed << 13;
        w->seed ^= w->seed >> 7;
        w->seed ^= w->seed << 17;
        return w->seed % below;
}

static void check_own(uint64_t i) {
        CHECK(memcmp(page(i), mirror + i * PAGE_BYTES, PAGE_BYTES) == 0, "WRONG BYTES in page %lu", i);
}

static void change(Writer *w, uint64_t i) {
        char *p = page(i), *m = mirror + i * PAGE_BYTES;
        void *spare = (void *)(shared->start - 64 * MIB + i * PAGE_BYTES);
        uint64_t word = w->seed;
        struct iovec from = { &word, sizeof word }, to = { p, sizeof word };

        /* Every third page is always there and may be written: for the children. */
        switch (i % 3 ? rnd(w, 64) : 4 + rnd(w, 60)) {
        case 0:
                CHECK(madvise(p, PAGE_BYTES, MADV_DONTNEED) == 0);
                memset(m, 0, PAGE_BYTES);
                return;
        case 1:
                CHECK(mmap(p, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
                memset(m, 0, PAGE_BYTES);
                return;
        case 2:
                CHECK(mremap(p, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, spare) == spare);
                CHECK(mremap(spare, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, p) == p);
                return;
        case 3:
                CHECK(mprotect(p, PAGE_BYTES, PROT_READ) == 0 && mprotect(p, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0);
                return;
        case 4 ... 11:
                CHECK(write(w->pipe_fds[1], &word, sizeof word) == sizeof word);
                CHECK(read(w->pipe_fds[0], p, sizeof word) == sizeof word);
                memcpy(m, &word, sizeof word);
                return;
        case 12 ... 19:
                CHECK(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == sizeof word);
                memcpy(m, &word, sizeof word);
                return;
        default:
                for (uint64_t k = 0; k < 4; k++) {
                        uint64_t at = rnd(w, PAGE_BYTES / 8) * 8;
                        *(volatile uint64_t *)(void *)(p + at) = w->seed;
                        memcpy(m + at, &w->seed, 8);
                }
        }
}

static void *write_and_check(void *userdata) {
        Writer *w = userdata;

        while (!__atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE)) {
                uint64_t i = w->number * OWN_PAGES + rnd(w, OWN_PAGES);
                check_own(i);
                change(w, i);
                check_own(i);
                shared->counters[w->number]++;
        }
        for (uint64_t i = w->number * OWN_PAGES; i < (w->number + 1) * OWN_PAGES; i++)
                check_own(i);
        return NULL;
}

static void *fork_and_write(void *unused) {
        while (!__atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE)) {
                pid_t pid = fork();
                int status;

                if (pid == 0) {
                        for (uint64_t i = 0; i < AREA_PAGES; i += 3)
                                *(volatile char *)page(i) = 'c'; /* its own copy */
                        _exit(0);
                }
                CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0, "%#x", status);
                shared->counters[THREADS]++;
                usleep(20000);
        }
        return NULL;
}

static pthread_t forker;
static long begin(long unused) {
        shared->stop = 0;
        memset(shared->counters, 0, sizeof shared->counters);
        mirror = mmap(NULL, AREA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(mirror != MAP_FAILED);
        memcpy(mirror, (void *)shared->start, AREA_PAGES * PAGE_BYTES);
        for (unsigned i = 0; i < THREADS; i++) {
                writers[i] = (Writer){ .number = i, .seed = 88172645463325252 + i };
                CHECK(pipe2(writers[i].pipe_fds, O_CLOEXEC) == 0);
                CHECK(pthread_create(&writers[i].thread, NULL, write_and_check, &writers[i]) == 0);
        }
        return pthread_create(&forker, NULL, fork_and_write, NULL);
}
static long end(long unused) {
        __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
        for (unsigned i = 0; i < THREADS; i++)
                CHECK(pthread_join(writers[i].thread, NULL) == 0);
        return pthread_join(forker, NULL);
}

static uint64_t pages_read;

/* A page that is just elsewhere will be reported when it is back. */
static void copy_pages(const Child *child, char *copy, const Pages *pages) {
        for (size_t i = 0; i < pages->written.n; i++)
                for (uint64_t at = pages->written.ranges[i].start; at < pages->written.ranges[i].end; at += PAGE_BYTES)
                        pages_read += pread(child->target->memfd, copy + (at - shared->start), PAGE_BYTES,
                                            (off_t)at) > 0;
}

static void scan(Child *child, char *copy, bool control) {
        Pages pages = child_written(child, shared->start, area_end(), !control);

        copy_pages(child, copy, &pages);
        track_ranges_done(&pages.written);
        if (control) {
                pages = child_written(child, shared->start, area_end(), true);
                track_ranges_done(&pages.written);
        }
}

static int hammer(unsigned seconds, bool control) {
        char *copy = calloc(AREA_PAGES, PAGE_BYTES);
        uint64_t *entries = calloc(AREA_PAGES, sizeof *entries), until, scans = 0, wrong = 0, compared = 0;
        char now[PAGE_BYTES];
        Child child = child_start();

        CHECK(copy && entries);
        child_order(&child, order_map, AREA_PAGES * (long)PAGE_BYTES);
        shared->permille = 1000;
        child_order(&child, order_write_picked, 0);
        child_adopt(&child);
        CHECK(child_order(&child, begin, 0) == 0);
        for (until = now_nsec() + seconds * NSEC_PER_SEC; now_nsec() < until; scans++) {
                scan(&child, copy, control);
                if (scans % 64 == 0)
                        child_update(&child);
        }
        CHECK(child_order(&child, end, 0) == 0);
        child_update(&child); /* what was elsewhere or read-only at the last one was not covered */
        scan(&child, copy, control);
        CHECK(pread(child.target->pagemapfd, entries, AREA_PAGES * sizeof *entries,
                    (off_t)(shared->start / PAGE_BYTES * 8)) == (ssize_t)(AREA_PAGES * sizeof *entries));
        for (uint64_t i = 0; i < AREA_PAGES; i++)
                if (entries[i] >> 63) {
                        compared++;
                        CHECK(pread(child.target->memfd, now, PAGE_BYTES, (off_t)area_page(i)) == (ssize_t)PAGE_BYTES);
                        wrong += memcmp(now, copy + i * PAGE_BYTES, PAGE_BYTES) != 0;
                }
        printf("%lu scans, %lu pages read again, writes %lu %lu %lu %lu, %lu forks: %lu of %lu pages are not "
               "what they were read as last\n", scans, pages_read, shared->counters[0], shared->counters[1], shared->counters[2],
               shared->counters[3], shared->counters[4], wrong, compared);
        CHECK(compared > AREA_PAGES / 2 && scans > 20);
        child_stop(&child);
        free(copy);
        free(entries);
        return wrong ? TEST_NOTICED : 0;
}

static void make_file(void) {
        static const char text[PAGE_BYTES] = "of a file";
        int fd = mkostemp(file_path, O_CLOEXEC), direct;

        if (fd < 0)
                return;
        CHECK(fchmod(fd, 0644) == 0 && write(fd, text, sizeof text) == sizeof text && fsync(fd) == 0);
        close(fd);
        direct = open(file_path, O_RDONLY | O_DIRECT | O_CLOEXEC);
        has_file = direct >= 0;
        safe_close(direct);
}

int main(int argc, char **argv) {
        track_test_begin();
        if (argc > 1)
                return hammer(3, strcmp(argv[1], "--control") == 0);
        make_file();
        test_kernel_writes("root");
        shared->uid = 65534;
        test_kernel_writes("nobody");
        shared->docker_filter = true;
        test_kernel_writes("nobody under a container's filter");
        shared->uid = 0;
        shared->docker_filter = false;
        shared->user_namespace = true;
        test_kernel_writes("in a user namespace");
        shared->user_namespace = false;
        show_pinned();
        unlink(file_path);
        return hammer(10, false);
}
