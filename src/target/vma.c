/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The text of /proc/PID/smaps, read once for every target and pass. Of the two dozen lines of a mapping all but six
 * are stepped over by memchr(3): 0.2 us a mapping, where the kernel takes 3 to 4 us to write it.
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

#define FLAG(a, b) ((unsigned)(a) << 8 | (unsigned)(b))

typedef struct Flags {
        bool shared, device, shadow_stack, special, hugetlb, locked, dontdump;
        bool uffd, written;     /* written: a userfaultfd is told of writes; uffd: of more than that */
} Flags;

/* The reason named is the one that says most: what the memory is before what was asked for it. */
static VmaSkip judge(const VmaParser *parser, const Vma *vma, const Flags *flags, bool uffd) {
        if (may_be_region(vma))
                return VMA_SKIP_STUB;
        if (parser->secret)
                return VMA_SKIP_SECRET;
        if (flags->special)
                return VMA_SKIP_SPECIAL;
        if (flags->hugetlb)
                return VMA_SKIP_HUGETLB;
        if (flags->device)
                return VMA_SKIP_DEVICE;
        if (flags->shared)
                return VMA_SKIP_SHARED;
        if (flags->shadow_stack)
                return VMA_SKIP_SHADOW_STACK;
        if (uffd)
                return VMA_SKIP_UFFD;
        if (flags->locked)
                return VMA_SKIP_LOCKED;
        if (flags->dontdump && !parser->include_dontdump)
                return VMA_SKIP_DONTDUMP;
        return vma->skip;
}

static bool parse_flags(const VmaParser *parser, const char *p, const char *end, Vma *vma) {
        Flags flags = { .shared = vma->skip == VMA_SKIP_SHARED, .special = parser->special };

        while (end - p >= 2) {
                if (*p == ' ') {
                        p++;
                        continue;
                }
                switch (FLAG((unsigned char)p[0], (unsigned char)p[1])) {
                case FLAG('s', 'h'): case FLAG('m', 's'):
                        flags.shared = true;
                        break;
                case FLAG('i', 'o'): case FLAG('p', 'f'): case FLAG('m', 'm'): case FLAG('d', 'e'):
                        flags.device = true;
                        break;
                case FLAG('s', 's'):
                        flags.shadow_stack = true;
                        break;
                case FLAG('w', 'f'): case FLAG('d', 'p'):
                        flags.special = true;
                        break;
                case FLAG('h', 't'):
                        flags.hugetlb = true;
                        break;
                case FLAG('l', 'o'): case FLAG('l', 'f'):
                        flags.locked = true;
                        break;
                case FLAG('d', 'd'):
                        flags.dontdump = true;
                        vma->advice |= VMA_DONTDUMP;
                        break;
                case FLAG('d', 'c'):
                        vma->advice |= VMA_DONTFORK;
                        break;
                case FLAG('n', 'r'):
                        vma->advice |= VMA_NORESERVE;
                        break;
                case FLAG('n', 'h'):
                        vma->advice |= VMA_NOHUGEPAGE;
                        break;
                case FLAG('s', 'r'):
                        vma->advice |= VMA_SEQUENTIAL;
                        break;
                case FLAG('r', 'r'):
                        vma->advice |= VMA_RANDOM;
                        break;
                case FLAG('s', 'l'):
                        vma->sealed = true;
                        break;
                case FLAG('u', 'm'): case FLAG('u', 'i'):
                        flags.uffd = true;
                        break;
                case FLAG('u', 'w'):
                        flags.written = true;
                        break;
                case FLAG('m', 'g'):
                        vma->mergeable = true;
                        break;
                case FLAG('g', 'd'):
                        vma->growsdown = true;
                        break;
                case FLAG('h', 'g'):
                        vma->huge_advised = true;
                        break;
                }
                p += 2;
        }
        if (p < end && *p != ' ')
                return false;
        vma->tracked = flags.written && !flags.uffd;
        vma->skip_if_ours = judge(parser, vma, &flags, flags.uffd);
        vma->skip = judge(parser, vma, &flags, flags.uffd || flags.written);
        return true;
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
        parser->list.vmas[parser->list.n++] = vma;
        parser->inside = true;
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
        if (!parser->list.n)
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
                vma->keyed = !(end - p > 1 && end[-1] == '0' && end[-2] == ' ');
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
                if (r < 0)
                        return r;
        }
        *ret_used = (size_t)(p - text);
        return 0;
}

int vma_parser_finish(VmaParser *parser, VmaList *ret) {
        if (parser->inside)
                return -EINVAL;
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
