/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kernel's promises that route remap's order of calls leans on, one by one, in a process of our own: see the table
 * in docs/route-remap.md. The calls are made here as the program in a target makes them.
 */
#include "host/pagemap.h"
#include "tests/test.h"

#include <linux/mount.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define PAGES 64U
#define RUN_BYTES ((size_t)PAGES * PAGE_BYTES)
#define GUARD_FEATURES                                                                                          \
        (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM)
#ifndef UFFDIO_MOVE
struct uffdio_move {
        uint64_t dst, src, len, mode;
        int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
#define MOVE_DONTWAKE 1U
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static int pool_rw, pool_ro, guard;
static uint8_t *pool;
static atomic_int guard_faults, guard_forks;

static int make_uffd(uint64_t features) {
        int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (dev < 0)
                TEST_SKIP("no /dev/userfaultfd");
        int fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        CHECK(fd >= 0, "userfaultfd");
        close(dev);
        struct uffdio_api api = {.api = UFFD_API, .features = features};
        if (ioctl(fd, UFFDIO_API, &api) < 0)
                TEST_SKIP("userfaultfd features 0x%llx are missing", (unsigned long long)features);
        return fd;
}

static int reg(int fd, const void *at, size_t size, uint64_t mode) {
        struct uffdio_register r = {.range = {(uintptr_t)at, size}, .mode = mode};
        return ioctl(fd, UFFDIO_REGISTER, &r) < 0 ? -errno : 0;
}

static int range(int fd, unsigned long request, const void *at, size_t size) {
        struct uffdio_range r = {(uintptr_t)at, size};
        return ioctl(fd, request, &r) < 0 ? -errno : 0;
}

/* *ret_moved, also on failure: bytes. */
static int move(int fd, void *to, void *from, size_t size, uint64_t mode, size_t *ret_moved) {
        struct uffdio_move m = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = size, .mode = MOVE_DONTWAKE | mode};
        int r = ioctl(fd, UFFDIO_MOVE, &m) < 0 ? -errno : 0;
        *ret_moved = m.move > 0 ? (size_t)m.move : 0;
        return r;
}

static void make_pool(void) {
        int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);
        CHECK(fs >= 0, "fsopen");
        if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "noswap", NULL, 0) < 0)
                TEST_SKIP("tmpfs without noswap");
        CHECK(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0, "tmpfs");
        int mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
        CHECK(mount >= 0, "fsmount");
        pool_rw = openat(mount, "pool", O_RDWR | O_CREAT | O_CLOEXEC, 0400);
        CHECK(pool_rw >= 0 && ftruncate(pool_rw, (off_t)1 << 40) == 0, "pool");
        pool_ro = openat(mount, "pool", O_RDONLY | O_CLOEXEC);
        pool = mmap(NULL, RUN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, pool_rw, 0);
        CHECK(pool_ro >= 0 && pool != MAP_FAILED, "pool");
        close(fs);
        close(mount);
}

static void fill(uint8_t *at, unsigned page) { memset(at + page * PAGE_BYTES, (int)page + 1, PAGE_BYTES); }

static bool holds(const uint8_t *at, unsigned page, int byte) {
        const uint8_t *p = at + page * PAGE_BYTES;
        return p[0] == byte && memcmp(p, p + 1, PAGE_BYTES - 1) == 0;
}

/* Every fault on the guard means that the page was discarded. */
static void *serve(void *unused) {
        int fds[16] = {guard}, n = 1;
        for (;;) {
                struct pollfd polls[16];
                for (int i = 0; i < n; i++)
                        polls[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
                if (poll(polls, (nfds_t)n, 10) <= 0)
                        continue;
                for (int i = 0; i < n; i++) {
                        struct uffd_msg message;
                        if (!(polls[i].revents & POLLIN) || read(fds[i], &message, sizeof message) != sizeof message)
                                continue;
                        if (message.event == UFFD_EVENT_FORK) {
                                guard_forks++;
                                if (n < 16)
                                        fds[n++] = (int)message.arg.fork.ufd;
                        } else if (message.event == UFFD_EVENT_PAGEFAULT) {
                                struct uffdio_zeropage zero = {
                                        .range = {message.arg.pagefault.address & ~(PAGE_BYTES - 1), PAGE_BYTES}};
                                guard_faults++;
                                if (ioctl(fds[i], UFFDIO_ZEROPAGE, &zero) < 0)
                                        range(fds[i], UFFDIO_WAKE, (void *)(uintptr_t)zero.range.start, PAGE_BYTES);
                        }
                }
        }
        return unused;
}

static uint8_t *map(size_t size) {
        uint8_t *p = mmap(NULL, size + 2 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(p != MAP_FAILED, "mmap");
        p += PAGE_BYTES;
        CHECK(mprotect(p, size, PROT_READ | PROT_WRITE) == 0 && madvise(p, size, MADV_NOHUGEPAGE) == 0, "mprotect");
        return p;
}

static uint8_t *map_run(void) {
        uint8_t *p = map(RUN_BYTES);
        for (unsigned i = 0; i < PAGES; i++)
                fill(p, i);
        return p;
}

static void put_pool(void *at) {
        CHECK(mmap(at, RUN_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, pool_ro, 0) == at, "mmap over");
        CHECK(madvise(at, RUN_BYTES, MADV_POPULATE_READ) == 0, "populate");
}

static void pagemap_read(const void *at, uint64_t entries[static PAGES]) {
        int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        CHECK(pread(fd, entries, PAGES * 8, (off_t)((uintptr_t)at / PAGE_BYTES * 8)) == PAGES * 8, "pagemap");
        close(fd);
}

static uint8_t *merged(void) {
        size_t moved;
        uint8_t *run = map_run(), *scratch = map(RUN_BYTES);
        int m = make_uffd(0);
        CHECK(reg(m, scratch, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "scratch");
        CHECK(reg(m, run, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "run");
        CHECK(move(m, scratch, run, RUN_BYTES, 0, &moved) == 0 && moved == RUN_BYTES, "moved %zu", moved);
        CHECK(memcmp(scratch, pool, RUN_BYTES) == 0, "the same");
        put_pool(run);
        CHECK(reg(guard, run, RUN_BYTES,
                  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP) == 0, "guard");
        CHECK(range(m, UFFDIO_WAKE, run, RUN_BYTES) == 0, "wake");
        munmap(scratch, RUN_BYTES);
        close(m);
        return run;
}

/* MADV_POPULATE_READ maps the pool's own pages, all of them, and registering afterwards leaves them there. */
static void test_populate(void) {
        uint64_t run[PAGES], own[PAGES];
        int before = guard_faults;
        uint8_t *p = merged();
        pagemap_read(p, run);
        pagemap_read(pool, own);
        for (unsigned i = 0; i < PAGES; i++) {
                CHECK(run[i] >> 63 && run[i] >> 61 & 1, "page %u is present and the file's", i);
                CHECK((run[i] & PAGEMAP_PFN) == (own[i] & PAGEMAP_PFN), "page %u is the pool's frame", i);
                CHECK(holds(p, i, (int)i + 1), "page %u", i);
        }
        CHECK(guard_faults == before, "nothing was taken for discarded");
        munmap(p, RUN_BYTES);
}

/* A page that is discarded reads as zero; what is written stays; also in a child, which copies the page tables although
 * nothing was ever written: its mapping is registered for write protection. */
static void use_guarded(uint8_t *p) {
        CHECK(madvise(p + 3 * PAGE_BYTES, 2 * PAGE_BYTES, MADV_DONTNEED) == 0, "discard");
        CHECK(holds(p, 3, 0) && holds(p, 4, 0), "discarded pages are zero");
        p[5 * PAGE_BYTES] = 77;
        CHECK(p[5 * PAGE_BYTES] == 77 && p[5 * PAGE_BYTES + 1] == 6, "a page that was written");
        CHECK(madvise(p + 5 * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED) == 0 && holds(p, 5, 0), "written and discarded");
        for (unsigned i = 6; i < PAGES; i++)
                CHECK(holds(p, i, (int)i + 1), "page %u", i);
}

static void test_guarded(void) {
        uint8_t *p = merged();
        int faults = guard_faults, status;
        pid_t child = fork();
        if (child == 0) {
                for (unsigned i = 0; i < PAGES; i++)
                        if (!holds(p, i, (int)i + 1))
                                _exit(2);
                use_guarded(p);
                _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0, "child %x", status);
        CHECK(guard_forks > 0, "the fork was told");
        CHECK(guard_faults == faults + 3, "%d faults: the child's discarded pages only", guard_faults - faults);
        use_guarded(p);
        munmap(p, RUN_BYTES);
}

typedef struct Reader {
        uint8_t *at;
        uint8_t *got;
        atomic_int done;
} Reader;

static void *read_from_outside(void *userdata) {
        Reader *reader = userdata;
        struct iovec to = {reader->got, RUN_BYTES}, from = {reader->at, RUN_BYTES};
        CHECK(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)RUN_BYTES, "readv");
        reader->done = 1;
        return NULL;
}

/* Who reads what was moved away waits; replacing the mapping and waking lets it go on with what is there then, and so
 * does closing the userfaultfd. */
static void test_waiter(bool by_close) {
        size_t moved;
        uint8_t *run = map_run(), *scratch = map(RUN_BYTES);
        int m = make_uffd(0);
        CHECK(reg(m, scratch, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "scratch");
        CHECK(reg(m, run, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "run");
        CHECK(move(m, scratch, run, RUN_BYTES, 0, &moved) == 0, "move");
        Reader reader = {.at = run, .got = malloc(RUN_BYTES)};
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, read_from_outside, &reader) == 0, "thread");
        usleep(20000);
        CHECK(!reader.done, "it waits");
        put_pool(run);
        CHECK(reg(guard, run, RUN_BYTES,
                  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP) == 0, "guard");
        usleep(20000);
        CHECK(!reader.done, "it still waits");
        if (by_close)
                close(m);
        else
                CHECK(range(m, UFFDIO_WAKE, run, RUN_BYTES) == 0, "wake");
        pthread_join(thread, NULL);
        for (unsigned i = 0; i < PAGES; i++)
                CHECK(holds(reader.got, i, (int)i + 1), "page %u", i);
        if (!by_close)
                close(m);
        free(reader.got);
        munmap(run, RUN_BYTES);
        munmap(scratch, RUN_BYTES);
}

/* A run that cannot be moved as a whole, its page 10 being shared with a child, comes back whole by one move that ends
 * where it meets the page that never went. */
static void test_partial(void) {
        size_t moved;
        int ends[2], status;
        uint8_t *run = map_run(), *scratch = map(RUN_BYTES);
        int m = make_uffd(0);
        CHECK(pipe(ends) == 0, "pipe");
        pid_t child = fork();
        if (child == 0) {
                char byte;
                _exit(read(ends[0], &byte, 1) != 1);
        }
        for (unsigned i = 0; i < PAGES; i++)
                if (i != 10)
                        run[i * PAGE_BYTES] = (uint8_t)(i + 1); /* a copy of its own */
        CHECK(reg(m, scratch, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "scratch");
        CHECK(reg(m, run, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "run");
        CHECK(move(m, scratch, run, RUN_BYTES, 0, &moved) < 0 && moved == 10 * PAGE_BYTES, "moved %zu", moved);
        int r = move(m, run, scratch, RUN_BYTES, 0, &moved);
        CHECK((r == -EEXIST || r == -EAGAIN) && moved == 10 * PAGE_BYTES, "back: %d, %zu", r, moved);
        CHECK(move(m, run, scratch, RUN_BYTES, 0, &moved) == -EEXIST && moved == 0, "again: nothing is left to move");
        CHECK(range(m, UFFDIO_UNREGISTER, run, RUN_BYTES) == 0, "unregister");
        for (unsigned i = 0; i < PAGES; i++)
                CHECK(holds(run, i, (int)i + 1), "page %u", i);
        close(m);
        CHECK(write(ends[1], "x", 1) == 1 && waitpid(child, &status, 0) == child && status == 0, "child");
        close(ends[0]);
        close(ends[1]);
        munmap(run, RUN_BYTES);
        munmap(scratch, RUN_BYTES);
}

static size_t count_mappings(const uint8_t *from, const uint8_t *to) {
        size_t n = 0;
        char line[512];
        FILE *maps = fopen("/proc/self/maps", "re");
        while (fgets(line, sizeof line, maps)) {
                unsigned long start, end;
                CHECK(sscanf(line, "%lx-%lx", &start, &end) == 2, "maps");
                n += end > (uintptr_t)from && start < (uintptr_t)to;
        }
        fclose(maps);
        return n;
}

/* A fresh anonymous mapping takes the place of the guarded one in one step, blocked, and the contents move in: a reader
 * from outside never sees zeros, and the mapping merges with its neighbours again. */
static void *read_event(void *userdata) {
        struct uffd_msg message;
        int fd = *(int *)userdata;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        do
                CHECK(poll(&p, 1, 5000) == 1, "an event");
        while (read(fd, &message, sizeof message) != sizeof message);
        CHECK(message.event == UFFD_EVENT_REMAP, "event %d", message.event);
        return NULL;
}

static void test_undo(void) {
        size_t moved, three = 3 * RUN_BYTES;
        uint8_t *area = map(three), *run = area + RUN_BYTES;
        memset(area, 9, three);
        for (unsigned i = 0; i < PAGES; i++)
                fill(run, i);
        CHECK(count_mappings(area, area + three) == 1, "one mapping");
        put_pool(run);
        CHECK(reg(guard, run, RUN_BYTES,
                  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP) == 0, "guard");
        run[7 * PAGE_BYTES] = 99;
        CHECK(madvise(run + 8 * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED) == 0, "discard");
        CHECK(count_mappings(area, area + three) == 3, "three");

        int u = make_uffd(UFFD_FEATURE_EVENT_REMAP);
        uint8_t *scratch = map(RUN_BYTES), *fresh = map(RUN_BYTES);
        CHECK(madvise(fresh, RUN_BYTES, MADV_NOHUGEPAGE) == 0, "like its neighbours");
        CHECK(reg(u, scratch, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "scratch");
        CHECK(reg(u, fresh, RUN_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "fresh");
        /* Mappings of different anon_vmas never merge, and one that is registered gets its neighbour's only if that is
         * registered alike: so a page of the neighbour is, and the fresh mapping merges with it at once. */
        CHECK(reg(u, run - PAGE_BYTES, PAGE_BYTES, UFFDIO_REGISTER_MODE_MISSING) == 0, "neighbour");
        /* Protecting an empty entry leaves a marker there, and UFFDIO_ZEROPAGE refuses to fill over one: the guard would
         * answer for ever. So what was discarded is filled first. */
        CHECK(madvise(run, RUN_BYTES, MADV_POPULATE_READ) == 0, "fill");
        struct uffdio_writeprotect protect = {.range = {(uintptr_t)run, RUN_BYTES}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
        CHECK(ioctl(guard, UFFDIO_WRITEPROTECT, &protect) == 0, "writers wait");
        struct uffdio_copy copy = {.dst = (uintptr_t)scratch, .src = (uintptr_t)run, .len = RUN_BYTES};
        CHECK(ioctl(u, UFFDIO_COPY, &copy) == 0, "copy");
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, read_event, &u) == 0, "thread");
        CHECK(mremap(fresh, RUN_BYTES, RUN_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, run) == run, "mremap");
        pthread_join(thread, NULL);
        Reader reader = {.at = run, .got = malloc(RUN_BYTES)};
        CHECK(pthread_create(&thread, NULL, read_from_outside, &reader) == 0, "thread");
        usleep(20000);
        CHECK(!reader.done, "still blocked after mremap");
        CHECK(move(u, run, scratch, RUN_BYTES, 0, &moved) == 0, "moved in");
        CHECK(range(u, UFFDIO_UNREGISTER, run - PAGE_BYTES, RUN_BYTES + PAGE_BYTES) == 0, "unregister");
        pthread_join(thread, NULL);
        CHECK(memcmp(reader.got, run, RUN_BYTES) == 0, "what the reader saw");
        for (unsigned i = 0; i < PAGES; i++)
                if (i != 7)
                        CHECK(holds(run, i, i == 8 ? 0 : (int)i + 1), "page %u", i);
        CHECK(run[7 * PAGE_BYTES] == 99 && run[7 * PAGE_BYTES + 1] == 8, "what was written");
        CHECK(count_mappings(area, area + three) == 1, "one mapping again, not %zu", count_mappings(area, area + three));
        CHECK(madvise(run, RUN_BYTES, MADV_FREE) == 0, "MADV_FREE");
        CHECK(mremap(area, three, 2 * three, MREMAP_MAYMOVE) != MAP_FAILED, "mremap over all of it");
        close(u);
}

int main(void) {
        setlinebuf(stdout);
        test_need_root();
        make_pool();
        for (unsigned i = 0; i < PAGES; i++)
                fill(pool, i);
        guard = make_uffd(GUARD_FEATURES);
        pthread_t server;
        CHECK(pthread_create(&server, NULL, serve, NULL) == 0, "thread");
        test_populate();
        printf("populate\n");
        test_guarded();
        printf("guarded\n");
        test_waiter(false);
        test_waiter(true);
        printf("waiters\n");
        test_partial();
        printf("partial\n");
        test_undo();
        printf("undo\n");
        return 0;
}
