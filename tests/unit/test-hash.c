/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/hash.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>
#define XXH_DISPATCH_DISABLE_REPLACE
#include <xxhash.h>

static uint8_t page[2 * PAGE_BYTES] __attribute__((aligned(4096)));

static void test_zero_sees_every_byte(void **state) {
        memset(page, 0, sizeof page);
        assert_true(page_is_zero(page));
        for (size_t i = 0; i < PAGE_BYTES; i++) {
                page[i] = 0x80;
                assert_false(page_is_zero(page));
                page[i] = 0;
        }
}

static void test_zero_ends_with_the_page(void **state) {
        memset(page, 0, PAGE_BYTES);
        memset(page + PAGE_BYTES, 0xff, PAGE_BYTES);
        assert_true(page_is_zero(page));
}

/* All one word is not all zero: comparing a page with itself one step on must not be enough. */
static void test_zero_is_not_repetition(void **state) {
        memset(page, 0x55, PAGE_BYTES);
        assert_false(page_is_zero(page));
}

static void test_every_byte_counts(void **state) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;
        uint64_t key;

        assert_int_equal(hash_secret_new(&secret), 0);
        for (size_t i = 0; i < PAGE_BYTES; i++)
                page[i] = (uint8_t)(i * 7 + i / 256);
        key = hash_page(secret, page);
        assert_int_equal(key, hash_page(secret, page));
        for (size_t i = 0; i < PAGE_BYTES; i++) {
                page[i] ^= 1;
                assert_int_not_equal(key, hash_page(secret, page));
                page[i] ^= 1;
        }
        page[PAGE_BYTES] ^= 1;
        assert_int_equal(key, hash_page(secret, page));
}

static void test_secrets_differ(void **state) {
        _cleanup_(hash_secret_freep) HashSecret *a = NULL, *b = NULL;

        assert_int_equal(hash_secret_new(&a), 0);
        assert_int_equal(hash_secret_new(&b), 0);
        memset(page, 0, PAGE_BYTES);
        assert_int_not_equal(hash_page(a, page), hash_page(b, page));
}

/* The wide code gives the keys of the plain code: the type is opaque, its first bytes are the secret. */
static void test_same_keys_as_the_plain_code(void **state) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;

        assert_int_equal(hash_secret_new(&secret), 0);
        for (unsigned round = 0; round < 100; round++) {
                for (size_t i = 0; i < PAGE_BYTES; i++)
                        page[i] = (uint8_t)random();
                assert_int_equal(hash_page(secret, page), XXH3_64bits_withSecret(page, PAGE_BYTES, secret, 192));
        }
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_zero_sees_every_byte),
                cmocka_unit_test(test_zero_ends_with_the_page),
                cmocka_unit_test(test_zero_is_not_repetition),
                cmocka_unit_test(test_every_byte_counts),
                cmocka_unit_test(test_secrets_differ),
                cmocka_unit_test(test_same_keys_as_the_plain_code),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
