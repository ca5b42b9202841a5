/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The text of /proc/PID/smaps, or of maps with answers to what it does not say. Of the two dozen lines of a mapping all
 * but six are stepped over by memchr(3): 0.2 us a mapping, where the kernel takes 3 to 4 us to write it.
 *
 * File names in it are chosen by the process. What keeps them from lying to us: a name is the last field of its line,
 * the kernel writes a newline in it as \012 (seq_file_path(), fs/seq_file.c), a name of anonymous memory may not hold
 * brackets (anon_vma_name(), kernel/sys.c), and the kernel's own marks like [vdso] are compared whole, while a file's
 * name starts with / or with the name of a pseudo file system. Lines that start a mapping begin with a lower-case
 * digit, all the others with a capital.
 *
 * The walk takes and drops the target's mmap lock many times; addresses never go backwards and mappings never overlap
 * meanwhile (Documentation/filesystems/proc.rst). Text that breaks this, or a mapping without its VmFlags, is refused
 * as a whole: a list that is wrong about what may be read is worse than none.
 */
#include "target/vma.h"

#include "target/remote-arch.h"

#include <string.h>
#include <sys/sysmacros.h>

/* Grows for the rare mapping whose one line is longer. */
#define CHUNK_BYTES ((size_t)64 << 10)
#define LINE_MAX_BYTES ((size_t)16 << 20)

static const char *const skip_names[_VMA_SKIP_MAX] = {
        [VMA_OK] = "ok",
        [VMA_SKIP_SHARED] = "shared",
        [VMA_SKIP_DEVICE] = "device",
        [VMA_SKIP_SPECIAL] = "special",
        [VMA_SKIP_HUGETLB] = "hugetlb",
        [VMA_SKIP_LOCKED] = "locked",
        [VMA_SKIP_DONTDUMP] = "dontdump",
        [VMA_SKIP_SECRET] = "secret",
        [VMA_SKIP_UFFD] = "userfaultfd",
        [VMA_SKIP_UNREADABLE] = "unreadable",
        [VMA_SKIP_SHADOW_STACK] = "shadow-stack",
        [VMA_SKIP_STUB] = "stub",
};

const char *vma_skip_name(VmaSkip skip) {
        return (unsigned)skip < _VMA_SKIP_MAX ? skip_names[skip] : "?";
}

void vma_list_done(VmaList *list) {
        free(list->vmas);
        *list = (VmaList) {};
}

void vma_letters_done(VmaLettersList *list) {
        free(list->vmas);
        *list = (VmaLettersList) {};
}

void vma_parser_done(VmaParser *parser) { vma_list_done(&parser->list); }

/* The hexadecimal (as the kernel writes it) or decimal number at *p, which must end with the character given. */
static bool take_number(const char **p, const char *end, unsigned base, char terminator, uint64_t *ret) {
        const char *s = *p;
        uint64_t value = 0;

        for (; s < end && *s != terminator; s++) {
                unsigned digit;

                if (*s >= '0' && *s <= '9')
                        digit = (unsigned)(*s - '0');
                else if (base == 16 && *s >= 'a' && *s <= 'f')
                        digit = (unsigned)(*s - 'a') + 10;
                else
                        return false;
                if (value > (UINT64_MAX - digit) / base)
                        return false;
                value = value * base + digit;
        }
        if (s == *p || s == end)
                return false;
        *ret = value;
        *p = s + 1;
        return true;
}

static bool name_is(const char *name, size_t size, const char *what) {
        return size == strlen(what) && memcmp(name, what, size) == 0;
}

/* "start-end perms offset major:minor inode   name", without the newline. */
static bool parse_header(VmaParser *parser, const char *p, const char *end, Vma *ret) {
        const Vma *below = parser->list.n ? &parser->list.vmas[parser->list.n - 1] : NULL;
        uint64_t offset, major, minor, inode;
        Vma vma = {};
        size_t size;

        if (!take_number(&p, end, 16, '-', &vma.start) || !take_number(&p, end, 16, ' ', &vma.end))
                return false;
        if (vma.start >= vma.end || (vma.start | vma.end) & (PAGE_BYTES - 1) || (below && vma.start < below->end))
                return false;
        if (end - p < 5 || (p[0] != 'r' && p[0] != '-') || (p[1] != 'w' && p[1] != '-') ||
            (p[2] != 'x' && p[2] != '-') || (p[3] != 'p' && p[3] != 's') || p[4] != ' ')
                return false;
        if (p[3] == 's')
                vma.skip = VMA_SKIP_SHARED;
        else if (p[0] != 'r')
                vma.skip = VMA_SKIP_UNREADABLE;
        vma.write = p[1] == 'w';
        vma.exec = p[2] == 'x';
        p += 5;
        if (!take_number(&p, end, 16, ' ', &offset) || !take_number(&p, end, 16, ':', &major) ||
            !take_number(&p, end, 16, ' ', &minor) || !take_number(&p, end, 10, ' ', &inode))
                return false;
        vma.offset = offset;
        vma.inode = inode;
        vma.dev = (uint32_t)makedev((unsigned)major, (unsigned)minor);
        vma.file = major || minor || inode; /* every file system has a device number, be it an anonymous one */

        while (p < end && *p == ' ')
                p++;
        size = (size_t)(end - p);
        parser->special = !vma.file && size && *p == '[' &&
                (name_is(p, size, "[vvar]") || name_is(p, size, "[vvar_vclock]") || name_is(p, size, "[vdso]") ||
                 name_is(p, size, "[vsyscall]"));
        vma.named = !vma.file && size > 6 && memcmp(p, "[anon:", 6) == 0;
        parser->secret = vma.file &&
                (name_is(p, size, "/secretmem (deleted)") || name_is(p, size, "/secretmem"));
        *ret = vma;
        return true;
}

/* Where nobody but remote calls maps anything: what is there was left by a daemon that died. Whether it really is ours
 * to unmap, remote_adopt() finds out. */
static bool may_be_region(const Vma *vma) {
        return !vma->file && vma->start >= REMOTE_REGION_BASE &&
                vma->end <= REMOTE_REGION_BASE + REMOTE_REGION_SLOTS * REMOTE_REGION_STRIDE;
}

/* The reason named is the one that says most: what the memory is before what was asked for it. */
static VmaSkip judge(const VmaParser *parser, const Vma *vma, uint32_t traits, bool uffd) {
        if (may_be_region(vma))
                return VMA_SKIP_STUB;
        if (parser->secret)
                return VMA_SKIP_SECRET;
        if (parser->special || traits & VMA_TRAIT_SPECIAL)
                return VMA_SKIP_SPECIAL;
        if (traits & VMA_TRAIT_HUGETLB)
                return VMA_SKIP_HUGETLB;
        if (traits & VMA_TRAIT_DEVICE)
                return VMA_SKIP_DEVICE;
        if (vma->skip == VMA_SKIP_SHARED || traits & VMA_TRAIT_SHARED)
                return VMA_SKIP_SHARED;
        if (traits & VMA_TRAIT_SHADOW_STACK)
                return VMA_SKIP_SHADOW_STACK;
        if (uffd)
                return VMA_SKIP_UFFD;
        if (traits & VMA_TRAIT_LOCKED)
                return VMA_SKIP_LOCKED;
        if (traits & VMA_TRAIT_DONTDUMP && !parser->include_dontdump)
                return VMA_SKIP_DONTDUMP;
        return vma->skip;
}

VmaTrait vma_trait(uint16_t letters) {
        switch (letters) {
        case VMA_LETTERS('r', 'd'):
                return VMA_TRAIT_READ;
        case VMA_LETTERS('w', 'r'):
                return VMA_TRAIT_WRITE;
        case VMA_LETTERS('e', 'x'):
                return VMA_TRAIT_EXEC;
        case VMA_LETTERS('s', 'h'): case VMA_LETTERS('m', 's'):
                return VMA_TRAIT_SHARED;
        case VMA_LETTERS('i', 'o'): case VMA_LETTERS('p', 'f'): case VMA_LETTERS('m', 'm'): case VMA_LETTERS('d', 'e'):
                return VMA_TRAIT_DEVICE;
        case VMA_LETTERS('s', 's'):
                return VMA_TRAIT_SHADOW_STACK;
        case VMA_LETTERS('w', 'f'): case VMA_LETTERS('d', 'p'):
                return VMA_TRAIT_SPECIAL;
        case VMA_LETTERS('h', 't'):
                return VMA_TRAIT_HUGETLB;
        case VMA_LETTERS('l', 'o'): case VMA_LETTERS('l', 'f'):
                return VMA_TRAIT_LOCKED;
        case VMA_LETTERS('d', 'd'):
                return VMA_TRAIT_DONTDUMP;
        case VMA_LETTERS('d', 'c'):
                return VMA_TRAIT_DONTFORK;
        case VMA_LETTERS('n', 'r'):
                return VMA_TRAIT_NORESERVE;
        case VMA_LETTERS('n', 'h'):
                return VMA_TRAIT_NOHUGEPAGE;
        case VMA_LETTERS('s', 'r'):
                return VMA_TRAIT_SEQUENTIAL;
        case VMA_LETTERS('r', 'r'):
                return VMA_TRAIT_RANDOM;
        case VMA_LETTERS('s', 'l'):
                return VMA_TRAIT_SEALED;
        case VMA_LETTERS('u', 'm'): case VMA_LETTERS('u', 'i'):
                return VMA_TRAIT_UFFD;
        case VMA_LETTERS('u', 'w'):
                return VMA_TRAIT_WRITTEN;
        case VMA_LETTERS('m', 'g'):
                return VMA_TRAIT_MERGEABLE;
        case VMA_LETTERS('g', 'd'):
                return VMA_TRAIT_GROWSDOWN;
        case VMA_LETTERS('h', 'g'):
                return VMA_TRAIT_HUGE_ADVISED;
        /* What may be asked for, how it is accounted, whether it was written since somebody asked; guard regions in it
         * (6.19); ARM64's branch targets. */
        case VMA_LETTERS('m', 'r'): case VMA_LETTERS('m', 'w'): case VMA_LETTERS('m', 'e'): case VMA_LETTERS('a', 'c'):
        case VMA_LETTERS('s', 'd'): case VMA_LETTERS('g', 'u'): case VMA_LETTERS('b', 't'):
                return 0;
        }
        return letters >> 8 ? VMA_TRAIT_UNKNOWN : VMA_TRAIT_KEYED;
}

static void take_traits(const VmaParser *parser, uint32_t traits, Vma *vma) {
        static const struct {
                VmaTrait trait;
                uint8_t advice;
        } advices[] = {
                { VMA_TRAIT_NORESERVE, VMA_NORESERVE }, { VMA_TRAIT_DONTFORK, VMA_DONTFORK },
                { VMA_TRAIT_DONTDUMP, VMA_DONTDUMP },   { VMA_TRAIT_NOHUGEPAGE, VMA_NOHUGEPAGE },
                { VMA_TRAIT_SEQUENTIAL, VMA_SEQUENTIAL }, { VMA_TRAIT_RANDOM, VMA_RANDOM },
        };
        bool uffd = traits & VMA_TRAIT_UFFD, written = traits & VMA_TRAIT_WRITTEN;

        for (size_t i = 0; i < ELEMENTSOF(advices); i++)
                if (traits & advices[i].trait)
                        vma->advice |= advices[i].advice;
        vma->sealed = traits & VMA_TRAIT_SEALED;
        vma->mergeable = traits & VMA_TRAIT_MERGEABLE;
        vma->growsdown = traits & VMA_TRAIT_GROWSDOWN;
        vma->huge_advised = traits & VMA_TRAIT_HUGE_ADVISED;
        vma->keyed |= (traits & VMA_TRAIT_KEYED) != 0;
        vma->tracked = written && !uffd;
        vma->skip_if_ours = judge(parser, vma, traits, uffd);
        vma->skip = judge(parser, vma, traits, uffd || written);
}

static void collect(const VmaParser *parser, uint16_t letters) {
        VmaLetters *last = parser->letters ? &parser->letters->vmas[parser->letters->n - 1] : NULL;

        if (last && last->n < VMA_LETTERS_MAX)
                last->letters[last->n++] = letters;
}

static bool parse_flags(const VmaParser *parser, const char *p, const char *end, Vma *vma) {
        uint32_t traits = 0;

        while (end - p >= 2) {
                if (*p == ' ') {
                        p++;
                        continue;
                }
                uint16_t letters = VMA_LETTERS((unsigned char)p[0], (unsigned char)p[1]);
                traits |= letters >> 8 ? vma_trait(letters) : 0;
                collect(parser, letters);
                p += 2;
        }
        if (p < end && *p != ' ')
                return false;
        take_traits(parser, traits, vma);
        return true;
}

/* "         0", without the newline. */
static void parse_key(const VmaParser *parser, const char *p, const char *end, Vma *vma) {
        unsigned long key = 0;

        while (p < end && *p == ' ')
                p++;
        for (; p < end && *p >= '0' && *p <= '9' && key < UINT8_MAX; p++)
                key = key * 10 + (unsigned long)(*p - '0');
        vma->keyed = key > 0;
        for (unsigned i = 0; key >> i; i++)
                if (key >> i & 1)
                        collect(parser, VMA_LETTERS(0, i));
}

/* The header just parsed is of the same mapping as the next answer, which also says so of what both say. */
static int take_answer(VmaParser *parser, Vma *vma) {
        const VmaAnswer *answer = parser->at < parser->n_answers ? &parser->answers[parser->at] : NULL;
        bool shared = vma->skip == VMA_SKIP_SHARED;

        /* [vsyscall] is in the text of every process and belongs to none. */
        if (parser->special && vma->start >> 63) {
                take_traits(parser, 0, vma);
                return 0;
        }
        if (!answer || answer->start != vma->start || answer->end != vma->end)
                return VMA_E_CHANGED;
        parser->at++;
        /* Whatever it is, a shared mapping is neither read nor merged. */
        if (answer->unsure && !shared && !(VMA_LEAVE_OUT & VMA_LEAVE_OUT_UNSURE))
                return VMA_E_UNSURE;
        if (vma->write != !!(answer->traits & VMA_TRAIT_WRITE) || vma->exec != !!(answer->traits & VMA_TRAIT_EXEC) ||
            shared != !!(answer->traits & VMA_TRAIT_SHARED) ||
            (!shared && (vma->skip == VMA_OK) != !!(answer->traits & VMA_TRAIT_READ)))
                return VMA_E_CHANGED;
        take_traits(parser, answer->traits, vma);
        vma->anonymous_bytes = answer->anonymous ? vma->end - vma->start : 0;
        return 0;
}

/* "         8 kB" */
static bool parse_size(const char *p, const char *end, uint64_t *ret_bytes) {
        uint64_t kilobytes;

        while (p < end && *p == ' ')
                p++;
        if (!take_number(&p, end, 10, ' ', &kilobytes) || kilobytes > UINT64_MAX >> 10)
                return false;
        *ret_bytes = kilobytes << 10;
        return true;
}

#define LITERAL(p, end, text) ((size_t)((end) - (p)) >= sizeof(text) - 1 && memcmp(p, text, sizeof(text) - 1) == 0)

static int begin_mapping(VmaParser *parser, const char *p, const char *end) {
        Vma vma;

        if (parser->inside || !parse_header(parser, p, end, &vma))
                return -EINVAL;
        if (GROW(parser->list.vmas, parser->list.n, parser->list.allocated) < 0)
                return -ENOMEM;
        if (parser->answers) {
                int r = take_answer(parser, &vma);
                if (r != 0)
                        return r;
        } else
                parser->inside = true;
        if (parser->letters) {
                VmaLettersList *letters = parser->letters;

                if (GROW(letters->vmas, letters->n, letters->allocated) < 0)
                        return -ENOMEM;
                letters->vmas[letters->n++] = (VmaLetters){ .start = vma.start, .end = vma.end };
        }
        parser->list.vmas[parser->list.n++] = vma;
        return 0;
}

static int end_mapping(VmaParser *parser, const char *p, const char *end) {
        Vma *vma = &parser->list.vmas[parser->list.n - 1];

        if (!parse_flags(parser, p, end, vma))
                return -EINVAL;
        parser->inside = false;
        return 0;
}

static int take_line(VmaParser *parser, const char *p, const char *end) {
        Vma *vma;

        if (p == end || *p < 'A' || *p > 'Z')
                return begin_mapping(parser, p, end);
        if (!parser->list.n || parser->answers)
                return -EINVAL;
        vma = &parser->list.vmas[parser->list.n - 1];
        if (LITERAL(p, end, "VmFlags:"))
                return !parser->inside ? -EINVAL : end_mapping(parser, p + sizeof "VmFlags:" - 1, end);
        if (LITERAL(p, end, "Anonymous:"))
                return parse_size(p + sizeof "Anonymous:" - 1, end, &vma->anonymous_bytes) ? 0 : -EINVAL;
        if (LITERAL(p, end, "AnonHugePages:"))
                return parse_size(p + sizeof "AnonHugePages:" - 1, end, &vma->huge_bytes) ? 0 : -EINVAL;
        if (LITERAL(p, end, "Rss:"))
                return parse_size(p + sizeof "Rss:" - 1, end, &vma->rss_bytes) ? 0 : -EINVAL;
        if (LITERAL(p, end, "ProtectionKey:")) {
                parse_key(parser, p + sizeof "ProtectionKey:" - 1, end, vma);
                return 0;
        }
        if (LITERAL(p, end, "Referenced:"))
                return parse_size(p + sizeof "Referenced:" - 1, end, &vma->referenced_bytes) ? 0 : -EINVAL;
        return 0;
}

int vma_parser_feed(VmaParser *parser, const char *text, size_t size, size_t *ret_used) {
        const char *p = text, *end = text + size, *eol;

        for (; p < end && (eol = memchr(p, '\n', (size_t)(end - p))); p = eol + 1) {
                int r = take_line(parser, p, eol);
                if (r != 0)
                        return r;
        }
        *ret_used = (size_t)(p - text);
        return 0;
}

/* In pieces: the text is some 700 bytes a mapping, and the cache is the target's too. */
int vma_parser_read(VmaParser *parser, int fd) {
        size_t allocated = CHUNK_BYTES, size = 0, used;
        _cleanup_free_ char *buffer = malloc(allocated);
        ssize_t n;
        int r;

        if (!buffer)
                return -ENOMEM;
        for (;;) {
                if (size == allocated) {
                        char *p;

                        if (allocated >= LINE_MAX_BYTES)
                                return -EINVAL;
                        p = realloc(buffer, allocated * 2);
                        if (!p)
                                return -ENOMEM;
                        buffer = p;
                        allocated *= 2;
                }
                n = read(fd, buffer + size, allocated - size);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                if (n == 0)
                        return size ? -EINVAL : 0;
                size += (size_t)n;
                r = vma_parser_feed(parser, buffer, size, &used);
                if (r != 0)
                        return r;
                size -= used;
                memmove(buffer, buffer + used, size);
        }
}

int vma_parser_finish(VmaParser *parser, VmaList *ret) {
        if (parser->inside)
                return -EINVAL;
        if (parser->at < parser->n_answers)
                return VMA_E_CHANGED;
        parser->list.uncounted = parser->answers != NULL;
        *ret = parser->list;
        *parser = (VmaParser) {};
        return 0;
}

int vma_list_parse(const char *smaps, bool include_dontdump, VmaList *ret) {
        _cleanup_(vma_parser_done) VmaParser parser = { .include_dontdump = include_dontdump };
        size_t size = strlen(smaps), used;
        int r;

        r = vma_parser_feed(&parser, smaps, size, &used);
        if (r < 0)
                return r;
        if (used != size)
                return -EINVAL;
        return vma_parser_finish(&parser, ret);
}

size_t vma_list_first(const VmaList *list, uint64_t address) {
        return FIRST_BEHIND(list->vmas, list->n, address);
}

const Vma *vma_list_find(const VmaList *list, uint64_t address) {
        size_t i = vma_list_first(list, address);

        return i < list->n && list->vmas[i].start <= address ? &list->vmas[i] : NULL;
}
