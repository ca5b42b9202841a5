/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Varlink's framing and parser, through a socket as a peer reaches them. The first byte says in which portions the rest
 * arrives: what comes of it must not depend on that, must be within the limits, and must survive being written and
 * read again.
 */

#include "control/varlink-message.h"

#include "fuzz.h"

#include <sys/socket.h>

#define MAX_BYTES ((size_t)4096) /* small, so that short inputs reach the limit */

/* What became of the input: messages until the first that is refused. */
typedef struct Outcome {
        unsigned messages;
        int result;
        uint64_t sum;
} Outcome;

static unsigned depth_of(const json_t *value) {
        unsigned deepest = 0;
        const char *key;
        json_t *child;
        size_t i;

        if (json_is_object(value))
                json_object_foreach((json_t *)value, key, child)
                        deepest = MAX_OF(deepest, depth_of(child));
        else if (json_is_array(value))
                json_array_foreach(value, i, child)
                        deepest = MAX_OF(deepest, depth_of(child));
        else
                return 0;
        return deepest + 1;
}

static void check_message(const json_t *message, Outcome *outcome) {
        VarlinkBuffer buffer = {};
        json_t *again;

        MUST(json_is_object(message));
        MUST(depth_of(message) <= VARLINK_DEPTH_MAX);
        MUST(varlink_buffer_add(&buffer, message) == 0);
        for (size_t i = buffer.start; i < buffer.end; i++)
                outcome->sum = outcome->sum * 31 + (uint8_t)buffer.data[i];
        MUST(varlink_buffer_take(&buffer, SIZE_MAX - 1, &again) == 0);
        MUST(json_equal(message, again));
        MUST(varlink_buffer_size(&buffer) == 0);
        json_decref(again);
        varlink_buffer_done(&buffer);
        outcome->messages++;
}

static Outcome feed(const uint8_t *data, size_t size, size_t portion) {
        _cleanup_(varlink_buffer_done) VarlinkBuffer buffer = {};
        Outcome outcome = {};
        int fds[2];

        MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
        while (outcome.result == 0) {
                size_t n = MIN_OF(portion, size);

                if (varlink_buffer_ready(&buffer, MAX_BYTES)) {
                        json_t *message = NULL;

                        outcome.result = varlink_buffer_take(&buffer, MAX_BYTES, &message);
                        MUST(outcome.result == 0 || outcome.result == -EBADMSG || outcome.result == -EMSGSIZE);
                        if (outcome.result == 0)
                                check_message(message, &outcome);
                        json_decref(message);
                        continue;
                }
                MUST(varlink_buffer_size(&buffer) <= MAX_BYTES);
#ifdef LOSE_BYTES
                if (n > 0 && n < size)
                        data++, size--;
#endif
                if (n > 0)
                        MUST(send(fds[0], data, n, MSG_NOSIGNAL) == (ssize_t)n);
                else
                        shutdown(fds[0], SHUT_WR);
                data += n;
                size -= n;
                do
                        outcome.result = varlink_buffer_receive(&buffer, fds[1], MAX_BYTES);
                while (outcome.result == 0 && !varlink_buffer_ready(&buffer, MAX_BYTES));
                if (outcome.result == VARLINK_MESSAGE_E_NONE)
                        outcome.result = 0;
        }
        close(fds[0]);
        close(fds[1]);
        return outcome;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        Outcome whole, parts;

        if (size == 0 || size > 16384)
                return 0;
        whole = feed(data + 1, size - 1, size);
        parts = feed(data + 1, size - 1, data[0] == 0 ? 1 : data[0]);
        MUST(whole.messages == parts.messages && whole.result == parts.result && whole.sum == parts.sum);
        return 0;
}
