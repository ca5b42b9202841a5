/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <cmocka.h>

/* Building programs: what the stub will find, and what is no program. What they do when they are run is shown on victims
 * (tests/system/remote-transaction.c). */

static RemoteProgram *new(void) {
        RemoteProgram *p = NULL;
        assert_int_equal(remote_program_new(&p), 0);
        return p;
}

static void test_labels(void **state) {
        _cleanup_(remote_program_freep) RemoteProgram *p = new();
        unsigned back = remote_program_label(p), out = remote_program_label(p), word = remote_program_words(p, 2);
        remote_program_here(p, back);
        REMOTE_CALL(p, out, word, SYS_getppid, remote_value(7), remote_word(word + 1), remote_at(word));
        remote_program_jump(p, back);
        remote_program_here(p, out);
        assert_int_equal(remote_program_finish(p), 0);
        assert_int_equal(remote_program_finish(p), 0); /* once is enough */
        assert_int_equal(p->n_ops, 3);
        assert_int_equal(p->ops[0].target, 2);
        assert_int_equal(p->ops[0].modes, REMOTE_VALUE | REMOTE_WORD << 2 | REMOTE_AT << 4);
        assert_int_equal(p->ops[1].op, REMOTE_OP_JUMP);
        assert_int_equal(p->ops[1].target, 0);
        assert_int_equal(p->ops[2].op, REMOTE_OP_END);
        assert_int_equal(p->ops[2].target, REMOTE_NOWHERE);
}

/* As a seccomp filter will see the calls: addresses as they will be, what is not known yet as a descriptor. */
static void test_calls(void **state) {
        _cleanup_(remote_program_freep) RemoteProgram *p = new();
        unsigned word = remote_program_words(p, 3);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_ioctl, remote_word(word), remote_value(42), remote_at(word + 2));
        remote_program_jump(p, REMOTE_NOWHERE);
        RemoteCall call;
        assert_true(remote_program_call_at(p, 0, REMOTE_REGION_BASE, &call));
        assert_int_equal(call.nr, SYS_ioctl);
        assert_int_equal(call.args[0], 3);
        assert_int_equal(call.args[1], 42);
        assert_int_equal(call.args[2], REMOTE_REGION_BASE + REMOTE_REGION_WORDS_OFFSET + 16);
        assert_false(remote_program_call_at(p, 1, REMOTE_REGION_BASE, &call));
}

static void test_words(void **state) {
        _cleanup_(remote_program_freep) RemoteProgram *p = new();
        unsigned word = remote_program_words(p, 4);
        remote_program_set(p, word + 3, UINT64_MAX);
        assert_int_equal(remote_program_get(p, word + 3), UINT64_MAX);
        assert_int_equal(remote_program_get(p, word), 0);
        assert_int_equal(remote_program_get(p, word + 4), 0); /* nobody's */
        assert_int_equal(remote_program_finish(p), 0);
}

static void expect(RemoteProgram *p, int error) {
        assert_int_equal(remote_program_finish(p), error);
        remote_program_free(p);
}

static void test_none(void **state) {
        RemoteProgram *p = new();
        remote_program_jump(p, remote_program_label(p)); /* never placed */
        expect(p, -EINVAL);
        p = new();
        unsigned label = remote_program_label(p);
        remote_program_here(p, label);
        remote_program_here(p, label);
        expect(p, -EINVAL);
        p = new();
        remote_program_jump(p, 3); /* never handed out */
        expect(p, -EINVAL);
        p = new();
        remote_program_set(p, 0, 1);
        expect(p, -EINVAL);
        p = new();
        REMOTE_CALL(p, REMOTE_NOWHERE, 0, SYS_getppid, remote_value(0)); /* a result without a word */
        expect(p, -EINVAL);
        p = new();
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_getppid, remote_word(0));
        expect(p, -EINVAL);
        p = new();
        remote_program_op(p, REMOTE_OP_ASK, REMOTE_NOWHERE, REMOTE_NOTHING, 0, NULL); /* whom? */
        expect(p, -EINVAL);
        p = new();
        remote_program_words(p, REMOTE_PROGRAM_WORDS_MAX);
        remote_program_words(p, 1);
        expect(p, -E2BIG);
        p = new();
        for (unsigned i = 0; i < REMOTE_PROGRAM_OPS_MAX; i++)
                remote_program_jump(p, REMOTE_NOWHERE);
        expect(p, -E2BIG); /* no room for its end */
        p = new();
        const int fds[REMOTE_PROGRAM_GIVE_MAX + 1] = {};
        remote_program_give(p, fds, ELEMENTSOF(fds), 0, REMOTE_NOWHERE);
        expect(p, -E2BIG);
}

static int answer(void *userdata, RemoteProgram *p, const Target *target) { return 0; }

/* What is asked along is answered with the next question, in order; there has to be one. */
static void test_ask_along(void **state) {
        RemoteProgram *p = new();
        int a, b, c;
        remote_program_ask_along(p, answer, &a);
        remote_program_hold(p);
        remote_program_ask(p, answer, &b, REMOTE_NOWHERE);
        remote_program_ask(p, answer, &c, REMOTE_NOWHERE);
        assert_int_equal(p->n_ops, 2);
        assert_int_equal(p->n_questions, 2);
        assert_int_equal(p->n_asks, 4);
        assert_true(p->holds && p->asks[0].userdata == &a && p->asks[2].userdata == &b && p->asks[3].userdata == &c);
        for (unsigned i = 0; i < 4; i++)
                assert_int_equal(p->asks[i].question, i < 3 ? 1 : 2);
        assert_int_equal(p->ops[1].args[0], 2);
        expect(p, 0);
        p = new();
        remote_program_ask(p, answer, &a, REMOTE_NOWHERE);
        remote_program_ask_along(p, answer, &b);
        expect(p, -EINVAL);
}

/* Whatever way a program with given descriptors goes, each that it has is closed: as many closes as there can be. */
static void test_give(void **state) {
        _cleanup_(remote_program_freep) RemoteProgram *p = new();
        const int fds[] = {5, 6, 7};
        unsigned out = remote_program_label(p), word = remote_program_words(p, 3), closes = 0, receives = 0;
        remote_program_give(p, fds, 3, word, out);
        remote_program_here(p, out);
        for (unsigned i = 0; i < 3; i++)
                remote_program_close(p, word + i);
        assert_int_equal(remote_program_finish(p), 0);
        assert_int_equal(p->n_asks, 1);
        assert_int_equal(p->n_given, 1);
        assert_memory_equal(p->given[0].fds, fds, sizeof fds);
        for (unsigned i = 0; i < p->n_ops; i++) {
                closes += p->ops[i].op == REMOTE_OP_CALL && p->ops[i].nr == SYS_close;
                if (p->ops[i].op == REMOTE_OP_CALL && p->ops[i].nr == SYS_recvmsg) {
                        receives++;
                        assert_int_equal(p->ops[i].args[2], MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
                }
        }
        assert_int_equal(receives, 1);
        assert_int_equal(closes, 2 + 2 + 3); /* the sockets, on either way out, and what was given */
        assert_true(p->n_notes == 5);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_labels), cmocka_unit_test(test_calls), cmocka_unit_test(test_words),
                cmocka_unit_test(test_none),   cmocka_unit_test(test_ask_along), cmocka_unit_test(test_give),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
