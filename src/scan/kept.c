/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The file is a sequence of 64-bit words, as this machine has them: a header (what it is, how many words follow, their
 * checksum), then records. Each begins with its kind and its length in words, these two included.
 *
 *      NOTES   the domain's name (hashed), frames that relatives shared and a page was noted for
 *      SPACE   pid, start time, kin; then of each block with anything to tell its address, which sets follow, and those
 *
 * Of a block three sets are told: own; given, to which those belong that are all zero now (the next burst gives them
 * back); and hole. All three are believed of a page only while its page table entry agrees (census.c, merge/zero), so
 * what the process did while no daemon ran is counted as if one had. It costs up to 200 bytes for each 2 MiB that has
 * anything to tell, and 8 for each frame.
 *
 * It is written before each burst, so that a daemon killed at any time leaves it right: what was noted for pages that
 * were not merged in the end is noted anew before they are.
 */
#include "scan/kept.h"

#include "base/io.h"
#include "target/origin.h"

#include <string.h>
#include <xxhash.h>

#define KEPT_MAGIC UINT64_C(0x316b2d646d736b75) /* "uksmd-k1" */
#define HEADER_WORDS 3U
#define SET_WORDS (BLOCK_PAGES / 64)

enum {
        KEPT_TAKEN,
        KEPT_NOTES,
        KEPT_SPACE,
};

enum { /* words of a record */
        AT_KIND,
        AT_LENGTH,
        AT_DOMAIN,
        NOTES_FRAMES,
        AT_PID = AT_DOMAIN,
        AT_START_TICKS,
        AT_KIN,
        SPACE_BLOCKS,
};

enum { /* bits of a block's address that say which sets follow, in this order */
        SET_OWN = 1,
        SET_GIVEN = 2,
        SET_HOLE = 4,
        SET_ALL = 7,
};

void kept_writer_done(KeptWriter *writer) {
        free(writer->words);
        *writer = (KeptWriter){};
}

static void put(KeptWriter *writer, uint64_t word) {
        if (writer->n == 0 && GROW(writer->words, writer->n, writer->allocated) == 0)
                writer->n = HEADER_WORDS; /* filled in at the end; the first array has room for more */
        if (GROW(writer->words, writer->n, writer->allocated) < 0)
                writer->failed = true;
        else
                writer->words[writer->n++] = word;
}

static size_t begin_record(KeptWriter *writer, uint64_t kind) {
        size_t record = MAX_OF(writer->n, (size_t)HEADER_WORDS);

        put(writer, kind);
        put(writer, 0);
        return record;
}

/* A record that is no longer than empty is taken back. */
static void end_record(KeptWriter *writer, size_t record, size_t empty) {
        if (writer->failed)
                return;
        writer->words[record + AT_LENGTH] = writer->n - record;
        if (writer->n - record == empty)
                writer->n = record;
}

static uint64_t domain_name(const char *domain) { return XXH3_64bits(domain, strlen(domain)); }

static void put_frames(KeptWriter *writer, const Frame *slots, size_t n) {
        for (size_t i = 0; slots && i < n; i++)
                if (slots[i].pfn != 0)
                        put(writer, slots[i].pfn);
}

void kept_add_notes(KeptWriter *writer, const char *domain, const CensusNotes *notes) {
        size_t record = begin_record(writer, KEPT_NOTES);

        put(writer, domain_name(domain));
        put_frames(writer, notes->frames.slots, notes->frames.allocated);
        put_frames(writer, notes->frames.old, notes->frames.allocated / 2); /* some are in both, which does no harm */
        end_record(writer, record, NOTES_FRAMES);
}

static void put_set(KeptWriter *writer, const PageSet set) {
        for (unsigned i = 0; i < SET_WORDS; i++)
                put(writer, set[i]);
}

static void add_block(KeptWriter *writer, const Block *block) {
        PageSet given;
        uint64_t sets;

        for (unsigned i = 0; i < SET_WORDS; i++)
                given[i] = (block->given[i] | block->zero[i]) & ~block->hole[i];
        sets = (page_set_any(block->own) ? SET_OWN : 0) | (page_set_any(given) ? SET_GIVEN : 0) |
               (page_set_any(block->hole) ? SET_HOLE : 0);
        if (sets == 0)
                return;
        put(writer, block->addr | sets);
        if (sets & SET_OWN)
                put_set(writer, block->own);
        if (sets & SET_GIVEN)
                put_set(writer, given);
        if (sets & SET_HOLE)
                put_set(writer, block->hole);
}

void kept_add_space(KeptWriter *writer, const KeptId *id, const Space *space) {
        size_t record = begin_record(writer, KEPT_SPACE);

        put(writer, id->pid);
        put(writer, id->start_ticks);
        put(writer, id->kin);
        for (size_t b = 0; b < space->n; b++)
                add_block(writer, space->blocks[b]);
        end_record(writer, record, SPACE_BLOCKS);
}

int kept_write(KeptWriter *writer, int at, const char *path) {
        size_t bytes;

        if (writer->failed)
                return -ENOMEM;
        if (writer->n <= HEADER_WORDS)
                return unlinkat(at, path, 0) < 0 && errno != ENOENT ? -errno : 0;
        bytes = (writer->n - HEADER_WORDS) * sizeof *writer->words;
        writer->words[0] = KEPT_MAGIC;
        writer->words[1] = writer->n - HEADER_WORDS;
        writer->words[2] = XXH3_64bits(writer->words + HEADER_WORDS, bytes);
        return write_bytes_atomic(at, path, writer->words, writer->n * sizeof *writer->words);
}

void kept_done(Kept *kept) {
        free(kept->words);
        *kept = (Kept){};
}

static size_t count_sets(uint64_t sets) { return (size_t)__builtin_popcountll(sets & SET_ALL); }

static uint64_t block_addr(uint64_t word) { return word & ~(BLOCK_BYTES - 1); }
static size_t block_words(uint64_t word) { return 1 + count_sets(word) * SET_WORDS; }

static bool space_is_sound(const uint64_t *record) {
        size_t i = SPACE_BLOCKS, before = 0;

        if (record[AT_LENGTH] < SPACE_BLOCKS)
                return false;
        while (i < record[AT_LENGTH]) {
                if ((record[i] & (BLOCK_BYTES - 1)) > SET_ALL || (before && block_addr(record[i]) <= block_addr(record[before])))
                        return false;
                before = i;
                i += block_words(record[i]);
        }
        return i == record[AT_LENGTH];
}

static bool is_sound(const Kept *kept) {
        for (size_t i = 0; i < kept->n;) {
                const uint64_t *record = kept->words + i;

                if (kept->n - i < NOTES_FRAMES || record[AT_LENGTH] < NOTES_FRAMES || record[AT_LENGTH] > kept->n - i)
                        return false;
                if (record[AT_KIND] != KEPT_NOTES && (record[AT_KIND] != KEPT_SPACE || !space_is_sound(record)))
                        return false;
                i += record[AT_LENGTH];
        }
        return true;
}

int kept_read(int at, const char *path, Kept *ret) {
        _cleanup_free_ char *bytes = NULL;
        uint64_t *words;
        size_t size;
        Kept kept;
        int r;

        r = read_file(at, path, &bytes, &size);
        if (r < 0)
                return r;
        words = (uint64_t *)(void *)bytes; /* of malloc(3) */
        if (size % sizeof *words != 0 || size < HEADER_WORDS * sizeof *words || words[0] != KEPT_MAGIC ||
            words[1] != size / sizeof *words - HEADER_WORDS ||
            words[2] != XXH3_64bits(words + HEADER_WORDS, size - HEADER_WORDS * sizeof *words))
                return -EBADMSG;
        kept = (Kept){ words, words[1] };
        memmove(words, words + HEADER_WORDS, kept.n * sizeof *words);
        if (!is_sound(&kept))
                return -EBADMSG;
        TAKE_PTR(bytes);
        *ret = kept;
        return 0;
}

bool kept_take_notes(Kept *kept, const char *domain, CensusNotes *notes) {
        for (size_t i = 0; i < kept->n; i += kept->words[i + AT_LENGTH]) {
                uint64_t *record = kept->words + i;

                if (record[AT_KIND] != KEPT_NOTES || record[AT_DOMAIN] != domain_name(domain))
                        continue;
                for (size_t k = NOTES_FRAMES; k < record[AT_LENGTH]; k++) {
                        Frame *frame;

                        if (frame_map_add(&notes->frames, record[k], &frame) == 0)
                                frame->value = notes->round;
                }
                record[AT_KIND] = KEPT_TAKEN;
                return true;
        }
        return false;
}

static void add_set(PageSet set, const uint64_t **words, bool told) {
        for (unsigned i = 0; told && i < SET_WORDS; i++)
                set[i] |= *(*words)++;
}

/* What was given back whole has a block of its own. All in one go: each time the list of all blocks is made anew. */
static int add_holes(const uint64_t *record, Space *space) {
        _cleanup_free_ uint64_t *addrs = NULL;
        size_t n = 0, allocated = 0;

        for (size_t k = SPACE_BLOCKS; k < record[AT_LENGTH]; k += block_words(record[k])) {
                if (!(record[k] & SET_HOLE) || space_find(space, block_addr(record[k])))
                        continue;
                if (GROW(addrs, n, allocated) < 0)
                        return -ENOMEM;
                addrs[n++] = block_addr(record[k]);
        }
        return space_add(space, addrs, n);
}

static void take_block(const uint64_t *words, Space *space) {
        uint64_t sets = *words & SET_ALL;
        Block *block = space_find(space, block_addr(*words));

        if (!block)
                return;
        words++;
        add_set(block->own, &words, sets & SET_OWN);
        add_set(block->given, &words, sets & SET_GIVEN);
        add_set(block->hole, &words, sets & SET_HOLE);
}

bool kept_take_space(Kept *kept, const KeptId *id, Space *space) {
        for (size_t i = 0; i < kept->n; i += kept->words[i + AT_LENGTH]) {
                uint64_t *record = kept->words + i;

                if (record[AT_KIND] != KEPT_SPACE || record[AT_PID] != id->pid ||
                    record[AT_START_TICKS] != id->start_ticks)
                        continue;
                record[AT_KIND] = KEPT_TAKEN;
                if (record[AT_KIN] != id->kin) /* one that began another program since is not who it was */
                        return false;
                (void)add_holes(record, space); /* out of memory, what they save is not counted */
                for (size_t k = SPACE_BLOCKS; k < record[AT_LENGTH]; k += block_words(record[k]))
                        take_block(record + k, space);
                return true;
        }
        return false;
}

static bool runs_still(const uint64_t *record) {
        TargetOrigin origin;

        return target_origin_of((pid_t)record[AT_PID], &origin) == 0 && origin.start_ticks == record[AT_START_TICKS];
}

void kept_pass_on(Kept *kept, KeptWriter *writer) {
        bool any = false;

        for (size_t i = 0; i < kept->n; i += kept->words[i + AT_LENGTH]) {
                uint64_t *record = kept->words + i;

                if (record[AT_KIND] == KEPT_SPACE && !runs_still(record))
                        record[AT_KIND] = KEPT_TAKEN;
                any |= record[AT_KIND] == KEPT_SPACE;
        }
        for (size_t i = 0; any && i < kept->n; i += kept->words[i + AT_LENGTH])
                for (size_t k = 0; kept->words[i + AT_KIND] != KEPT_TAKEN && k < kept->words[i + AT_LENGTH]; k++)
                        put(writer, kept->words[i + k]);
        if (!any)
                kept_done(kept);
}
