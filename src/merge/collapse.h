/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "host/thp.h"
#include "scan/block.h"
#include "scan/track.h"

/*
 * The way back from a huge page that was split for merging: where nothing of it is merged or wanted any more, the
 * kernel is asked to make it one again. Never where that would undo a saving, and only where huge pages are wanted.
 */

/* As far as is known, nothing in the block is saved or to be. */
bool collapse_is_due(const Block *block, uint32_t pass);
/* The mapping allows it: it covers the block, is not offered to KSM, and huge pages are wanted in it. */
bool collapse_is_allowed(const Vma *vma, const Block *block, HostThp thp);

enum { COLLAPSE_E_REFUSED = 1 };        /* something in it is shared, no huge page was free, the mapping is not fit */
/* Asks for it, if the frames say so too. track may be NULL. 0: it is huge, and the block says so; COLLAPSE_E_REFUSED:
 * it is asked again later and later. -errno: the kernel cannot do it (before 6.1), or the process ended. */
int collapse_block(const Target *target, Track *track, Block *block, uint32_t pass);
