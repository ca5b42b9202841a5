/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * However pages are dealt into batches, and however many threads scan these, the answer is the same: whole blocks, one
 * page in each of many blocks, and anything between, over processes that share frames by fork and by KSM and one that
 * shares nothing; by 1, 2 and 4 threads. Blocks learn of the pages asked for and of no others. And nothing that was
 * shared comes apart.
 *
 * The answer is known page by page for the process that shares nothing; for the others it is what one thread finds
 * block by block. With -Db_sanitize=thread this is also the test of the scanner's locks. Built twice: with
 * NAIVE_READER pages must come apart.
 */
#include "test.h"

#include "base/crew.h"
#include "pairs.h"
#include "scan/frames.h"
#include "scan/scan.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define LONE_BLOCKS 300U
#define LONE_BYTES (LONE_BLOCKS * BLOCK_BYTES)
#define VICTIMS 5U
#define LONE (VICTIMS - 1)
#define THREADS_MAX 4U

#ifdef NAIVE_READER
#define NAIVE true
#else
#define NAIVE false
#endif

typedef enum Choice { WHOLE, ONE_EACH, RUNS, ANY, CHOICES } Choice;
static const char *const choice_names[] = { "whole blocks", "one page a block", "runs and gaps", "any pages" };

typedef struct Victim {
        Target *target;
        VmaList vmas;
        BlockTable table;
        Space space;
        uint64_t start;
        unsigned n_blocks;
        ScanPage *expected;     /* of each page from start on */
        PageSet *asked;         /* of each block */
} Victim;

typedef struct Round {
        Scanner *scanner;
        ScanBatch *batches;
        size_t n, allocated;
} Round;

static Ksm *ksm;
static Pair *forked, *merged;
static pid_t lone;
static uint8_t *lone_area;
static HashSecret *secret;
static Victim victims[VICTIMS];

static void clean_up(void) {
        if (lone > 0)
                kill(lone, SIGKILL);
}

static uint64_t mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9U;
        x = (x ^ x >> 27) * 0x94d049bb133111ebU;
        return x ^ x >> 31;
}

static bool zero_page; /* test_has_zero_page() */

/* What page i of the lone process is: one page in the block, some, most. (A block of none but zero pages is none.) */
static ScanKind lone_kind(size_t i) {
        unsigned density = (unsigned)(i / BLOCK_PAGES) % 4;
        uint64_t dice = mix(i) % 1000;

        if (density == 0)
                return i % BLOCK_PAGES == mix(i / BLOCK_PAGES) % BLOCK_PAGES ? SCAN_HASHED : SCAN_NOTHING;
        if (density == 1 ? dice < 950 : dice < 100)
                return SCAN_NOTHING;
        return dice >= 990 || (dice >= 980 && !zero_page) ? SCAN_ZERO : dice >= 980 ? SCAN_ZEROPAGE : SCAN_HASHED;
}

static void lone_content(size_t i, uint64_t *words) {
        for (size_t k = 0; k < PAGE_BYTES / 8; k++)
                words[k] = lone_kind(i) == SCAN_HASHED ? mix(i << 9 | k) : 0;
}

static void start_lone(void) {
        int ready[2];
        char c;

        CHECK(pipe2(ready, O_CLOEXEC) == 0);
        lone_area = mmap(NULL, LONE_BYTES + BLOCK_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        CHECK(lone_area != MAP_FAILED);
        lone_area += BLOCK_BYTES - (uintptr_t)lone_area % BLOCK_BYTES;
        lone = fork();
        CHECK(lone >= 0);
        if (lone > 0) {
                CHECK(read(ready[0], &c, 1) == 1);
                close(ready[0]);
                close(ready[1]);
                return;
        }
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        CHECK(mprotect(lone_area, LONE_BYTES, PROT_READ | PROT_WRITE) == 0);
        CHECK(madvise(lone_area, LONE_BYTES, MADV_NOHUGEPAGE) == 0);
        for (size_t i = 0; i < LONE_BLOCKS * BLOCK_PAGES; i++) {
                uint64_t *words = (uint64_t *)(void *)(lone_area + i * PAGE_BYTES);

                if (lone_kind(i) == SCAN_ZEROPAGE)
                        c = *(volatile char *)words;
                else if (lone_kind(i) != SCAN_NOTHING) {
                        *(volatile uint64_t *)words = 1; /* a page of zeros needs a frame too */
                        lone_content(i, words);
                }
        }
        CHECK(write(ready[1], "", 1) == 1);
        for (;;)
                pause();
}

static void open_victims(void) {
        for (unsigned v = 0; v < VICTIMS; v++) {
                Victim *victim = &victims[v];

                CHECK(target_new(v == LONE ? lone : (v < 2 ? forked : merged)->pids[v % 2], &victim->target) == 0);
                CHECK(target_open_memory(victim->target) == 0);
                CHECK(target_read_vmas(victim->target, false, &victim->vmas) == 0);
                victim->start = (uintptr_t)(v == LONE ? lone_area : pair_area());
                victim->n_blocks = v == LONE ? LONE_BLOCKS : PAIR_PAGES / BLOCK_PAGES;
                victim->expected = calloc(victim->n_blocks * BLOCK_PAGES, sizeof *victim->expected);
                victim->asked = calloc(victim->n_blocks, sizeof *victim->asked);
                CHECK(victim->expected && victim->asked);
        }
}

static void close_victims(void) {
        for (unsigned v = 0; v < VICTIMS; v++) {
                target_free(victims[v].target);
                vma_list_done(&victims[v].vmas);
                free(victims[v].expected);
                free(victims[v].asked);
        }
}

static Block *find_block(const Victim *victim, unsigned b) {
        return space_find(&victim->space, victim->start + b * BLOCK_BYTES);
}

static void choose(PageSet set, const ScanPage *expected, Choice choice, unsigned *seed) {
        unsigned one = (unsigned)rand_r(seed) % BLOCK_PAGES;

        memset(set, 0, sizeof(PageSet));
        for (unsigned n = 0; n < BLOCK_PAGES && expected[one].kind == SCAN_NOTHING; n++)
                one = (one + 1) % BLOCK_PAGES;
        for (unsigned i = 0; i < BLOCK_PAGES; i++)
                switch (choice) {
                case WHOLE:
                        page_set_add(set, i);
                        break;
                case ONE_EACH:
                        page_set_add(set, one);
                        return;
                case RUNS: /* with gaps that are bridged, and gaps that are not */
                        for (unsigned run = (unsigned)rand_r(seed) % 12; run > 0 && i < BLOCK_PAGES; run--)
                                page_set_add(set, i++);
                        i += (unsigned)rand_r(seed) % 40;
                        break;
                default:
                        if (rand_r(seed) % 3 == 0)
                                page_set_add(set, i);
                }
}

static ScanBatch *new_batch(Round *round, Victim *victim) {
        ScanBatch *batch;

        CHECK(GROW(round->batches, round->n, round->allocated) == 0);
        batch = &round->batches[round->n++];
        batch->target = victim->target;
        batch->vmas = &victim->vmas;
        batch->n = 0;
        return batch;
}

/* Blocks in turn from all victims, so that those who share a frame come up side by side; a victim's blocks share a
 * batch as long as they fit. */
static void deal(Round *round, Choice choice, unsigned *seed) {
        size_t open[VICTIMS];

        round->n = 0;
        for (unsigned v = 0; v < VICTIMS; v++) {
                new_batch(round, &victims[v]);
                open[v] = round->n - 1;
        }
        for (unsigned b = 0; b < LONE_BLOCKS; b++)
                for (unsigned v = 0; v < VICTIMS; v++) {
                        Block *block = b < victims[v].n_blocks ? find_block(&victims[v], b) : NULL;
                        ScanBatch *batch = &round->batches[open[v]];
                        uint64_t *asked;

                        if (!block)
                                continue;
                        asked = victims[v].asked[b];
                        choose(asked, &victims[v].expected[b * BLOCK_PAGES], choice, seed);
                        if (batch->n + page_set_count(asked) > SCAN_BATCH_PAGES) {
                                batch = new_batch(round, &victims[v]);
                                open[v] = round->n - 1;
                        }
                        for (unsigned i = 0; i < BLOCK_PAGES; i++)
                                if (page_set_has(asked, i)) {
                                        /* Whatever the last user left in it must not matter. */
                                        memset(&batch->pages[batch->n], 0xa5, sizeof batch->pages[0]);
                                        batch->pages[batch->n].block = block;
                                        batch->pages[batch->n++].page = (uint16_t)i;
                                }
                }
}

static void work(void *userdata, unsigned thread, size_t item) {
        Round *round = userdata;

        CHECK(scan_batch(round->scanner, thread, &round->batches[item]) == 0);
}

static bool is_leader(const ScanPage *p) { return p->kind == SCAN_HASHED && !p->writable_alone; }

/* Which of a frame's mappers is called SCAN_SHARED depends on the order. */
static ScanKind plain_kind(const ScanPage *p) { return p->kind == SCAN_SHARED ? SCAN_HASHED : (ScanKind)p->kind; }

static const ScanPage *expected_page(const ScanPage *p) {
        const Victim *victim = NULL;

        for (unsigned v = 0; v < VICTIMS; v++)
                if (p->block->space == &victims[v].space)
                        victim = &victims[v];
        CHECK(victim);
        return &victim->expected[(p->block->addr - victim->start) / PAGE_BYTES + p->page];
}

static void check_block(const Victim *victim, unsigned b) {
        const Block *block = find_block(victim, b);
        const ScanPage *expected = &victim->expected[b * BLOCK_PAGES];

        if (!block)
                return;
        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                bool asked = page_set_has(victim->asked[b], i);
                const ScanPage *e = &expected[i];

                CHECK(page_set_has(block->hashed, i) == (asked && e->key_known));
                CHECK(page_set_has(block->zero, i) == (asked && e->kind == SCAN_ZERO));
                CHECK(page_set_has(block->merged, i) == (asked && e->kind == SCAN_KSM));
                CHECK(page_set_has(block->zeropage, i) == (asked && e->kind == SCAN_ZEROPAGE));
                CHECK(page_set_has(block->forked, i) ==
                      (asked && e->key_known && !e->writable_alone && e->kind != SCAN_KSM));
                CHECK(block->check[i] == (asked && e->key_known ? (uint8_t)e->key : 0));
        }
}

/* Returns how many frames were read more than once. */
static unsigned check_round(const Round *round, bool first) {
        _cleanup_(frame_map_done) FrameMap frames = {};
        unsigned again = 0;
        Frame *frame;

        for (size_t k = 0; k < round->n; k++)
                for (unsigned i = 0; i < round->batches[k].n; i++) {
                        const ScanPage *p = &round->batches[k].pages[i], *e = expected_page(p);

                        CHECK(plain_kind(p) == plain_kind(e), "page %u: %d, not %d", p->page, p->kind, e->kind);
                        CHECK(p->key_known == e->key_known && p->key == e->key && p->pfn == e->pfn &&
                              p->writable_alone == e->writable_alone);
                        CHECK(p->first == (first && p->key_known) && !p->changed);
                        if (is_leader(p)) {
                                CHECK(frame_map_add(&frames, p->pfn, &frame) == 0);
                                again += frame->value++ > 0;
                        }
                }
        for (size_t k = 0; k < round->n; k++)
                for (unsigned i = 0; i < round->batches[k].n; i++) {
                        const ScanPage *p = &round->batches[k].pages[i];

                        CHECK(p->kind != SCAN_SHARED || frame_map_find(&frames, p->pfn), "nobody read this frame");
                }
        for (unsigned v = 0; v < VICTIMS; v++)
                for (unsigned b = 0; b < victims[v].n_blocks; b++)
                        check_block(&victims[v], b);
        return again;
}

static void open_spaces(void) {
        for (unsigned v = 0; v < VICTIMS; v++) {
                victims[v].table = (BlockTable) {};
                victims[v].space = (Space) { .target = victims[v].target, .table = &victims[v].table };
                CHECK(space_refresh(&victims[v].space, &victims[v].vmas) == 0);
                memset(victims[v].asked, 0, victims[v].n_blocks * sizeof *victims[v].asked);
        }
}

static void close_spaces(void) {
        for (unsigned v = 0; v < VICTIMS; v++) {
                space_done(&victims[v].space);
                block_table_done(&victims[v].table);
        }
}

static void run(Choice choice, unsigned threads) {
        _cleanup_(scanner_freep) Scanner *scanner = NULL;
        _cleanup_(crew_freep) Crew *crew = NULL;
        Round round = {};
        unsigned seed = choice + 1;
        ScanStats stats;
        uint64_t present = 0;

        CHECK(scanner_new(secret, threads, &scanner) == 0 && crew_new(threads, &crew) == 0);
        round.scanner = scanner;
        open_spaces();
        deal(&round, choice, &seed);
        for (uint32_t pass = 1; pass <= 2; pass++) {
                scanner_begin_pass(scanner, pass);
                crew_run(crew, round.n, work, &round);
                if (!NAIVE) {
                        unsigned again = check_round(&round, pass == 1);

                        CHECK(threads > 1 || again == 0, "%u frames were read twice", again);
                        printf("%s, %u threads: %zu batches, %u frames read twice\n", choice_names[choice], threads,
                               round.n, again);
                }
                for (size_t k = 0; k < round.n; k++)
                        for (unsigned i = 0; i < round.batches[k].n; i++)
                                present += round.batches[k].pages[i].kind != SCAN_NOTHING;
        }
        scanner_stats(scanner, &stats);
        CHECK(stats.pages_scanned == present && stats.pages_skipped == 0 && stats.read_failures == 0);
        close_spaces();
        free(round.batches);
}

/* Block by block, by one thread. */
static void learn(void) {
        _cleanup_(scanner_freep) Scanner *scanner = NULL;
        static ScanBatch batch;

        CHECK(scanner_new(secret, 1, &scanner) == 0);
        scanner_begin_pass(scanner, 1);
        open_spaces();
        for (unsigned v = 0; v < VICTIMS; v++)
                for (unsigned b = 0; b < victims[v].n_blocks; b++) {
                        Block *block = find_block(&victims[v], b);

                        if (!block)
                                continue;
                        batch.target = victims[v].target;
                        batch.vmas = &victims[v].vmas;
                        scan_batch_whole(&batch, block);
                        CHECK(scan_batch(scanner, 0, &batch) == 0);
                        memcpy(&victims[v].expected[b * BLOCK_PAGES], batch.pages, sizeof batch.pages);
                }
        close_spaces();
}

static void check_lone(void) {
        for (size_t i = 0; i < LONE_BLOCKS * BLOCK_PAGES; i++) {
                const ScanPage *p = &victims[LONE].expected[i];
                uint64_t words[PAGE_BYTES / 8];

                CHECK(p->kind == lone_kind(i), "page %zu: %d, not %d", i, p->kind, lone_kind(i));
                lone_content(i, words);
                CHECK(!p->key_known || p->key == hash_page(secret, words), "page %zu has another page's key", i);
        }
}

/* Where each page lies, asked one by one; and what is said once the process is no more. */
static void check_frames(void) {
        const Block *block = NULL;
        uint64_t pfn;

        open_spaces();
        for (unsigned v = 0; v < VICTIMS; v++)
                for (unsigned b = 0; b < victims[v].n_blocks; b++) {
                        if (!find_block(&victims[v], b))
                                continue;
                        block = find_block(&victims[v], b);
                        for (unsigned i = 0; i < BLOCK_PAGES; i++) {
                                CHECK(scan_page_frame(block, i, &pfn) == 0);
                                CHECK(pfn == victims[v].expected[b * BLOCK_PAGES + i].pfn);
                        }
                }
        CHECK(block && block->space == &victims[LONE].space);
        CHECK(kill(lone, SIGKILL) == 0 && waitpid(lone, NULL, 0) == lone);
        lone = 0;
        CHECK(scan_page_frame(block, 0, &pfn) == TARGET_E_GONE);
        close_spaces();
}

int main(void) {
        unsigned of_fork, of_ksm;

        setvbuf(stdout, NULL, _IOLBF, 0);
        ksm = pairs_ksm("scan-batches");
        zero_page = test_has_zero_page();
        CHECK(hash_secret_new(&secret) == 0);
        test_at_end(clean_up);
        pairs_start(ksm, &forked, &merged);
        start_lone();
        open_victims();
        pair_remember(forked);
        pair_remember(merged);
        learn();
        if (!NAIVE)
                check_lone();
        for (Choice choice = WHOLE; choice < CHOICES; choice++)
                for (unsigned threads = 1; threads <= THREADS_MAX; threads *= 2)
                        run(choice, threads);
        if (!NAIVE)
                check_frames();
        of_fork = pair_count_moved(forked);
        of_ksm = pair_count_moved(merged);
        printf("frames changed: %u forked, %u merged\n", of_fork, of_ksm);
        if (NAIVE)
                CHECK(of_fork > 0 && of_ksm > 0, "a pinning reader un-shared nothing");
        else
                CHECK(of_fork == 0 && of_ksm == 0);
        close_victims();
        hash_secret_free(secret);
        return 0;
}
