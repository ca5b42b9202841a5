/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The stable tree against a model: an array that says of each frame which key it has and how often it is mapped. */

#include "index-model.h"

#include "index/stable-nodes.h"

#include <pthread.h>

#define FRAMES 20000U

typedef struct Model {
        Stable *tree;
        uint32_t max_sharing;
        uint32_t n_keys;
        bool clustered;
        uint32_t which[FRAMES];         /* of n_keys keys */
        uint32_t sharers[FRAMES];       /* 0: not in the tree */
        uint32_t asked[FRAMES];         /* in which call of the prune callback last */
} Model;

static uint64_t model_key(const Model *m, uint32_t which) {
        return m->clustered ? (uint64_t)which << 44 : (which + 1) * UINT64_C(0xd1342543de82ef95);
}

/* Frame numbers as the kernel gives them: neighbours; and up to the highest. */
static uint64_t model_frame(const Model *m, uint32_t i) {
        return i % 3 == 0 ? ((uint64_t)1 << 40) - 1 - i : m->clustered ? (uint64_t)i << 20 : i;
}

/* Every rule of stable.c and stable-nodes.h. */
static void tree_check(const Stable *tree) {
        uint32_t n_nodes = 0, n_dups = 0, n_chains = 0, n_in_frames = 0;
        uint64_t n_sharers = 0, n_chained = 0;

        for (uint32_t b = 0; b < tree->keys.n; b++)
                for (uint32_t item = *buckets_at(&tree->keys, b); item != NIL; item = *item_next(tree, item)) {
                        assert_int_equal(buckets_find(&tree->keys, stable_hash(item_key(tree, item))), b);
                        n_nodes++;
                        if (!(item & ITEM_CHAIN)) {
                                assert_true(item < tree->n_dups && !dup_at(tree, item)->chained);
                                n_dups++;
                                n_sharers += dup_at(tree, item)->sharers;
                                continue;
                        }

                        assert_true((item & ~ITEM_CHAIN) < tree->n_chains);
                        const Chain *chain = chain_at(tree, item & ~ITEM_CHAIN);
                        uint32_t n_in_chain = 0;
                        uint64_t n_sharing = 0;
                        for (uint32_t l = 0; l < 2; l++)
                                for (uint32_t i = chain->lists[l], prev = NIL; i != NIL; i = dup_at(tree, i)->next) {
                                        const Dup *dup = dup_at(tree, i);
                                        assert_true(i < tree->n_dups && dup->chained && dup->key == chain->key);
                                        assert_int_equal(dup->prev, prev);
                                        assert_int_equal(dup->full, l);
                                        assert_int_equal(dup->sharers >= tree->max_sharing, l);
                                        n_in_chain++;
                                        n_sharing += dup->sharers;
                                        prev = i;
                                }
                        assert_int_equal(chain->n_dups, n_in_chain);
                        assert_int_equal(chain->n_sharing, n_sharing);
                        assert_in_range(n_in_chain, 2, UINT32_MAX);
                        n_chains++;
                        n_dups += n_in_chain;
                        n_chained += n_in_chain;
                        n_sharers += n_sharing;
                }

        for (uint32_t b = 0; b < tree->frames.n; b++)
                for (uint32_t i = *buckets_at(&tree->frames, b); i != NIL; i = dup_at(tree, i)->frame_next) {
                        assert_int_equal(buckets_find(&tree->frames, stable_hash(dup_at(tree, i)->frame)), b);
                        n_in_frames++;
                }

        assert_int_equal(n_nodes, tree->n_nodes);
        assert_int_equal(n_dups, tree->n_dups);
        assert_int_equal(n_chains, tree->n_chains);
        assert_int_equal(n_in_frames, tree->n_dups);
        assert_int_equal(n_chained, tree->n_chained);
        assert_int_equal(n_sharers, tree->n_sharers);
        assert_true(tree->checked <= tree->n_dups);
        arrays_check(&tree->arrays);
        array_check(&tree->dups, tree->n_dups * sizeof(Dup));
        array_check(&tree->chains, tree->n_chains * sizeof(Chain));
        array_check(&tree->keys.words, tree->keys.n * sizeof(uint32_t));
        array_check(&tree->frames.words, tree->frames.n * sizeof(uint32_t));
}

static Model *model_new(uint32_t n_keys, bool clustered) {
        Model *m = calloc(1, sizeof *m);
        while (!m)
                m = calloc(1, sizeof *m);
        *m = (Model){ .n_keys = n_keys, .clustered = clustered, .max_sharing = 4 };
        while (stable_new(m->max_sharing, &m->tree) < 0)
                ;
        return m;
}

static void model_free(Model *m) {
        assert_null(stable_free(m->tree));
        free(m);
}

static void model_insert(Model *m, uint32_t i) {
        uint32_t which = random_below(m->n_keys), sharers = random_below(8) + 1;
        int r = stable_insert(m->tree, model_key(m, which), model_frame(m, i), sharers);

        if (m->sharers[i] > 0)
                assert_true(r == -EEXIST || (r == -ENOMEM && n_failed > 0));
        else if (r < 0) {
                assert_int_equal(r, -ENOMEM);
                assert_true(n_failed > 0);
        } else {
                m->which[i] = which;
                m->sharers[i] = sharers;
        }
}

static void model_set(Model *m, uint32_t i, uint32_t sharers) {
        assert_int_equal(stable_set_sharers(m->tree, model_frame(m, i), sharers), m->sharers[i] > 0 ? 0 : -ENOENT);
        if (m->sharers[i] > 0)
                m->sharers[i] = sharers;
}

/* A frame back from its number. */
static uint32_t model_index(const Model *m, uint64_t frame) {
        uint32_t i = frame >> 39 ? ((uint64_t)1 << 40) - 1 - frame : m->clustered ? frame >> 20 : frame;
        assert_int_equal(model_frame(m, i), frame);
        return i;
}

static uint32_t prune_calls;

/* What is left of a frame: from its number and the moment, so that some are gone, some changed. */
static uint32_t model_check_frame(void *userdata, uint64_t key, uint64_t frame) {
        Model *m = userdata;
        uint32_t i = model_index(m, frame);

        assert_true(m->sharers[i] > 0);
        assert_int_equal(key, model_key(m, m->which[i]));
        m->asked[i] = ++prune_calls;
        m->sharers[i] = random_below(4) == 0 ? 0 : random_below(3) == 0 ? random_below(8) + 1 : m->sharers[i];
        return m->sharers[i];
}

static size_t model_count(const Model *m) {
        size_t n = 0;
        for (uint32_t i = 0; i < FRAMES; i++)
                n += m->sharers[i] > 0;
        return n;
}

static void model_prune(Model *m) {
        size_t before = model_count(m), budget = random_below(2) ? random_below(500) : SIZE_MAX;
        uint32_t calls = prune_calls;
        size_t removed = stable_prune(m->tree, budget, model_check_frame, m);

        assert_int_equal(prune_calls - calls, MIN_OF(budget, before));
        assert_int_equal(before - model_count(m), removed);
}

/* A batch finds what single look-ups find. */
static void model_check_batch(const Model *m) {
        enum { N = 150 };
        uint64_t keys[N] = {};
        StableHit hits[N], hit = {};
        size_t n = random_below(N + 1), n_hits = 0;

        for (size_t i = 0; i < n; i++)
                keys[i] = random_below(8) ? model_key(m, random_below(m->n_keys)) : random_next();
        memset(hits, 0xff, sizeof hits);
        size_t r = stable_lookup_batch(m->tree, keys, n, hits);
        for (size_t i = 0; i < n; i++) {
                bool found = stable_lookup(m->tree, keys[i], &hit);
                n_hits += found;
                if (r > 0)
                        assert_int_equal(hits[i].n_dups, found ? hit.n_dups : 0);
                if (found) {
                        assert_int_equal(hits[i].frame, hit.frame);
                        assert_int_equal(hits[i].n_sharing, hit.n_sharing);
                }
        }
        assert_int_equal(r, n_hits);
        for (size_t i = n; i < N; i++)
                assert_int_equal(hits[i].n_dups, UINT32_MAX);
}

/* Compares everything the tree says with the model. */
static void model_check(Model *m) {
        _cleanup_free_ uint32_t *n_dups = NULL, *n_room = NULL;
        _cleanup_free_ uint64_t *n_sharing = NULL;
        StableCounts counts, want = {};
        StableHit hit;

        fail_never();
        assert_non_null(n_dups = calloc(m->n_keys, sizeof *n_dups));
        assert_non_null(n_room = calloc(m->n_keys, sizeof *n_room));
        assert_non_null(n_sharing = calloc(m->n_keys, sizeof *n_sharing));

        tree_check(m->tree);
        for (uint32_t i = 0; i < FRAMES; i++) {
                uint64_t key;
                uint32_t sharers;
                assert_int_equal(stable_has_frame(m->tree, model_frame(m, i), &key), m->sharers[i] > 0);
                assert_int_equal(stable_get_sharers(m->tree, model_frame(m, i), &sharers),
                                 m->sharers[i] > 0 ? 0 : -ENOENT);
                if (m->sharers[i] == 0)
                        continue;
                assert_int_equal(key, model_key(m, m->which[i]));
                assert_int_equal(sharers, m->sharers[i]);
                n_dups[m->which[i]]++;
                n_room[m->which[i]] += m->sharers[i] < m->max_sharing;
                n_sharing[m->which[i]] += m->sharers[i];
                want.pages_shared++;
                want.pages_sharing += m->sharers[i] - 1;
        }
        for (uint32_t k = 0; k < m->n_keys; k++) {
                assert_int_equal(stable_lookup(m->tree, model_key(m, k), &hit), n_dups[k] > 0);
                if (n_dups[k] == 0)
                        continue;
                want.nodes++;
                want.stable_node_chains += n_dups[k] > 1;
                want.stable_node_dups += n_dups[k] > 1 ? n_dups[k] : 0;
                assert_int_equal(hit.n_dups, n_dups[k]);
                assert_int_equal(hit.n_sharing, n_sharing[k]);
                assert_int_equal(hit.frame != FRAME_NONE, n_room[k] > 0);
                if (hit.frame != FRAME_NONE) {
                        uint32_t i = model_index(m, hit.frame);
                        assert_int_equal(m->which[i], k);
                        assert_in_range(m->sharers[i], 1, m->max_sharing - 1);
                }
        }
        model_check_batch(m);
        stable_counts(m->tree, &counts);
        want.bytes = counts.bytes;
        assert_memory_equal(&counts, &want, sizeof counts);
}

static void model_run(Model *m, unsigned phases, unsigned operations) {
        for (unsigned phase = 0; phase < phases; phase++) {
                uint32_t inserts = (uint32_t[]){ 70, 10, 40, 90, 2 }[random_below(5)];
                for (unsigned o = 0; o < operations; o++) {
                        uint32_t what = random_below(100), i = random_below(FRAMES);
                        StableHit hit;
                        if (what < inserts)
                                model_insert(m, i);
                        else if (what < 96)
                                model_set(m, i, random_below(2) ? 0 : random_below(8) + 1);
                        else if (what < 98)
                                stable_lookup(m->tree, model_key(m, random_below(m->n_keys)), &hit);
                        else if (random_below(20) == 0)
                                stable_set_max_sharing(m->tree, m->max_sharing = random_below(9) + 1);
                        else if (random_below(50) == 0)
                                model_prune(m);
                }
                model_check(m);
        }
}

static void run(uint32_t n_keys, bool clustered, unsigned seeds, unsigned phases, unsigned operations) {
        for (unsigned seed = 0; seed < seeds; seed++) {
                random_state = seed;
                n_failed = 0;
                Model *m = model_new(n_keys, clustered);
                model_run(m, phases, operations);
                model_free(m);
        }
}

static void test_mostly_single(void **state) {
        run(200000, false, 4, 8, 50000);
        run(200000, true, 2, 8, 50000);
}

static void test_short_chains(void **state) {
        run(5000, false, 4, 8, 50000);
        run(5000, true, 2, 8, 50000);
}

static void test_long_chains(void **state) {
        run(3, false, 4, 8, 50000);
        run(1, true, 2, 8, 50000);
}

/* No dup is asked about twice in a round, whatever is removed and added meanwhile. */
static void test_prune_in_rounds(void **state) {
        Model *m = model_new(5000, false);

        random_state = 1;
        n_failed = 0;
        for (unsigned round = 0; round < 20; round++) {
                for (uint32_t i = 0; i < FRAMES; i++)
                        if (random_below(2))
                                model_insert(m, i);
                stable_prune(m->tree, m->tree->n_dups - m->tree->checked, model_check_frame, m);
                m->tree->checked = 0;

                uint32_t first = prune_calls;
                while (m->tree->n_dups > 0 && m->tree->checked < m->tree->n_dups) {
                        uint32_t asked_before[FRAMES], calls = prune_calls;
                        memcpy(asked_before, m->asked, sizeof asked_before);
                        stable_prune(m->tree, MIN_OF(300U, m->tree->n_dups - m->tree->checked), model_check_frame, m);
                        for (uint32_t i = 0; i < FRAMES; i++)
                                if (m->asked[i] > calls)
                                        assert_true(asked_before[i] <= first);
                        /* leaves and comes back: a new dup, asked about again */
                        for (unsigned o = 0; o < 200; o++) {
                                uint32_t i = random_below(FRAMES);
                                model_set(m, i, 0);
                                if (o % 4 == 0 && m->tree->n_dups - m->tree->checked > 300) {
                                        model_insert(m, i);
                                        m->asked[i] = 0;
                                }
                        }
                }
                for (uint32_t i = 0; i < FRAMES; i++)
                        if (m->sharers[i] > 0)
                                assert_true(m->asked[i] > first);
                model_check(m);
        }
        model_free(m);
}

/* At most 48 bytes a node of one dup, on the way up and on the way down, and back to nothing. */
static void test_memory(void **state) {
        _cleanup_(stable_freep) Stable *tree = NULL;
        const uint32_t n = 1000000;
        StableCounts counts;

        assert_int_equal(stable_new(256, &tree), 0);
        for (uint32_t i = 0; i < n; i++) {
                assert_int_equal(stable_insert(tree, (i + 1) * UINT64_C(0xd1342543de82ef95), i, 2), 0);
                stable_counts(tree, &counts);
                if (i >= 100000)
                        assert_in_range(counts.bytes, (i + 1) * 40, (i + 1) * 48);
        }
        tree_check(tree);
        for (uint32_t i = 0; i < n; i++) {
                assert_int_equal(stable_set_sharers(tree, (uint64_t)i * 7919 % n, 0), 0);
                stable_counts(tree, &counts);
                if (n - i > 200000)
                        assert_in_range(counts.bytes, (n - i - 1) * 40, (n - i) * 54);
        }
        assert_int_equal(counts.nodes, 0);
        assert_in_range(counts.bytes, 1, 256 * 1024);
        tree_check(tree);
}

/* Every allocation of a run fails once, alone or with all after it; then memory is there again. */
static void test_out_of_memory(void **state) {
        for (unsigned lasting = 0; lasting < 2; lasting++) {
                size_t last = SIZE_MAX;
                for (size_t at = 0; at < last; at++) {
                        Model *m;
                        random_state = at;
                        n_allocations = n_failed = 0;
                        fail_after = at;
                        fail_for = lasting ? 1000 : 1;
                        m = model_new(at % 2 ? 4000 : 100000, false);
                        for (uint32_t i = 0; i < FRAMES; i++)
                                model_insert(m, i);
                        if (n_failed == 0 && at % 2)
                                last = at;
                        model_check(m);
                        model_run(m, 1, 20000);
                        model_free(m);
                }
                assert_in_range(last, 5, 1000);
        }
}

/* Threads look up while nobody writes, also after the limit changed: under a thread sanitizer, a look-up that writes
 * fails here. */
typedef struct Reader {
        const Model *m;
        uint64_t found;
} Reader;

static void *read_all(void *userdata) {
        Reader *reader = userdata;
        const Model *m = reader->m;
        StableHit hit;

        for (uint32_t k = 0; k < m->n_keys; k++)
                reader->found += stable_lookup(m->tree, model_key(m, k), &hit);
        for (uint32_t k = 0; k < m->n_keys; k++) {
                uint64_t key = model_key(m, k);
                reader->found += stable_lookup_batch(m->tree, &key, 1, &hit);
        }
        for (uint32_t i = 0; i < FRAMES; i++)
                reader->found += stable_has_frame(m->tree, model_frame(m, i), NULL);
        return NULL;
}

static void test_readers(void **state) {
        Model *m = model_new(1000, false);
        Reader readers[4] = {};
        pthread_t threads[4];

        random_state = 1;
        for (uint32_t i = 0; i < FRAMES; i++)
                model_insert(m, i);
        for (unsigned round = 0; round < 3; round++) {
                stable_set_max_sharing(m->tree, m->max_sharing = 3 + round);
                for (unsigned t = 0; t < ELEMENTSOF(threads); t++) {
                        readers[t] = (Reader){ .m = m };
                        assert_int_equal(pthread_create(&threads[t], NULL, read_all, &readers[t]), 0);
                }
                for (unsigned t = 0; t < ELEMENTSOF(threads); t++) {
                        assert_int_equal(pthread_join(threads[t], NULL), 0);
                        assert_int_equal(readers[t].found, readers[0].found);
                }
                assert_in_range(readers[0].found, 1000, SIZE_MAX);
                model_check(m);
        }
        model_free(m);
}

static void test_arguments(void **state) {
        _cleanup_(stable_freep) Stable *tree = NULL;
        StableHit hit = { .n_dups = 7 };
        uint32_t sharers = 7;

        assert_null(stable_free(NULL));
        assert_int_equal(stable_new(2, &tree), 0);
        assert_false(stable_lookup(tree, 1, &hit));
        assert_int_equal(hit.n_dups, 7);
        assert_false(stable_has_frame(tree, 1, NULL));
        assert_int_equal(stable_set_sharers(tree, 1, 0), -ENOENT);
        assert_int_equal(stable_get_sharers(tree, 1, &sharers), -ENOENT);
        assert_int_equal(stable_prune(tree, 10, NULL, NULL), 0);
        assert_int_equal(stable_insert(tree, 1, 1, 0), -EINVAL);
        assert_int_equal(stable_insert(tree, 1, (uint64_t)1 << 40, 1), -EINVAL);

        /* a frame that goes to another content */
        assert_int_equal(stable_insert(tree, 1, 5, 1), 0);
        assert_int_equal(stable_insert(tree, 2, 5, 1), -EEXIST);
        assert_int_equal(stable_set_sharers(tree, 5, 0), 0);
        assert_int_equal(stable_insert(tree, 2, 5, 2), 0);
        assert_false(stable_lookup(tree, 1, &hit));
        assert_true(stable_lookup(tree, 2, &hit));
        assert_true(hit.frame == FRAME_NONE && hit.n_dups == 1 && hit.n_sharing == 2);
        stable_set_max_sharing(tree, 3);
        assert_true(stable_lookup(tree, 2, &hit) && hit.frame == 5);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_arguments),    cmocka_unit_test(test_mostly_single),
                cmocka_unit_test(test_short_chains), cmocka_unit_test(test_long_chains),
                cmocka_unit_test(test_prune_in_rounds), cmocka_unit_test(test_memory), cmocka_unit_test(test_readers),
                cmocka_unit_test(test_out_of_memory),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
