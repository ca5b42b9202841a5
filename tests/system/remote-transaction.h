/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/remote-internal.h"

/* A transaction that uses everything a program can do: takes descriptors in, makes a userfaultfd with one of them, moves
 * the page out of the victim's memory (0: none) and back, compares, and closes what it has. The page is gone
 * for good if the program does not come to its end. As remote_transact(); checks what the program found. */
int transaction_once(Remote *remote, Target *target, uint64_t page, bool *ret_moved);
