/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Route advise on real processes and the real KSM: plan, mark, burst, undo. Judged by page frames, by the VmFlags and
 * the number of mappings, and by the processes' own look at their memory. The last child is the control: it holds the
 * same pages and is never marked, so it must not take part. Then: what a daemon that was killed leaves is undone by
 * the next one, a forked child's inherited marks too, and what the process marked itself stays.
 */

#include "base/io.h"
#include "host/ksm.h"
#include "merge/advise.h"
#include "merge/burst.h"
#include "tests/test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#define N_MARKED 3
#define N_CHILDREN (N_MARKED + 1)
#define PAGES (2 * BLOCK_PAGES)
#define OWN_MARK_PAGES 16       /* after the others: marked by the process itself */
#define PFN_MASK (((uint64_t)1 << 55) - 1)

typedef struct Child {
        pid_t pid;
        int command, answer;
        Target *target;
        Marks marks;
        size_t vmas;            /* before anything was marked */
} Child;

static Child children[N_CHILDREN];
static char *memory;            /* at the same address in all of them */
static char state_dir[] = "/tmp/test-advise.XXXXXX";
static uint64_t zero_pfn;
static Remote *remote;
static Ksm *ksm;

enum { UNIQUE, TWIN, ZERO };

/* Single pages, a run of eight, runs of zeroes, the rest unique. */
static int kind_of(unsigned page) {
        return page % 16 == 3 ? TWIN : page % 64 >= 40 && page % 64 < 48 ? TWIN : page % 32 == 20 ? ZERO : UNIQUE;
}

static void fill(unsigned child, unsigned page, uint64_t *words) {
        uint64_t x = (page + 1) * 0x9E3779B97F4A7C15ULL + (kind_of(page) == UNIQUE ? child + 1 : 0);

        for (unsigned i = 0; i < PAGE_BYTES / 8; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                words[i] = kind_of(page) == ZERO ? 0 : x;
        }
}

/* 'c': is all as it was written; 'f': fork a child that waits, say its pid. */
static _Noreturn void serve(unsigned child, int command, int answer) {
        char c;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (unsigned i = 0; i < PAGES; i++)
                fill(child, i, (void *)(memory + i * PAGE_BYTES));
        CHECK(madvise(memory + PAGES * PAGE_BYTES, OWN_MARK_PAGES * PAGE_BYTES, MADV_MERGEABLE) == 0);
        CHECK(write(answer, "r", 1) == 1);
        while (read(command, &c, 1) == 1)
                if (c == 'c') {
                        static uint64_t words[PAGE_BYTES / 8];
                        char ok = 1;

                        for (unsigned i = 0; i < PAGES; i++) {
                                fill(child, i, words);
                                ok = ok && memcmp(words, memory + i * PAGE_BYTES, PAGE_BYTES) == 0;
                        }
                        CHECK(write(answer, &ok, 1) == 1);
                } else {
                        pid_t pid = fork();
                        if (pid == 0) {
                                prctl(PR_SET_PDEATHSIG, SIGKILL);
                                for (;;)
                                        pause();
                        }
                        CHECK(write(answer, &pid, sizeof pid) == sizeof pid);
                }
        exit(0);
}

static void children_start(void) {
        for (unsigned i = 0; i < N_CHILDREN; i++) {
                int command[2], answer[2];
                char byte;

                CHECK(pipe(command) == 0 && pipe(answer) == 0);
                children[i].pid = fork();
                CHECK(children[i].pid >= 0);
                if (children[i].pid == 0)
                        serve(i, command[0], answer[1]);
                close(command[0]);
                close(answer[1]);
                children[i].command = command[1];
                children[i].answer = answer[0];
                CHECK(read(answer[0], &byte, 1) == 1);
                CHECK(target_new(children[i].pid, &children[i].target) == 0);
        }
}

static void children_end(void) {
        for (unsigned i = 0; i < N_CHILDREN; i++) {
                if (children[i].pid <= 0)
                        continue;
                kill(children[i].pid, SIGKILL);
                waitpid(children[i].pid, NULL, 0);
                children[i].target = target_free(children[i].target);
                marks_done(&children[i].marks);
                close(children[i].command);
                close(children[i].answer);
                children[i].pid = 0;
        }
}

static void put_back(void) {
        for (unsigned i = 0; i < N_CHILDREN; i++)
                if (children[i].pid > 0)
                        kill(children[i].pid, SIGKILL);
        test_remove_directory(state_dir);
}

static void children_intact(void) {
        for (unsigned i = 0; i < N_CHILDREN; i++) {
                char ok = 0;
                CHECK_HARMLESS(write(children[i].command, "c", 1) == 1 && read(children[i].answer, &ok, 1) == 1,
                               "child %u does not answer", i);
                CHECK_HARMLESS(ok, "child %u finds its memory changed", i);
        }
}

static uint64_t pfn_of(pid_t pid, const void *page) {
        char path[64];
        uint64_t entry;
        _cleanup_close_ int fd = -EBADF;

        snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0 && pread(fd, &entry, 8, (off_t)((uintptr_t)page / PAGE_BYTES * 8)) == 8 && entry >> 63);
        CHECK(entry & PFN_MASK, "no frame numbers");
        return entry & PFN_MASK;
}

/* Pages that share a frame with the first child's, or the zero page. */
static unsigned merged_pages(unsigned child) {
        unsigned n = 0;

        for (unsigned page = 0; page < PAGES; page++) {
                char *at = memory + page * PAGE_BYTES;
                uint64_t pfn = pfn_of(children[child].pid, at);
                bool merged = pfn == zero_pfn || (child != 0 && pfn == pfn_of(children[0].pid, at));

                CHECK(!merged || kind_of(page) != UNIQUE, "page %u is unique, and merged", page);
                n += merged;
        }
        return n;
}

static unsigned count_kind(int kind) {
        unsigned n = 0;

        for (unsigned page = 0; page < PAGES; page++)
                n += kind_of(page) == kind;
        return n;
}

static void read_vmas(Target *target, VmaList *ret) {
        vma_list_done(ret);
        CHECK(target_read_vmas(target, true, ret) == 0, "mappings of %d", target->pid);
}

/* Mergeable pages of the test's memory, without what the process marked itself; and those it did. */
static uint64_t mergeable_pages(const VmaList *vmas, uint64_t *ret_own) {
        uint64_t start = (uintptr_t)memory, own = start + PAGES * PAGE_BYTES, n = 0;

        *ret_own = 0;
        for (size_t i = 0; i < vmas->n; i++) {
                const Vma *v = &vmas->vmas[i];

                if (!v->mergeable)
                        continue;
                CHECK(v->start >= start && v->end <= own + OWN_MARK_PAGES * PAGE_BYTES, "a foreign mapping is marked");
                n += MIN_OF(v->end, own) - MIN_OF(v->start, own);
                *ret_own += MAX_OF(v->end, own) - MAX_OF(v->start, own);
        }
        *ret_own /= PAGE_BYTES;
        return n / PAGE_BYTES;
}

static bool has_state(const Target *target) {
        char path[96];

        snprintf(path, sizeof path, "%s/%d.%llu", state_dir, target->pid, (unsigned long long)target->start_ticks);
        return access(path, F_OK) == 0;
}

/* Where others use the CPUs too, a thread may not come to a stop in time. */
static void try_again(int r, const char *what) {
        static unsigned tries;

        CHECK((r == REMOTE_E_BUSY || r == REMOTE_E_LOST) && tries++ < 100, "%s: %s", what,
              r > 0 ? remote_error_name(r) : strerror(-r));
        usleep(20000);
        remote_reap(remote);
}

static uint64_t mark(Advise *advise, Child *child) {
        static Block blocks[PAGES / BLOCK_PAGES];
        Block *list[ELEMENTSOF(blocks)];
        Space space = { .blocks = list, .n = ELEMENTSOF(blocks) };
        PlanRules rules = { .minimum_run_pages = 1, .huge_page_split = 2500, .vmas_max = 16000 };
        _cleanup_(vma_list_done) VmaList vmas = {};
        uint64_t marked = 0;
        TargetSkip skip;
        int r;

        memset(blocks, 0, sizeof blocks);
        for (unsigned page = 0; page < PAGES; page++) {
                Block *block = &blocks[page / BLOCK_PAGES];
                block->addr = (uintptr_t)memory + page / BLOCK_PAGES * BLOCK_BYTES;
                list[page / BLOCK_PAGES] = block;
                page_set_add(block->hashed, page % BLOCK_PAGES);
                if (kind_of(page) == TWIN)
                        page_set_add(block->twin, page % BLOCK_PAGES);
                else if (kind_of(page) == ZERO)
                        page_set_add(block->zero, page % BLOCK_PAGES);
        }
        read_vmas(child->target, &vmas);
        child->vmas = vmas.n;
        while ((r = remote_adopt(remote, child->target, NULL, &skip)) != 0)
                try_again(r, "adopt");
        CHECK(skip == TARGET_OK);
        CHECK(marks_load(advise, child->target, &vmas, &child->marks) == 0);
        CHECK(child->marks.ours.n == 0 && ranges_pages(&child->marks.foreign) == OWN_MARK_PAGES);
        do {
                _cleanup_(plan_done) Plan plan = {};
                AdviseResult result = {};

                read_vmas(child->target, &vmas);
                rules.vmas_now = vmas.n;
                CHECK(plan_make(&space, &vmas, &rules, &plan) == 0);
                CHECK(plan.pages_marked == count_kind(TWIN) + count_kind(ZERO));
                r = advise_apply(advise, child->target, &plan, &child->marks, NULL, NULL, &result);
                CHECK(result.failed_ranges == 0);
                marked += result.pages_marked;
                if (r != 0)
                        try_again(r, "apply");
        } while (r != 0);
        CHECK(marked == count_kind(TWIN) + count_kind(ZERO) && has_state(child->target));
        return marked;
}

static void burst(uint64_t marked) {
        _cleanup_(burst_freep) Burst *b = NULL;

        CHECK(burst_new(ksm, &b) == 0);
        CHECK(burst_start(b, count_kind(TWIN) * (N_MARKED - 1) + count_kind(ZERO) * N_MARKED, marked) == 0);
        while (burst_step(b) == BURST_RUNNING) {
                struct timespec pause = { .tv_nsec = (long)burst_interval_nsec(b) };
                nanosleep(&pause, NULL);
        }
}

/* Nothing of ours is left in the process. */
static void check_clean(const Child *child) {
        _cleanup_(vma_list_done) VmaList vmas = {};
        uint64_t own;

        read_vmas(child->target, &vmas);
        CHECK(mergeable_pages(&vmas, &own) == 0, "mergeable pages are left");
        CHECK(own == OWN_MARK_PAGES, "the process's own mark is gone");
        CHECK(vmas.n == child->vmas, "%zu mappings, were %zu", vmas.n, child->vmas);
        CHECK(!has_state(child->target), "the state file is left");
}

static void undo(Advise *advise, Target *target, Marks *marks, uint64_t expected) {
        AdviseResult result = {};
        uint64_t pages = 0;
        int r;

        while ((r = advise_undo(advise, target, marks, UINT64_MAX, &result)) != 0) {
                pages += result.pages_unmarked;
                result = (AdviseResult){};
                try_again(r, "undo");
        }
        CHECK(result.failed_ranges == 0 && pages + result.pages_unmarked == expected, "%llu pages unmarked",
              (unsigned long long)(pages + result.pages_unmarked));
        advise_forget(advise, target, marks);
}

/* A child of a marked process: born with the marks, which are as much ours in it. */
static void check_forked(Advise *advise, const Child *parent, uint64_t marked) {
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(vma_list_done) VmaList vmas = {};
        _cleanup_(marks_done) Marks marks = {};
        uint64_t own;
        pid_t pid;

        CHECK(write(parent->command, "f", 1) == 1 && read(parent->answer, &pid, sizeof pid) == sizeof pid);
        CHECK(target_new(pid, &target) == 0);
        read_vmas(target, &vmas);
        CHECK(mergeable_pages(&vmas, &own) == marked, "the marks are inherited");
        CHECK(marks_load(advise, target, &vmas, &marks) == 0);
        CHECK(ranges_pages(&marks.ours) == marked && ranges_pages(&marks.foreign) == OWN_MARK_PAGES);
        undo(advise, target, &marks, marked);
        read_vmas(target, &vmas);
        CHECK(mergeable_pages(&vmas, &own) == 0 && own == OWN_MARK_PAGES);
        kill(pid, SIGKILL);
}

int main(void) {
        _cleanup_(advise_freep) Advise *advise = NULL, *next = NULL;
        char state_file[96];
        uint64_t marked = 0, each = 0;
        unsigned expected = count_kind(TWIN) + count_kind(ZERO);

        test_need_root();
        test_lock_ksm();
        CHECK(mkdtemp(state_dir));
        snprintf(state_file, sizeof state_file, "%s/ksm", state_dir);
        if (ksm_new(NULL, state_file, &ksm) < 0)
                TEST_SKIP("no KSM");
        test_at_end(put_back);
        /* On a block's border, with a mapping of its own. */
        memory = mmap(NULL, (PAGES + BLOCK_PAGES + OWN_MARK_PAGES) * PAGE_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
        CHECK(madvise(memory, (PAGES + BLOCK_PAGES + OWN_MARK_PAGES) * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
        memory += BLOCK_BYTES - (uintptr_t)memory % BLOCK_BYTES;
        CHECK(*(volatile char *)memory == 0); /* read, never written: maps the zero page */
        zero_pfn = pfn_of(getpid(), memory);
        children_start();
        CHECK(remote_new(&remote) == 0);
        CHECK(advise_new(remote, state_dir, false, &advise) == 0);

        for (unsigned i = 0; i < N_MARKED; i++)
                marked += each = mark(advise, &children[i]);
        burst(marked);
        for (unsigned i = 1; i < N_MARKED; i++)
                CHECK(merged_pages(i) == expected, "child %u: %u of %u pages merged", i, merged_pages(i), expected);
        CHECK(merged_pages(N_MARKED) == 0, "the control was merged without a mark");
        children_intact();
        printf("%u pages merged in each of %u processes, %zu ranges in each\n", expected, N_MARKED,
               children[0].marks.ours.n);

        check_forked(advise, &children[0], each);
        undo(advise, children[0].target, &children[0].marks, each);
        check_clean(&children[0]);
        CHECK(merged_pages(0) == 0, "child 0 still shares");
        /* The daemon is killed; the next one finds the state files, and loads before it undoes. */
        advise = advise_free(advise);
        CHECK(advise_new(remote, state_dir, false, &next) == 0);
        for (unsigned i = 1; i < N_MARKED; i++) {
                _cleanup_(vma_list_done) VmaList vmas = {};
                size_t before = children[i].vmas;

                CHECK(has_state(children[i].target), "swept though it lives");
                marks_done(&children[i].marks);
                read_vmas(children[i].target, &vmas);
                CHECK(marks_load(next, children[i].target, &vmas, &children[i].marks) == 0);
                CHECK(vmas.n > before);
                undo(next, children[i].target, &children[i].marks, each);
                check_clean(&children[i]);
                CHECK(merged_pages(i) == 0, "child %u still shares", i);
        }
        children_intact();
        children_end();
        remote_free(remote);
        CHECK(unlink(state_file) == 0 || errno == ENOENT);
        CHECK(rmdir(state_dir) == 0, "%s is not empty", state_dir);
        ksm = ksm_free(ksm);
        return 0;
}
