/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What was cold before it was read looks cold afterwards (scan/cold.h), judged by the smaps of a process whose marks of
 * use clear_refs takes off, as reclaim does. Each claim has its control: without cold_restore() all that was read is
 * Referenced; a range that ends within a huge page does split it, and so does one call for more than 2 GiB.
 */

#include "scan/cold.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define SMALL_BYTES (8 * BLOCK_BYTES)
#define LOCKED (3 * BLOCK_BYTES)         /* a block of the small region that gets locked, and one that goes */
#define HOLE (5 * BLOCK_BYTES)
#define HUGE_BYTES (4 * BLOCK_BYTES)     /* begins and ends in the middle of a block: three huge pages */
#define LONG_BYTES ((uint64_t)2 << 30)   /* one huge page at its end, the rest never touched */

static char *small_region, *huge_region, *long_region;
static int command, answer;
static Target *target;
static bool keep_sharing;       /* never read by process_vm_readv(2), which un-shares */

static char *map(uint64_t address, uint64_t bytes, int advice) {
        char *p = mmap((void *)address, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

        CHECK(p == (void *)address, "mmap");
        CHECK(madvise(p, bytes, advice) == 0 || advice == MADV_HUGEPAGE, "madvise");
        return p;
}

static void use(char *from, uint64_t bytes) {
        for (uint64_t i = 0; i < bytes; i += PAGE_BYTES)
                ((volatile char *)from)[i] = (char)(i >> PAGE_SHIFT | 1);
}

/* 'u': use the small region; 'l': lock and unmap a block of it each; 'f': fork a child that waits. */
static _Noreturn void serve(int commands, int answers) {
        char c = 'r';

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        use(small_region, SMALL_BYTES);
        use(huge_region, HUGE_BYTES);
        use(long_region + LONG_BYTES - BLOCK_BYTES, PAGE_BYTES);
        do {
                if (c == 'u')
                        use(small_region, SMALL_BYTES);
                if (c == 'l')
                        CHECK(mlock(small_region + LOCKED, BLOCK_BYTES) == 0 &&
                              munmap(small_region + HOLE, BLOCK_BYTES) == 0, "locking");
                if (c == 'f' && fork() == 0) {
                        prctl(PR_SET_PDEATHSIG, SIGKILL);
                        for (;;)
                                pause();
                }
                CHECK(write(answers, &c, 1) == 1, "answer");
        } while (read(commands, &c, 1) == 1);
        exit(0);
}

static void tell(char c) {
        CHECK(c == 'r' || write(command, &c, 1) == 1, "command");
        CHECK(read(answer, &c, 1) == 1, "answer");
}

static VmaList mappings(void) {
        VmaList list;
        CHECK(target_read_vmas(target, false, &list) == 0, "smaps");
        return list;
}

/* Takes the marks of use off. */
static void forget(void) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/clear_refs", target->pid);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
                TEST_SKIP("no clear_refs in this kernel");
        CHECK(write(fd, "1", 1) == 1, "clear_refs");
        close(fd);
}

/* Reads by both readers' means, every other block each. */
static void read_region(const char *from, uint64_t bytes) {
        static char buffer[BLOCK_BYTES];

        for (uint64_t at = 0; at < bytes; at += sizeof buffer) {
                struct iovec local = { buffer, sizeof buffer }, remote = { (void *)(uintptr_t)(from + at), sizeof buffer };
                ssize_t n = !keep_sharing && at / sizeof buffer % 2
                        ? process_vm_readv(target->pid, &local, 1, &remote, 1, 0)
                        : pread(target->memfd, buffer, sizeof buffer, (off_t)(uintptr_t)(from + at));
                CHECK(n == sizeof buffer, "reading");
        }
}

/* Percent of the present pages in [from, from + bytes) that look used; its mappings begin and end there. */
static unsigned referenced(const char *from, uint64_t bytes) {
        VmaList list = mappings();
        uint64_t used = 0, present = 0, end = (uintptr_t)from + bytes;

        for (const Vma *vma = list.vmas; vma < list.vmas + list.n; vma++)
                if (vma->start >= (uintptr_t)from && vma->end <= end) {
                        used += vma->referenced_bytes;
                        present += vma->rss_bytes;
                }
        vma_list_done(&list);
        CHECK(present, "nothing is there");
        return (unsigned)(used * 100 / present);
}

static uint64_t huge_bytes(const char *from) {
        VmaList list = mappings();
        uint64_t bytes = vma_list_find(&list, (uintptr_t)from)->huge_bytes;

        vma_list_done(&list);
        return bytes;
}

/* All blocks that [from, from + bytes) touches, as of the mappings before the read. */
static ColdList collect(const VmaList *before, const char *from, uint64_t bytes) {
        ColdList list = {};
        uint64_t end = (uintptr_t)from + bytes;

        for (uint64_t block = (uintptr_t)from & ~(BLOCK_BYTES - 1); block < end; block += BLOCK_BYTES)
                CHECK(cold_collect(&list, before, block) == 0, "memory");
        return list;
}

/* Returns what looks used after a read that was put back, and *ret_read: right after the read. */
static unsigned restored(const char *from, uint64_t bytes, unsigned *ret_read) {
        VmaList before;
        ColdList list;

        forget();
        before = mappings();
        read_region(from, bytes);
        *ret_read = referenced(from, bytes);
        list = collect(&before, from, bytes);
        CHECK(cold_restore(target, list.ranges, list.n) == 0, "cold_restore");
        cold_list_done(&list);
        vma_list_done(&before);
        return referenced(from, bytes);
}

static void test_small(void) {
        uint64_t begun = now_nsec(), took;
        ColdRange all = { (uintptr_t)small_region, (uintptr_t)small_region + SMALL_BYTES };
        unsigned read, share = restored(small_region, SMALL_BYTES, &read);

        CHECK(read == 100, "%u %% look used after a read that was not put back: this proves nothing", read);
        CHECK(share <= 1, "%u %% look used", share);
        begun = now_nsec();
        CHECK(cold_restore(target, &all, 1) == 0, "cold_restore");
        took = now_nsec() - begun;
        printf("small pages: %u %% referenced after a read, %u %% after cold_restore() (%llu ns a page)\n", read, share,
               (unsigned long long)(took / (SMALL_BYTES / PAGE_BYTES)));
}

/* What the process uses is left as it is. */
static void test_hot(void) {
        VmaList before;
        ColdList list;

        forget();
        tell('u');
        if (referenced(small_region, SMALL_BYTES) < 50) {
                TEST_SKIP_PART("what is in use does not show: accessed bits of page tables that a hypervisor shadows");
                return;
        }
        before = mappings();
        list = collect(&before, small_region, SMALL_BYTES);
        CHECK(list.n == 0, "%zu ranges of a mapping in use", list.n);
        vma_list_done(&before);
}

/* Whole huge pages are not marked by a read on x86 (pmdp_set_access_flags()), the small pages at both ends are. */
static void test_huge(void) {
        ColdRange part = { (uintptr_t)huge_region, (uintptr_t)huge_region + BLOCK_BYTES };
        uint64_t before = huge_bytes(huge_region);
        unsigned read, share;

        if (before != 3 * BLOCK_BYTES) {
                TEST_SKIP_PART("huge pages: there are none");
                return;
        }
        share = restored(huge_region, HUGE_BYTES, &read);
        CHECK(read >= 25, "%u %% look used after a read that was not put back: this proves nothing", read);
        CHECK(huge_bytes(huge_region) == before, "%llu bytes left", (unsigned long long)huge_bytes(huge_region));
        CHECK(share <= 1, "%u %% look used", share);
        CHECK(cold_restore(target, &part, 1) == 0, "cold_restore");
        CHECK(huge_bytes(huge_region) < before, "a part of a huge page splits nothing: this proves nothing");
        printf("huge pages: %u %% referenced after a read, %u %% after cold_restore(), all whole\n", read, share);
}

/* The kernel shortens one call to 2 GiB less a page; cold_restore() never asks for so much. */
static void test_long(void) {
        ColdRange range = { (uintptr_t)long_region, (uintptr_t)long_region + LONG_BYTES };
        struct iovec whole = { long_region, LONG_BYTES };

        if (huge_bytes(long_region) != BLOCK_BYTES) {
                TEST_SKIP_PART("2 GiB in one range: there is no huge page at its end");
                return;
        }
        CHECK(cold_restore(target, &range, 1) == 0, "cold_restore");
        CHECK(huge_bytes(long_region) == BLOCK_BYTES, "the huge page at the end was split");
        CHECK(syscall(SYS_process_madvise, target->pidfd, &whole, 1, MADV_COLD, 0) > 0, "process_madvise");
        CHECK(huge_bytes(long_region) == 0, "one call for 2 GiB splits nothing: this proves nothing");
        printf("2 GiB in one range: whole\n");
}

/* What is locked or gone is passed over, what comes after it is not. */
static void test_changed(void) {
        VmaList before;
        ColdList list;
        unsigned share;

        forget();
        before = mappings();
        read_region(small_region, SMALL_BYTES);
        list = collect(&before, small_region, SMALL_BYTES);
        CHECK(list.n == 1, "%zu ranges", list.n);
        /* In pieces, as they are where a process has many mappings. */
        for (uint64_t at = list.ranges[0].start; at < list.ranges[0].end; at += BLOCK_BYTES) {
                CHECK(GROW(list.ranges, list.n, list.allocated) == 0, "memory");
                list.ranges[list.n++] = (ColdRange){ at, at + BLOCK_BYTES };
        }
        tell('l');
        CHECK(cold_restore(target, list.ranges + 1, list.n - 1) == 0, "cold_restore");
        share = referenced(small_region + HOLE + BLOCK_BYTES, SMALL_BYTES - HOLE - BLOCK_BYTES);
        CHECK(share <= 1, "behind the hole %u %% look used", share);
        CHECK(referenced(small_region + LOCKED, BLOCK_BYTES) == 100, "locked memory was touched");
        cold_list_done(&list);
        vma_list_done(&before);
}

/* The kernel leaves pages alone that others map too; asking for it does no harm. */
static void test_forked(void) {
        unsigned read, share;

        keep_sharing = true;
        tell('f');
        share = restored(small_region, LOCKED, &read);
        CHECK(share == 100, "%u %%: the kernel takes marks off shared pages now: say so in cold.c", share);
}

static void test_gone(void) {
        ColdRange range = { (uintptr_t)small_region, (uintptr_t)small_region + BLOCK_BYTES };
        int r;

        kill(target->pid, SIGKILL);
        waitpid(target->pid, NULL, 0);
        r = cold_restore(target, &range, 1);
        CHECK(r == TARGET_E_GONE, "%d", r);
}

int main(void) {
        int commands[2], answers[2];
        ColdRange none = {};
        pid_t pid;
        int r;

        test_need_root();
        small_region = map(0x200000000000, SMALL_BYTES, MADV_NOHUGEPAGE);
        huge_region = map(0x210000000000 + BLOCK_BYTES / 2, HUGE_BYTES, MADV_HUGEPAGE);
        long_region = map(0x220000000000, LONG_BYTES, MADV_HUGEPAGE);
        CHECK(pipe2(commands, O_CLOEXEC) == 0 && pipe2(answers, O_CLOEXEC) == 0, "pipe");
        pid = fork();
        CHECK(pid >= 0, "fork");
        if (pid == 0)
                serve(commands[0], answers[1]);
        command = commands[1];
        answer = answers[0];
        tell('r');
        CHECK(target_new(pid, &target) == 0 && target_open_memory(target) == 0, "target");
        r = cold_restore(target, &none, 1);
        if (r == -ENOSYS || r == -EPERM)
                TEST_SKIP("process_madvise(2) is not for us: %s", strerror(-r));
        CHECK(r == 0, "%d", r);

        test_small();
        test_hot();
        test_huge();
        test_long();
        test_changed();
        target_free(target);
        /* The region has a hole and a lock now; the next test uses what comes before them. */
        CHECK(target_new(pid, &target) == 0 && target_open_memory(target) == 0, "target");
        test_forked();
        test_gone();
        target_free(target);
        return 0;
}
