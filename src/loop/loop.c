/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The event loop on io_uring.
 *
 * Every source keeps apart what is wanted of it (events, due) and what the kernel has been asked for (asked). Calls on
 * a source only change the former and put it on the list `changed`; flush() alone, right before the loop waits, makes
 * the kernel's side follow. So nothing but waiting can fail for want of a queue entry, changes between two waits cost
 * one request, and everything goes out with the system call that waits.
 *
 * Polls are one-shot and asked for again after each completion: a poll looks at readiness when it is asked for, which
 * makes it level-triggered (multishot polls tell of edges only).
 *
 * What must always hold: a source has at most one request and one cancellation of it with the kernel, is asked for
 * again, or released, only when both have completed, and both completions carry its address. So no completion can
 * reach a source that is gone or be taken for one of a later request.
 *
 * The ring is set up with DEFER_TASKRUN (6.1) where there is such: completions are then worked out only inside our own
 * waits, whereas otherwise they interrupt other system calls of this thread (sigtimedwait and epoll_wait return EINTR).
 */

#include "loop/loop.h"

#include "base/clock.h"

#include <assert.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/queue.h>
#include <sys/signalfd.h>

#define RING_ENTRIES 256U
#define SHORTAGE_USEC 10000U
#define NEVER UINT64_MAX
#define TAG_CANCEL ((uintptr_t)1) /* in a completion's user data: of the cancellation, not of the request */

typedef enum SourceType { SOURCE_IO, SOURCE_TIMER, SOURCE_SIGNAL } SourceType;

enum { ASKED_REQUEST = 1, ASKED_CANCEL = 2 };

struct LoopSource {
        Loop *loop;
        SourceType type;
        unsigned asked;                 /* ASKED_*: what the kernel has not answered yet */
        bool freed;                     /* by its owner: its handler runs no more */
        bool changed;                   /* on loop->changed, else, when freed, on loop->dying */
        TAILQ_ENTRY(LoopSource) link;
        union {
                LoopIoHandler io;
                LoopTimerHandler timer;
                LoopSignalHandler signal;
        } handler;
        void *userdata;
        int fd;                         /* io: borrowed; signal: the signalfd, ours */
        uint32_t events, asked_events;
        uint64_t due, asked_due, interval; /* nsec, CLOCK_MONOTONIC; NEVER */
        struct __kernel_timespec ts;    /* of the request, read by the kernel when it is submitted */
};

TAILQ_HEAD(SourceList, LoopSource);

struct Loop {
        struct io_uring ring;
        struct SourceList changed;      /* wanted and asked may differ */
        struct SourceList dying;        /* freed and cancelled, not yet answered */
        LoopSource *running;            /* its handler runs now */
        bool settle;                    /* something was freed in a handler that the kernel holds */
        size_t n_sources;               /* not freed by their owners */
        bool exit;
        int exit_result;
};

int loop_new(Loop **ret) {
        struct io_uring_params params = {};
        _cleanup_free_ Loop *loop = calloc(1, sizeof *loop);
        int r;

        if (!loop)
                return -ENOMEM;
        TAILQ_INIT(&loop->changed);
        TAILQ_INIT(&loop->dying);
        params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
        r = io_uring_queue_init_params(RING_ENTRIES, &loop->ring, &params);
        if (r == -EINVAL) {
                params = (struct io_uring_params){};
                r = io_uring_queue_init_params(RING_ENTRIES, &loop->ring, &params);
        }
        if (r < 0)
                return r;
        /* Without these completions could be lost, or a wait could not be limited: kernels before 5.11. */
        if (!(params.features & IORING_FEAT_NODROP) || !(params.features & IORING_FEAT_EXT_ARG)) {
                io_uring_queue_exit(&loop->ring);
                return -ENOSYS;
        }
        *ret = TAKE_PTR(loop);
        return 0;
}

static void source_release(LoopSource *source) {
        if (source->type == SOURCE_SIGNAL)
                safe_close(source->fd);
        free(source);
}

static void list_release(struct SourceList *list) {
        LoopSource *source;

        while ((source = TAILQ_FIRST(list))) {
                TAILQ_REMOVE(list, source, link);
                source_release(source);
        }
}

Loop *loop_free(Loop *loop) {
        if (!loop)
                return NULL;
        assert(loop->n_sources == 0);
        io_uring_queue_exit(&loop->ring);
        list_release(&loop->changed);
        list_release(&loop->dying);
        free(loop);
        return NULL;
}

static void source_changed(LoopSource *source) {
        if (source->changed)
                return;
        source->changed = true;
        TAILQ_INSERT_TAIL(&source->loop->changed, source, link);
}

static LoopSource *source_new(Loop *loop, SourceType type, void *userdata) {
        LoopSource *source = calloc(1, sizeof *source);

        if (!source)
                return NULL;
        source->loop = loop;
        source->type = type;
        source->userdata = userdata;
        source->fd = -EBADF;
        source->due = NEVER;
        loop->n_sources++;
        source_changed(source);
        return source;
}

int loop_add_io(Loop *loop, int fd, uint32_t events, LoopIoHandler handler, void *userdata, LoopSource **ret) {
        LoopSource *source;

        if (fd < 0)
                return -EBADF;
        source = source_new(loop, SOURCE_IO, userdata);
        if (!source)
                return -ENOMEM;
        source->handler.io = handler;
        source->fd = fd;
        source->events = events;
        *ret = source;
        return 0;
}

int loop_source_set_events(LoopSource *source, uint32_t events) {
        if (source->type != SOURCE_IO)
                return -EINVAL;
        if (source->events != events) {
                source->events = events;
                source_changed(source);
        }
        return 0;
}

int loop_add_timer(Loop *loop, uint64_t delay_nsec, uint64_t interval_nsec, LoopTimerHandler handler, void *userdata,
                   LoopSource **ret) {
        LoopSource *source = source_new(loop, SOURCE_TIMER, userdata);

        if (!source)
                return -ENOMEM;
        source->handler.timer = handler;
        loop_source_set_timer(source, delay_nsec, interval_nsec);
        *ret = source;
        return 0;
}

/* The kernel takes seconds and nanoseconds in signed numbers: what lies beyond is never. */
static uint64_t time_after(uint64_t nsec) {
        uint64_t now = now_nsec();

        return nsec > (uint64_t)INT64_MAX - now ? NEVER : now + nsec;
}

int loop_source_set_timer(LoopSource *source, uint64_t delay_nsec, uint64_t interval_nsec) {
        if (source->type != SOURCE_TIMER)
                return -EINVAL;
        source->due = time_after(delay_nsec);
        source->interval = interval_nsec;
        source_changed(source);
        return 0;
}

int loop_add_signal(Loop *loop, int signo, LoopSignalHandler handler, void *userdata, LoopSource **ret) {
        LoopSource *source;
        sigset_t set;
        int r;
        _cleanup_close_ int fd = -EBADF;

        if (sigemptyset(&set) < 0 || sigaddset(&set, signo) < 0)
                return -errno;
        fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
        if (fd < 0)
                return -errno;
        r = pthread_sigmask(SIG_BLOCK, &set, NULL);
        if (r != 0)
                return -r;
        source = source_new(loop, SOURCE_SIGNAL, userdata);
        if (!source)
                return -ENOMEM;
        source->handler.signal = handler;
        source->fd = TAKE_FD(fd);
        source->events = POLLIN;
        *ret = source;
        return 0;
}

static bool source_wanted(const LoopSource *source) {
        return source->type == SOURCE_TIMER ? source->due != NEVER : source->events != 0;
}

static bool source_as_asked(const LoopSource *source) {
        return source->type == SOURCE_TIMER ? source->due == source->asked_due : source->events == source->asked_events;
}

static void source_ask(LoopSource *source, struct io_uring_sqe *sqe) {
        if (source->type == SOURCE_TIMER) {
                source->asked_due = source->due;
                source->ts.tv_sec = (int64_t)(source->due / NSEC_PER_SEC);
                source->ts.tv_nsec = (long long)(source->due % NSEC_PER_SEC);
                io_uring_prep_timeout(sqe, &source->ts, 0, IORING_TIMEOUT_ABS);
        } else {
                source->asked_events = source->events;
                io_uring_prep_poll_add(sqe, source->fd, source->events);
        }
        io_uring_sqe_set_data64(sqe, (uintptr_t)source);
        source->asked |= ASKED_REQUEST;
}

static void source_ask_cancel(LoopSource *source, struct io_uring_sqe *sqe) {
        io_uring_prep_cancel64(sqe, (uintptr_t)source, 0);
        io_uring_sqe_set_data64(sqe, (uintptr_t)source | TAG_CANCEL);
        source->asked |= ASKED_CANCEL;
}

/* -EBUSY: the kernel wants its completions taken first. */
static int ring_get_sqe(Loop *loop, struct io_uring_sqe **ret) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&loop->ring);
        int r;

        if (!sqe) {
                r = io_uring_submit(&loop->ring);
                if (r < 0)
                        return r;
                sqe = io_uring_get_sqe(&loop->ring);
                if (!sqe)
                        return -EBUSY;
        }
        *ret = sqe;
        return 0;
}

/* Makes what the kernel is asked for follow what is wanted. A source leaves the list when nothing more can be done
 * about it before an answer of the kernel, which puts it there again. */
static int flush(Loop *loop) {
        LoopSource *source;

        while ((source = TAILQ_FIRST(&loop->changed))) {
                bool ask = source->asked == 0 && !source->freed && source_wanted(source);
                bool cancel = source->asked == ASKED_REQUEST && (source->freed || !source_as_asked(source));
                struct io_uring_sqe *sqe;
                int r;

                if (ask || cancel) {
                        r = ring_get_sqe(loop, &sqe);
                        if (r < 0)
                                return r;
                        if (ask)
                                source_ask(source, sqe);
                        else
                                source_ask_cancel(source, sqe);
                }
                TAILQ_REMOVE(&loop->changed, source, link);
                source->changed = false;
                if (!source->freed)
                        continue;
                if (source->asked != 0)
                        TAILQ_INSERT_TAIL(&loop->dying, source, link);
                else
                        source_release(source);
        }
        return 0;
}

/* Has the kernel let go of what was freed, without running any handler. What fails here is done by the next wait. */
static void settle(Loop *loop) {
        loop->settle = false;
        if (flush(loop) == 0)
                io_uring_submit_and_get_events(&loop->ring);
}

LoopSource *loop_source_free(LoopSource *source) {
        Loop *loop;

        if (!source)
                return NULL;
        assert(!source->freed);
        loop = source->loop;
        loop->n_sources--;
        source->freed = true;
        if (source->asked == 0 && loop->running != source) {
                if (source->changed)
                        TAILQ_REMOVE(&loop->changed, source, link);
                source_release(source);
                return NULL;
        }
        source_changed(source);
        if (loop->running)
                loop->settle = true;
        else
                settle(loop);
        return NULL;
}

static int run_signal(LoopSource *source) {
        struct signalfd_siginfo info;
        ssize_t n = read(source->fd, &info, sizeof info);

        if (n < 0)
                return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        if (n != (ssize_t)sizeof info)
                return -EIO;
        return source->handler.signal(source->userdata, source, (int)info.ssi_signo, (int)info.ssi_pid);
}

static int run_timer(LoopSource *source) {
        uint64_t now = now_nsec();

        /* Set again meanwhile: what completed was the old time. */
        if (source->due != source->asked_due && source->due > now)
                return 0;
        /* Ticks that nobody was there for are left out; the others keep to their raster. */
        if (source->interval == 0)
                source->due = NEVER;
        else if (source->interval < (uint64_t)INT64_MAX && source->due + source->interval > now)
                source->due += source->interval;
        else
                source->due = time_after(source->interval);
        return source->handler.timer(source->userdata, source);
}

static int run_io(LoopSource *source, int result) {
        uint32_t revents = result < 0 ? (uint32_t)POLLNVAL : (uint32_t)result;

        if (source->events == 0) /* muted meanwhile */
                return 0;
        revents &= source->events | POLLERR | POLLHUP | POLLNVAL;
        return revents == 0 ? 0 : source->handler.io(source->userdata, source, source->fd, revents);
}

/* The request of a source completed: result is poll(2) bits, -ETIME for a timer, -ECANCELED, or the kernel's
 * refusal. */
static int source_run(LoopSource *source, int result) {
        int expected = source->type == SOURCE_TIMER ? -ETIME : -EBADF;
        int r;

        if (result == -ECANCELED)
                return 0;
        if (result < 0 && result != expected)
                return result;
        source->loop->running = source;
        if (source->type == SOURCE_TIMER)
                r = run_timer(source);
        else if (source->type == SOURCE_SIGNAL)
                r = result < 0 ? result : run_signal(source);
        else
                r = run_io(source, result);
        source->loop->running = NULL;
        return r;
}

static int complete(Loop *loop, uintptr_t data, int result) {
        LoopSource *source = (LoopSource *)(data & ~TAG_CANCEL);

        source->asked &= data & TAG_CANCEL ? ~(unsigned)ASKED_CANCEL : ~(unsigned)ASKED_REQUEST;
        if (source->freed) {
                if (source->asked == 0) {
                        TAILQ_REMOVE(source->changed ? &loop->changed : &loop->dying, source, link);
                        source_release(source);
                }
                return 0;
        }
        source_changed(source);
        return data & TAG_CANCEL ? 0 : source_run(source, result);
}

static int wait_for_completions(Loop *loop, uint64_t timeout_nsec) {
        struct __kernel_timespec ts = {
                .tv_sec = (int64_t)(timeout_nsec / NSEC_PER_SEC),
                .tv_nsec = (long long)(timeout_nsec % NSEC_PER_SEC),
        };
        struct io_uring_cqe *cqe;
        int r;

        if (timeout_nsec == 0)
                r = io_uring_submit_and_get_events(&loop->ring);
        else if (timeout_nsec == UINT64_MAX)
                r = io_uring_submit_and_wait(&loop->ring, 1);
        else
                r = io_uring_submit_and_wait_timeout(&loop->ring, &cqe, 1, &ts, NULL);
        return r == -EINTR || r == -ETIME ? 0 : r;
}

int loop_dispatch(Loop *loop, uint64_t timeout_nsec) {
        struct io_uring_cqe *cqe;
        int r;

        if (loop->running)
                return -EDEADLK;
        r = flush(loop);
        if (r >= 0)
                r = wait_for_completions(loop, timeout_nsec);
        if (r == -EAGAIN)
                usleep(SHORTAGE_USEC); /* the kernel is short of memory: what is asked for stays queued */
        else if (r < 0 && r != -EBUSY)
                return r;
        r = 0;
        while (io_uring_peek_cqe(&loop->ring, &cqe) == 0) {
                uintptr_t data = (uintptr_t)io_uring_cqe_get_data64(cqe);
                int result = cqe->res;

                io_uring_cqe_seen(&loop->ring, cqe);
                r = complete(loop, data, result);
                if (r < 0)
                        break;
        }
        if (loop->settle)
                settle(loop);
        return r < 0 ? r : 0;
}

int loop_run(Loop *loop) {
        int r;

        while (!loop->exit) {
                r = loop_dispatch(loop, UINT64_MAX);
                if (r < 0)
                        return r;
        }
        loop->exit = false;
        return loop->exit_result;
}

void loop_exit(Loop *loop, int result) {
        loop->exit = true;
        loop->exit_result = result;
}
