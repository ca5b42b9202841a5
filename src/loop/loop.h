/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The event loop: io_uring polls and timeouts behind plain callbacks, for one thread.
 *
 * A source is owned by whoever added it and lives until loop_source_free(); freeing a source inside any callback,
 * its own included, is allowed, and its callback never runs afterwards (a completion still in flight is swallowed).
 * A callback returns 0 or a negative errno; an error stops loop_run() and is its result.
 */
typedef struct Loop Loop;
typedef struct LoopSource LoopSource;

typedef int (*LoopIoHandler)(void *userdata, LoopSource *source, int fd, uint32_t revents /* poll(2) bits */);
typedef int (*LoopTimerHandler)(void *userdata, LoopSource *source);
typedef int (*LoopSignalHandler)(void *userdata, LoopSource *source, int signo, int pid /* sender */);

/* -ENOSYS, -EPERM: this kernel or its sysctl kernel.io_uring_disabled refuses io_uring. */
int loop_new(Loop **ret);
Loop *loop_free(Loop *loop); /* every source must have been freed */
DEFINE_CLEANUP(Loop, loop_free)

/* Level-triggered: the handler runs as long as any of events is ready, and for POLLERR, POLLHUP and POLLNVAL unless
 * muted. Readiness may have gone again when it runs (an earlier handler took it): descriptors should be non-blocking.
 * fd is borrowed and must outlive the source. */
int loop_add_io(Loop *loop, int fd, uint32_t events, LoopIoHandler handler, void *userdata, LoopSource **ret);
int loop_source_set_events(LoopSource *source, uint32_t events); /* 0 mutes it */

/* First after delay_nsec (UINT64_MAX: never), then every interval_nsec (0: once); ticks missed are left out.
 * CLOCK_MONOTONIC. */
int loop_add_timer(Loop *loop, uint64_t delay_nsec, uint64_t interval_nsec, LoopTimerHandler handler, void *userdata,
                   LoopSource **ret);
int loop_source_set_timer(LoopSource *source, uint64_t delay_nsec, uint64_t interval_nsec);

/* Blocks the signal for the calling thread and takes it by signalfd. It stays blocked when the source is freed: a
 * second SIGTERM must not end a process that is cleaning up. */
int loop_add_signal(Loop *loop, int signo, LoopSignalHandler handler, void *userdata, LoopSource **ret);

/* The kernel lets go of the file behind fd before this returns; called in a handler, when that dispatch returns. */
LoopSource *loop_source_free(LoopSource *source);
DEFINE_CLEANUP(LoopSource, loop_source_free)

/* Waits up to timeout_nsec (UINT64_MAX: for ever; 0: not at all), then runs what is ready. May be called from inside
 * long work to let the rest of the daemon breathe, but not from inside a handler. */
int loop_dispatch(Loop *loop, uint64_t timeout_nsec);

int loop_run(Loop *loop); /* until loop_exit() or a handler's error */
void loop_exit(Loop *loop, int result);
