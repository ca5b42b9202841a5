/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include "index/buckets.h"

static void buckets_resize(Buckets *buckets, uint32_t n) {
        buckets->n = n;
        buckets->mask = n > 0 ? (buckets_bit(n) << 1) - 1 : 0;
}

int buckets_add(Buckets *buckets, uint32_t word) {
        if (buckets->n >= BUCKETS_MAX - 1)
                return -ENOMEM;
        int r = array_grow(&buckets->words, (buckets->n + 1) * sizeof word);
        if (r < 0)
                return r;

        *buckets_at(buckets, buckets->n) = word;
        buckets_resize(buckets, buckets->n + 1);
        return 0;
}

void buckets_drop(Buckets *buckets) {
        buckets_resize(buckets, buckets->n - 1);
        array_shrink(&buckets->words, buckets->n * sizeof(uint32_t));
}

static uint32_t reverse_bits(uint32_t x) {
        x = (x >> 1 & 0x55555555U) | (x & 0x55555555U) << 1;
        x = (x >> 2 & 0x33333333U) | (x & 0x33333333U) << 2;
        x = (x >> 4 & 0x0f0f0f0fU) | (x & 0x0f0f0f0fU) << 4;
        return __builtin_bswap32(x);
}

uint32_t buckets_position_bucket(const Buckets *buckets, uint32_t position) {
        return buckets_find(buckets, reverse_bits(position));
}

uint32_t buckets_position_next(const Buckets *buckets, uint32_t position) {
        uint32_t bucket = buckets_position_bucket(buckets, position);
        uint32_t low = buckets->mask >> 1;

        /* How many low bits of the hash the bucket stands for: all of the mask when it was split already in this
         * round or made by it, one less when it still waits. */
        bool fine = bucket > low || bucket + low + 1 < buckets->n;
        uint32_t depth = __builtin_popcount(fine ? buckets->mask : low);
        if (depth == 0)
                return 0;

        uint32_t step = (uint32_t)1 << (32 - depth);
        return (position & ~(step - 1)) + step;
}
