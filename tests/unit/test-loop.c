/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The event loop with real pipes, timers and signals, and under random operations against a model. */

#include "loop/loop.h"

#include "test.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

static Loop *loop_or_skip(void) {
        Loop *loop = NULL;
        int r = loop_new(&loop);

        if (r == -ENOSYS || r == -EPERM)
                TEST_SKIP("io_uring is refused here: %s", strerror(-r));
        assert_int_equal(r, 0);
        return loop;
}

/* A source together with what is expected of it. */
typedef struct Item {
        LoopSource *source;
        int pipe[2];
        unsigned runs;
        uint32_t revents;
        bool drain, free_self;
        struct Item *victim;    /* freed by this one's handler */
        Loop *loop;             /* for handlers that act on it */
        int result;
} Item;

static void item_open(Item *item) {
        *item = (Item){};
        assert_int_equal(pipe2(item->pipe, O_CLOEXEC | O_NONBLOCK), 0);
}

static void item_close(Item *item) {
        item->source = loop_source_free(item->source);
        close(item->pipe[0]);
        close(item->pipe[1]);
}

static void item_fill(Item *item) {
        assert_int_equal(write(item->pipe[1], "x", 1), 1);
}

static int on_io(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Item *item = userdata;
        char c;

        assert_ptr_equal(item->source, source);
        item->runs++;
        item->revents = revents;
        if (item->drain)
                assert_int_equal(read(fd, &c, 1), 1);
        if (item->victim)
                item->victim->source = loop_source_free(item->victim->source);
        if (item->free_self)
                item->source = loop_source_free(item->source);
        return item->result;
}

static void test_level_triggered(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item;

        item_open(&item);
        assert_int_equal(loop_add_io(loop, item.pipe[0], POLLIN, on_io, &item, &item.source), 0);
        assert_int_equal(loop_dispatch(loop, 0), 0);
        assert_int_equal(item.runs, 0);

        item_fill(&item);
        item_fill(&item);
        for (unsigned i = 1; i <= 3; i++) { /* nobody reads: it stays ready */
                assert_int_equal(loop_dispatch(loop, NSEC_PER_SEC), 0);
                assert_int_equal(item.runs, i);
                assert_int_equal(item.revents, POLLIN);
        }
        item.drain = true;
        loop_dispatch(loop, NSEC_PER_SEC);
        loop_dispatch(loop, NSEC_PER_SEC);
        assert_int_equal(item.runs, 5);
        assert_int_equal(loop_dispatch(loop, NSEC_PER_MSEC), 0);
        assert_int_equal(item.runs, 5);

        item.drain = false;
        close(item.pipe[1]);
        loop_dispatch(loop, NSEC_PER_SEC);
        assert_int_equal(item.runs, 6);
        assert_true(item.revents & POLLHUP);
        item.pipe[1] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        item_close(&item);
}

static void test_mute(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item;

        item_open(&item);
        assert_int_equal(loop_add_io(loop, item.pipe[0], 0, on_io, &item, &item.source), 0);
        item_fill(&item);
        loop_dispatch(loop, 0);
        assert_int_equal(item.runs, 0);
        loop_source_set_events(item.source, POLLIN);
        loop_dispatch(loop, NSEC_PER_SEC);
        assert_int_equal(item.runs, 1);
        loop_source_set_events(item.source, 0);
        loop_dispatch(loop, NSEC_PER_MSEC);
        loop_dispatch(loop, 0);
        assert_int_equal(item.runs, 1);
        /* Muted while it is with the kernel, and wanted again before that knows. */
        loop_source_set_events(item.source, POLLIN);
        loop_dispatch(loop, NSEC_PER_SEC);
        loop_source_set_events(item.source, 0);
        loop_source_set_events(item.source, POLLIN);
        loop_dispatch(loop, NSEC_PER_SEC);
        assert_int_equal(item.runs, 3);
        item_close(&item);
}

/* Both are ready in one batch; whichever runs first frees the other, which then must not run. */
static void test_free_other(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item a, b;

        item_open(&a);
        item_open(&b);
        a.victim = &b;
        b.victim = &a;
        item_fill(&a);
        item_fill(&b);
        assert_int_equal(loop_add_io(loop, a.pipe[0], POLLIN, on_io, &a, &a.source), 0);
        assert_int_equal(loop_add_io(loop, b.pipe[0], POLLIN, on_io, &b, &b.source), 0);
        loop_dispatch(loop, NSEC_PER_SEC);
        loop_dispatch(loop, NSEC_PER_MSEC);
        assert_int_equal((a.runs > 0) + (b.runs > 0), 1);
        assert_int_equal((a.source != NULL) + (b.source != NULL), 1);
        item_close(&a);
        item_close(&b);
}

static void test_free_self(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item;

        item_open(&item);
        item.free_self = true;
        item_fill(&item);
        assert_int_equal(loop_add_io(loop, item.pipe[0], POLLIN, on_io, &item, &item.source), 0);
        loop_dispatch(loop, NSEC_PER_SEC);
        loop_dispatch(loop, NSEC_PER_MSEC);
        assert_int_equal(item.runs, 1);
        assert_null(item.source);
        item_close(&item);
}

/* A poll holds the file: when source and descriptor are gone the other end must see that at once. */
static void test_free_lets_go(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        struct pollfd pollfd = {.events = POLLIN};
        Item item = {.free_self = true};
        int fds[2];

        for (unsigned in_handler = 0; in_handler < 2; in_handler++) {
                assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
                pollfd.fd = fds[1];
                assert_int_equal(loop_add_io(loop, fds[0], POLLIN, on_io, &item, &item.source), 0);
                loop_dispatch(loop, 0);
                if (in_handler) {
                        Item other = {.free_self = true, .victim = &item};

                        assert_int_equal(write(fds[0], "x", 1), 1);
                        assert_int_equal(loop_add_io(loop, fds[1], POLLIN, on_io, &other, &other.source), 0);
                        loop_dispatch(loop, NSEC_PER_SEC);
                        assert_int_equal(other.runs, 1);
                } else
                        item.source = loop_source_free(item.source);
                assert_null(item.source);
                close(fds[0]);
                assert_int_equal(poll(&pollfd, 1, 0), 1);
                assert_true(pollfd.revents & POLLHUP);
                close(fds[1]);
        }
}

static void test_bad_descriptor(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item;

        item_open(&item);
        item.free_self = true;
        assert_int_equal(loop_add_io(loop, -1, POLLIN, on_io, &item, &item.source), -EBADF);
        assert_int_equal(loop_add_io(loop, 1 << 20, POLLIN, on_io, &item, &item.source), 0);
        assert_int_equal(loop_dispatch(loop, NSEC_PER_SEC), 0);
        assert_int_equal(item.runs, 1);
        assert_int_equal(item.revents, POLLNVAL);
        item_close(&item);
}

static int on_timer(void *userdata, LoopSource *source) {
        Item *item = userdata;

        item->runs++;
        if (item->free_self)
                item->source = loop_source_free(item->source);
        return item->result;
}

static void test_timer(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item = {}, other = {};
        uint64_t begin = now_nsec();

        assert_int_equal(loop_add_timer(loop, 5 * NSEC_PER_MSEC, 0, on_timer, &item, &item.source), 0);
        while (item.runs == 0)
                loop_dispatch(loop, NSEC_PER_SEC);
        assert_true(now_nsec() - begin >= 5 * NSEC_PER_MSEC);
        loop_dispatch(loop, 10 * NSEC_PER_MSEC);
        assert_int_equal(item.runs, 1);

        /* Set again before it is over: only the last time counts. */
        loop_source_set_timer(item.source, NSEC_PER_SEC * 3600, 0);
        loop_dispatch(loop, 0);
        begin = now_nsec();
        loop_source_set_timer(item.source, 3 * NSEC_PER_MSEC, 2 * NSEC_PER_MSEC);
        while (item.runs < 4)
                loop_dispatch(loop, NSEC_PER_SEC);
        assert_true(now_nsec() - begin >= 7 * NSEC_PER_MSEC);

        loop_source_set_timer(item.source, UINT64_MAX, 0);
        loop_dispatch(loop, 5 * NSEC_PER_MSEC);
        assert_int_equal(item.runs, 4);

        /* Far away, and freed while with the kernel. */
        assert_int_equal(loop_add_timer(loop, UINT64_MAX - 1, 1, on_timer, &other, &other.source), 0);
        loop_source_set_timer(item.source, 3600 * NSEC_PER_SEC, UINT64_MAX);
        loop_dispatch(loop, 0);
        item.source = loop_source_free(item.source);
        other.source = loop_source_free(other.source);
        loop_dispatch(loop, 0);
}

static int on_signal(void *userdata, LoopSource *source, int signo, int pid) {
        Item *item = userdata;

        assert_int_equal(signo, SIGUSR1);
        assert_int_equal(pid, getpid());
        item->runs++;
        loop_exit(item->loop, 7);
        return 0;
}

static void test_signal_and_run(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item = {.loop = loop};

        assert_int_equal(loop_add_signal(loop, SIGUSR1, on_signal, &item, &item.source), 0);
        assert_int_equal(loop_dispatch(loop, 0), 0);
        assert_int_equal(kill(getpid(), SIGUSR1), 0);
        assert_int_equal(loop_run(loop), 7);
        assert_int_equal(item.runs, 1);
        assert_int_equal(kill(getpid(), SIGUSR1), 0); /* again, with nothing left over from the first */
        assert_int_equal(loop_run(loop), 7);
        assert_int_equal(item.runs, 2);
        assert_int_equal(loop_add_signal(loop, 1000, on_signal, &item, &item.source), -EINVAL);
        loop_source_free(item.source);
        assert_int_equal(kill(getpid(), SIGUSR1), 0); /* still blocked */
}

static void test_error_ends_run(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item = {.result = -EXDEV};

        assert_int_equal(loop_add_timer(loop, 0, 0, on_timer, &item, &item.source), 0);
        assert_int_equal(loop_run(loop), -EXDEV);
        loop_source_free(item.source);
}

static int on_nested(void *userdata, LoopSource *source) {
        Item *item = userdata;

        item->runs++;
        assert_int_equal(loop_dispatch(item->loop, 0), -EDEADLK);
        return 0;
}

static void test_dispatch_in_handler(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item = {.loop = loop};

        assert_int_equal(loop_add_timer(loop, 0, 0, on_nested, &item, &item.source), 0);
        while (item.runs == 0)
                assert_int_equal(loop_dispatch(loop, NSEC_PER_SEC), 0);
        loop_source_free(item.source);
}

/* Waiting must not use the CPU: the loop may wake up for the timeout, not spin until it. */
static void test_waits(void **state) {
        _cleanup_(loop_freep) Loop *loop = loop_or_skip();
        Item item;
        unsigned rounds = 0;
        uint64_t begin = now_nsec();

        item_open(&item);
        assert_int_equal(loop_add_io(loop, item.pipe[0], POLLIN, on_io, &item, &item.source), 0);
        while (now_nsec() - begin < 50 * NSEC_PER_MSEC) {
                assert_int_equal(loop_dispatch(loop, 60 * NSEC_PER_MSEC), 0);
                rounds++;
        }
        assert_true(rounds < 10);
        item_close(&item);
}

/*
 * More sources than the ring has entries, 10,000 random operations. The model: every io source whose pipe holds
 * something and that is not muted runs in the next dispatch; none else does; a freed one never does.
 */
#define N_ITEMS 400U

static Item items[N_ITEMS];
static Item timers[N_ITEMS];
static Loop *random_loop;
static unsigned random_runs;

static int on_random_timer(void *userdata, LoopSource *source) {
        Item *item = userdata;

        assert_ptr_equal(item->source, source);
        item->runs++;
        random_runs++;
        if (rand() % 2)
                item->source = loop_source_free(source);
        else
                loop_source_set_timer(source, (uint64_t)(rand() % 1000) * NSEC_PER_USEC, 0);
        return 0;
}

static int on_random_io(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Item *item = userdata, *other = &items[(unsigned)rand() % N_ITEMS];
        char c[16];

        assert_ptr_equal(item->source, source);
        item->runs++;
        random_runs++;
        if (rand() % 2)
                assert_true(read(fd, c, sizeof c) >= 0 || errno == EAGAIN);
        if (rand() % 4 == 0)
                other->source = loop_source_free(other->source);
        if (rand() % 4 == 0 && item->source)
                item->source = loop_source_free(item->source);
        return 0;
}

static void random_operation(void) {
        Item *item = &items[(unsigned)rand() % N_ITEMS], *timer = &timers[(unsigned)rand() % N_ITEMS];

        switch (rand() % 8) {
        case 0:
        case 1:
                if (!item->source)
                        assert_int_equal(loop_add_io(random_loop, item->pipe[0], POLLIN, on_random_io, item,
                                                     &item->source), 0);
                break;
        case 2:
                item->source = loop_source_free(item->source);
                break;
        case 3:
                assert_true(write(item->pipe[1], "x", 1) == 1 || errno == EAGAIN);
                break;
        case 4:
                if (item->source)
                        loop_source_set_events(item->source, rand() % 2 ? POLLIN : 0);
                break;
        case 5:
                if (!timer->source)
                        assert_int_equal(loop_add_timer(random_loop, (uint64_t)(rand() % 500) * NSEC_PER_USEC,
                                                        (uint64_t)(rand() % 3) * 100 * NSEC_PER_USEC, on_random_timer,
                                                        timer, &timer->source), 0);
                break;
        case 6:
                timer->source = loop_source_free(timer->source);
                break;
        default:
                assert_int_equal(loop_dispatch(random_loop, rand() % 4 ? 0 : 100 * NSEC_PER_USEC), 0);
        }
}

static void test_random(void **state) {
        random_loop = loop_or_skip();
        srand(1);
        for (unsigned i = 0; i < N_ITEMS; i++)
                item_open(&items[i]);
        for (unsigned n = 0; n < 10000; n++)
                random_operation();
        assert_true(random_runs > 1000);

        /* Settled: every one that is ready runs, exactly once a dispatch, and no other. */
        for (unsigned i = 0; i < N_ITEMS; i++) {
                char c[4096];

                timers[i].source = loop_source_free(timers[i].source);
                items[i].source = loop_source_free(items[i].source);
                while (read(items[i].pipe[0], c, sizeof c) > 0)
                        ;
                items[i].runs = 0;
                assert_int_equal(loop_add_io(random_loop, items[i].pipe[0], i % 3 ? POLLIN : 0, on_io, &items[i],
                                             &items[i].source), 0);
                if (i % 2)
                        item_fill(&items[i]);
        }
        for (unsigned n = 0; n < 5; n++)
                assert_int_equal(loop_dispatch(random_loop, NSEC_PER_MSEC), 0);
        for (unsigned i = 0; i < N_ITEMS; i++)
                assert_true(i % 3 && i % 2 ? items[i].runs >= 4 && items[i].runs <= 5 : items[i].runs == 0);
        for (unsigned i = 0; i < N_ITEMS; i++)
                item_close(&items[i]);
        loop_free(random_loop);
}

/* Where a container's seccomp filter or the sysctl refuses io_uring, loop_new() says so with the kernel's own errno. */
static int loop_new_with_refusal(int error) {
        struct sock_filter filter[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {.len = ELEMENTSOF(filter), .filter = filter};
        pid_t pid = fork();
        int status;

        if (pid == 0) {
                Loop *loop = NULL;

                if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
                    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
                        _exit(0);
                _exit(-loop_new(&loop));
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        return -WEXITSTATUS(status);
}

static void test_refused(void **state) {
        loop_free(loop_or_skip());
        assert_int_equal(loop_new_with_refusal(EPERM), -EPERM);
        assert_int_equal(loop_new_with_refusal(ENOSYS), -ENOSYS);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_level_triggered),
                cmocka_unit_test(test_mute),
                cmocka_unit_test(test_free_other),
                cmocka_unit_test(test_free_self),
                cmocka_unit_test(test_free_lets_go),
                cmocka_unit_test(test_bad_descriptor),
                cmocka_unit_test(test_timer),
                cmocka_unit_test(test_signal_and_run),
                cmocka_unit_test(test_error_ends_run),
                cmocka_unit_test(test_dispatch_in_handler),
                cmocka_unit_test(test_waits),
                cmocka_unit_test(test_random),
                cmocka_unit_test(test_refused),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
