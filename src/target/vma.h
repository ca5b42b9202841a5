/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The mappings of a process with the kernel's VmFlags (/proc/PID/smaps, Documentation/filesystems/proc.rst), and
 * whether their anonymous pages may be read and merged.
 */
typedef enum VmaSkip {
        VMA_OK,
        VMA_SKIP_SHARED,        /* shared, or file mapping without private pages */
        VMA_SKIP_DEVICE,        /* io, pf, mm: device memory */
        VMA_SKIP_SPECIAL,       /* vvar, vdso, vsyscall, droppable, wipe-on-fork */
        VMA_SKIP_HUGETLB,
        VMA_SKIP_LOCKED,        /* lo: a secret, or latency that must stay */
        VMA_SKIP_DONTDUMP,      /* dd, unless IncludeDontDump=yes */
        VMA_SKIP_SECRET,        /* memfd_secret(2) */
        VMA_SKIP_UFFD,          /* registered with somebody's userfaultfd */
        VMA_SKIP_UNREADABLE,    /* no permission to read: guard pages, reservations */
        VMA_SKIP_SHADOW_STACK,
        VMA_SKIP_STUB,          /* a leftover of our own remote calls: to be unmapped, never merged */
        _VMA_SKIP_MAX,
} VmaSkip;

typedef struct Vma {
        uint64_t start, end;    /* bytes, page-aligned */
        VmaSkip skip;
        bool write, exec, file; /* file: pages not yet copied belong to a file and are never read */
        bool mergeable;         /* mg: MADV_MERGEABLE or PR_SET_MEMORY_MERGE */
        bool huge_advised;      /* hg */
        bool stack, growsdown;
        bool guards_below;      /* the mapping right below is inaccessible: sp's room ends at start */
} Vma;

typedef struct VmaList {
        Vma *vmas;              /* by address */
        size_t n, allocated;
} VmaList;

void vma_list_done(VmaList *list);

/* Parses the text of a smaps file; pure. -EINVAL with nothing in *ret when the text is not one. */
int vma_list_parse(const char *smaps, bool include_dontdump, VmaList *ret);

const Vma *vma_list_find(const VmaList *list, uint64_t address); /* NULL: unmapped */
const char *vma_skip_name(VmaSkip skip);        /* "locked", "dontdump", …: as `why` shows them */
