/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/advise.h"

/* The state files of the marks, inside the layer: see marks.c. */
struct Advise {
        Remote *remote;
        int statefd;            /* the directory of the state files */
        bool process_madvise;
};

/* Writes the state file unless it is there: before the first mark. -errno. */
int marks_record(Advise *advise, const Target *target, Marks *marks);
void marks_unrecord(Advise *advise, const Target *target, Marks *marks);
/* Removes the state files of processes that are gone. */
int marks_sweep(int statefd);
/* All the mergeable mappings as one set. -ENOMEM. */
int marks_mergeable(const VmaList *vmas, Ranges *ret);
