/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What the kernel promises of guarded pool pages, each with the real keeper answering: a discarded page reads as zeros
 * and nothing else changes, whatever the process does to its mappings, and in all that it forks. argv[1]: the keeper.
 */
#include "guard-child.h"

#include "base/clock.h"
#include "keeper/serve.h"
#include "keeper/store.h"
#include "merge/remap-target.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

#define PAGES 128

static void test_discard(void) {
        Guarded guarded = guarded_start(PAGES, true);
        Child *child = &guarded.child;
        uint32_t sharers[PAGES];

        CHECK_HARMLESS(child_order(child, order_check_pool, PAGES) == 0);
        CHECK(pool_sharers(pool, pool_first, PAGES, sharers) == 0);
        for (unsigned i = 0; i < PAGES; i++)
                CHECK(sharers[i] == 1, "page %u: %u", i, sharers[i]);
        CHECK(child_order(child, order_discard, 5) == 0);
        CHECK_HARMLESS(child_order(child, order_is_zero, 5) == 1);
        CHECK_HARMLESS(child_order(child, order_is_pool, 4) == 1 && child_order(child, order_is_pool, 6) == 1);
        /* Again, after it was written to. */
        CHECK(child_order(child, order_discard, 5) == 0);
        CHECK_HARMLESS(child_order(child, order_is_zero, 5) == 1);
        CHECK_HARMLESS(child_order(child, order_check_pool, PAGES) == 1);
        CHECK(pool_sharers(pool, pool_first, PAGES, sharers) == 0 && sharers[5] == 0 && sharers[6] == 1);
        guarded_stop(&guarded);
}

/* A read by the kernel, of a page that is gone: read(2) of a file into it, write(2) out of it. */
static long order_kernel_access(long page) {
        char *p = (char *)area_page((uint64_t)page);
        int fds[2];
        char byte = 1;

        CHECK(pipe2(fds, O_CLOEXEC) == 0);
        CHECK(write(fds[1], p, 1) == 1 && read(fds[0], &byte, 1) == 1);
        CHECK_HARMLESS(byte == 0);
        CHECK(madvise(p, PAGE_BYTES, MADV_DONTNEED) == 0);
        CHECK(write(fds[1], "x", 1) == 1 && read(fds[0], p, 1) == 1 && *p == 'x');
        *p = 0;
        close(fds[0]);
        close(fds[1]);
        return page_is_zero(p);
}

static void test_kernel_access(void) {
        Guarded guarded = guarded_start(PAGES, true);

        CHECK(child_order(&guarded.child, order_discard, 3) == 0);
        CHECK_HARMLESS(child_order(&guarded.child, order_kernel_access, 3) == 1);
        CHECK_HARMLESS(child_order(&guarded.child, order_check_pool, PAGES) == 1);
        guarded_stop(&guarded);
}

/* In a child of a child: all pages as they were, without a fault (it is told by pagemap), and discarding works. */
static long check_generation(long generations) {
        pid_t pid = fork();
        int status;

        CHECK(pid >= 0);
        if (pid == 0) {
                _cleanup_close_ int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
                uint64_t entries[PAGES];

                CHECK(pread(pagemap, entries, sizeof entries, (off_t)(shared->start / PAGE_BYTES * 8)) == sizeof entries);
                for (unsigned i = 0; i < PAGES; i++)
                        CHECK(!!(entries[i] >> 63) == (i != 7 + (unsigned)generations), "page %u has no pte", i);
                for (long i = 0; i < PAGES; i++)
                        if (i < 7 || i > 9)
                                CHECK_HARMLESS(order_is_pool(i), "page %ld in generation %ld", i, generations);
                CHECK_HARMLESS(order_is_zero(7 + generations));
                if (generations > 0) {
                        CHECK(order_discard(7 + generations - 1) == 0);
                        _exit((int)check_generation(generations - 1));
                }
                CHECK(order_discard(100) == 0);
                CHECK_HARMLESS(order_is_zero(100));
                *(volatile char *)area_page(101) = 1;
                _exit(0);
        }
        CHECK(waitpid(pid, &status, 0) == pid);
        return status == 0 ? 0 : 1;
}

static void test_fork(void) {
        Guarded guarded = guarded_start(PAGES, true);
        KeeperStats stats;

        CHECK(child_order(&guarded.child, order_discard, 9) == 0);
        CHECK_HARMLESS(child_order(&guarded.child, check_generation, 2) == 0);
        CHECK_HARMLESS(child_order(&guarded.child, order_is_pool, 100) == 1);
        CHECK_HARMLESS(child_order(&guarded.child, order_is_pool, 101) == 1);
        CHECK(keeper_stats(keeper, &stats) == 0 && stats.forks >= 3);
        guarded_stop(&guarded);
}

/* Its parent is gone when it discards. */
static long orphan(long unused) {
        int fds[2];
        char byte;
        pid_t pid;

        shared->counters[8] = 0;
        CHECK(pipe(fds) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                close(fds[1]);
                CHECK(read(fds[0], &byte, 1) == 0); /* the parent was killed */
                CHECK(order_discard(20) == 0);
                shared->counters[8] = order_is_zero(20) && order_is_pool(21) ? 1 : 2;
                _exit(0);
        }
        return 0;
}

static void test_orphan(void) {
        Guarded guarded = guarded_start(PAGES, true);

        CHECK(child_order(&guarded.child, orphan, 0) == 0);
        guarded_stop(&guarded);
        for (unsigned i = 0; __atomic_load_n(&shared->counters[8], __ATOMIC_ACQUIRE) == 0; i++) {
                CHECK(i < 500, "the orphan waits");
                usleep(10000);
        }
        CHECK_HARMLESS(shared->counters[8] == 1);
}

/* The mapping grows in place, moves and grows, leaves its old place mapped: never a pool page that it had not. */
static long order_grow(long n_pages) {
        size_t old = 32 * PAGE_BYTES, new = (size_t)n_pages * PAGE_BYTES;
        char *p = mremap((void *)area_page(0), old, new, MREMAP_MAYMOVE);

        if (p == MAP_FAILED)
                return -errno;
        for (long i = 0; i < n_pages; i++)
                if (i < 32 ? !page_is(p + i * (long)PAGE_BYTES, pool_first + (uint64_t)i)
                           : !page_is_zero(p + i * (long)PAGE_BYTES))
                        return 1 + i;
        return 0;
}

static long order_leave(long unused) {
        char *from = (char *)area_page(0), *to;

        to = (char *)syscall(SYS_mremap, from, 32 * PAGE_BYTES, 32 * PAGE_BYTES,
                             MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP, 5.7 */, NULL);
        if (to == MAP_FAILED)
                return -errno;
        for (uint64_t i = 0; i < 32; i++)
                if (!page_is(to + i * PAGE_BYTES, pool_first + i) || !page_is_zero(from + i * PAGE_BYTES))
                        return 1 + (long)i;
        return 0;
}

/* To another address, as pool pages and discarded ones. */
static long order_move(long unused) {
        char *from = (char *)area_page(0), *to = (char *)area_page(20000);

        CHECK(order_discard(3) == 0);
        if (mremap(from, 32 * PAGE_BYTES, 32 * PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
                return -errno;
        CHECK(madvise(to + 4 * PAGE_BYTES, PAGE_BYTES, MADV_DONTNEED) == 0);
        for (uint64_t i = 0; i < 32; i++)
                if (i == 3 || i == 4 ? !page_is_zero(to + i * PAGE_BYTES) : !page_is(to + i * PAGE_BYTES, pool_first + i))
                        return 1 + (long)i;
        return 0;
}

static long order_unmap_behind(long unused) { /* room to grow in place */
        return munmap((void *)area_page(32), ORDER_MAP_ROOM / 2);
}

/* An order that returns an error, or 1 + the first page that is wrong. */
static void check_pages(const Guarded *guarded, long (*order)(long), long argument) {
        long r = child_order(&guarded->child, order, argument);

        CHECK(r >= 0, "%ld", r);
        CHECK_HARMLESS(r == 0, "page %ld", r - 1);
}

static void test_mremap(void) {
        Guarded guarded = guarded_start(32, true);
        KeeperStats before, after;

        CHECK(keeper_stats(keeper, &before) == 0);
        CHECK(child_order(&guarded.child, order_unmap_behind, 0) == 0);
        check_pages(&guarded, order_grow, 64); /* over pool pages 32 … 63, which hold data */
        guarded_stop(&guarded);
        guarded = guarded_start(32, true);
        check_pages(&guarded, order_leave, 0);
        guarded_stop(&guarded);
        guarded = guarded_start(32, true);
        check_pages(&guarded, order_move, 0);
        guarded_stop(&guarded);
        CHECK(keeper_stats(keeper, &after) == 0 && after.zeros > before.zeros && after.remaps > before.remaps);
}

static void *read_page(void *page) { return (void *)(uintptr_t)page_is_zero(page); }

/* Who read the message of a fault died with it: it is told again to the keeper that the userfaultfd is given to. */
static long order_is_zero_50(long unused) { return (long)(uintptr_t)read_page((void *)area_page(50)); }

static void test_requeue(void) {
        Guarded guarded = guarded_start(PAGES, false);
        KeeperOwner owner = { .pid = guarded.child.pid };
        struct uffd_msg msg;
        pid_t pid;
        int status;

        CHECK(child_order(&guarded.child, order_discard, 50) == 0);
        pid = fork(); /* gives the order and waits for the answer */
        if (pid == 0)
                _exit(child_order(&guarded.child, order_is_zero_50, 0) == 1 ? 0 : 1);
        for (unsigned i = 0; read(guarded.guard, &msg, sizeof msg) != sizeof msg; i++) {
                CHECK(i < 1000, "no message");
                usleep(1000);
        }
        CHECK(msg.event == UFFD_EVENT_PAGEFAULT && msg.arg.pagefault.address == area_page(50));
        usleep(50000);
        CHECK(read(guarded.guard, &msg, sizeof msg) < 0 && errno == EAGAIN); /* it is not told twice by itself */
        CHECK(waitpid(pid, &status, WNOHANG) == 0);
        CHECK(guard_requeue(guarded.guard) == 0);
        usleep(50000);
        CHECK(read(guarded.guard, &msg, sizeof msg) == sizeof msg && msg.arg.pagefault.address == area_page(50));
        CHECK(keeper_add(keeper, guarded.guard, &owner) == 0);
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK_HARMLESS(status == 0, "%#x", (unsigned)status);
        guarded_stop(&guarded);
}

static void protect(const Guarded *guarded, uint64_t page) {
        struct uffdio_writeprotect change = { { area_page(page), PAGE_BYTES }, UFFDIO_WRITEPROTECT_MODE_WP };

        CHECK(ioctl(guarded->guard, UFFDIO_WRITEPROTECT, &change) == 0);
}

/* An order that may wait for ever, given by a process of its own. */
static pid_t begin_order(const Guarded *guarded, long (*order)(long), long argument, long expected) {
        pid_t pid = fork();

        CHECK(pid >= 0);
        if (pid == 0)
                _exit(child_order(&guarded->child, order, argument) == expected ? 0 : 1);
        return pid;
}

static void await_order(pid_t pid, const char *what, void (*meanwhile)(void *userdata), void *userdata) {
        int status;

        for (unsigned i = 0; waitpid(pid, &status, WNOHANG) == 0; i++) {
                CHECK(i < 2000, "%s waits", what);
                if (meanwhile)
                        meanwhile(userdata);
                usleep(1000);
        }
        CHECK_HARMLESS(status == 0, "%s: %d", what, status);
}

static void *write_page(void *page) {
        *(volatile char *)page = 1;
        return NULL;
}

/* One thread writes a page that is protected, then another forks. */
static long order_write_and_fork(long page) {
        pthread_t thread;
        int status;
        pid_t pid;

        CHECK(pthread_create(&thread, NULL, write_page, (void *)area_page((uint64_t)page)) == 0);
        usleep(50000);
        pid = fork();
        if (pid == 0)
                _exit(0);
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0);
        CHECK(pthread_join(thread, NULL) == 0);
        return 0;
}

typedef struct ByHand {
        Hold hold;
        int fd;
} ByHand;

static void note_nothing(void *userdata, int fd) { }

static void serve_by_hand(void *userdata) {
        ByHand *hand = userdata;

        (void)serve_read(&hand->hold, hand->fd, 64, note_nothing, NULL);
}

/* A write to a protected page is let go while the kernel wants the event of a fork to be read first. */
static void test_protected_fork(void) {
        Guarded guarded = guarded_start(PAGES, false);
        KeeperItem item = {};
        ByHand hand;
        int table;
        pid_t pid;

        CHECK(hold_init(&hand.hold, 1024, &table) == 0);
        hand.fd = fcntl(guarded.guard, F_DUPFD_CLOEXEC, 3);
        CHECK(hold_add(&hand.hold, hand.fd, &item) == 0);
        protect(&guarded, 40);
        pid = begin_order(&guarded, order_write_and_fork, 40, 0);
        usleep(200000);
        CHECK(hand.hold.stats->faults == 0);
        (void)serve_read(&hand.hold, hand.fd, 1, note_nothing, NULL); /* the fault: they are told before events */
        CHECK(hand.hold.stats->faults == 1 && hand.hold.stats->forks == 0);
        await_order(pid, "who writes to a protected page", serve_by_hand, &hand);
        CHECK(hand.hold.stats->forks == 1);
        CHECK_HARMLESS(child_order(&guarded.child, order_is_pool, 41) == 1);
        for (int fd = hand.hold.end - 1; fd >= 0; fd--)
                if (hand.hold.entries[fd].id)
                        hold_drop(&hand.hold, fd);
        safe_close(table);
        guarded_stop(&guarded);
}

static void *read_hole(void *page) { return (void *)(uintptr_t)page_is_zero(page); }

/* So many, each by a thread. */
static long order_read_holes(long n) {
        pthread_t threads[4];
        long zero = 0;

        for (long i = 0; i < n; i++)
                CHECK(pthread_create(&threads[i], NULL, read_hole, (void *)area_page(50 + (uint64_t)i)) == 0);
        for (long i = 0; i < n; i++) {
                void *is;

                CHECK(pthread_join(threads[i], &is) == 0);
                zero += is != NULL;
        }
        return zero;
}

/* Discarded pages that were protected all the same: one, and several at once. */
static void test_protected_holes(long n) {
        Guarded guarded = guarded_start(PAGES, true);

        for (long i = 0; i < n; i++) {
                CHECK(child_order(&guarded.child, order_discard, 50 + i) == 0);
                protect(&guarded, 50 + (uint64_t)i);
        }
        await_order(begin_order(&guarded, order_read_holes, n, n), "who reads a protected hole", NULL, NULL);
        CHECK_HARMLESS(child_order(&guarded.child, order_is_pool, 50 + n) == 1);
        guarded_stop(&guarded);
}

static long order_fork(long unused) {
        pid_t pid = fork();
        int status;

        if (pid == 0)
                _exit(0);
        return waitpid(pid, &status, 0) == pid ? status : -1;
}

static void *read_late(void *guard) {
        struct uffd_msg msg;

        usleep(1000);
        CHECK(read(*(const int *)guard, &msg, sizeof msg) == sizeof msg && msg.event == UFFD_EVENT_FORK);
        return (void *)(uintptr_t)msg.arg.fork.ufd;
}

/* Whose guard it is shows also while its process forks, which the keeper takes a moment to read; and on a page that is
 * there. */
static void test_watches(void) {
        Guarded guarded = guarded_start(PAGES, false), other = guarded_start(PAGES, false);
        const Target *target = guarded.child.target;
        Vma vma = { .start = area_page(0), .end = area_page(PAGES) };
        pthread_t thread;
        void *forked;
        pid_t pid;

        CHECK(remap_guard_page(target, &vma) == area_page(0));
        CHECK(child_order(&guarded.child, order_discard, 0) == 0);
        protect(&guarded, 1);
        CHECK(remap_guard_page(target, &vma) == area_page(2));
        CHECK(remap_guard_watches(guarded.guard, target, area_page(2)));
        CHECK(!remap_guard_watches(other.guard, target, area_page(2)));
        pid = begin_order(&guarded, order_fork, 0, 0);
        usleep(100000);
        CHECK(pthread_create(&thread, NULL, read_late, &guarded.guard) == 0);
        CHECK(remap_guard_watches(guarded.guard, target, area_page(2)), "not while it forks");
        CHECK(pthread_join(thread, &forked) == 0);
        await_order(pid, "who forks", NULL, NULL);
        safe_close((int)(uintptr_t)forked);
        guarded_stop(&guarded);
        guarded_stop(&other);
}

/* Of a mapping that nobody watched for a time what is absent was not discarded; what is from then on was. */
static void test_watched_again(void) {
        Guarded guarded = { .child = child_start() };

        guarded_map_area(&guarded.child, PAGES);
        guarded_guard(&guarded, true);
        guarded_map_pool(&guarded, 0, PAGES, pool_first);
        CHECK(child_order(&guarded.child, order_is_pool, 3) == 1);
        CHECK(target_open_memory(guarded.child.target) == 0);
        CHECK(remap_guard_watch_again(guarded.guard, guarded.child.target, area_page(0), area_page(PAGES)) == 0);
        CHECK(child_order(&guarded.child, order_check_pool, PAGES) == 0);
        CHECK(child_order(&guarded.child, order_discard, 5) == 0 && child_order(&guarded.child, order_is_zero, 5) == 1);
        guarded_stop(&guarded);
}

static pid_t group;

/* So many children, … */
static long order_brood_begin(long n) {
        group = 0;
        for (long i = 0; i < n; i++) {
                pid_t pid = fork();

                if (pid == 0) {
                        pause();
                        _exit(1);
                }
                CHECK(pid > 0 && setpgid(pid, group) == 0);
                group = group ?: pid;
        }
        return 0;
}

/* … which end at once. */
static long order_brood_end(long n) {
        CHECK(kill(-group, SIGKILL) == 0);
        for (long i = 0; i < n; i++)
                CHECK(waitpid(-group, NULL, 0) > 0);
        return 0;
}

static long order_brood(long n) { return order_brood_begin(n) ?: order_brood_end(n); }

static int count_child(void *userdata, const KeeperItem *item, int uffd) {
        *(unsigned *)userdata += item->parent != 0;
        return 0;
}

/* The keeper has more to tell a daemon than its socket holds, and answers it all the same. */
static void test_many_children(const char *program) {
        Guarded guarded = guarded_start(PAGES, true);
        Keeper *second = NULL;
        uint64_t until, begun = now_nsec();
        KeeperStats stats;
        int r;

        CHECK(child_order(&guarded.child, order_brood_begin, 1000) == 0);
        r = keeper_stats(keeper, &stats);
        CHECK(r == 0, "%s", strerror(-r));
        r = keeper_new(guard_directory, program, &second);
        CHECK(r == 0, "%s", strerror(-r));
        second = keeper_free(second);
        r = keeper_recover(keeper);
        CHECK(r == 0, "%s", strerror(-r));
        printf("known to a second daemon, and the first again, in %lu ms\n", (now_nsec() - begun) / NSEC_PER_MSEC);
        until = now_nsec() + 10 * NSEC_PER_SEC;
        for (unsigned known = 0; known < 1000; usleep(1000)) {
                CHECK(now_nsec() < until, "%u of 1000 children are known", known);
                known = 0;
                CHECK(keeper_list(keeper, count_child, &known) == 0);
        }
        CHECK(child_order(&guarded.child, order_brood_end, 1000) == 0);
        guarded_stop(&guarded);
}

/* Until nobody's guard but that of the process itself is held. */
static uint64_t await_swept(void) {
        uint64_t begun = now_nsec();
        KeeperStats stats;

        do {
                usleep(10000);
                CHECK(keeper_dispatch(keeper) == 0 && keeper_stats(keeper, &stats) == 0);
                CHECK(now_nsec() < begun + 20 * NSEC_PER_SEC, "%u guards are held", stats.guards);
        } while (stats.guards > 1);
        return now_nsec() - begun;
}

/* To let go of many guards at once is no reason to look for more the later: forks would make them grow without end. */
static void test_sweep(void) {
        Guarded guarded = guarded_start(PAGES, true);
        uint64_t many, one;

        CHECK(child_order(&guarded.child, order_brood, 800) == 0);
        many = await_swept();
        CHECK(child_order(&guarded.child, order_brood, 1) == 0);
        one = await_swept();
        printf("800 dead guards are let go of in %lu ms, one more in %lu ms\n", many / NSEC_PER_MSEC, one / NSEC_PER_MSEC);
        CHECK(one < 2 * NSEC_PER_SEC, "%lu ms", one / NSEC_PER_MSEC);
        guarded_stop(&guarded);
}

static int count_guards(void *userdata, const KeeperItem *item, int uffd) {
        ++*(unsigned *)userdata;
        return 0;
}

/* All threads of a target stand in a keeper_sync(): how many guards there are must not matter. And each process that is new
 * looks through all of them for its own. */
static void test_many_guards(void) {
        enum { GUARDS = 2000, TIMES = 50 };
        _cleanup_free_ int *fds = calloc(GUARDS, sizeof *fds);
        Guarded guarded = guarded_start(PAGES, true);
        KeeperOwner owner = { .pid = guarded.child.pid };
        uint64_t before = UINT64_MAX, after = UINT64_MAX, listed;
        unsigned n = 0;

        for (unsigned i = 0; i < 2 * TIMES; i++) {
                uint64_t begun = now_nsec(), *least = i < TIMES ? &before : &after;

                CHECK(keeper_sync(keeper) == 0);
                *least = MIN_OF(*least, now_nsec() - begun);
                for (unsigned k = 0; i == TIMES - 1 && k < GUARDS; k++) {
                        fds[k] = child_userfaultfd(&guarded.child, GUARD_ZERO);
                        CHECK(keeper_add(keeper, fds[k], &owner) == 0);
                }
        }
        printf("keeper_sync(): %lu us, with %u guards %lu us\n", before / 1000, GUARDS, after / 1000);
        CHECK(after < before + 500 * NSEC_PER_USEC, "%lu us, with %u guards %lu us", before / 1000, GUARDS, after / 1000);
        listed = now_nsec();
        CHECK(keeper_list(keeper, count_guards, &n) == 0 && n >= GUARDS, "%u", n);
        listed = now_nsec() - listed;
        CHECK(listed < 5 * NSEC_PER_MSEC, "listed in %lu us", listed / 1000);
        for (unsigned k = 0; k < GUARDS; k++) {
                CHECK(keeper_drop(keeper, guard_id(fds[k])) == 0);
                safe_close(fds[k]);
        }
        guarded_stop(&guarded);
}

static int bind_socket(const char *path, int type) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

        snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
        CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
        return fd;
}

/* A service manager: what is stored by names, until it is asked for a barrier. Returns how many it has. */
static unsigned manage_store(int notify) {
        char names[8][STORE_NAME_BYTES_MAX + 1] = {};
        unsigned n = 0;

        for (;;) {
                char text[256] = {}, name[STORE_NAME_BYTES_MAX + 1];
                char control[CMSG_SPACE(sizeof(int))];
                struct iovec data = { text, sizeof text - 1 };
                struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                                          .msg_controllen = sizeof control };
                struct cmsghdr *header;

                CHECK(recvmsg(notify, &message, MSG_CMSG_CLOEXEC) > 0, "no word of the keeper");
                header = CMSG_FIRSTHDR(&message);
                if (header)
                        close(*(const int *)(const void *)CMSG_DATA(header));
                if (strcmp(text, "BARRIER=1") == 0)
                        return n;
                CHECK(sscanf(strstr(text, "FDNAME="), "FDNAME=%16s", name) == 1);
                for (unsigned i = 0; i <= n && strncmp(text, "FDSTOREREMOVE", 13) == 0; i++) {
                        CHECK(i < n, "%s is not stored", name);
                        if (strcmp(names[i], name) != 0)
                                continue;
                        memcpy(names[i], names[--n], sizeof names[i]);
                        break;
                }
                if (strncmp(text, "FDSTORE=1", 9) == 0)
                        memcpy(names[n++], name, sizeof name);
        }
}

/* With a pool in it the store of a service that ended would keep all the pool's memory. */
static void test_store_emptied(const char *program) {
        _cleanup_(pool_freep) Pool *other = NULL;
        struct timeval patience = { .tv_sec = 20 };
        char directory[] = "/tmp/ksmd-store-XXXXXX", path[64], notify_path[64];
        int listening, notify, status;
        Keeper *second;
        pid_t pid;

        CHECK(mkdtemp(directory));
        snprintf(path, sizeof path, "%s/keeper", directory);
        snprintf(notify_path, sizeof notify_path, "%s/notify", directory);
        listening = bind_socket(path, SOCK_SEQPACKET);
        CHECK(listen(listening, 8) == 0);
        notify = bind_socket(notify_path, SOCK_DGRAM);
        CHECK(setsockopt(notify, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0);
        pid = fork();
        if (pid == 0) {
                CHECK(dup2(listening, 3) == 3 && fcntl(3, F_SETFD, 0) == 0 && setenv("NOTIFY_SOCKET", notify_path, 1) == 0);
                execl(program, program, "--listen", "3", NULL);
                _exit(127);
        }
        close(listening);
        CHECK(pool_new("stored", 256, &other, NULL) == 0);
        CHECK(keeper_new(directory, program, &second) == 0 && keeper_pool_add(second, pool_mount_fd(other)) == 0);
        second = keeper_free(second);
        CHECK(manage_store(notify) == 0, "something is stored after the end");
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        close(notify);
        CHECK(unlink(path) == 0 && unlink(notify_path) == 0 && rmdir(directory) == 0);
}

int main(int argc, char **argv) {
        struct rlimit limit;

        CHECK(argc == 2);
        CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
        limit.rlim_cur = limit.rlim_max;
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        guard_test_begin(256, argv[1]);
        test_discard();
        test_kernel_access();
        test_fork();
        test_orphan();
        test_mremap();
        test_requeue();
        test_protected_fork();
        test_protected_holes(1);
        test_protected_holes(4);
        test_watches();
        test_watched_again();
        test_sweep();
        test_many_children(argv[1]);
        test_many_guards();
        test_store_emptied(argv[1]);
        guard_test_end();
        return 0;
}
