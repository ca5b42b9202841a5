/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Counts KSM frames by what pagemap and kpageflags say. KSM's own counters go on claiming pages that were un-shared
 * (by a pinning read, for one), and our bookkeeping only knows what we wanted: neither proves a saving.
 */
#include "scan/frames.h"
#include "scan/pagemap.h"
#include "scan/scan.h"

enum {
        FRAME_NEW,
        FRAME_OTHER,
        FRAME_KSM,
        FRAME_ZEROPAGE,
};

struct CensusFrames {
        const Scanner *scanner;
        FrameMap map;
        uint64_t entries[BLOCK_PAGES], flags[BLOCK_PAGES];
};

int census_frames_new(Scanner *scanner, CensusFrames **ret) {
        CensusFrames *frames = calloc(1, sizeof *frames);

        if (!frames)
                return -ENOMEM;
        frames->scanner = scanner;
        *ret = frames;
        return 0;
}

CensusFrames *census_frames_free(CensusFrames *frames) {
        if (frames)
                frame_map_done(&frames->map);
        free(frames);
        return NULL;
}

static bool is_shared(uint64_t entry) { return pagemap_is_anonymous(entry) && !(entry & PAGEMAP_EXCLUSIVE); }

static uint8_t tag_of(uint64_t flags) {
        if (flags & KPAGEFLAGS_ZERO_PAGE)
                return FRAME_ZEROPAGE;
        return flags & KPAGEFLAGS_KSM ? FRAME_KSM : FRAME_OTHER;
}

/* Learns what the frames of entries[i], and of the entries behind it on the frames behind it, are. */
static int learn(CensusFrames *frames, size_t i, size_t n) {
        uint64_t pfn = frames->entries[i] & PAGEMAP_PFN;
        unsigned length = 1;
        int r;

        while (i + length < n && is_shared(frames->entries[i + length]) &&
               (frames->entries[i + length] & PAGEMAP_PFN) == pfn + length)
                length++;
        r = scanner_page_flags(frames->scanner, pfn, length, frames->flags);
        if (r < 0)
                return r;
        for (unsigned k = 0; k < length; k++) {
                Frame *frame;

                r = frame_map_add(&frames->map, pfn + k, &frame);
                if (r < 0)
                        return r;
                if (frame->tag == FRAME_NEW)
                        frame->tag = tag_of(frames->flags[k]);
        }
        return 0;
}

/* A frame's value: whether it was counted. */
static int count(CensusFrames *frames, size_t n, Census *census, CensusLook *look) {
        for (size_t i = 0; i < n; i++) {
                uint64_t entry = frames->entries[i];
                Frame *frame;

                if (!pagemap_is_anonymous(entry))
                        continue;
                if (!is_shared(entry)) {
                        census->pages++;
                        continue;
                }
                frame = frame_map_find(&frames->map, entry & PAGEMAP_PFN);
                if (!frame) {
                        int r = learn(frames, i, n);
                        if (r < 0)
                                return r;
                        frame = frame_map_find(&frames->map, entry & PAGEMAP_PFN);
                }
                if (frame->tag == FRAME_ZEROPAGE) {
                        census->zeropage++;
                        page_set_add(look->zeropage, look->first + (unsigned)i);
                        continue;
                }
                census->pages++;
                if (frame->tag == FRAME_KSM) {
                        census->ksm_mappings++;
                        page_set_add(look->merged, look->first + (unsigned)i);
                        census->ksm_frames += frame->value++ == 0;
                }
        }
        return 0;
}

CensusPage census_page(const CensusFrames *frames, uint64_t entry) {
        uint64_t flags;

        if (!pagemap_is_anonymous(entry) || scanner_page_flags(frames->scanner, entry & PAGEMAP_PFN, 1, &flags) < 0)
                return CENSUS_ABSENT;
        return flags & (KPAGEFLAGS_KSM | KPAGEFLAGS_ZERO_PAGE) ? CENSUS_MERGED : CENSUS_OTHER;
}

int census_add(CensusFrames *frames, Target *target, uint64_t start, uint64_t end, Census *add, CensusLooked looked,
               void *userdata) {
        Census census = *add;

        for (uint64_t addr = start; addr < end;) {
                unsigned first = (unsigned)(addr % BLOCK_BYTES / PAGE_BYTES);
                uint64_t want = MIN_OF((end - addr) / PAGE_BYTES, (uint64_t)(BLOCK_PAGES - first));
                CensusLook look = { .block = addr - addr % BLOCK_BYTES, .first = first, .entries = frames->entries };
                ssize_t got = pread(target->pagemapfd, frames->entries, want * sizeof *frames->entries,
                                    (off_t)(addr / PAGE_BYTES * sizeof *frames->entries));
                size_t n;
                int r;

                if (got < 0)
                        return -errno;
                if (got == 0)
                        return TARGET_E_GONE;
                n = (size_t)got / sizeof *frames->entries;
                r = count(frames, n, &census, &look);
                if (r < 0)
                        return r;
                look.n = (unsigned)n;
                if (looked)
                        looked(userdata, &look);
                addr += n * PAGE_BYTES;
        }
        *add = census;
        return 0;
}

uint32_t census_mappings(const CensusFrames *frames, uint64_t pfn) {
        const Frame *frame = frame_map_find(&frames->map, pfn);
        uint64_t flags;

        if (frame && frame->tag == FRAME_KSM)
                return (uint32_t)MIN_OF(frame->value, (uint64_t)UINT32_MAX);
        return scanner_page_flags(frames->scanner, pfn, 1, &flags) == 0 && flags & KPAGEFLAGS_KSM;
}
