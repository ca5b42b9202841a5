/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * One process whose memory has twins in every other of its kind: a text that depends on nothing but the page's number, in
 * an area of --mib, half of which nobody touches ("still") and half of which two threads write, discard, and read all the
 * time ("live"), each page checked before it is changed. Obeys lines on its standard input, each answered "ok" or "bad":
 *
 *      check           every byte is what it has to be
 *      discard         MADV_DONTNEED on every 31st still page, which reads as zeros from then on
 *      write           every 37th still page is written
 *      fork            makes a child that checks the still pages until it is told to end
 *      end             it ends, having found everything right
 *      again           executes the program anew, which says that it is ready again
 *      pin             the first 16 still pages are registered with io_uring, as a buffer
 *      receive         … which reads other contents into them each time, past the page tables
 *      unpin           and are not any more
 *      chase           a thread discards still pages, sees that they are zeros, and writes what was there, one after the other
 *      outside         a process begins to write to each still page from outside, one after the other
 *      watch           a thread reads all still pages, again and again, and compares them
 *      rewrite         every page is written, with what no other process has
 *      even, odd       every other piece of 16 pages is written, with what everybody has in such a piece
 *      seen            nothing wrong was seen until now
 *      calm            who was begun by the last two ends, having found what it wrote
 *
 * --confined: as a process of a container. --quiet: all pages are still. --unlike: begins with what no other process has,
 * and all of them lie alike modulo 2 MiB, so that any page of a pool that one can map at a place the others can, too.
 * --as lock|bind|peer|pin|uffd|name: what route remap leaves alone, each for its own reason.
 */
#include "tests/confine.h"

#include <getopt.h>
#include <liburing.h>
#include <linux/mempolicy.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define PINNED_PAGES 16U
#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define THREADS 2U

static uint64_t *area;
static size_t pages;
static uint64_t *texts;                 /* what each page holds; 0: zeros */
static volatile bool stopping;
static uint64_t *wrong;                 /* shared with the child */
static bool live = true;

#define ALIGNED_BYTES ((size_t)2 << 20)

static uint64_t *page_at(size_t page) { return area + page * WORDS; }

static void fill(uint64_t *words, uint64_t text) {
        uint64_t x = text * 0x9E3779B97F4A7C15ULL | 1;

        for (unsigned i = 0; i < WORDS; i++) {
                words[i] = text ? x : 0;
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
        }
}

static bool holds(size_t page) {
        uint64_t expected[WORDS];

        fill(expected, texts[page]);
        return memcmp(expected, page_at(page), sizeof expected) == 0;
}

static void *live_thread(void *argument) {
        uint64_t me = (uintptr_t)argument, state = 88172645463325252ULL + me;

        while (!stopping) {
                size_t page;

                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                page = pages / 2 + (state >> 8) % (pages / 2 / THREADS) * THREADS + me;
                if (page >= pages)
                        continue;
                if (!holds(page))
                        __atomic_add_fetch(wrong, 1, __ATOMIC_SEQ_CST);
                if (state % 64 == 0 && madvise(page_at(page), PAGE_BYTES, MADV_DONTNEED) == 0)
                        texts[page] = 0;
                else if (state % 64 < 4) {
                        texts[page] = state % 64 == 1 ? page + 1 : state >> 16 | 1;
                        fill(page_at(page), texts[page]);
                }
                if (state % 16 == 0)
                        usleep(100);
        }
        return NULL;
}

static size_t still_pages(void) { return live ? pages / 2 : pages; }

static bool check(void) {
        for (size_t page = 0; page < still_pages(); page++)
                if (!holds(page)) {
                        fprintf(stderr, "page %zu is wrong\n", page);
                        return false;
                }
        return *wrong == 0;
}

static pid_t child;
static int child_end[2];

static bool fork_child(void) {
        CHECK(pipe2(child_end, O_CLOEXEC | O_NONBLOCK) == 0, "pipe");
        child = fork();
        if (child == 0) {
                char byte;

                prctl(PR_SET_PDEATHSIG, SIGKILL);
                close(child_end[1]);
                while (read(child_end[0], &byte, 1) < 0) {
                        for (size_t page = 0; page < pages / 2; page++)
                                if (!holds(page))
                                        __atomic_add_fetch(wrong, 1, __ATOMIC_SEQ_CST);
                        usleep(2000);
                }
                _exit(0);
        }
        close(child_end[0]);
        return child > 0;
}

static bool end_child(void) {
        int status;

        close(child_end[1]);
        return waitpid(child, &status, 0) == child && status == 0 && *wrong == 0;
}

static struct io_uring ring;

static bool pin(void) {
        struct iovec buffer = { page_at(0), PINNED_PAGES * PAGE_BYTES };

        return io_uring_queue_init(2, &ring, 0) == 0 && io_uring_register_buffers(&ring, &buffer, 1) == 0;
}

/* From a pipe that holds it already: no worker is needed for that. */
static bool receive(void) {
        static uint64_t times;
        int ends[2];
        bool ok = pipe2(ends, O_CLOEXEC) == 0;

        for (size_t page = 0; ok && page < PINNED_PAGES; page++) {
                uint64_t words[WORDS];
                struct io_uring_cqe *cqe;

                texts[page] = 0x2000000 + (times++ << 32) + page;
                fill(words, texts[page]);
                ok = write(ends[1], words, sizeof words) == sizeof words;
                io_uring_prep_read_fixed(io_uring_get_sqe(&ring), ends[0], page_at(page), PAGE_BYTES, 0, 0);
                ok = ok && io_uring_submit_and_wait(&ring, 1) == 1 && io_uring_wait_cqe(&ring, &cqe) == 0 &&
                     cqe->res == (int)PAGE_BYTES;
                if (ok)
                        io_uring_cqe_seen(&ring, cqe);
        }
        close(ends[0]);
        close(ends[1]);
        return ok && check();
}

static bool unpin(void) {
        bool ok = io_uring_unregister_buffers(&ring) == 0;

        io_uring_queue_exit(&ring);
        return ok && check();
}

static pthread_t chaser;
static volatile bool calm = true;

static bool is_zero(const uint64_t *words) {
        for (unsigned i = 0; i < WORDS; i++)
                if (words[i])
                        return false;
        return true;
}

static void *chase(void *unused) {
        while (!calm)
                for (size_t page = 0; page < pages / 2 && !calm; page++) {
                        if (!holds(page) || madvise(page_at(page), PAGE_BYTES, MADV_DONTNEED) < 0 || !is_zero(page_at(page)))
                                __atomic_add_fetch(wrong, 1, __ATOMIC_SEQ_CST);
                        fill(page_at(page), texts[page]);
                        usleep(1000);
                }
        return NULL;
}

static void *watch(void *unused) {
        while (!calm)
                for (size_t page = 0; page < still_pages() && !calm; page++)
                        if (!holds(page))
                                __atomic_add_fetch(wrong, 1, __ATOMIC_SEQ_CST);
        return NULL;
}

static bool begin(void *(*thread)(void *)) {
        calm = false;
        return pthread_create(&chaser, NULL, thread, NULL) == 0;
}

/* What nobody else has. */
static uint64_t own_text(size_t page) { return 0x100000000 * (uint64_t)getpid() + page; }

#define PIECE_PAGES 16U

/* The thread that watches stands aside. */
static bool rewrite(const char *which) {
        bool watched = !calm;

        if (watched) {
                calm = true;
                pthread_join(chaser, NULL);
        }
        for (size_t page = 0; page < pages; page++) {
                if (*which != 'r' && page / PIECE_PAGES % 2 != (*which == 'o'))
                        continue;
                texts[page] = *which == 'r' ? own_text(page) : page + 1;
                fill(page_at(page), texts[page]);
        }
        return check() && (!watched || begin(watch));
}

static pid_t outsider;
static uint64_t *written;               /* what was written to each still page from outside; 0: nothing; shared */

/* Each page once, so that none was written before (that has a gap of its own: docs/remap-programs.md), in an order that
 * has some pages of each run at any time. */
_Noreturn static void write_outside(pid_t victim) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (size_t i = 0; i < pages / 2; i++) {
                size_t page = i * 5003 % (pages / 2);
                uint64_t word = 0x3000000 + page;
                struct iovec from = { &word, sizeof word }, to = { page_at(page) + 7, sizeof word };

                if (process_vm_writev(victim, &from, 1, &to, 1, 0) != sizeof word)
                        _exit(1);
                written[page] = word;
                usleep(10);
        }
        _exit(0);
}

static bool begin_outside(void) {
        written = mmap(NULL, pages * sizeof *written, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(written != MAP_FAILED, "mmap");
        pid_t victim = getpid();
        outsider = fork();
        if (outsider == 0)
                write_outside(victim);
        return outsider > 0;
}

static bool end_outside(void) {
        int status;
        bool ok = waitpid(outsider, &status, 0) == outsider && status == 0;

        for (size_t page = 0; page < pages / 2; page++) {
                uint64_t expected[WORDS];

                fill(expected, texts[page]);
                if (written[page] && page_at(page)[7] != written[page]) {
                        fprintf(stderr, "page %zu: a write from outside is lost\n", page);
                        ok = false;
                }
                page_at(page)[7] = expected[7];
        }
        return ok;
}

static bool calm_down(void) {
        bool ok = true;

        if (!calm) {
                calm = true;
                pthread_join(chaser, NULL);
        }
        if (outsider > 0)
                ok = end_outside();
        outsider = 0;
        return ok && check();
}

_Noreturn static int idle(void *unused) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
                pause();
}

static void become(const char *kind) {
        static char stack[65536];

        if (strcmp(kind, "lock") == 0)
                CHECK(mlock(page_at(0), 64 * PAGE_BYTES) == 0, "mlock");
        else if (strcmp(kind, "bind") == 0) {
                unsigned long nodes = 1;

                CHECK(syscall(SYS_mbind, area, pages * PAGE_BYTES, MPOL_BIND, &nodes, 64UL, 0UL) == 0, "mbind");
        } else if (strcmp(kind, "peer") == 0)
                CHECK(clone(idle, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL) > 0, "clone");
        else if (strcmp(kind, "pin") == 0) {
                CHECK(pin(), "io_uring");
        } else if (strcmp(kind, "uffd") == 0) {
                struct uffdio_api api = { .api = UFFD_API };
                struct uffdio_register reg = { .range = { (uintptr_t)area, pages * PAGE_BYTES },
                                               .mode = UFFDIO_REGISTER_MODE_MISSING };
                int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

                CHECK(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &reg) == 0, "userfaultfd");
        } else if (strcmp(kind, "name") == 0) {
                if (prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, area, pages * PAGE_BYTES, "named") < 0) {
                        printf("unable\n"); /* a kernel without CONFIG_ANON_VMA_NAME */
                        exit(0);
                }
        } else
                CHECK(false, "what is %s?", kind);
}

static char **arguments;

static bool obey(const char *order) {
        if (strcmp(order, "again") == 0) {
                printf("ok\n");
                fflush(stdout);
                execv("/proc/self/exe", arguments);
                return false;
        }
        if (strcmp(order, "discard") == 0 || strcmp(order, "write") == 0) {
                bool discard = *order == 'd';

                for (size_t page = 0; page < pages / 2; page += discard ? 31 : 37) {
                        texts[page] = discard ? 0 : 0x1000000 + page;
                        if (!discard)
                                fill(page_at(page), texts[page]);
                        else if (madvise(page_at(page), PAGE_BYTES, MADV_DONTNEED) < 0)
                                return false;
                }
                return check();
        }
        const struct {
                const char *order;
                bool (*obey)(void);
        } others[] = {
                { "fork", fork_child }, { "end", end_child },         { "pin", pin },         { "receive", receive },
                { "unpin", unpin },     { "outside", begin_outside }, { "calm", calm_down },
        };
        for (size_t i = 0; i < ELEMENTSOF(others); i++)
                if (strcmp(order, others[i].order) == 0)
                        return others[i].obey();
        if (strcmp(order, "chase") == 0 || strcmp(order, "watch") == 0)
                return begin(*order == 'c' ? chase : watch);
        if (strcmp(order, "rewrite") == 0 || strcmp(order, "even") == 0 || strcmp(order, "odd") == 0)
                return rewrite(order);
        if (strcmp(order, "seen") == 0)
                return *wrong == 0;
        return check();
}

/* aligned: to 2 MiB. */
static uint64_t *map_area(bool aligned) {
        size_t bytes = pages * PAGE_BYTES, spare = aligned ? ALIGNED_BYTES : 0, before;
        uint8_t *start = mmap(NULL, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        CHECK(start != MAP_FAILED && madvise(start, bytes + spare, MADV_NOHUGEPAGE) == 0, "mmap");
        before = aligned ? -(uintptr_t)start % ALIGNED_BYTES : 0;
        CHECK(before == 0 || munmap(start, before) == 0, "munmap");
        CHECK(before == spare || munmap(start + before + bytes, spare - before) == 0, "munmap");
        return (uint64_t *)((uintptr_t)start + before);
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "mib", required_argument, NULL, 'm' }, { "as", required_argument, NULL, 'a' },
                { "quiet", no_argument, NULL, 'q' },     { "confined", no_argument, NULL, 'c' },
                { "unlike", no_argument, NULL, 'u' },     {},
        };
        pthread_t threads[THREADS];
        const char *kind = NULL;
        bool confined = false, unlike = false;
        char line[64];

        arguments = argv;
        pages = 1024;
        for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
                switch (c) {
                case 'm': pages = (size_t)atoi(optarg) << (20 - PAGE_SHIFT); break;
                case 'a': kind = optarg; break;
                case 'q': live = false; break;
                case 'c': confined = true; break;
                case 'u': unlike = true; break;
                default: return 2;
                }
        if (confined)
                confine();
        area = map_area(unlike);
        texts = calloc(pages, sizeof *texts);
        wrong = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(texts && wrong != MAP_FAILED, "mmap");
        for (size_t page = 0; page < pages; page++) {
                texts[page] = unlike ? own_text(page) : page + 1;
                fill(page_at(page), texts[page]);
        }
        if (kind)
                become(kind);
        for (uintptr_t i = 0; live && i < THREADS; i++)
                CHECK(pthread_create(&threads[i], NULL, live_thread, (void *)i) == 0, "thread");
        setlinebuf(stdout);
        printf("ready %lx %zu\n", (unsigned long)(uintptr_t)area, pages);
        while (fgets(line, sizeof line, stdin)) {
                line[strcspn(line, "\n")] = 0;
                printf("%s\n", obey(line) ? "ok" : "bad");
        }
        stopping = true;
        return 0;
}
