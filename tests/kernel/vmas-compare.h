/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/vma-reader.h"

/* What is wrong with the list that the reader made, where smaps says the other (NULL: nothing): all but the sums is the same,
 * and of pages there are no more than it says. The mappings must not have changed in between. */
const char *vmas_differ(const VmaList *list, const VmaList *smaps, const Vma **ret_vma);
