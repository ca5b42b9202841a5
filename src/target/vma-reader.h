/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "probe/probe.h"
#include "target/target.h"
#include "target/vma-bits.h"

/*
 * Reads the mappings of a process and their flags without the kernel looking at a page for it: what smaps says less the
 * sums, from maps and from the probe PROBE_VMAS. What cannot be had so, for whatever reason, is to be read from smaps.
 */
typedef struct VmaReader {
        const Probes *probes;   /* borrowed; NULL: reads nothing */
        VmaBits bits;
        uint64_t n_read, n_unsure, n_changed, n_failed; /* what became of all the attempts */
} VmaReader;

/* Learns what this kernel's flags mean, from a short-lived child. pagemap_scan: the kernel has it; where it has not,
 * the sums are needed. If it does not come to anything the reader reads nothing, and the probe says why. probes are
 * borrowed until vma_reader_close(). */
void vma_reader_open(VmaReader *reader, Probes *probes, bool pagemap_scan);
void vma_reader_close(VmaReader *reader);

/* As target_read_vmas(), uncounted. VMA_E_CHANGED: the mappings, the program or the process did meanwhile;
 * VMA_E_UNSURE: a mapping has something about it that was not learnt; -errno. */
int vma_reader_read(VmaReader *reader, Target *target, bool include_dontdump, VmaList *ret);

/* vma-examples.c: begins a child that holds a mapping of every kind that can be made here, for vma_examples_end().
 * -errno. */
int vma_examples_begin(pid_t *ret);
void vma_examples_end(pid_t pid);
