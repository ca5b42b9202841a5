/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/census.h"

/*
 * What the census cannot find out once pages are merged, kept beyond the daemon's end: for the next one, which is to
 * report the same savings. A file in memory (below /run: what it tells of does not outlive the boot either).
 */
typedef struct KeptId {         /* of a process and the program it runs */
        uint64_t pid, start_ticks, kin;
} KeptId;

/* To be filled with everything that is known now, then written in one go. */
typedef struct KeptWriter {
        uint64_t *words;
        size_t n, allocated;
        bool failed;            /* out of memory: kept_write() says so */
} KeptWriter;

void kept_writer_done(KeptWriter *writer);
void kept_add_notes(KeptWriter *writer, const char *domain, const CensusNotes *notes);
void kept_add_space(KeptWriter *writer, const KeptId *id, const Space *space);
/* Replaces the file atomically; without anything to tell it is removed. -ENOMEM, -errno. */
int kept_write(KeptWriter *writer, int at, const char *path);

/* What an earlier daemon wrote. */
typedef struct Kept {
        uint64_t *words;
        size_t n;
} Kept;

void kept_done(Kept *kept);
/* -ENOENT: there is none; -EBADMSG: it is not as we write it, nothing is concluded from it; -errno. */
int kept_read(int at, const char *path, Kept *ret);
/* Hands out what is told of this domain, or process, once. Of the process only where there are blocks, except for pages
 * that were given back whole: those get a block. false: nothing was told. */
bool kept_take_notes(Kept *kept, const char *domain, CensusNotes *notes);
bool kept_take_space(Kept *kept, const KeptId *id, Space *space);
/* What was not taken yet is passed on, as far as its process still runs; without any such process all is dropped. */
void kept_pass_on(Kept *kept, KeptWriter *writer);
