/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "host/uapi.h"
#include "test.h"

#include <liburing.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * What route zero leans on: UFFDIO_MOVE takes a page only where nobody else has it (pinned, shared with a child: EBUSY), says how
 * much it moved before it failed, and does not move while a change of the mappings has not been read (EAGAIN); who touches a page
 * that is away waits, and goes on when the userfaultfd is closed, finding zeros.
 */
#define PAGES 16U

static char *memory, *scratch;

static int new_uffd(void) {
        struct uffdio_api api = {
                .api = UFFD_API,
                .features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE,
        };
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
                TEST_SKIP("/dev/userfaultfd: %s", strerror(errno));
        int fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        CHECK(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0);
        close(device);
        return fd;
}

static void register_all(int fd, char *at, unsigned pages) {
        struct uffdio_register reg = {.range = {(uintptr_t)at, pages * PAGE_BYTES}, .mode = UFFDIO_REGISTER_MODE_MISSING};
        CHECK(ioctl(fd, UFFDIO_REGISTER, &reg) == 0);
}

/* What UFFDIO_MOVE returned; *ret_move: what it said of how far it came. */
static int move(int fd, char *to, char *from, unsigned pages, int64_t *ret_move) {
        UffdMove m = {(uintptr_t)to, (uintptr_t)from, pages * PAGE_BYTES, UAPI_UFFD_MOVE_DONTWAKE, 0};
        int r = ioctl(fd, UAPI_UFFDIO_MOVE, &m) < 0 ? -errno : 0;
        *ret_move = m.move;
        return r;
}

static char *map(unsigned pages) {
        char *p = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(p != MAP_FAILED && madvise(p, pages * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
        return p;
}

static int begin(void) {
        int fd = new_uffd();
        memory = map(PAGES);
        scratch = map(PAGES);
        memset(memory, 0x5a, PAGES * PAGE_BYTES);
        register_all(fd, memory, PAGES);
        register_all(fd, scratch, PAGES);
        return fd;
}

static void end(int fd) {
        close(fd);
        munmap(memory, PAGES * PAGE_BYTES);
        munmap(scratch, PAGES * PAGE_BYTES);
}

static void moves_and_returns(void) {
        int fd = begin();
        int64_t moved;
        CHECK(move(fd, scratch, memory, PAGES, &moved) == 0 && moved == (int64_t)(PAGES * PAGE_BYTES));
        CHECK(scratch[PAGE_BYTES] == 0x5a);
        CHECK(move(fd, memory, scratch, PAGES, &moved) == 0);
        for (unsigned i = 0; i < PAGES * PAGE_BYTES; i++)
                CHECK(memory[i] == 0x5a);
        end(fd);
}

/* A page in the middle that cannot be moved: what is before it was, and is counted. */
static void refuses_pinned(void) {
        struct io_uring ring;
        int fd = begin();
        int64_t moved;
        struct iovec fixed = {memory + 5 * PAGE_BYTES, PAGE_BYTES};
        CHECK(io_uring_queue_init(4, &ring, 0) == 0);
        CHECK(io_uring_register_buffers(&ring, &fixed, 1) == 0);
        CHECK(move(fd, scratch, memory, PAGES, &moved) == -EAGAIN && moved == (int64_t)(5 * PAGE_BYTES));
        CHECK(move(fd, scratch + 5 * PAGE_BYTES, memory + 5 * PAGE_BYTES, 1, &moved) == -EBUSY && moved == -EBUSY);
        io_uring_queue_exit(&ring);
        end(fd);
}

static void refuses_shared(void) {
        int fds[2], fd = begin(), status;
        int64_t moved;
        char byte;
        CHECK(pipe(fds) == 0);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
                close(fds[1]);
                _exit(read(fds[0], &byte, 1) != 0);
        }
        CHECK(move(fd, scratch, memory, 1, &moved) == -EBUSY);
        close(fds[1]);
        close(fds[0]);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        end(fd);
}

static void refuses_holes(void) {
        int fd = new_uffd();
        int64_t moved;
        memory = map(PAGES);
        scratch = map(PAGES);
        memset(memory, 0x5a, 3 * PAGE_BYTES);
        register_all(fd, scratch, PAGES);
        CHECK(move(fd, scratch, memory, PAGES, &moved) == -EAGAIN && moved == (int64_t)(3 * PAGE_BYTES));
        CHECK(move(fd, scratch + 3 * PAGE_BYTES, memory + 3 * PAGE_BYTES, 1, &moved) == -ENOENT);
        end(fd);
}

static void *throw_away(void *unused) {
        CHECK(madvise(memory + PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED) == 0);
        return NULL;
}

/* The thread that changes the mapping waits, and nothing is moved, until the event was read. */
static void waits_for_events(void) {
        int fd = begin();
        struct uffd_msg message;
        pthread_t thread;
        int64_t moved;
        CHECK(pthread_create(&thread, NULL, throw_away, NULL) == 0);
        for (int tries = 0; move(fd, scratch, memory, 1, &moved) == 0; tries++) {
                CHECK(tries < 1000 && move(fd, memory, scratch, 1, &moved) == 0);
                usleep(1000);
        }
        CHECK(moved == -EAGAIN && memory[PAGE_BYTES] == 0x5a); /* not thrown away yet */
        ssize_t n;
        while ((n = read(fd, &message, sizeof message)) < 0 && errno == EAGAIN)
                usleep(100);
        CHECK(n == sizeof message && message.event == UFFD_EVENT_REMOVE &&
              message.arg.remove.start == (uintptr_t)memory + PAGE_BYTES);
        pthread_join(thread, NULL);
        CHECK(move(fd, scratch, memory, 1, &moved) == 0);
        end(fd);
}

static volatile int touched;

static void *touch(void *unused) {
        touched = 1 + ((volatile char *)memory)[0];
        return NULL;
}

/* As if whoever took the page away had died. */
static void lets_go_at_close(void) {
        int fd = begin();
        pthread_t thread;
        int64_t moved;
        CHECK(move(fd, scratch, memory, 1, &moved) == 0);
        CHECK(pthread_create(&thread, NULL, touch, NULL) == 0);
        usleep(20000);
        CHECK(touched == 0, "it did not wait");
        close(fd);
        pthread_join(thread, NULL);
        CHECK(touched == 1, "it found %d", touched - 1);
        end(-1);
}

int main(void) {
        int fd = new_uffd();
        struct uffdio_api api = {.api = UFFD_API, .features = UAPI_UFFD_MOVE};
        int probe = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
        if (probe < 0 || ioctl(probe, UFFDIO_API, &api) < 0)
                TEST_SKIP("no UFFDIO_MOVE (6.8)");
        close(probe);
        close(fd);
        moves_and_returns();
        refuses_pinned();
        refuses_shared();
        refuses_holes();
        waits_for_events();
        lets_go_at_close();
        return 0;
}
