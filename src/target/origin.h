/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * Where a process comes from. execve(2) lays out the address space anew, at random; fork(2) copies the layout. So
 * processes of one layout were forked from one another, whether the parent is still there to be asked or not.
 */
typedef struct TargetOrigin {
        pid_t parent;           /* as of now: the parent it was born with may have ended */
        uint64_t start_ticks;
        uint64_t start_code, start_stack, start_brk;
} TargetOrigin;

/* -ENOENT, -ESRCH: the process is gone; -errno. */
int target_origin(const Target *target, TargetOrigin *ret);
int target_origin_of(pid_t pid, TargetOrigin *ret);

/* An error of these that says so, and not that it could not be told just now. */
static inline bool target_origin_is_gone(int error) { return error == -ENOENT || error == -ESRCH; }

/* One layout. Where the layout is not random (target_layout_is_fixed()) that alone proves nothing. */
bool target_origin_same(const TargetOrigin *a, const TargetOrigin *b);
/* Two layouts, both known: two programs, or one that was started twice. */
bool target_origin_differs(const TargetOrigin *a, const TargetOrigin *b);
/* One layout, and the first is not the younger: who has the second may be forked from who has it. */
bool target_origin_precedes(const TargetOrigin *parent, const TargetOrigin *child);
/* personality(2) ADDR_NO_RANDOMIZE, or it cannot be told. */
bool target_layout_is_fixed(const Target *target);

/* A number for the layout, the same for all that were forked from one another; 0: it is not known. */
uint64_t target_origin_kin(const TargetOrigin *origin);
