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
        VMA_SKIP_DEVICE,        /* io, pf, mm, de: a driver's memory, which KSM refuses too */
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

/* What a process advised of a mapping, and whoever puts another one in its place has to advise of that too. */
enum {
        VMA_NORESERVE = 1 << 0, /* nr: mmap(MAP_NORESERVE) */
        VMA_DONTFORK = 1 << 1,  /* dc */
        VMA_DONTDUMP = 1 << 2,  /* dd */
        VMA_NOHUGEPAGE = 1 << 3, /* nh */
        VMA_SEQUENTIAL = 1 << 4, /* sr */
        VMA_RANDOM = 1 << 5,    /* rr */
};

typedef struct Vma {
        uint64_t start, end;    /* bytes, page-aligned */
        uint64_t offset, inode; /* of its file */
        uint32_t dev;           /* makedev(3) of its file system */
        uint8_t advice;         /* VMA_NORESERVE, … */
        VmaSkip skip;
        VmaSkip skip_if_ours;   /* what skip would be, should it be we who track it */
        bool tracked;           /* uw alone: somebody's userfaultfd tells what is written to it, and does no more */
        bool write, exec, file; /* file: pages not yet copied belong to a file and are never read */
        bool mergeable;         /* mg: MADV_MERGEABLE or PR_SET_MEMORY_MERGE */
        bool huge_advised;      /* hg */
        bool growsdown;         /* gd: the main thread's stack */
        bool sealed;            /* sl: mseal(2) */
        bool keyed;             /* protected by a key: pkey_mprotect(2) */
        bool named;             /* anonymous, with a name: PR_SET_VMA_ANON_NAME */
        bool policy;            /* mbind(2); only where somebody asked (numa_maps), smaps does not say */
        uint64_t anonymous_bytes; /* present and anonymous, KSM's included */
        uint64_t huge_bytes;    /* of them mapped by huge pages */
        uint64_t rss_bytes;     /* present, a file's pages included */
        uint64_t referenced_bytes; /* of them used since reclaim last looked (scan/cold) */
} Vma;

typedef struct VmaList {
        Vma *vmas;              /* by address */
        size_t n, allocated;
} VmaList;

void vma_list_done(VmaList *list);

/* Parses the text of a smaps file; pure. -EINVAL with nothing in *ret when the text is not one. */
int vma_list_parse(const char *smaps, bool include_dontdump, VmaList *ret);

/* The same, for text that comes in pieces: a process with 60,000 mappings has 40 MB of it. Zero-initialize, set
 * include_dontdump, feed, finish. */
typedef struct VmaParser {
        VmaList list;
        bool include_dontdump;
        bool inside;            /* a header came, its VmFlags have not */
        bool special, secret;   /* what the name of the current one said */
} VmaParser;

/* Takes the whole lines of text; *ret_used: their bytes, the rest is to be fed again with what follows. -EINVAL: not
 * smaps; -ENOMEM. */
int vma_parser_feed(VmaParser *parser, const char *text, size_t size, size_t *ret_used);
/* -EINVAL when the text ended inside a mapping. The caller owns *ret. */
int vma_parser_finish(VmaParser *parser, VmaList *ret);
void vma_parser_done(VmaParser *parser);

/* Its userfaultfd is known to be our own (scan/track): as if it had none. */
static inline void vma_claim(Vma *vma) { vma->skip = vma->skip_if_ours; }

size_t vma_list_first(const VmaList *list, uint64_t address); /* the index of the first that ends behind address */
const Vma *vma_list_find(const VmaList *list, uint64_t address); /* NULL: unmapped */
const char *vma_skip_name(VmaSkip skip);        /* "locked", "dontdump", …: as `why` shows them */
