/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include <sys/mman.h>
#include <sys/uio.h>

/*
 * Memory worth merging, in every victim: pages that are equal in all of them, zero pages and pages like no other, always
 * changing: some every few hundred milliseconds (never to be merged for long), some every few seconds, some hardly at
 * all. What each page holds follows from one number kept elsewhere, so each byte of it can be checked at any time. Only one
 * thread of a victim works on it; a child that was forked has a copy of memory and numbers, and checks that.
 */
#define AREA_PAGES 512U
#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define RUN_PAGES 4U
#define EQUAL_CONTENTS 48U
#define TICK_NSEC NSEC_PER_MSEC
#define CHECKED_IN_A_TICK 8U

bool victim_may_call = true;
unsigned victim_churn_permille = 20;
static uint64_t *area, *spare;          /* spare: where a page is moved to, and back from */
static uint64_t holds[AREA_PAGES];      /* 0: zeros */
static uint64_t unique /* the last of them given out */, seed = 88172645463325252, checked, changed, next_tick_nsec;

static uint64_t rnd(uint64_t below) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        return seed % below;
}

static uint64_t word_of(uint64_t number, size_t word) {
        return number ? (number ^ (uint64_t)word << 48) * 0x9e3779b97f4a7c15 : 0;
}

static uint64_t *page_at(size_t page) { return area + page * WORDS; }

static void fill(uint64_t *page, uint64_t number) {
        for (size_t i = 0; i < WORDS; i++)
                page[i] = word_of(number, i);
}

static void check_page(size_t page) {
        const volatile uint64_t *p = page_at(page);
        for (size_t i = 0; i < WORDS; i++) {
                uint64_t is = p[i];
                CHECK(is == word_of(holds[page], i), "WRONG BYTES: page %zu word %zu is %#lx, holds number %#lx", page, i, is,
                      holds[page]);
        }
        checked++;
}

void victim_memory_check(void) {
        for (size_t page = 0; page < AREA_PAGES; page++)
                check_page(page);
}

/* Half of what is written has equals, a quarter is zero, a quarter unique. */
static uint64_t new_number(void) {
        switch (rnd(4)) {
        case 0: return 0;
        case 1: return ++unique;
        default: return 1 + rnd(EQUAL_CONTENTS);
        }
}

static void renew(void *address, size_t pages) {
        CHECK(mmap(address, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
              address);
}

/* What a process may do to its mappings and, through the kernel, to its pages. */
static void churn(size_t page, size_t n) {
        void *address = page_at(page);
        uint64_t text[WORDS];
        struct iovec from = {.iov_base = text, .iov_len = sizeof text}, to = {.iov_base = address, .iov_len = sizeof text};
        switch (rnd(4)) {
        case 0:
                CHECK(madvise(address, n * PAGE_BYTES, MADV_DONTNEED) == 0);
                memset(holds + page, 0, n * sizeof *holds);
                break;
        case 1:
                CHECK(munmap(address, n * PAGE_BYTES) == 0);
                renew(address, n);
                memset(holds + page, 0, n * sizeof *holds);
                break;
        case 2: /* one page: it surely lies in one mapping */
                CHECK(mremap(address, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, spare) == spare);
                renew(address, 1);
                CHECK(mremap(spare, PAGE_BYTES, PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, address) == address);
                renew(spare, 1);
                break;
        default: /* the kernel writes */
                holds[page] = new_number();
                fill(text, holds[page]);
                CHECK(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == (ssize_t)sizeof text);
        }
}

static void change(void) {
        /* A quarter of the area lives some 0.3 s, half of it 3 s, the last quarter 15 s. */
        uint64_t dice = rnd(1000);
        size_t first = dice < 430 ? 0 : dice < 515 ? AREA_PAGES / 4 : AREA_PAGES / 4 * 3;
        size_t n = dice < 430 || dice >= 515 ? AREA_PAGES / 4 : AREA_PAGES / 2, run = 1 + rnd(RUN_PAGES);
        size_t page = first + rnd(n - run);
        if (dice >= 524)
                return;
        changed++;
        if (victim_may_call && rnd(1000) < victim_churn_permille)
                churn(page, run);
        else if (rnd(4) == 0) { /* written to, and the same again */
                uint64_t *word = page_at(page) + rnd(WORDS);
                *(volatile uint64_t *)word ^= 1;
                *(volatile uint64_t *)word ^= 1;
        } else
                for (size_t i = page; i < page + run; i++) {
                        holds[i] = new_number();
                        fill(page_at(i), holds[i]);
                }
        for (size_t i = page; i < page + run; i++)
                check_page(i);
}

void victim_memory_step(void) {
        static size_t at;
        for (unsigned i = 0; i < CHECKED_IN_A_TICK; i++)
                check_page(at++ % AREA_PAGES);
        change();
}

void victim_memory_tick(void) {
        uint64_t now = now_nsec();
        if (now < next_tick_nsec)
                return;
        next_tick_nsec = now + TICK_NSEC;
        victim_memory_step();
}

void victim_memory_new(void) {
        area = mmap(NULL, AREA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        spare = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(area != MAP_FAILED && spare != MAP_FAILED);
        (void)madvise(area, AREA_PAGES * PAGE_BYTES, MADV_NOHUGEPAGE);
        seed ^= (uint64_t)getpid() << 20;
        unique = (uint64_t)getpid() << 32;
        for (size_t page = 0; page < AREA_PAGES; page++) {
                holds[page] = new_number();
                fill(page_at(page), holds[page]);
        }
        printf("memory %p %lu\n", (void *)area, AREA_PAGES * PAGE_BYTES);
        fflush(stdout);
}

void victim_memory_report(void) { printf("%lu pages checked, %lu times changed\n", checked, changed); }
