/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "index/array.h"

/*
 * The directory of a hash table that grows and shrinks by one bucket at a time: linear hashing (W. Litwin, "Linear
 * Hashing: a new tool for file and table addressing", VLDB 1980). There is no moment at which everything is rehashed:
 * adding bucket n splits one other bucket, its parent, in two, and nothing else moves.
 *
 * With n buckets, 2^l <= n < 2^(l+1), a hash belongs to the bucket its low l + 1 bits name, or where that is not there
 * yet, to the one its low l bits name. A bucket is one 32-bit word here; what it means is the user's.
 */
typedef struct Buckets {
        Array words;
        uint32_t n;
        uint32_t mask;          /* 2^(l+1) - 1 */
} Buckets;

#define BUCKETS_MAX ((uint32_t)1 << 31)

static inline uint32_t *buckets_at(const Buckets *buckets, uint32_t bucket) {
        return (uint32_t *)(void *)buckets->words.data + bucket;
}

/* Where a hash belongs; there must be one bucket at least. */
static inline uint32_t buckets_find(const Buckets *buckets, uint32_t hash) {
        uint32_t bucket = hash & buckets->mask;
        return bucket < buckets->n ? bucket : bucket & buckets->mask >> 1;
}

/* The bucket that was split to make this one (bucket > 0): the same number without its highest bit. */
static inline uint32_t buckets_parent(uint32_t bucket) {
        return bucket & ~((uint32_t)1 << (31 - __builtin_clz(bucket)));
}

/* The bit of the hash that sends an entry to the bucket rather than to its parent. */
static inline uint32_t buckets_bit(uint32_t bucket) {
        return (uint32_t)1 << (31 - __builtin_clz(bucket));
}

/* Appends a bucket; the caller splits its parent. Pointers to words die. -ENOMEM: as before. */
int buckets_add(Buckets *buckets, uint32_t word);
/* Drops the last one; the caller has joined it with its parent. */
void buckets_drop(Buckets *buckets);

/*
 * Walking all buckets while they grow and shrink: in the order of the reversed bits of their numbers, a bucket and the
 * one split off from it are neighbours. A position in that order is a fixed-point fraction, and stays meaningful
 * whatever was split or joined since: nothing that was ahead of it ever gets behind it.
 */
uint32_t buckets_position_bucket(const Buckets *buckets, uint32_t position);
/* The next position; 0 after the last. */
uint32_t buckets_position_next(const Buckets *buckets, uint32_t position);
