/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The unstable tree against a model: an array of which key is held by which page, indexed by the key itself. */

#include "index-model.h"

#include "index/unstable-cells.h"

/* Enough to split buckets, of which there are 256 from the start, several times. */
#define KEYS 200000U

/* How the i-th of KEYS keys looks. Each shape keeps them distinct in the 40 bits that count. */
typedef uint64_t (*KeyShape)(uint32_t i);

/* scattered, and no two alike in their low 32 bits (the finalizer of MurmurHash3 is a bijection) */
static uint64_t key_uniform(uint32_t i) {
        uint32_t low = i;
        low = (low ^ low >> 16) * UINT32_C(0x85ebca6b);
        low = (low ^ low >> 13) * UINT32_C(0xc2b2ae35);
        return (i * UINT64_C(0x94d049bb133111eb)) >> 32 << 32 | (low ^ low >> 16);
}

static uint64_t key_counted(uint32_t i) {
        return i;
}

static uint64_t key_strided(uint32_t i) {
        return (uint64_t)i << 14;
}

/* few tags, all of the high bits */
static uint64_t key_high(uint32_t i) {
        return (uint64_t)i << 56 | i >> 8;
}

/* The worst there is: one in eight goes to the same bucket, until that is split. Searched for, as nobody can who does
 * not know the hash secret. */
static uint64_t key_same_bucket(uint32_t i) {
        static uint32_t tags[KEYS / 8], n;
        static uint64_t next;

        if (i % 8 != 0)
                return key_uniform(i);
        while (n <= i / 8) {
                if (unstable_scatter(next) % 4096 == 0x234)
                        tags[n++] = next;
                next++;
        }
        return tags[i / 8];
}

/* Every rule of unstable.c and unstable-cells.h, from the words of the buckets to the last entry. */
static void tree_check(const Unstable *tree, bool after_failures) {
        size_t n = 0, n_cells[CELL_SIZES + 1] = {};

        for (uint32_t b = 0; b < tree->buckets.n; b++) {
                uint32_t head = *buckets_at(&tree->buckets, b);
                for (uint32_t id = head; id > 0; id = cell_next(tree, id)) {
                        const Cell *cell = cell_at(tree, id);
                        uint32_t size = cell_size(id);
                        n_cells[size]++;
                        assert_int_equal(cell->bucket, b);
                        assert_true(size == CELL_SIZES || (id == head && cell_next(tree, id) == 0));
                        assert_in_range(cell->n, id == head ? 1 : 0, cell_capacity(size));
                        for (uint32_t i = 0; i < cell->n; i++) {
                                uint32_t hash = unstable_scatter(cell->tags[i]);
                                hash ^= (hash ^ b) % UNSTABLE_BUCKETS_MIN;
                                assert_int_equal(buckets_find(&tree->buckets, hash), b);
                                if (id == head && cell_next(tree, id) == 0)
                                        assert_int_equal(cell_find(cell, size, cell->tags[i]), i);
                        }
                        n += cell->n;
                }
        }
        assert_int_equal(n, tree->n);

        /* dense: as many cells as the buckets name, and memory for little more */
        arrays_check(&tree->arrays);
        array_check(&tree->buckets.words, tree->buckets.n * sizeof(uint32_t));
        for (uint32_t size = 1; size <= CELL_SIZES; size++) {
                assert_int_equal(tree->classes[size].n, n_cells[size]);
                array_check(&tree->classes[size].cells, n_cells[size] * size * CELL_LINE);
        }

        if (tree->buckets.n > UNSTABLE_BUCKETS_MIN && !after_failures)
                assert_in_range(tree->n, (size_t)tree->buckets.n * 14 - 14, (size_t)tree->buckets.n * 16);
}

typedef struct Model {
        KeyShape shape;
        Unstable *tree;
        PageRef held[KEYS];     /* PAGE_REF_NONE: by nobody */
        size_t n;
} Model;

static Model *model_new(KeyShape shape) {
        Model *m = malloc(sizeof *m);
        CHECK(m);
        *m = (Model){ .shape = shape };
        memset(m->held, 0xff, sizeof m->held);
        while (unstable_new(&m->tree) < 0)
                ;
        return m;
}

static void model_free(Model *m) {
        assert_null(unstable_free(m->tree));
        free(m);
}

static PageRef random_ref(void) {
        return random_next() >> (64 - PAGE_REF_BITS);
}

/* What a look-up did must be what the model says; or it ran out of memory, and did nothing. */
static void model_saw(Model *m, uint32_t i, PageRef ref, int r, PageRef other) {
        if (r == -ENOMEM) {
                assert_true(n_failed > 0);
                assert_true(m->held[i] == PAGE_REF_NONE);
        } else if (m->held[i] == PAGE_REF_NONE) {
                assert_int_equal(r, 0);
                m->held[i] = ref;
                m->n++;
        } else if (m->held[i] == ref)
                assert_int_equal(r, UNSTABLE_E_SELF);
        else {
                assert_int_equal(r, UNSTABLE_E_TWIN);
                assert_int_equal(other, m->held[i]);
        }
}

static void model_see(Model *m, uint32_t i) {
        PageRef other = 0, ref = m->held[i] != PAGE_REF_NONE && random_below(2) ? m->held[i] : random_ref();
        int r = unstable_see(m->tree, m->shape(i), ref, &other);
        model_saw(m, i, ref, r, other);
}

static void model_see_batch(Model *m) {
        uint64_t keys[100];
        PageRef refs[100], others[100];
        uint32_t which[100], n = random_below(100) + 1;
        int results[100];

        for (uint32_t i = 0; i < n; i++) {
                which[i] = random_below(i > 0 && random_below(8) == 0 ? 50 : KEYS);
                keys[i] = m->shape(which[i]);
                refs[i] = random_ref();
        }
        unstable_see_batch(m->tree, keys, refs, n, results, others);
        for (uint32_t i = 0; i < n; i++)
                model_saw(m, which[i], refs[i], results[i], others[i]);
}

static void model_remove(Model *m, uint32_t i) {
        PageRef ref = PAGE_REF_NONE;

        assert_int_equal(unstable_take(m->tree, m->shape(i), &ref), m->held[i] == PAGE_REF_NONE ? -ENOENT : 0);
        assert_int_equal(ref, m->held[i]);
        if (ref == PAGE_REF_NONE)
                return;
        m->held[i] = PAGE_REF_NONE;
        m->n--;
}

static void model_replace(Model *m, uint32_t i) {
        PageRef ref = random_ref();
        assert_int_equal(unstable_replace(m->tree, m->shape(i), m->held[i] ^ 1, ref), -ENOENT);
        assert_int_equal(unstable_replace(m->tree, m->shape(i), m->held[i], UINT64_MAX), -EINVAL);
        if (m->held[i] == PAGE_REF_NONE)
                return;
        assert_int_equal(unstable_replace(m->tree, m->shape(i), m->held[i], ref), 0);
        m->held[i] = ref;
}

/* Stale is what the low digits of the reference say, so that the model can tell too. */
static PageRef stale_modulus;
static size_t n_asked;

static bool sweep_stale(void *userdata, uint32_t tag, PageRef ref) {
        n_asked++;
        return ref % stale_modulus == 0;
}

static void model_sweep_all(Model *m) {
        size_t dropped = 0;
        stale_modulus = random_below(4) + 1;
        n_asked = 0;
        for (uint32_t i = 0; i < KEYS; i++)
                if (m->held[i] != PAGE_REF_NONE && m->held[i] % stale_modulus == 0) {
                        m->held[i] = PAGE_REF_NONE;
                        dropped++;
                }
        assert_int_equal(unstable_sweep(m->tree, SIZE_MAX, sweep_stale, NULL), dropped);
        assert_int_equal(n_asked, m->n);
        m->n -= dropped;
}

static void model_check(Model *m, bool after_failures) {
        tree_check(m->tree, after_failures);
        assert_int_equal(unstable_count(m->tree), m->n);
        PageRef other;
        for (uint32_t i = 0; i < KEYS; i++)
                if (m->held[i] != PAGE_REF_NONE)
                        assert_int_equal(unstable_see(m->tree, m->shape(i), m->held[i], &other), UNSTABLE_E_SELF);
}

/* Phases that mostly insert, mostly remove, or do a bit of everything. */
static void model_run(Model *m, unsigned phases, unsigned operations) {
        for (unsigned phase = 0; phase < phases; phase++) {
                uint32_t inserts = (uint32_t[]){ 70, 10, 40, 90, 2 }[random_below(5)];
                for (unsigned o = 0; o < operations; o++) {
                        uint32_t what = random_below(100), i = random_below(KEYS);
                        if (what < inserts)
                                model_see(m, i);
                        else if (what < 98)
                                model_remove(m, i);
                        else if (what < 99)
                                model_replace(m, i);
                        else if (random_below(200) == 0)
                                unstable_expect(m->tree, random_below(2) * random_below(KEYS));
                        else
                                model_see_batch(m);
                }
                if (random_below(3) == 0)
                        model_sweep_all(m);
                unstable_expect(m->tree, 0);
                model_check(m, n_failed > 0);
        }
}

static void run_shape(KeyShape shape, unsigned seeds, unsigned phases, unsigned operations) {
        for (unsigned seed = 0; seed < seeds; seed++) {
                random_state = seed;
                n_failed = 0;
                Model *m = model_new(shape);
                model_run(m, phases, operations);
                model_free(m);
        }
}

static void test_uniform(void **state) {
        run_shape(key_uniform, 4, 8, 300000);
}

static void test_clustered(void **state) {
        run_shape(key_counted, 1, 8, 200000);
        run_shape(key_strided, 1, 8, 200000);
        run_shape(key_high, 1, 8, 200000);
}

static void test_same_bucket(void **state) {
        run_shape(key_same_bucket, 1, 6, 50000);
}

/* Small sweeps between changes: who is there during a whole round is asked, though the tree grows or shrinks around
 * the cursor. */
#define RESIDENTS 6000U

static bool sweep_mark(void *userdata, uint32_t tag, PageRef ref) {
        bool *asked = userdata;
        if (ref < RESIDENTS)
                asked[ref] = true;
        return false;
}

static void sweep_around(size_t guests, bool grow, size_t from) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        bool asked[RESIDENTS] = {};
        uint64_t begun;
        uint32_t buckets;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        for (uint32_t i = 0; i < RESIDENTS; i++)
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), 0);
        for (size_t i = 0; i < guests; i++)
                assert_int_equal(unstable_see(tree, ~key_uniform(i), RESIDENTS + i, &other), 0);
        unstable_sweep(tree, from, sweep_mark, asked); /* the round may begin anywhere */
        memset(asked, 0, sizeof asked);

        begun = unstable_swept(tree);
        buckets = tree->buckets.n;
        do {
                unstable_sweep(tree, 150, sweep_mark, asked);
                for (unsigned i = 0; i < 100 && (grow || guests > 0); i++)
                        if (grow) {
                                PageRef ref = RESIDENTS + guests;
                                assert_int_equal(unstable_see(tree, ~key_uniform(guests), ref, &other), 0);
                                guests++;
                        } else {
                                guests--;
                                assert_int_equal(unstable_take(tree, ~key_uniform(guests), &other), 0);
                                assert_int_equal(other, RESIDENTS + guests);
                        }
        } while (unstable_swept(tree) - begun < UNSTABLE_ROUND);

        assert_true(grow ? tree->buckets.n > buckets * 3 / 2 : tree->buckets.n < buckets * 3 / 4);
        for (uint32_t i = 0; i < RESIDENTS; i++)
                assert_true(asked[i]);
        tree_check(tree, false);
}

static void test_sweep_survives_growth(void **state) {
        sweep_around(100000, true, 0);
        sweep_around(150000, true, 77777);
        sweep_around(400000, false, 0);
        sweep_around(250000, false, 111111);
}

static bool sweep_drop_most(void *userdata, uint32_t tag, PageRef ref) {
        size_t *asked = userdata;

        (*asked)++;
        return ref % 4 != 0;
}

/* However many entries go, a round is over when all have been asked about, and not before. */
static void test_sweep_round(void **state) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        size_t asked = 0, n = 100000;
        uint64_t begun;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        unstable_sweep(tree, 1, sweep_drop_most, &asked);
        assert_int_equal(unstable_swept(tree), UNSTABLE_ROUND); /* there is nothing to ask about */
        for (size_t i = 0; i < n; i++)
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), 0);
        begun = unstable_swept(tree);
        while (unstable_swept(tree) - begun < UNSTABLE_ROUND) {
                assert_true(asked < n);
                unstable_sweep(tree, 1000, sweep_drop_most, &asked);
        }
        assert_true(asked >= n && asked < n + n / 50);
        assert_int_equal(unstable_count(tree), n / 4);
        begun = unstable_swept(tree);
        asked = 0;
        unstable_sweep(tree, SIZE_MAX, sweep_drop_most, &asked);
        assert_int_equal(unstable_swept(tree) - begun, UNSTABLE_ROUND);
        assert_int_equal(asked, n / 4);
}

/* Memory stays within its bound while the tree grows and while it shrinks, and what the system lent comes back. */
static void test_memory(void **state) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        const size_t n = 1000000;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        for (size_t i = 0; i < n; i++) {
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), 0);
                if (i >= 100000 && i % 1000 == 0)
                        assert_in_range(unstable_bytes(tree), (i + 1) * 9, (i + 1) * 143 / 10);
        }
        assert_in_range(unstable_bytes(tree), n * 9, n * 125 / 10);
        tree_check(tree, false);

        size_t left = n;
        for (size_t i = 0; i < n; i++) {
                size_t k = i * 7919 % n;
                assert_int_equal(unstable_take(tree, key_uniform(k), &other), 0);
                assert_int_equal(other, k);
                left--;
                if (left >= 200000 && left % 1000 == 0)
                        assert_in_range(unstable_bytes(tree), left * 9, left * 16);
        }
        assert_int_equal(unstable_count(tree), 0);
        assert_in_range(unstable_bytes(tree), 1, 256 * 1024);
}

/* One in 2^k of the keys: what is outside is dropped by a sweep, and the memory with it. */
static bool sweep_outside(void *userdata, uint32_t tag, PageRef ref) {
        const unsigned *sample_bits = userdata;
        return !unstable_in_sample(tag, *sample_bits);
}

static void test_sample(void **state) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        const uint32_t n = 1000000;
        size_t in[8] = {}, bytes;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        for (uint32_t i = 0; i < n; i++) {
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), 0);
                for (unsigned k = 0; k < ELEMENTSOF(in); k++) {
                        bool inside = unstable_in_sample(key_uniform(i), k);
                        assert_true(!inside || k == 0 || unstable_in_sample(key_uniform(i), k - 1));
                        assert_int_equal(inside, unstable_in_sample((uint32_t)key_uniform(i), k));
                        in[k] += inside;
                }
        }
        assert_true(unstable_in_sample(UINT64_MAX, 0));
        assert_true(unstable_in_sample(UINT64_MAX << 32, 32));
        assert_false(unstable_in_sample(1, 32));

        bytes = unstable_bytes(tree);
        for (unsigned k = 0; k < ELEMENTSOF(in); k++) {
                assert_in_range(in[k], (n >> k) * 9 / 10, (n >> k) * 11 / 10 + 1);
                size_t dropped = 0, want = unstable_count(tree) - in[k];
                for (size_t swept = 0; swept < n; swept += 10000)
                        dropped += unstable_sweep(tree, 10000, sweep_outside, &k);
                assert_int_equal(dropped, want);
                assert_int_equal(unstable_count(tree), in[k]);
                assert_in_range(unstable_bytes(tree), in[k] * 9, (bytes >> k) * 13 / 10 + 256 * 1024);
                tree_check(tree, false);
        }
        for (uint32_t i = 0; i < n; i++)
                if (unstable_in_sample(key_uniform(i), ELEMENTSOF(in) - 1))
                        assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), UNSTABLE_E_SELF);
}

/* Shards and samples depend on each other no more than on the buckets. */
static void test_shards(void **state) {
        uint32_t in[UNSTABLE_SHARDS] = {}, sampled[UNSTABLE_SHARDS] = {};

        for (uint32_t i = 0; i < 160000; i++) {
                uint64_t key = random_next();
                unsigned shard = unstable_shard(key);
                assert_in_range(shard, 0, UNSTABLE_SHARDS - 1);
                in[shard]++;
                sampled[shard] += unstable_in_sample(key, 2);
        }
        for (unsigned s = 0; s < UNSTABLE_SHARDS; s++) {
                assert_in_range(in[s], 9000, 11000);
                assert_in_range(sampled[s], 2250, 2750);
        }
}

/* Every allocation of a run fails once, alone or with all after it; then memory is there again. */
static void test_out_of_memory(void **state) {
        for (unsigned lasting = 0; lasting < 2; lasting++) {
                size_t last = SIZE_MAX;
                for (size_t at = 0; at < last; at++) {
                        random_state = at;
                        n_allocations = n_failed = 0;
                        fail_after = at;
                        fail_for = lasting ? 1000 : 1;
                        Model *m = model_new(at % 4 == 3 ? key_same_bucket : key_uniform);
                        for (uint32_t i = 0; i < KEYS; i++)
                                model_see(m, i);
                        model_run(m, 1, 5000);
                        if (n_failed == 0)
                                last = at;
                        model_check(m, true);

                        fail_never();
                        model_run(m, 1, 5000);
                        model_free(m);
                }
                assert_in_range(last, 10, 1000);
        }
        fail_never();
}

/* The buckets are there beforehand, with no memory for cells but address space; what did not come is given back. */
static void test_expectation(void **state) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        const size_t n = 20000;
        uint32_t buckets;
        size_t held;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        unstable_expect(tree, n);
        buckets = tree->buckets.n;
        assert_in_range(buckets, n / 16, n / 16 + 1);
        assert_in_range(unstable_bytes(tree), buckets * 4, buckets * 4 + 4 * PAGE_BYTES + 8192);
        for (size_t i = 0; i < n; i++)
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), 0);
        assert_in_range(tree->buckets.n, buckets, buckets + 1);
        tree_check(tree, false);
        held = unstable_bytes(tree);
        unstable_expect(tree, 0);
        assert_in_range(unstable_bytes(tree), 1, held - 1);
        assert_in_range(tree->arrays.held - tree->arrays.used, 0, ARRAYS_SLACK_BYTES + tree->arrays.held / 16);
        unstable_expect(tree, 5 * n); /* none of which comes */
        assert_in_range(tree->buckets.n, 6 * n / 16, 6 * n / 16 + 1);
        for (size_t i = 0; i < n; i++)
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), UNSTABLE_E_SELF);
        unstable_expect(tree, 0);
        tree_check(tree, false);
        for (size_t i = 0; i < n; i++)
                assert_int_equal(unstable_see(tree, key_uniform(i), i, &other), UNSTABLE_E_SELF);
}

/* A bucket that so many entries are expected in: the cell it begins with is the largest that they fill. */
static void check_first_cell(size_t each, uint32_t size) {
        _cleanup_(unstable_freep) Unstable *tree = NULL;
        uint32_t bucket = 0x34, n = 0;
        PageRef other;

        assert_int_equal(unstable_new(&tree), 0);
        unstable_expect(tree, 1);
        assert_int_equal(tree->buckets.n, UNSTABLE_BUCKETS_MIN);
        tree->expected = each * UNSTABLE_BUCKETS_MIN + UNSTABLE_BUCKETS_MIN - 1;
        for (uint64_t key = 0; n <= cell_capacity(size); key++) {
                if (buckets_find(&tree->buckets, unstable_hash(key)) != bucket)
                        continue;
                assert_int_equal(unstable_see(tree, key, n, &other), 0);
                n++;
                if (n <= cell_capacity(size)) { /* not exchanged on the way */
                        assert_int_equal(cell_size(*buckets_at(&tree->buckets, bucket)), size);
                        assert_int_equal(tree->classes[size].n, 1);
                }
        }
        assert_int_equal(cell_size(*buckets_at(&tree->buckets, bucket)), MIN_OF(size + 1, CELL_SIZES));
        assert_int_equal(unstable_count(tree), n);
        tree_check(tree, false);
}

static void test_first_cell(void **state) {
        for (size_t each = 0; each < 13; each++)
                check_first_cell(each, 1);
        check_first_cell(13, 2);
        check_first_cell(16, 2); /* what it is as a rule */
        check_first_cell(19, 2);
        check_first_cell(20, 3);
        check_first_cell(55, 7);
        check_first_cell(56, 8);
        check_first_cell(104, 14);
        check_first_cell(105, 15);
        check_first_cell(100000, 15);
}

static void test_arguments(void **state) {
        Unstable *tree = NULL;
        PageRef other = 7;

        assert_null(unstable_free(NULL));
        assert_int_equal(unstable_new(&tree), 0);
        assert_int_equal(unstable_take(tree, 1, &other), -ENOENT);
        assert_int_equal(other, 7);
        assert_int_equal(unstable_sweep(tree, 10, sweep_stale, NULL), 0);
        assert_int_equal(unstable_see(tree, 1, (PageRef)1 << PAGE_REF_BITS, &other), -EINVAL);
        assert_int_equal(unstable_count(tree), 0);

        /* exactly 40 bits of the key count */
        assert_int_equal(unstable_see(tree, 0, 1, &other), 0);
        for (unsigned bit = 0; bit < 64; bit++) {
                bool kept = bit < 32 || bit >= 56;
                assert_int_equal(unstable_see(tree, UINT64_C(1) << bit, 2, &other), kept ? 0 : UNSTABLE_E_TWIN);
        }
        assert_int_equal(other, 1);
        assert_null(unstable_free(tree));
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_expectation),    cmocka_unit_test(test_first_cell),
                cmocka_unit_test(test_arguments),      cmocka_unit_test(test_uniform),
                cmocka_unit_test(test_clustered),      cmocka_unit_test(test_same_bucket),
                cmocka_unit_test(test_sweep_survives_growth), cmocka_unit_test(test_sweep_round), cmocka_unit_test(test_memory),
                cmocka_unit_test(test_sample),         cmocka_unit_test(test_shards),
                cmocka_unit_test(test_out_of_memory),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
