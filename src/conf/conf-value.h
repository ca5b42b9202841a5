/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Values as systemd writes them. Each returns -EINVAL for what is no such value, -ERANGE for one too big for *ret;
 * surrounding space is the caller's to strip.
 */

#define CONF_SHARE_ONE 10000U

int conf_value_boolean(const char *s, bool *ret);       /* 1 yes y true t on, 0 no n false f off, in any case */
int conf_value_number(const char *s, uint64_t *ret);    /* decimal digits only */
int conf_value_time(const char *s, uint64_t *ret_nsec); /* "1min 30s", "500ms", "1.5h"; a bare number is seconds */
int conf_value_size(const char *s, uint64_t *ret);      /* "64M", "1.5G": bytes, to the base 1024 */
int conf_value_share(const char *s, uint32_t *ret);     /* "5%", "2.25%": in 1/10,000 */

/* NULL for a good cgroup pattern (without its leading '/'), else what is wrong with it. */
const char *conf_pattern_problem(const char *pattern);
