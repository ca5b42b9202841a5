/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "scan/frames.h"

/*
 * The frames that a pass has met, shared by the threads that scan: frame maps under a lock each, dealt by frame number.
 * Frames that lie together fall to one map, so that a run of them stays in few cache lines. A frame's tag and value are
 * read and written together; tag 0 means that nobody knows yet what the frame holds.
 */
typedef struct FrameStripes FrameStripes;

int frame_stripes_new(FrameStripes **ret);
FrameStripes *frame_stripes_free(FrameStripes *stripes);
DEFINE_CLEANUP(FrameStripes, frame_stripes_free)

/* Forgets all frames. Not beside other threads. */
void frame_stripes_clear(FrameStripes *stripes);

/* *ret is what was known of the frame (tag and value 0: not met before). While the tag is 0 the frame's value becomes
 * `claim`, which tells who is about to find out. -ENOMEM. */
int frame_stripes_claim(FrameStripes *stripes, uint64_t pfn, uint64_t claim, Frame *ret);
int frame_stripes_set(FrameStripes *stripes, uint64_t pfn, uint8_t tag, uint64_t value); /* -ENOMEM */
bool frame_stripes_get(FrameStripes *stripes, uint64_t pfn, Frame *ret); /* false: not met */
