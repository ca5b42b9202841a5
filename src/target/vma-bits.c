/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A bit and two letters mean the same if no sample has one without the other. The kernel writes at most one pair of
 * letters for each bit (show_smap_vma_flags(), fs/proc/task_mmu.c), some bits have none. So where as many pairs of
 * letters as bits are in exactly the same samples, the bits are theirs; which is whose does not matter if the letters
 * all mean the same to us. In every other case nothing is learnt: a bit that looks like two others, one that has no
 * letters, letters nobody knows.
 *
 * More samples can only tell apart what was alike before: what was learnt from few that differ in one thing each is not
 * luck. And a bit that never was in a sample is not known, however harmless.
 */
#include "target/vma-bits.h"

#define BITS 64U

static bool has_letters(const VmaSample *sample, uint16_t letters) {
        for (unsigned i = 0; i < sample->letters->n; i++)
                if (sample->letters->letters[i] == letters)
                        return true;
        return false;
}

static bool has_bit(const VmaSample *sample, unsigned bit) { return sample->bits >> bit & 1; }

static bool letters_match(const VmaSample *samples, size_t n, unsigned bit, uint16_t letters) {
        for (size_t i = 0; i < n; i++)
                if (has_bit(&samples[i], bit) != has_letters(&samples[i], letters))
                        return false;
        return true;
}

static unsigned count_alike(const VmaSample *samples, size_t n, unsigned bit) {
        uint64_t alike = UINT64_MAX;
        unsigned count = 0;

        for (size_t i = 0; i < n; i++)
                alike &= has_bit(&samples[i], bit) ? samples[i].bits : ~samples[i].bits;
        for (; alike; alike &= alike - 1)
                count++;
        return count;
}

/* false: nothing is learnt of it. */
static bool learn_bit(const VmaSample *samples, size_t n, unsigned bit, uint32_t *ret_trait) {
        const VmaSample *first = samples;
        unsigned n_letters = 0;
        uint32_t trait = 0;

        while (first < samples + n && !has_bit(first, bit))
                first++;
        if (first == samples + n)
                return false;
        for (unsigned i = 0; i < first->letters->n; i++) {
                uint16_t letters = first->letters->letters[i];

                if (!letters_match(samples, n, bit, letters))
                        continue;
                if (n_letters++ > 0 && trait != vma_trait(letters))
                        return false;
                trait = vma_trait(letters);
        }
        if (n_letters == 0 || trait == VMA_TRAIT_UNKNOWN || n_letters != count_alike(samples, n, bit))
                return false;
        *ret_trait = trait;
        return true;
}

void vma_bits_learn(const VmaSample *samples, size_t n, VmaBits *ret) {
        VmaBits bits = {};

        for (unsigned bit = 0; bit < BITS; bit++)
                if (learn_bit(samples, n, bit, &bits.traits[bit]))
                        bits.known |= (uint64_t)1 << bit;
        *ret = bits;
}

uint32_t vma_bits_traits(const VmaBits *bits, uint64_t flags, bool *ret_unsure) {
        uint32_t traits = 0;

        for (uint64_t left = flags & bits->known; left; left &= left - 1)
                traits |= bits->traits[__builtin_ctzll(left)];
        *ret_unsure = (flags & ~bits->known) != 0;
        return traits;
}
