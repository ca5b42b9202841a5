/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * proc_pid_stat(5), fields 4, 22, 26, 28 and 47: parent, start time, start of code, of the stack and of brk. For who
 * may not ptrace the process the addresses read as 0 (fs/proc/array.c): then nothing is known of its layout.
 */
#include "target/origin.h"

#include "base/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define ADDR_NO_RANDOMIZE 0x0040000U /* linux/personality.h */

static int origin_read(int at, const char *path, TargetOrigin *ret) {
        _cleanup_free_ char *text = NULL;
        uint64_t fields[48] = {};
        char *at_field;
        int r;

        r = read_file(at, path, &text, NULL);
        if (r < 0)
                return r;
        at_field = strrchr(text, ')'); /* the name before it may hold anything */
        if (!at_field || strlen(at_field) < 5)
                return -EBADMSG;
        at_field += 3; /* field 3, the state, is a letter */
        for (unsigned i = 4; i < ELEMENTSOF(fields); i++) {
                char *end;
                fields[i] = strtoull(at_field + 1, &end, 10);
                if (end == at_field + 1)
                        return -EBADMSG;
                at_field = end;
        }
        *ret = (TargetOrigin){ (pid_t)fields[4], fields[22], fields[26], fields[28], fields[47] };
        return 0;
}

int target_origin(const Target *target, TargetOrigin *ret) { return origin_read(target->procfd, "stat", ret); }

int target_origin_of(pid_t pid, TargetOrigin *ret) {
        char path[32];

        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        return origin_read(AT_FDCWD, path, ret);
}

bool target_origin_same(const TargetOrigin *a, const TargetOrigin *b) {
        return a->start_stack != 0 && a->start_code == b->start_code && a->start_stack == b->start_stack &&
               a->start_brk == b->start_brk;
}

bool target_origin_differs(const TargetOrigin *a, const TargetOrigin *b) {
        return a->start_stack != 0 && b->start_stack != 0 && !target_origin_same(a, b);
}

bool target_origin_precedes(const TargetOrigin *parent, const TargetOrigin *child) {
        return target_origin_same(parent, child) && parent->start_ticks <= child->start_ticks;
}

bool target_layout_is_fixed(const Target *target) {
        _cleanup_free_ char *text = NULL;

        return read_file(target->procfd, "personality", &text, NULL) < 0 ||
               strtoul(text, NULL, 16) & ADDR_NO_RANDOMIZE;
}

uint64_t target_origin_kin(const TargetOrigin *origin) {
        uint64_t kin = origin->start_code;

        if (origin->start_stack == 0)
                return 0;
        kin = (kin ^ origin->start_stack) * 0x9e3779b97f4a7c15U;
        kin = ((kin ^ kin >> 32) ^ origin->start_brk) * 0x9e3779b97f4a7c15U;
        return kin ?: 1;
}
