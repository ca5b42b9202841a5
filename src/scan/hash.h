/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Keyed page hashing: XXH3-64 with a random secret, so that nobody can prepare pages that collide in our trees or
 * learn anything from a key. A key is a hint: equality is decided on bytes, under protection, by whoever merges.
 */
typedef struct HashSecret HashSecret;

int hash_secret_new(HashSecret **ret); /* random; -errno as getrandom(2) said */
HashSecret *hash_secret_free(HashSecret *secret);
DEFINE_CLEANUP(HashSecret, hash_secret_free)

uint64_t hash_page(const HashSecret *secret, const void *page);
bool page_is_zero(const void *page);
