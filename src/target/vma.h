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

/* What the two letters of a VmFlag say, as far as anything here goes by it: a set of them. */
typedef enum VmaTrait {
        VMA_TRAIT_READ = 1 << 0,        /* rd */
        VMA_TRAIT_WRITE = 1 << 1,       /* wr */
        VMA_TRAIT_EXEC = 1 << 2,        /* ex */
        VMA_TRAIT_SHARED = 1 << 3,      /* sh, ms */
        VMA_TRAIT_DEVICE = 1 << 4,      /* io, pf, mm, de */
        VMA_TRAIT_SHADOW_STACK = 1 << 5, /* ss */
        VMA_TRAIT_SPECIAL = 1 << 6,     /* wf, dp */
        VMA_TRAIT_HUGETLB = 1 << 7,     /* ht */
        VMA_TRAIT_LOCKED = 1 << 8,      /* lo, lf */
        VMA_TRAIT_DONTDUMP = 1 << 9,    /* dd */
        VMA_TRAIT_DONTFORK = 1 << 10,   /* dc */
        VMA_TRAIT_NORESERVE = 1 << 11,  /* nr */
        VMA_TRAIT_NOHUGEPAGE = 1 << 12, /* nh */
        VMA_TRAIT_SEQUENTIAL = 1 << 13, /* sr */
        VMA_TRAIT_RANDOM = 1 << 14,     /* rr */
        VMA_TRAIT_SEALED = 1 << 15,     /* sl */
        VMA_TRAIT_UFFD = 1 << 16,       /* um, ui: a userfaultfd is told of more than writes */
        VMA_TRAIT_WRITTEN = 1 << 17,    /* uw: a userfaultfd is told of writes */
        VMA_TRAIT_MERGEABLE = 1 << 18,  /* mg */
        VMA_TRAIT_GROWSDOWN = 1 << 19,  /* gd */
        VMA_TRAIT_HUGE_ADVISED = 1 << 20, /* hg */
        VMA_TRAIT_KEYED = 1 << 21,      /* no letters: ProtectionKey */
        VMA_TRAIT_UNKNOWN = 1 << 22,    /* letters that nothing is known of; in smaps, of no consequence */
} VmaTrait;

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
        uint64_t anonymous_bytes; /* present and anonymous, KSM's included; see VmaList.uncounted */
        uint64_t huge_bytes;    /* of them mapped by huge pages */
        uint64_t rss_bytes;     /* present, a file's pages included */
        uint64_t referenced_bytes; /* of them used since reclaim last looked (scan/cold) */
} Vma;

/* Or what is treated as if it did. */
static inline bool vma_holds_secrets(const Vma *vma) {
        return vma->skip == VMA_SKIP_LOCKED || vma->skip == VMA_SKIP_DONTDUMP || vma->skip == VMA_SKIP_SECRET;
}

typedef struct VmaList {
        Vma *vmas;              /* by address */
        size_t n, allocated;
        bool uncounted;         /* pages were not looked at: anonymous_bytes is what there may be at most, until
                                 * space_refresh() counts it of those that may be read; the others are 0 */
} VmaList;

void vma_list_done(VmaList *list);

/* Parses the text of a smaps file; pure. -EINVAL with nothing in *ret when the text is not one. */
int vma_list_parse(const char *smaps, bool include_dontdump, VmaList *ret);

/* VmFlags as smaps shows them of one mapping. */
#define VMA_LETTERS(a, b) ((uint16_t)((unsigned)(a) << 8 | (unsigned)(b)))
#define VMA_LETTERS_MAX 80U
typedef struct VmaLetters {
        uint64_t start, end;
        unsigned n;
        uint16_t letters[VMA_LETTERS_MAX]; /* VMA_LETTERS(); of the bits of ProtectionKey VMA_LETTERS(0, number of the bit) */
} VmaLetters;

typedef struct VmaLettersList {
        VmaLetters *vmas;
        size_t n, allocated;
} VmaLettersList;

void vma_letters_done(VmaLettersList *list);
VmaTrait vma_trait(uint16_t letters);           /* 0: nothing that matters */

/* What is known of one mapping without smaps. */
typedef struct VmaAnswer {
        uint64_t start, end;
        uint32_t traits;        /* VmaTrait */
        bool unsure;            /* there is something about it that was not understood */
        bool anonymous;         /* it may hold pages of its own */
} VmaAnswer;

/* Safeguards, for a test to leave out. */
enum { VMA_LEAVE_OUT_UNSURE = 1 << 0, VMA_LEAVE_OUT_IMAGE = 1 << 1 };
#ifndef VMA_LEAVE_OUT
#define VMA_LEAVE_OUT 0
#endif

enum {
        VMA_E_CHANGED = 1,      /* text and answers are not of one moment */
        VMA_E_UNSURE,           /* what is unsure may be a reason to leave alone what could be read */
};

/* The same, for text that comes in pieces: a process with 60,000 mappings has 40 MB of it. Zero-initialize, set
 * include_dontdump, feed, finish.
 *
 * With answers the text is that of maps: headers alone, and VmFlags are in the answers. */
typedef struct VmaParser {
        VmaList list;
        bool include_dontdump;
        const VmaAnswer *answers; /* by address; NULL: smaps; borrowed */
        size_t n_answers, at;
        VmaLettersList *letters; /* collects them; NULL; borrowed */
        bool inside;            /* a header came, its VmFlags have not */
        bool special, secret;   /* what the name of the current one said */
} VmaParser;

/* Takes the whole lines of text; *ret_used: their bytes, the rest is to be fed again with what follows. -EINVAL: not
 * smaps (maps); -ENOMEM; VMA_E_CHANGED, VMA_E_UNSURE. */
int vma_parser_feed(VmaParser *parser, const char *text, size_t size, size_t *ret_used);
/* Feeds it all of a file. The same, and what reading it said. */
int vma_parser_read(VmaParser *parser, int fd);
/* -EINVAL when the text ended inside a mapping, VMA_E_CHANGED when answers are left. The caller owns *ret. */
int vma_parser_finish(VmaParser *parser, VmaList *ret);
void vma_parser_done(VmaParser *parser);

/* Its userfaultfd is known to be our own (scan/track): as if it had none. */
static inline void vma_claim(Vma *vma) { vma->skip = vma->skip_if_ours; }

size_t vma_list_first(const VmaList *list, uint64_t address); /* the index of the first that ends behind address */
const Vma *vma_list_find(const VmaList *list, uint64_t address); /* NULL: unmapped */
const char *vma_skip_name(VmaSkip skip);        /* "locked", "dontdump", …: as `why` shows them */
