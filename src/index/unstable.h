/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The unstable tree: contents seen once, whose page may change under us. Knows keys (64-bit keyed hashes, uniformly
 * distributed) and page references, nothing else: no process, no memory of anyone's.
 *
 * A page reference is 40 bits: whatever the caller finds the page again by. An entry is a hint: the caller verifies
 * what a look-up returns and drops (unstable_remove) or replaces what no longer holds.
 */
typedef struct Unstable Unstable;
typedef uint64_t PageRef;

#define PAGE_REF_BITS 40
#define PAGE_REF_NONE UINT64_MAX

int unstable_new(Unstable **ret);
Unstable *unstable_free(Unstable *tree);
DEFINE_CLEANUP(Unstable, unstable_free)

enum {
        UNSTABLE_E_SELF = 1,    /* this very page was there under this key: unchanged since it was inserted */
        UNSTABLE_E_TWIN,        /* another page holds the key; the tree is unchanged */
};

/* Looks the key up; when nobody holds it, inserts ref under it. 0: inserted. UNSTABLE_E_SELF. UNSTABLE_E_TWIN with
 * *ret_other set. -ENOMEM: not inserted, the tree is as before. Only part of the key is kept: a twin is a candidate
 * (wrong once in 2^40 or so), never a proof. */
int unstable_see(Unstable *tree, uint64_t key, PageRef ref, PageRef *ret_other);

/* The same for a batch, prefetching: results[i] is what unstable_see() returns for item i, others[i] its *ret_other.
 * Items are processed in order: a twin inside the batch is found. */
void unstable_see_batch(Unstable *tree, const uint64_t *keys, const PageRef *refs, size_t n, int *results,
                        PageRef *others);

/* Puts ref where old was (old proved stale). -ENOENT when (key, old) is not there. */
int unstable_replace(Unstable *tree, uint64_t key, PageRef old, PageRef ref);
int unstable_remove(Unstable *tree, uint64_t key, PageRef ref); /* -ENOENT */

/* Walks on from where the last sweep stopped, over at least budget entries or once around, and drops those that the
 * callback calls stale. tag is what the tree kept of the key: the key's low 32 bits. Returns how many it dropped. */
typedef bool (*UnstableStale)(void *userdata, uint32_t tag, PageRef ref);
size_t unstable_sweep(Unstable *tree, size_t budget, UnstableStale stale, void *userdata);

size_t unstable_count(const Unstable *tree);    /* entries */
size_t unstable_bytes(const Unstable *tree);    /* all the memory it holds */
