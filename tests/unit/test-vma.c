/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The smaps parser: every reason to skip, names that pretend to be something else, text that is not smaps, text that
 * arrives in pieces. The texts are as Linux 6.1 and 6.18 write them, names and addresses changed. */
#include "target/vma-bits.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* What the kernel writes between header and flags. */
#define BODY(anonymous, huge)                      \
        "Size:                132 kB\n"            \
        "KernelPageSize:        4 kB\n"            \
        "MMUPageSize:           4 kB\n"            \
        "Rss:                  28 kB\n"            \
        "Pss:                  24 kB\n"            \
        "Pss_Dirty:            24 kB\n"            \
        "Shared_Clean:          0 kB\n"            \
        "Shared_Dirty:          0 kB\n"            \
        "Private_Clean:         0 kB\n"            \
        "Private_Dirty:        24 kB\n"            \
        "Referenced:           20 kB\n"            \
        "Anonymous:     " anonymous " kB\n"        \
        "KSM:                   0 kB\n"            \
        "LazyFree:              0 kB\n"            \
        "AnonHugePages: " huge " kB\n"             \
        "ShmemPmdMapped:        0 kB\n"            \
        "FilePmdMapped:         0 kB\n"            \
        "Shared_Hugetlb:        0 kB\n"            \
        "Private_Hugetlb:       0 kB\n"            \
        "Swap:                  0 kB\n"            \
        "SwapPss:               0 kB\n"            \
        "Locked:                0 kB\n"            \
        "THPeligible:           0\n"               \
        "ProtectionKey:         0\n"
#define MAPPING(header, flags) header "\n" BODY("      24", "       0") "VmFlags: " flags " \n"

static VmaList parse(const char *text, bool include_dontdump) {
        VmaList list;

        assert_int_equal(vma_list_parse(text, include_dontdump, &list), 0);
        return list;
}

static void test_process(void **state) {
        /* A program, its heap, a thread's stack above its guard, the stack and the kernel's pages. */
        VmaList list = parse(
                MAPPING("5577f2501000-5577f2503000 r--p 00000000 fe:00 247498                     /usr/bin/head",
                        "rd mr mw me")
                MAPPING("5577f2503000-5577f2509000 r-xp 00002000 fe:00 247498                     /usr/bin/head",
                        "rd ex mr mw me")
                MAPPING("5577f250c000-5577f250d000 rw-p 0000b000 fe:00 247498                     /usr/bin/head",
                        "rd wr mr mw me ac")
                MAPPING("557813a45000-557813a66000 rw-p 00000000 00:00 0                          [heap]",
                        "rd wr mr mw me ac")
                MAPPING("7f02dc626000-7f02dc627000 ---p 00000000 00:00 0 ", "mr mw me")
                MAPPING("7f02dc627000-7f02dce27000 rw-p 00000000 00:00 0 ", "rd wr mr mw me ac hg mg")
                MAPPING("7ffd77ab4000-7ffd77ad5000 rw-p 00000000 00:00 0                          [stack]",
                        "rd wr mr mw me gd ac")
                MAPPING("7ffd77bb4000-7ffd77bb8000 r--p 00000000 00:00 0                          [vvar]",
                        "rd mr pf io de dd")
                MAPPING("7ffd77bb8000-7ffd77bba000 r--p 00000000 00:00 0                          [vvar_vclock]",
                        "rd mr pf io de dd")
                MAPPING("7ffd77bba000-7ffd77bbc000 r-xp 00000000 00:00 0                          [vdso]",
                        "rd ex mr mw me de")
                MAPPING("ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]", "ex"),
                false);
        static const VmaSkip skips[] = { VMA_OK, VMA_OK, VMA_OK, VMA_OK, VMA_SKIP_UNREADABLE, VMA_OK, VMA_OK,
                                         VMA_SKIP_SPECIAL, VMA_SKIP_SPECIAL, VMA_SKIP_SPECIAL, VMA_SKIP_SPECIAL };

        assert_int_equal(list.n, ELEMENTSOF(skips));
        for (size_t i = 0; i < list.n; i++) {
                assert_int_equal(list.vmas[i].skip, skips[i]);
                assert_int_equal(list.vmas[i].file, i < 3);
                assert_int_equal(list.vmas[i].huge_advised, i == 5);
                assert_int_equal(list.vmas[i].mergeable, i == 5);
                assert_int_equal(list.vmas[i].write, i == 2 || i == 3 || i == 5 || i == 6);
                assert_int_equal(list.vmas[i].exec, i == 1 || i == 9 || i == 10);
                assert_int_equal(list.vmas[i].anonymous_bytes, 24 << 10);
                assert_int_equal(list.vmas[i].rss_bytes, 28 << 10);
                assert_int_equal(list.vmas[i].referenced_bytes, 20 << 10);
        }
        assert_int_equal(list.vmas[3].start, 0x557813a45000);
        assert_int_equal(list.vmas[3].end, 0x557813a66000);
        assert_true(list.vmas[10].start == 0xffffffffff600000);

        assert_ptr_equal(vma_list_find(&list, 0x5577f2501000), &list.vmas[0]);
        assert_ptr_equal(vma_list_find(&list, 0x5577f2502fff), &list.vmas[0]);
        assert_ptr_equal(vma_list_find(&list, 0x5577f2503000), &list.vmas[1]);
        assert_null(vma_list_find(&list, 0x5577f2509000));
        assert_null(vma_list_find(&list, 0));
        assert_null(vma_list_find(&list, UINT64_MAX));
        assert_ptr_equal(vma_list_find(&list, 0xffffffffff600fff), &list.vmas[10]);
        vma_list_done(&list);
}

static void test_reasons(void **state) {
        static const struct {
                const char *header, *flags;
                VmaSkip skip, with_dontdump;
        } cases[] = {
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac", VMA_OK, VMA_OK },
                { "r--p 00000000 00:00 0 ", "rd mr mw me", VMA_OK, VMA_OK },
                { "rw-p 00000000 00:00 0                          [anon:tcache]", "rd wr mr mw me", VMA_OK, VMA_OK },
                { "rw-p 00000000 00:01 1036    /memfd:x (deleted)", "rd wr mr mw me", VMA_OK, VMA_OK },
                { "rw-s 00000000 00:01 3       /dev/zero (deleted)", "rd wr sh mr mw me ms", VMA_SKIP_SHARED,
                  VMA_SKIP_SHARED },
                { "r--s 00000000 fe:00 3       /usr/lib/gconv.cache", "rd mr me ms", VMA_SKIP_SHARED, VMA_SKIP_SHARED },
                { "rw-s 00000000 00:0e 5       anon_inode:[io_uring]", "rd wr sh mr mw me ms pf io de dd mm",
                  VMA_SKIP_DEVICE, VMA_SKIP_DEVICE },
                { "rw-p 00000000 00:05 7       /dev/mem", "rd wr mr mw me pf io", VMA_SKIP_DEVICE, VMA_SKIP_DEVICE },
                { "rw-p 00000000 00:05 7       /dev/gpu", "rd wr mr mw me mm", VMA_SKIP_DEVICE, VMA_SKIP_DEVICE },
                { "rw-p 00000000 00:05 7       /dev/x", "rd wr mr mw me de", VMA_SKIP_DEVICE, VMA_SKIP_DEVICE },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me wf", VMA_SKIP_SPECIAL, VMA_SKIP_SPECIAL },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me dd nr wf dp", VMA_SKIP_SPECIAL, VMA_SKIP_SPECIAL },
                { "rw-p 00000000 00:0f 9       /anon_hugepage (deleted)", "rd wr mr mw me de ht", VMA_SKIP_HUGETLB,
                  VMA_SKIP_HUGETLB },
                { "rw-s 00000000 00:0f 9       /anon_hugepage (deleted)", "rd wr sh mr mw me ms de ht",
                  VMA_SKIP_HUGETLB, VMA_SKIP_HUGETLB },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me lo ac", VMA_SKIP_LOCKED, VMA_SKIP_LOCKED },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me lo lf ac", VMA_SKIP_LOCKED, VMA_SKIP_LOCKED },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me lo ac dd", VMA_SKIP_LOCKED, VMA_SKIP_LOCKED },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac dd", VMA_SKIP_DONTDUMP, VMA_OK },
                { "---p 00000000 00:00 0 ", "mr mw me ac dd", VMA_SKIP_DONTDUMP, VMA_SKIP_UNREADABLE },
                { "rw-s 00000000 00:10 11      /secretmem (deleted)", "rd wr sh mr mw me ms lo dd", VMA_SKIP_SECRET,
                  VMA_SKIP_SECRET },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me um", VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me uw", VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ui", VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "---p 00000000 00:00 0 ", "mr mw me", VMA_SKIP_UNREADABLE, VMA_SKIP_UNREADABLE },
                { "-w-p 00000000 00:00 0 ", "wr mr mw me", VMA_SKIP_UNREADABLE, VMA_SKIP_UNREADABLE },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac ss", VMA_SKIP_SHADOW_STACK, VMA_SKIP_SHADOW_STACK },
                /* A flag of a kernel to come is not ours to judge. */
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ?? zz", VMA_OK, VMA_OK },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++)
                for (int dontdump = 0; dontdump < 2; dontdump++) {
                        char text[4096];
                        VmaList list;

                        snprintf(text, sizeof text, "7f0000000000-7f0000021000 %s\n" BODY("      24", "       0")
                                 "VmFlags: %s \n", cases[i].header, cases[i].flags);
                        list = parse(text, dontdump);
                        assert_int_equal(list.n, 1);
                        if (list.vmas[0].skip != (dontdump ? cases[i].with_dontdump : cases[i].skip))
                                fail_msg("%s %s: %s", cases[i].header, cases[i].flags,
                                         vma_skip_name(list.vmas[0].skip));
                        vma_list_done(&list);
                }
        for (int skip = 0; skip < _VMA_SKIP_MAX; skip++)
                assert_non_null(vma_skip_name((VmaSkip)skip));
        assert_string_equal(vma_skip_name((VmaSkip)-1), "?");
}

/* Registered for write protection alone: as any other's until somebody claims it, and then as if it were not. */
static void test_tracked(void **state) {
        static const struct {
                const char *header, *flags;
                bool tracked;
                VmaSkip skip, claimed;
        } cases[] = {
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac", false, VMA_OK, VMA_OK },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac uw", true, VMA_SKIP_UFFD, VMA_OK },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac um", false, VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac uw um", false, VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me ac uw ui", false, VMA_SKIP_UFFD, VMA_SKIP_UFFD },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me lo ac uw", true, VMA_SKIP_UFFD, VMA_SKIP_LOCKED },
                { "rw-p 00000000 00:00 0 ", "rd wr mr mw me dd ac uw", true, VMA_SKIP_UFFD, VMA_SKIP_DONTDUMP },
                { "---p 00000000 00:00 0 ", "mr mw me ac uw", true, VMA_SKIP_UFFD, VMA_SKIP_UNREADABLE },
                { "rw-s 00000000 00:01 3       /dev/zero (deleted)", "rd wr sh mr mw me ms uw", true, VMA_SKIP_SHARED,
                  VMA_SKIP_SHARED },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                char text[4096];
                VmaList list;

                snprintf(text, sizeof text, "7f0000000000-7f0000021000 %s\n" BODY("      24", "       0")
                         "VmFlags: %s \n", cases[i].header, cases[i].flags);
                list = parse(text, false);
                assert_int_equal(list.n, 1);
                assert_int_equal(list.vmas[0].tracked, cases[i].tracked);
                assert_int_equal(list.vmas[0].skip, cases[i].skip);
                vma_claim(&list.vmas[0]);
                assert_int_equal(list.vmas[0].skip, cases[i].claimed);
                vma_list_done(&list);
        }
}

/* Names that a process can give to files of its own, or to memory. */
static void test_hostile_names(void **state) {
        static const char *const names[] = {
                "/tmp/x\\012VmFlags: rd wr mr mw me ac ",
                "/tmp/VmFlags: rd wr",
                "/tmp/x\\0127f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
                "/tmp/7f0000000000-7f0000001000 rw-p 00000000 00:00 0",
                "/tmp/[vdso]", "/[vdso]", "/tmp/ [stack]", "/[stack]", "/tmp/secretmem (deleted)",
                "/tmp/secretmem", "/memfd:/secretmem (deleted)", "/memfd:[vvar] (deleted)", "anon_inode:[vvar]",
                "/tmp/\\012", "/tmp/\r\t\v\f\b\x7f\xff\xfe", "/tmp/Anonymous:              99 kB",
                "/tmp/x kB", "/tmp/ (deleted)", "/", "//deleted",
        };
        char text[8192];
        VmaList list;

        for (size_t i = 0; i < ELEMENTSOF(names); i++) {
                /* The one whose name lies is a device's: nothing it is called may make it readable, nor hide what
                 * follows. */
                snprintf(text, sizeof text,
                         "7f0000000000-7f0000001000 rw-p 00000000 fe:00 17                         %s\n"
                         BODY("      24", "       0") "VmFlags: rd wr mr mw me pf io \n"
                         "7f0000001000-7f0000002000 rw-p 00000000 fe:00 17                         %s\n"
                         BODY("      24", "       0") "VmFlags: rd wr mr mw me ac \n"
                         "7f0000002000-7f0000003000 rw-p 00000000 00:00 0 \n"
                         BODY("      24", "       0") "VmFlags: rd wr mr mw me lo \n", names[i], names[i]);
                list = parse(text, false);
                assert_int_equal(list.n, 3);
                assert_int_equal(list.vmas[0].skip, VMA_SKIP_DEVICE);
                assert_int_equal(list.vmas[1].skip, VMA_OK);
                assert_true(list.vmas[1].file);
                assert_int_equal(list.vmas[1].anonymous_bytes, 24 << 10);
                assert_int_equal(list.vmas[2].skip, VMA_SKIP_LOCKED);
                vma_list_done(&list);
        }
        /* Anonymous memory may be named, but not with brackets inside. */
        list = parse(MAPPING("7f0000000000-7f0000021000 rw-p 00000000 00:00 0         [anon:vdso]", "rd wr mr mw me"),
                     false);
        assert_int_equal(list.vmas[0].skip, VMA_OK);
        vma_list_done(&list);
}

static void test_sizes(void **state) {
        /* More than eight digits make a line longer than the others. */
        VmaList list = parse("100000000000-200000000000 rw-p 00000000 00:00 0 \n"
                             "Size:           17179869184 kB\n"
                             BODY("16777216000", "16777214976") "VmFlags: rd wr mr mw me \n", false);

        assert_int_equal(list.vmas[0].anonymous_bytes, (uint64_t)16777216000 << 10);
        assert_int_equal(list.vmas[0].huge_bytes, (uint64_t)16777214976 << 10);
        vma_list_done(&list);
}

/* What remote calls leave behind when the daemon dies is told by where it is. */
static void test_leftover(void **state) {
        static const struct {
                const char *header;
                VmaSkip skip;
        } cases[] = {
                { "6b736d640000-6b736d651000 r-xp 00000000 00:00 0 ", VMA_SKIP_STUB },
                { "6b736d651000-6b736d654000 rw-p 00000000 00:00 0 ", VMA_SKIP_STUB },
                { "6b736e540000-6b736e554000 r-xp 00000000 00:00 0 ", VMA_SKIP_STUB },
                { "6b736d63f000-6b736d640000 rw-p 00000000 00:00 0 ", VMA_OK },
                { "6b736d63f000-6b736d654000 rw-p 00000000 00:00 0 ", VMA_OK },
                { "6b736e640000-6b736e641000 rw-p 00000000 00:00 0 ", VMA_OK },
                { "6b736d640000-6b736d651000 rw-p 00000000 fe:00 9   /tmp/x", VMA_OK },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                char text[4096];
                VmaList list;

                snprintf(text, sizeof text, "%s\n" BODY("      24", "       0") "VmFlags: rd wr mr mw me dd \n",
                         cases[i].header);
                list = parse(text, true);
                assert_int_equal(list.vmas[0].skip, cases[i].skip);
                vma_list_done(&list);
        }
}

static void test_not_smaps(void **state) {
        static const char *const texts[] = {
                "x", "\n", "Size: 4 kB\n", "VmFlags: rd \n", "hello world\n",
                /* maps, not smaps: nothing says what the mapping is */
                "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n",
                "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n7f0000001000-7f0000002000 rw-p 00000000 00:00 0 \n",
                /* two VmFlags; cut short; an odd flag */
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ", "rd") "VmFlags: rd \n",
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ", "rd") "7f",
                "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \nVmFlags: rd wr x\n",
                /* headers */
                MAPPING("7f0000001000-7f0000001000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000002000-7f0000001000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000001-7f0000001000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000000-7f0000001000 rw-q 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000000-7f0000001000 r", "rd"),
                MAPPING("7f0000000000-7f0000001000", "rd"),
                MAPPING("-7f0000001000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00:00", "rd"),
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00 00 0 ", "rd"),
                MAPPING("7f0000000000-17f00000000010000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00:00 99999999999999999999 ", "rd"),
                /* backwards, overlapping */
                MAPPING("7f0000001000-7f0000002000 rw-p 00000000 00:00 0 ", "rd")
                MAPPING("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ", "rd"),
                MAPPING("7f0000000000-7f0000002000 rw-p 00000000 00:00 0 ", "rd")
                MAPPING("7f0000001000-7f0000003000 rw-p 00000000 00:00 0 ", "rd"),
                "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \nAnonymous:   x kB\nVmFlags: rd \n",
                "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \nAnonymous:\nVmFlags: rd \n",
        };
        VmaList list;

        for (size_t i = 0; i < ELEMENTSOF(texts); i++) {
                memset(&list, 0xa5, sizeof list);
                if (vma_list_parse(texts[i], false, &list) != -EINVAL)
                        fail_msg("taken for smaps: %s", texts[i]);
                assert_int_equal(list.n, 0xa5a5a5a5a5a5a5a5);
        }
        /* A process without memory has no mappings, and that is the truth. */
        list = parse("", false);
        assert_int_equal(list.n, 0);
        vma_list_done(&list);
}

static void test_pieces(void **state) {
        static const char text[] =
                MAPPING("5577f2501000-5577f2503000 r--p 00000000 fe:00 247498             /usr/bin/x kB", "rd mr")
                MAPPING("557813a45000-557813a66000 rw-p 00000000 00:00 0                          [heap]", "rd wr lo")
                MAPPING("7f02dc627000-7f02dce27000 rw-p 00000000 00:00 0 ", "rd wr mr mw me ac hg mg");
        VmaList whole = parse(text, false);

        for (size_t piece = 1; piece < sizeof text; piece++) {
                VmaParser parser = {};
                VmaList list;
                size_t at = 0, shown = 0, used;

                while (at < sizeof text - 1) {
                        shown = MIN_OF(sizeof text - 1, shown + piece);
                        assert_int_equal(vma_parser_feed(&parser, text + at, shown - at, &used), 0);
                        at += used;
                }
                assert_int_equal(vma_parser_finish(&parser, &list), 0);
                assert_int_equal(list.n, whole.n);
                for (size_t i = 0; i < list.n; i++) {
                        assert_int_equal(list.vmas[i].start, whole.vmas[i].start);
                        assert_int_equal(list.vmas[i].end, whole.vmas[i].end);
                        assert_int_equal(list.vmas[i].skip, whole.vmas[i].skip);
                        assert_int_equal(list.vmas[i].anonymous_bytes, whole.vmas[i].anonymous_bytes);
                }
                vma_list_done(&list);
        }
        vma_list_done(&whole);
}

/* --- maps, with answers --- */

#define PLAIN (VMA_TRAIT_READ | VMA_TRAIT_WRITE)

static int parse_maps(const char *text, const VmaAnswer *answers, size_t n, VmaList *ret) {
        _cleanup_(vma_parser_done) VmaParser parser = { .answers = answers, .n_answers = n };
        size_t used;
        int r = vma_parser_feed(&parser, text, strlen(text), &used);

        if (r == 0)
                assert_int_equal(used, strlen(text));
        return r != 0 ? r : vma_parser_finish(&parser, ret);
}

static void test_answers(void **state) {
        static const char text[] = "7f0000000000-7f0000002000 rw-p 00000000 00:00 0 \n"
                                   "7f0000003000-7f0000004000 rw-s 00000000 00:01 17                         /dev/zero (deleted)\n"
                                   "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        const VmaAnswer good[] = {
                { .start = 0x7f0000000000, .end = 0x7f0000002000, .traits = PLAIN | VMA_TRAIT_DONTFORK, .anonymous = true },
                { .start = 0x7f0000003000, .end = 0x7f0000004000, .traits = PLAIN | VMA_TRAIT_SHARED },
        };
        VmaAnswer answers[3];
        VmaList list;

        assert_int_equal(parse_maps(text, good, 2, &list), 0);
        assert_int_equal(list.n, 3);
        assert_true(list.uncounted);
        assert_int_equal(list.vmas[0].skip, VMA_OK);
        assert_int_equal(list.vmas[0].advice, VMA_DONTFORK);
        assert_int_equal(list.vmas[0].anonymous_bytes, 0x2000);
        assert_int_equal(list.vmas[1].skip, VMA_SKIP_SHARED);
        assert_int_equal(list.vmas[1].anonymous_bytes, 0);
        assert_int_equal(list.vmas[2].skip, VMA_SKIP_SPECIAL);
        vma_list_done(&list);

        for (unsigned i = 0; i < 10; i++) {
                size_t n = 2;
                int want = VMA_E_CHANGED, r;

                memcpy(answers, good, sizeof good);
                answers[2] = (VmaAnswer){ .start = 0x7f0000005000, .end = 0x7f0000006000, .traits = PLAIN };
                switch (i) {
                case 0:
                        answers[0].start += PAGE_BYTES;
                        break;
                case 1:
                        answers[0].end -= PAGE_BYTES;
                        break;
                case 2:
                        n = 1;
                        break;
                case 3:
                        n = 3; /* one that the text does not have */
                        break;
                case 4:
                        answers[0].traits &= ~(uint32_t)VMA_TRAIT_READ;
                        break;
                case 5:
                        answers[0].traits &= ~(uint32_t)VMA_TRAIT_WRITE;
                        break;
                case 6:
                        answers[0].traits |= VMA_TRAIT_EXEC;
                        break;
                case 7:
                        answers[0].traits |= VMA_TRAIT_SHARED;
                        break;
                case 8:
                        answers[0].unsure = true;
                        want = VMA_E_UNSURE;
                        break;
                case 9:
                        answers[1].unsure = true; /* shared: left alone whatever it is */
                        want = 0;
                        break;
                }
                r = parse_maps(text, answers, n, &list);
                if (r != want)
                        fail_msg("%u: %d", i, r);
                if (r == 0)
                        vma_list_done(&list);
        }
        assert_int_equal(parse_maps("7f0000000000-7f0000002000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n", good, 1, &list), -EINVAL);
}

static VmaLetters letters_of(const char *text) {
        VmaLetters letters = {};

        for (; text[0]; text += text[2] ? 3 : 2)
                letters.letters[letters.n++] = VMA_LETTERS(text[0], text[1]);
        return letters;
}

/* Which bit is which, from samples: bits and letters of a mapping each. */
static void test_bits(void **state) {
        static const struct {
                uint64_t bits;
                const char *letters;
        } mappings[] = {
                { 0x01, "rd" },
                { 0x03, "rd wr" },
                { 0x0d, "rd pf io" },           /* both always together, and mean the same */
                { 0x31, "rd lo dd" },           /* both always together, and do not */
                { 0x41, "rd" },                 /* one without letters */
                { 0x181, "rd mg" },             /* two bits, one of them without */
                { 0x201, "rd zz" },             /* letters that nobody knows */
                { 0x401, "rd gd" }, { 0x401, "rd" }, /* not always */
                { 0x801, "rd sd" },
        };
        VmaLetters letters[ELEMENTSOF(mappings)];
        VmaSample samples[ELEMENTSOF(mappings)];
        VmaBits bits;
        bool unsure;

        for (size_t i = 0; i < ELEMENTSOF(mappings); i++) {
                letters[i] = letters_of(mappings[i].letters);
                samples[i] = (VmaSample){ mappings[i].bits, &letters[i] };
        }
        vma_bits_learn(samples, ELEMENTSOF(mappings), &bits);
        assert_true(bits.known == 0x80f);
        assert_int_equal(vma_bits_traits(&bits, 0x80f, &unsure), PLAIN | VMA_TRAIT_DEVICE);
        assert_false(unsure);
        assert_int_equal(vma_bits_traits(&bits, 0x11, &unsure), VMA_TRAIT_READ);
        assert_true(unsure);
        vma_bits_traits(&bits, (uint64_t)1 << 63, &unsure); /* never seen */
        assert_true(unsure);
        vma_bits_learn(NULL, 0, &bits);
        assert_true(bits.known == 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_process),    cmocka_unit_test(test_reasons), cmocka_unit_test(test_tracked),
                cmocka_unit_test(test_hostile_names), cmocka_unit_test(test_sizes),
                cmocka_unit_test(test_leftover), cmocka_unit_test(test_not_smaps),
                cmocka_unit_test(test_pieces), cmocka_unit_test(test_answers), cmocka_unit_test(test_bits),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
