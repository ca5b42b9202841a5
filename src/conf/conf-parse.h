/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The text of one file, taken apart: knows the syntax, but no section and no key.
 */

/* A logical line (its continuations joined) has at most this many bytes. */
#define CONF_LINE_BYTES_MAX ((size_t)16 << 10)

typedef enum ConfItemType {
        CONF_ITEM_SECTION,              /* [name] or [name argument] */
        CONF_ITEM_ASSIGNMENT,           /* name=argument */
        CONF_ITEM_BAD_SECTION,          /* was to be a section, or may have been: problem says why it is none */
        CONF_ITEM_BAD_LINE,             /* nothing known: problem says why */
} ConfItemType;

/* Strings are borrowed: they last as long as the handler runs. */
typedef struct ConfItem {
        ConfItemType type;
        unsigned line;                  /* where the logical line starts, from 1 */
        const char *name;               /* without surrounding space */
        const char *argument;           /* without surrounding space; NULL: a section without one */
        const char *problem;
} ConfItem;

/* Anything but 0 ends the parse and is what conf_parse() returns. */
typedef int (*ConfItemHandler)(void *userdata, const ConfItem *item);

/* Hands out what the size bytes of text say, in their order. -ENOMEM, or what the handler returned. */
int conf_parse(const char *text, size_t size, ConfItemHandler handler, void *userdata);
