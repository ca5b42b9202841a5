/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The map of frames, alone and shared by threads. */
#include "scan/frames.h"

#include "base/crew.h"
#include "scan/stripes.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define FRAMES 100000U
#define PFN_MAX ((uint64_t)1 << 26)

/* Against a plain array: neighbours, strides that meet in the same slots, and frames nobody added. */
static void test_against_an_array(void **state) {
        _cleanup_(frame_map_done) FrameMap map = {};
        uint32_t *known = calloc(PFN_MAX, sizeof *known);
        static uint64_t added[FRAMES + 1];
        size_t n = 0, moving = 0;

        assert_non_null(known);
        for (unsigned i = 1; i <= FRAMES; i++) {
                uint64_t pfn = 1 + (i % 3 == 0 ? i : i % 3 == 1 ? (uint64_t)i * 256 : (uint64_t)random()) % (PFN_MAX - 1);
                Frame *frame;

                assert_int_equal(frame_map_find(&map, pfn) != NULL, known[pfn] != 0);
                assert_int_equal(frame_map_add(&map, pfn, &frame), 0);
                assert_int_equal(frame->pfn, pfn);
                assert_int_equal(frame->value, known[pfn]);
                assert_int_equal(frame->tag, known[pfn] & 0xff);
                n += known[pfn] == 0;
                known[pfn] = i;
                frame->value = i;
                frame->tag = i & 0xff;
                assert_int_equal(map.n, n);

                /* All the others are there too, and what is written to them stays, wherever they are just now. */
                moving += map.old != NULL;
                added[i] = pfn;
                for (unsigned k = 0; k < 3; k++) {
                        uint64_t earlier = added[1 + (size_t)random() % i];
                        frame = frame_map_find(&map, earlier);
                        assert_non_null(frame);
                        assert_int_equal(frame->value, known[earlier]);
                        frame->value = known[earlier] = (uint32_t)random();
                        frame->tag = frame->value & 0xff;
                }
        }
        assert_in_range(moving, FRAMES / 20, FRAMES / 2);
        for (uint64_t pfn = 1; pfn < PFN_MAX; pfn++) {
                const Frame *frame = known[pfn] || pfn % 64 == 0 ? frame_map_find(&map, pfn) : NULL;
                assert_int_equal(frame ? frame->value : 0, known[pfn]);
        }
        free(known);
}

static void test_clear_forgets(void **state) {
        _cleanup_(frame_map_done) FrameMap map = {};
        Frame *frame;

        assert_null(frame_map_find(&map, 5));
        for (int few = 0; few < 2; few++) {
                for (uint64_t pfn = 1; pfn < (few ? 10 : 10000); pfn++) {
                        assert_int_equal(frame_map_add(&map, pfn, &frame), 0);
                        assert_int_equal(frame->value, 0);
                        frame->value = pfn;
                }
                frame_map_clear(&map);
                assert_int_equal(map.n, 0);
                for (uint64_t pfn = 1; pfn < 10000; pfn++)
                        assert_null(frame_map_find(&map, pfn));
        }
        /* Room that a pass did not need goes back. */
        assert_int_equal(map.allocated, 0);
}

#define THREADS 4U
#define SHARED_FRAMES 20000U

typedef struct Race {
        FrameStripes *stripes;
        unsigned claimed[THREADS]; /* frames that each thread was the first to claim */
        unsigned broken[THREADS];  /* answers that cannot be */
} Race;

/* Each frame comes up once for each thread that might take it. */
static void race_for_frame(void *userdata, unsigned thread, size_t item) {
        Race *race = userdata;
        uint64_t pfn = 1 + item / THREADS * 7, claim = item + 1;
        Frame frame;

        if (frame_stripes_claim(race->stripes, pfn, claim, &frame) < 0)
                race->broken[thread]++;
        else if (frame.tag == 0 && frame.value == 0) {
                race->claimed[thread]++;
                if (frame_stripes_set(race->stripes, pfn, 3, pfn * pfn) < 0)
                        race->broken[thread]++;
        } else if (frame.tag == 0) /* claimed by another item for this frame, and not yet set */
                race->broken[thread] += frame.value == claim || (frame.value - 1) / THREADS != item / THREADS;
        else
                race->broken[thread] += frame.tag != 3 || frame.value != pfn * pfn;
        if (!frame_stripes_get(race->stripes, pfn, &frame) || (frame.tag == 3 && frame.value != pfn * pfn))
                race->broken[thread]++;
}

static void test_shared_by_threads(void **state) {
        _cleanup_(crew_freep) Crew *crew = NULL;
        _cleanup_(frame_stripes_freep) FrameStripes *stripes = NULL;
        Frame frame;

        assert_int_equal(crew_new(THREADS, &crew), 0);
        assert_int_equal(frame_stripes_new(&stripes), 0);
        for (unsigned round = 0; round < 5; round++) {
                Race race = { .stripes = stripes };
                unsigned claimed = 0;

                crew_run(crew, (size_t)SHARED_FRAMES * THREADS, race_for_frame, &race);
                for (unsigned i = 0; i < THREADS; i++) {
                        assert_int_equal(race.broken[i], 0);
                        claimed += race.claimed[i];
                }
                assert_int_equal(claimed, SHARED_FRAMES); /* one each, whoever it was */
                for (unsigned i = 0; i < SHARED_FRAMES; i++) {
                        uint64_t pfn = 1 + (uint64_t)i * 7;

                        assert_true(frame_stripes_get(stripes, pfn, &frame));
                        assert_int_equal(frame.pfn, pfn);
                        assert_int_equal(frame.tag, 3);
                        assert_int_equal(frame.value, pfn * pfn);
                        assert_false(frame_stripes_get(stripes, pfn + 1, &frame));
                }
                frame_stripes_clear(stripes);
                assert_false(frame_stripes_get(stripes, 1, &frame));
        }
}

/* While nobody knows what a frame holds, the last to claim it is noted; then it is as it was set. */
static void test_claim(void **state) {
        _cleanup_(frame_stripes_freep) FrameStripes *stripes = NULL;
        Frame frame;

        assert_int_equal(frame_stripes_new(&stripes), 0);
        assert_int_equal(frame_stripes_claim(stripes, 9, 100, &frame), 0);
        assert_int_equal(frame.tag, 0);
        assert_int_equal(frame.value, 0);
        assert_int_equal(frame_stripes_claim(stripes, 9, 101, &frame), 0);
        assert_int_equal(frame.value, 100);
        assert_int_equal(frame_stripes_claim(stripes, 9, 102, &frame), 0);
        assert_int_equal(frame.value, 101);
        assert_int_equal(frame_stripes_set(stripes, 9, 1, 77), 0);
        assert_int_equal(frame_stripes_claim(stripes, 9, 103, &frame), 0);
        assert_int_equal(frame.tag, 1);
        assert_int_equal(frame.value, 77);
        assert_true(frame_stripes_get(stripes, 9, &frame));
        assert_int_equal(frame.value, 77);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_against_an_array),
                cmocka_unit_test(test_clear_forgets),
                cmocka_unit_test(test_claim),
                cmocka_unit_test(test_shared_by_threads),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
