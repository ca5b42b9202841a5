/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The two kinds of userfaultfd that the keeper serves (what they are for stands at the top of guard.c). A descriptor's
 * kind, and which userfaultfd it is, are asked of the kernel, never remembered: whoever finds one in its descriptor
 * table, a keeper that was started again or systemd's store, knows what to do with it.
 */
typedef enum GuardKind {
        GUARD_NONE,             /* no userfaultfd, or not one of ours */
        GUARD_ZERO,             /* a fault means: this page was discarded, it reads as zeros from now on */
        GUARD_MUTE,             /* a fault waits until whoever registered the range fills it or gives it back */
} GuardKind;

/* UFFDIO_API on a userfaultfd that was just made. It must be O_NONBLOCK. -EINVAL: the kernel lacks a feature;
 * -errno. */
int guard_init(int uffd, GuardKind kind);

/* What fd is, from /proc/self/fdinfo. */
GuardKind guard_kind(int fd);

/* The same number for every descriptor of one userfaultfd (or of one pool's mount, or keeper's table), another for any
 * other that exists at the same time; 0: fd is bad. */
uint64_t guard_id(int fd);

/* Its address space is gone: nothing can fault any more. Neither poll(2) nor a pidfd say that: an address space
 * outlives its first process where others share it, and ends before it at execve(2). */
bool guard_is_dead(int uffd);

/* Who read a message and died before it answered left its faulting thread waiting: wakes all that wait, which makes
 * them fault, and be told, again. Harmless at any time. -errno. */
int guard_requeue(int uffd);
