/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "merge/advise.h"

/* What was foreign in a process that ended, for children of it that are met later. */
typedef struct MarksEnded {
        TargetOrigin origin;
        Ranges foreign;
} MarksEnded;

#define MARKS_ENDED_MAX 64

/* The state files of the marks, inside the layer: see marks.c. */
struct Advise {
        Remote *remote;
        int statefd;            /* the directory of the state files */
        int kpageflagsfd;       /* -EBADF: what is merged is not known from outside */
        bool process_madvise;
        MarksEnded ended[MARKS_ENDED_MAX];
        size_t n_ended, ended_next;     /* the next to be overwritten when it is full */
};

/* Writes the state file unless it is there: before the first mark. -errno. */
int marks_record(Advise *advise, const Target *target, Marks *marks);
/* The process ended, or runs another program: moves what was foreign in it to where its children find it. */
void marks_end(Advise *advise, Marks *marks);
/* The next undoing begins from the beginning. */
void marks_forget_undo(Marks *marks);
void marks_unrecord(Advise *advise, const Target *target, Marks *marks);
/* Removes the state files of processes that are gone. */
int marks_sweep(int statefd);
/* All the mergeable mappings as one set. -ENOMEM. */
int marks_mergeable(const VmaList *vmas, Ranges *ret);
