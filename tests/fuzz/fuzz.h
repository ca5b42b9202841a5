/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "test.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(condition)                                                                       \
        do {                                                                                  \
                if (!(condition)) {                                                           \
                        fprintf(stderr, "%s:%d: must hold: %s\n", __FILE__, __LINE__, #condition); \
                        abort();                                                              \
                }                                                                             \
        } while (0)
