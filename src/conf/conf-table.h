/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The table of all keys: which section has them, what their values look like, where they are stored, what they are
 * when nobody sets them.
 */

typedef enum ConfScope { CONF_SCOPE_DAEMON, CONF_SCOPE_CGROUP } ConfScope;

typedef struct ConfKey ConfKey;

struct ConfKey {
        ConfScope scope;
        const char *name;
        /* Stores value in the section at base: -EINVAL, -ERANGE (what was there stands), -ENOMEM. */
        int (*parse)(const ConfKey *key, const char *value, void *base);
        size_t offset;                  /* of the field in its section */
        const char *initial;            /* NULL: unset, as clear leaves it */
        const char *expected;           /* for the message when a value is none */
        uint64_t min, max;              /* of numbers, in the field's unit */
        void (*clear)(void *field);     /* frees what the field owns and unsets it; NULL: it owns nothing */
};

/* All of them; the tests compare the shipped file with it. */
const ConfKey *conf_keys(size_t *ret_n);
/* NULL: the section has no such key. */
const ConfKey *conf_key_find(ConfScope scope, const char *name);
/* Sets one key (value "": back to what it is when nobody sets it) of the section at base, a ConfDaemon or ConfCgroup. */
int conf_key_set(const ConfKey *key, const char *value, void *base);
/* Sets all keys of a zeroed section to what they are when nobody sets them; -ENOMEM. */
int conf_section_init(ConfScope scope, void *base);
/* Frees what the keys own in the section at base. */
void conf_section_done(ConfScope scope, void *base);
