/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* How often pools are put in order: nobody's memory is put back and merged, or moved, over and over. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "conf/conf-value.h"
#include "merge/tidy-pace.h"

/* What was put back is merged again at once, and alone again, for ever. How often that was in so many looks. */
static unsigned put_back_in(unsigned looks) {
        TidyWait wait = {};
        unsigned alone_for = 0, n = 0;

        for (uint32_t look = 1; look <= looks; look++)
                if (++alone_for >= tidy_alone_looks(&wait, look)) {
                        tidy_alone_note(&wait, look);
                        alone_for = 0;
                        n++;
                }
        return n;
}

static void test_alone_again_and_again(void **unused) {
        /* 8, 16, 32, … looks: with each doubling one more, and not one for each 8 looks. */
        assert_in_range(put_back_in(1000), 5, 8);
        assert_in_range(put_back_in(16000), 9, 12);
        /* It ends somewhere. */
        assert_true(put_back_in(16 * TIDY_LOOKS_MAX) > put_back_in(8 * TIDY_LOOKS_MAX));
}

/* A large process is put back in many looks in a row: that is one time. And it is forgotten. */
static void test_alone_at_once(void **unused) {
        TidyWait wait = {};
        uint32_t look = 100, longest;

        assert_int_equal(tidy_alone_looks(&wait, look), TIDY_LOOKS_MIN);
        for (unsigned i = 0; i < 50; i++, look++) {
                assert_int_equal(tidy_alone_looks(&wait, look), TIDY_LOOKS_MIN);
                tidy_alone_note(&wait, look);
        }
        look += 10;
        longest = tidy_alone_looks(&wait, look);
        assert_int_equal(longest, 2 * TIDY_LOOKS_MIN);
        /* Once more, in some looks in a row. */
        for (unsigned i = 0; i < 4; i++)
                tidy_alone_note(&wait, look++);
        look += 10;
        assert_int_equal(tidy_alone_looks(&wait, look), 2 * longest);
        longest *= 2;
        look += 3 * longest;
        assert_int_equal(tidy_alone_looks(&wait, look), longest);
        look += 2 * longest;
        assert_int_equal(tidy_alone_looks(&wait, look), TIDY_LOOKS_MIN);
}

/* Looks from one that was tried to the next. */
static uint32_t again_after(TidyWait *wait, uint32_t *look, bool done) {
        uint32_t waited = 0;

        tidy_again_note(wait, *look, done);
        for (; tidy_again_waits(wait, *look); ++*look)
                waited++;
        return waited;
}

static void test_again(void **unused) {
        TidyWait wait = {};
        uint32_t look = 5, first, before;

        assert_false(tidy_again_waits(&wait, look));
        first = before = again_after(&wait, &look, true);
        assert_true(first > 0);
        assert_int_equal(again_after(&wait, &look, true), first);
        for (unsigned i = 0; i < 5; i++) {
                assert_int_equal(again_after(&wait, &look, false), 2 * before);
                before *= 2;
        }
        /* It is done: it was worth it. */
        for (; before > first; before /= 2)
                assert_int_equal(again_after(&wait, &look, true), before / 2);
        assert_int_equal(again_after(&wait, &look, true), first);
        for (unsigned i = 0; i < 40; i++)
                before = again_after(&wait, &look, false);
        assert_int_equal(before, TIDY_LOOKS_MAX);
        /* Nothing of the kind for long. */
        look += 4 * before;
        assert_int_equal(again_after(&wait, &look, false), first);
        /* Several in one look are one time, and it failed if one did. */
        before = again_after(&wait, &look, false);
        tidy_again_note(&wait, look, true);
        tidy_again_note(&wait, look, true);
        assert_int_equal(wait.looks, MAX_OF(before / 2, first));
        tidy_again_note(&wait, look, false);
        assert_true(wait.looks > before / 2);
}

/* What a look found is given its time, however long the look took; and all of it is a small part of the quota. */
static void test_time(void **unused) {
        const uint64_t looks_nsec[] = { NSEC_PER_USEC, 5 * NSEC_PER_MSEC, NSEC_PER_SEC };
        const uint32_t quotas[] = { CONF_SHARE_ONE / 100, CONF_SHARE_ONE / 10, CONF_SHARE_ONE };

        for (unsigned i = 0; i < ELEMENTSOF(looks_nsec); i++)
                for (unsigned k = 0; k < ELEMENTSOF(quotas); k++) {
                        uint64_t begun = NSEC_PER_SEC, looked = begun + looks_nsec[i], until = tidy_until_nsec(looked), due;

                        assert_in_range(until - looked, NSEC_PER_MSEC, 10 * NSEC_PER_MSEC);
                        due = tidy_due_nsec(begun, until, quotas[k]);
                        assert_true(due >= until);
                        assert_true((until - begun) * CONF_SHARE_ONE <= (due - begun) * quotas[k] / TIDY_QUOTA_SHARE);
                }
        /* Nothing is allowed: not at once, and not never. */
        assert_in_range(tidy_due_nsec(0, NSEC_PER_MSEC, 0), NSEC_PER_SEC, 1000 * NSEC_PER_SEC);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_alone_again_and_again),
                cmocka_unit_test(test_alone_at_once),
                cmocka_unit_test(test_again),
                cmocka_unit_test(test_time),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
