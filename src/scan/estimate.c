/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The counts of an estimate.
 *
 * Reading leaves one 64-bit key for each non-zero frame, in the order of processes and addresses; a frame that may be
 * mapped elsewhere too is counted with the first process that maps it. At the end the keys are dealt into buckets of
 * a size that stays in the cache, and each bucket is matched in a small table: some 20 ns a page, against 500 for
 * reading it. Equal keys count as equal contents; two different contents meet in one key with a probability of
 * pages² / 2^65: one estimate in a million over a host with 24 GiB in use.
 */
#include "scan/estimate.h"

#include <string.h>

#include "scan/frames.h"

#define BUCKET_RECORDS 1024U
#define KSM_ITEM_BYTES 64U /* struct ksm_rmap_item, struct ksm_stable_node (mm/ksm.c, 64-bit) */

typedef struct Process {
        EstimateCounts counts;
        size_t first, end;      /* its keys */
        uint64_t nodes;         /* contents with twins whose first frame is here */
        unsigned group;
        bool dropped;           /* could not be read to its end: counts nowhere */
} Process;

typedef struct Group {
        EstimateCounts counts;
        uint64_t nodes;
} Group;

struct Estimate {
        HashSecret *secret;
        Scanner *scanner;
        FrameMap counted;       /* value: the process that counts the frame, plus one */
        uint64_t *keys;
        size_t n, allocated;
        uint32_t *breaks;       /* the keys whose page does not directly follow that of the key before */
        size_t n_breaks, breaks_allocated;
        uint64_t next_addr;     /* of a page that directly follows that of the last key */
        Process *processes;
        size_t n_processes, processes_allocated;
        Group *groups, total;
        size_t n_groups;
        uint64_t *twins;        /* a bit for each key: another frame holds the same content */
};

/* A key on its way through matching. */
typedef struct Record {
        uint64_t key;
        uint32_t index, process;
} Record;

typedef struct Content {
        uint64_t key;
        uint32_t first;         /* of its records, plus one; 0: a free slot */
        uint32_t last_process;  /* where it was last met */
} Content;

int estimate_new(Estimate **ret) {
        _cleanup_(estimate_freep) Estimate *estimate = calloc(1, sizeof *estimate);
        int r;

        if (!estimate)
                return -ENOMEM;
        r = hash_secret_new(&estimate->secret);
        if (r < 0)
                return r;
        r = scanner_new(estimate->secret, 1, &estimate->scanner);
        if (r < 0)
                return r;
        scanner_begin_pass(estimate->scanner, 1);
        *ret = TAKE_PTR(estimate);
        return 0;
}

Estimate *estimate_free(Estimate *estimate) {
        if (!estimate)
                return NULL;
        scanner_free(estimate->scanner);
        hash_secret_free(estimate->secret);
        frame_map_done(&estimate->counted);
        free(estimate->keys);
        free(estimate->breaks);
        free(estimate->processes);
        free(estimate->groups);
        free(estimate->twins);
        free(estimate);
        return NULL;
}

static int add_key(Estimate *estimate, uint64_t key, uint64_t addr) {
        if (estimate->n == UINT32_MAX)
                return -EOVERFLOW; /* 16 TiB of distinct frames */
        if (GROW(estimate->keys, estimate->n, estimate->allocated) < 0)
                return -ENOMEM;
        if (addr != estimate->next_addr) {
                if (GROW(estimate->breaks, estimate->n_breaks, estimate->breaks_allocated) < 0)
                        return -ENOMEM;
                estimate->breaks[estimate->n_breaks++] = (uint32_t)estimate->n;
        }
        estimate->next_addr = addr + PAGE_BYTES;
        estimate->keys[estimate->n++] = key;
        return 0;
}

static int add_page(Estimate *estimate, uint32_t process, const ScanPage *page, uint64_t addr) {
        EstimateCounts *counts = &estimate->processes[process].counts;

        if (page->kind == SCAN_NOTHING || page->kind == SCAN_ZEROPAGE)
                return 0;
        if (!page->key_known) {
                counts->unread++;
                return 0;
        }
        if (!page->writable_alone) {
                Frame *frame;
                int r = frame_map_add(&estimate->counted, page->pfn, &frame);

                if (r < 0)
                        return r;
                if (frame->value && !estimate->processes[frame->value - 1].dropped) {
                        counts->already_shared++;
                        return 0;
                }
                frame->value = (uint64_t)process + 1;
        }
        counts->pages++;
        if (page->key == scanner_zero_key(estimate->scanner)) {
                counts->zero++;
                return 0;
        }
        return add_key(estimate, page->key, addr);
}

/* What a running daemon tracks counts as it would without. Who has no userfaultfd of his own is taken to be tracked by
 * one: here pages are only read. */
static void claim_tracked(const Target *target, VmaList *vmas) {
        bool asked = false;

        for (size_t i = 0; i < vmas->n; i++) {
                if (!vmas->vmas[i].tracked)
                        continue;
                if (!asked && target_has_userfaultfd(target))
                        return;
                asked = true;
                vma_claim(&vmas->vmas[i]);
        }
}

static int add_memory(Estimate *estimate, Target *target, bool include_dontdump, uint32_t process) {
        EstimateCounts *counts = &estimate->processes[process].counts;
        _cleanup_(block_table_done) BlockTable table = {};
        _cleanup_(space_done) Space space = { .target = target, .table = &table };
        _cleanup_(vma_list_done) VmaList vmas = {};
        ScanBatch batch = { .target = target, .vmas = &vmas };
        int r;

        r = target_read_vmas(target, include_dontdump, &vmas);
        if (r != 0)
                return r;
        claim_tracked(target, &vmas);
        for (size_t i = 0; i < vmas.n; i++) {
                if (vmas.vmas[i].skip != VMA_OK)
                        counts->unread += vmas.vmas[i].anonymous_bytes / PAGE_BYTES;
                if (vmas.vmas[i].skip == VMA_SKIP_DONTDUMP)
                        counts->dontdump += vmas.vmas[i].anonymous_bytes / PAGE_BYTES;
        }
        r = space_refresh(&space, &vmas);
        if (r != 0)
                return r;
        for (size_t b = 0; b < space.n; b++) {
                counts->huge_pages += space.blocks[b]->huge;
                scan_batch_whole(&batch, space.blocks[b]);
                r = scan_batch(estimate->scanner, 0, &batch);
                if (r != 0)
                        return r;
                for (unsigned i = 0; i < batch.n; i++) {
                        r = add_page(estimate, process, &batch.pages[i], space.blocks[b]->addr + i * PAGE_BYTES);
                        if (r < 0)
                                return r;
                }
        }
        return 0;
}

int estimate_add(Estimate *estimate, Target *target, bool include_dontdump, unsigned group, unsigned *ret_process) {
        size_t n_breaks = estimate->n_breaks;
        Process *process;
        int r;

        if (GROW(estimate->processes, estimate->n_processes, estimate->processes_allocated) < 0)
                return -ENOMEM;
        process = &estimate->processes[estimate->n_processes];
        *process = (Process) { .first = estimate->n, .group = group };
        estimate->next_addr = UINT64_MAX;
        r = target_open_memory(target);
        if (r == 0)
                r = add_memory(estimate, target, include_dontdump, (uint32_t)estimate->n_processes);
        target_close_memory(target);
        /* Kept on failure too: frames it counted first carry its number. */
        estimate->n_processes++;
        if (r != 0) {
                process->dropped = true;
                process->counts = (EstimateCounts) {};
                estimate->n = process->first;
                estimate->n_breaks = n_breaks;
        }
        process->end = estimate->n;
        if (r == 0)
                *ret_process = (unsigned)(estimate->n_processes - 1);
        return r;
}

static int compare_groups(const void *a, const void *b, void *processes) {
        uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
        unsigned gx = ((const Process *)processes)[x].group, gy = ((const Process *)processes)[y].group;

        return gx != gy ? (gx < gy ? -1 : 1) : x < y ? -1 : x > y;
}

static size_t bucket_of(uint64_t key, unsigned bits) { return bits ? (size_t)(key >> (64 - bits)) : 0; }

/* Deals the keys into 2^bits buckets, each in the order of groups, then processes. ends[i]: where bucket i ends. */
static int deal(const Estimate *estimate, unsigned bits, Record *records, size_t *ends) {
        size_t n_buckets = (size_t)1 << bits, start = 0;
        _cleanup_free_ uint32_t *order = malloc((estimate->n_processes + 1) * sizeof *order);

        if (!order)
                return -ENOMEM;
        for (size_t i = 0; i < estimate->n_processes; i++)
                order[i] = (uint32_t)i;
        qsort_r(order, estimate->n_processes, sizeof *order, compare_groups, estimate->processes);
        memset(ends, 0, n_buckets * sizeof *ends);
        for (size_t i = 0; i < estimate->n; i++)
                ends[bucket_of(estimate->keys[i], bits)]++;
        for (size_t b = 0; b < n_buckets; b++) {
                size_t size = ends[b];
                ends[b] = start;
                start += size;
        }
        for (size_t k = 0; k < estimate->n_processes; k++) {
                const Process *process = &estimate->processes[order[k]];

                for (size_t i = process->first; i < process->end; i++)
                        records[ends[bucket_of(estimate->keys[i], bits)]++] =
                                (Record) { estimate->keys[i], (uint32_t)i, order[k] };
        }
        return 0;
}

static void match(Estimate *estimate, const Record *records, size_t n, Content *table, size_t slots) {
        memset(table, 0, slots * sizeof *table);
        for (size_t i = 0; i < n; i++) {
                const Record *record = &records[i];
                Process *process = &estimate->processes[record->process];
                size_t s = record->key & (slots - 1);
                const Record *first;
                Content *content;

                while (table[s].first && table[s].key != record->key)
                        s = (s + 1) & (slots - 1);
                content = &table[s];
                if (!content->first) {
                        *content = (Content) { record->key, (uint32_t)i + 1, record->process };
                        process->counts.distinct++;
                        continue;
                }
                first = &records[content->first - 1];
                if (!(estimate->twins[first->index / 64] >> (first->index % 64) & 1)) {
                        estimate->twins[first->index / 64] |= (uint64_t)1 << (first->index % 64);
                        estimate->processes[first->process].nodes++;
                }
                estimate->twins[record->index / 64] |= (uint64_t)1 << (record->index % 64);
                process->counts.duplicate++;
                process->counts.duplicate_within += content->last_process == record->process;
                /* The group's members come one after the other: met in it before, if the last one was of it. */
                estimate->groups[process->group].counts.duplicate_within +=
                        estimate->processes[content->last_process].group == process->group;
                content->last_process = record->process;
        }
}

static int match_all(Estimate *estimate) {
        unsigned bits = 0;
        size_t largest = 0, start = 0, slots = 16;
        _cleanup_free_ Record *records = NULL;
        _cleanup_free_ size_t *ends = NULL;
        _cleanup_free_ Content *table = NULL;
        int r;

        while (estimate->n >> bits > BUCKET_RECORDS)
                bits++;
        records = malloc((estimate->n + 1) * sizeof *records);
        ends = malloc(sizeof *ends << bits);
        if (!records || !ends)
                return -ENOMEM;
        r = deal(estimate, bits, records, ends);
        if (r < 0)
                return r;
        for (size_t b = 0; b < (size_t)1 << bits; b++)
                largest = MAX_OF(largest, ends[b] - (b ? ends[b - 1] : 0));
        while (slots < largest * 2)
                slots *= 2;
        table = malloc(slots * sizeof *table);
        if (!table)
                return -ENOMEM;
        for (size_t b = 0; b < (size_t)1 << bits; start = ends[b++]) {
                size_t small = 16;
                while (small < (ends[b] - start) * 2)
                        small *= 2;
                match(estimate, records + start, ends[b] - start, table, small);
        }
        return 0;
}

static unsigned run_class(size_t pages) {
        static const size_t least[] = { 1, 2, 4, 8, 16, 64, 512 };
        unsigned class = ELEMENTSOF(least) - 1;

        while (pages < least[class])
                class--;
        return class;
}

static void count_runs(Estimate *estimate) {
        size_t next_break = 0, run = 0;

        for (size_t p = 0; p < estimate->n_processes; p++) {
                Process *process = &estimate->processes[p];

                for (size_t i = process->first; i < process->end; i++) {
                        bool twin = estimate->twins[i / 64] >> (i % 64) & 1;
                        bool breaks = next_break < estimate->n_breaks && estimate->breaks[next_break] == i;

                        next_break += breaks;
                        if (run && (breaks || !twin)) {
                                process->counts.runs[run_class(run)] += run;
                                run = 0;
                        }
                        run += twin;
                }
                if (run)
                        process->counts.runs[run_class(run)] += run;
                run = 0;
        }
}

/* A mark that saves less than it costs is not made: never below 0. */
static void count_bytes(EstimateCounts *counts, uint64_t nodes) {
        uint64_t saved = (counts->duplicate + counts->zero) * PAGE_BYTES, cost = counts->zero + nodes;

        for (size_t i = 0; i < ELEMENTSOF(counts->runs); i++)
                cost += counts->runs[i];
        cost *= KSM_ITEM_BYTES;
        counts->bytes_saveable_advise = saved > cost ? saved - cost : 0;
        counts->bytes_saveable_zero = counts->zero * PAGE_BYTES;
}

static void add_counts(EstimateCounts *to, const EstimateCounts *from) {
        to->pages += from->pages;
        to->zero += from->zero;
        to->distinct += from->distinct;
        to->duplicate += from->duplicate;
        to->already_shared += from->already_shared;
        to->huge_pages += from->huge_pages;
        to->unread += from->unread;
        to->dontdump += from->dontdump;
        for (size_t i = 0; i < ELEMENTSOF(to->runs); i++)
                to->runs[i] += from->runs[i];
}

int estimate_finish(Estimate *estimate) {
        int r;

        for (size_t i = 0; i < estimate->n_processes; i++)
                estimate->n_groups = MAX_OF(estimate->n_groups, (size_t)estimate->processes[i].group + 1);
        estimate->groups = calloc(estimate->n_groups + 1, sizeof *estimate->groups);
        estimate->twins = calloc(estimate->n / 64 + 1, sizeof *estimate->twins);
        if (!estimate->groups || !estimate->twins)
                return -ENOMEM;
        r = match_all(estimate);
        if (r < 0)
                return r;
        count_runs(estimate);
        for (size_t i = 0; i < estimate->n_processes; i++) {
                Process *process = &estimate->processes[i];
                Group *group = &estimate->groups[process->group];

                count_bytes(&process->counts, process->nodes);
                add_counts(&group->counts, &process->counts);
                add_counts(&estimate->total.counts, &process->counts);
                group->nodes += process->nodes;
                estimate->total.nodes += process->nodes;
                estimate->total.counts.duplicate_within += process->counts.duplicate_within;
        }
        for (size_t i = 0; i < estimate->n_groups; i++)
                count_bytes(&estimate->groups[i].counts, estimate->groups[i].nodes);
        count_bytes(&estimate->total.counts, estimate->total.nodes);
        return 0;
}

void estimate_process(const Estimate *estimate, unsigned process, EstimateCounts *ret) {
        *ret = estimate->processes[process].counts;
}

void estimate_group(const Estimate *estimate, unsigned group, EstimateCounts *ret) {
        *ret = group < estimate->n_groups ? estimate->groups[group].counts : (EstimateCounts) {};
}

void estimate_total(const Estimate *estimate, EstimateCounts *ret) { *ret = estimate->total.counts; }
