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
 *
 * --as lock|bind|peer|pin|uffd|name: what route remap leaves alone, each for its own reason.
 */
#include "tests/test.h"

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
#include <sys/wait.h>

#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define THREADS 2U

static uint64_t *area;
static size_t pages;
static uint64_t *texts;                 /* what each page holds; 0: zeros */
static volatile bool stopping;
static uint64_t *wrong;                 /* shared with the child */
static bool live = true;

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

static bool check(void) {
        for (size_t page = 0; page < (live ? pages / 2 : pages); page++)
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
                static struct io_uring ring;
                struct iovec buffer = { page_at(0), 16 * PAGE_BYTES };

                CHECK(io_uring_queue_init(2, &ring, 0) == 0 && io_uring_register_buffers(&ring, &buffer, 1) == 0,
                      "io_uring");
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
        if (strcmp(order, "fork") == 0)
                return fork_child();
        if (strcmp(order, "end") == 0)
                return end_child();
        return check();
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "mib", required_argument, NULL, 'm' }, { "as", required_argument, NULL, 'a' },
                { "quiet", no_argument, NULL, 'q' }, {},
        };
        pthread_t threads[THREADS];
        const char *kind = NULL;
        char line[64];

        arguments = argv;
        pages = 1024;
        for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
                switch (c) {
                case 'm': pages = (size_t)atoi(optarg) << (20 - PAGE_SHIFT); break;
                case 'a': kind = optarg; break;
                case 'q': live = false; break;
                default: return 2;
                }
        area = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(area != MAP_FAILED && madvise(area, pages * PAGE_BYTES, MADV_NOHUGEPAGE) == 0, "mmap");
        texts = calloc(pages, sizeof *texts);
        wrong = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(texts && wrong != MAP_FAILED, "mmap");
        for (size_t page = 0; page < pages; page++) {
                texts[page] = page + 1;
                fill(page_at(page), page + 1);
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
