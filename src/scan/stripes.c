/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/stripes.h"

#include <pthread.h>

/* Many more than threads: that two meet at one lock is rare. */
#define STRIPES 64U
#define NEAR_FRAMES 64U /* so many adjacent frames share a stripe */
#define CACHE_LINE 64U

typedef struct Stripe {
        pthread_mutex_t lock;
        FrameMap map;
} __attribute__((aligned(CACHE_LINE))) Stripe;

struct FrameStripes {
        Stripe stripes[STRIPES];
};

int frame_stripes_new(FrameStripes **ret) {
        FrameStripes *stripes = aligned_alloc(CACHE_LINE, sizeof *stripes);

        if (!stripes)
                return -ENOMEM;
        for (unsigned i = 0; i < STRIPES; i++) {
                stripes->stripes[i] = (Stripe) {};
                pthread_mutex_init(&stripes->stripes[i].lock, NULL);
        }
        *ret = stripes;
        return 0;
}

FrameStripes *frame_stripes_free(FrameStripes *stripes) {
        if (!stripes)
                return NULL;
        for (unsigned i = 0; i < STRIPES; i++) {
                frame_map_done(&stripes->stripes[i].map);
                pthread_mutex_destroy(&stripes->stripes[i].lock);
        }
        free(stripes);
        return NULL;
}

void frame_stripes_clear(FrameStripes *stripes) {
        for (unsigned i = 0; i < STRIPES; i++)
                frame_map_clear(&stripes->stripes[i].map);
}

static Stripe *lock(FrameStripes *stripes, uint64_t pfn) {
        Stripe *stripe = &stripes->stripes[pfn / NEAR_FRAMES % STRIPES];

        pthread_mutex_lock(&stripe->lock);
        return stripe;
}

static void unlock(Stripe *stripe) { pthread_mutex_unlock(&stripe->lock); }

int frame_stripes_claim(FrameStripes *stripes, uint64_t pfn, uint64_t claim, Frame *ret) {
        Stripe *stripe = lock(stripes, pfn);
        Frame *frame;
        int r = frame_map_add(&stripe->map, pfn, &frame);

        if (r == 0) {
                *ret = *frame;
                if (frame->tag == 0)
                        frame->value = claim;
        }
        unlock(stripe);
        return r;
}

int frame_stripes_set(FrameStripes *stripes, uint64_t pfn, uint8_t tag, uint64_t value) {
        Stripe *stripe = lock(stripes, pfn);
        Frame *frame;
        int r = frame_map_add(&stripe->map, pfn, &frame);

        if (r == 0) {
                frame->tag = tag;
                frame->value = value;
        }
        unlock(stripe);
        return r;
}

bool frame_stripes_get(FrameStripes *stripes, uint64_t pfn, Frame *ret) {
        Stripe *stripe = lock(stripes, pfn);
        const Frame *frame = frame_map_find(&stripe->map, pfn);

        if (frame)
                *ret = *frame;
        unlock(stripe);
        return frame;
}
