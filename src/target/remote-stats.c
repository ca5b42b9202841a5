/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <string.h>

/* Counting stops, and the words for what came of them: the same on every architecture. */

static unsigned histogram_bin(uint64_t nsec) {
        uint64_t usec = nsec / NSEC_PER_USEC;
        if (usec < 2)
                return 0;
        unsigned log = 63 - (unsigned)__builtin_clzll(usec);
        /* The upper half of an octave begins at its lower edge times the square root of two. */
        unsigned bin = 2 * log + (usec * 1000 >= ((uint64_t)1 << log) * 1414);
        return MIN_OF(bin, (unsigned)ELEMENTSOF(((RemoteStats *)NULL)->stop_histogram) - 1);
}

void remote_stats_count(RemoteStats *stats, uint64_t interrupted, uint64_t stood, uint64_t detached) {
        stats->stops++;
        stats->stop_histogram[histogram_bin(detached - stood)]++;
        stats->reach_histogram[histogram_bin(stood - interrupted)]++;
        stats->stop_nsec_max = MAX_OF(stats->stop_nsec_max, detached - stood);
        stats->reach_nsec_max = MAX_OF(stats->reach_nsec_max, stood - interrupted);
}

static uint64_t percentile(const RemoteStats *stats, const uint32_t *histogram, uint64_t max, unsigned permille) {
        uint64_t want = DIV_ROUND_UP(stats->stops * permille, (uint64_t)1000), seen = 0;
        for (size_t i = 0; i < ELEMENTSOF(stats->stop_histogram); i++) {
                seen += histogram[i];
                if (seen >= want && seen > 0) {
                        uint64_t edge = ((uint64_t)1 << ((i + 1) / 2)) * NSEC_PER_USEC;
                        return MIN_OF((i + 1) % 2 ? edge * 1414 / 1000 : edge, max);
                }
        }
        return 0;
}

uint64_t remote_stop_percentile(const RemoteStats *stats, unsigned permille) {
        return percentile(stats, stats->stop_histogram, stats->stop_nsec_max, permille);
}

uint64_t remote_reach_percentile(const RemoteStats *stats, unsigned permille) {
        return percentile(stats, stats->reach_histogram, stats->reach_nsec_max, permille);
}

const char *remote_error_name(int error) {
        static const char *const names[] = {
                [REMOTE_E_GONE] = "gone",
                [REMOTE_E_DENIED] = "denied",
                [REMOTE_E_BUSY] = "busy",
                [REMOTE_E_TRACED] = "traced",
                [REMOTE_E_UNFIT] = "unfit",
                [REMOTE_E_LOST] = "lost",
        };
        return error > 0 && (size_t)error < ELEMENTSOF(names) ? names[error] : error < 0 ? strerror(-error) : "ok";
}
