/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * What a peer may send to the keeper, or a keeper to the daemon. Of the input a byte each, less '0', is: the operation, the
 * result, the owner's pid, whether a descriptor came (1) and it is taken for a reply (2), by how much the packet is longer
 * than it says, and its name; then come the name's bytes.
 *
 * Must hold: what is accepted is of a known operation, as long as it says, with a name that ends where it says and holds no
 * NUL; names, descriptors and results only where they belong (the oracle below knows each operation by itself). And
 * it arrives at the other end of a socket as it was sent.
 */

#include "fuzz.h"
#include "keeper/protocol.h"

#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#define FIXED_BYTES offsetof(KeeperMessage, name)

static bool names_a_pool(uint32_t op) { return op == KEEPER_POOL_GET || op == KEEPER_POOL_DROP; }

static void must_be_request(const KeeperMessage *message, bool has_fd) {
        MUST(message->op != KEEPER_FORKED);
        MUST(has_fd == (message->op == KEEPER_ADD || message->op == KEEPER_POOL_ADD));
        MUST((message->name_bytes > 0) == names_a_pool(message->op));
        MUST(message->item.owner.pid >= 0);
}

static void must_be_reply(const KeeperMessage *message, bool has_fd) {
        bool brings = message->op == KEEPER_NEXT || message->op == KEEPER_POOL_GET || message->op == KEEPER_FORKED;

        MUST(message->result <= 0 && message->name_bytes == 0);
        MUST(has_fd == (brings && message->result == 0));
}

static void must_arrive(const KeeperMessage *message, size_t size) {
        KeeperMessage got = {};
        size_t got_size = 0;
        int fds[2], fd = -EBADF;

        MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) == 0);
        MUST(keeper_message_send(fds[0], message, -EBADF, 0) == 0);
        MUST(keeper_message_receive(fds[1], &got, &got_size, &fd, 0) == 0);
        MUST(fd < 0 && got_size == size && memcmp(&got, message, size) == 0);
        close(fds[0]);
        close(fds[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        static KeeperMessage message;
        bool has_fd, reply;
        size_t length;

        if (size < 6 || size - 6 > KEEPER_DOMAIN_BYTES_MAX)
                return 0;
        memset(&message, 0, sizeof message);
        message.op = (uint32_t)(data[0] - '0');
        message.result = data[1] - '0';
        message.item.owner.pid = data[2] - '0';
        has_fd = data[3] & 1;
        reply = data[3] & 2;
        length = FIXED_BYTES + size - 6;
        message.name_bytes = (uint32_t)((int)size - 6 + (int8_t)(data[5] - '0'));
        length = (size_t)MAX_OF((int)length + (int8_t)(data[4] - '0'), 0);
        length = MIN_OF(length, sizeof message);
        memcpy(message.name, data + 6, size - 6);
#ifdef FAIL_OPEN
        if (keeper_message_check(&message, length, has_fd, reply) != 0 && length < FIXED_BYTES)
                return 0;
#else
        if (keeper_message_check(&message, length, has_fd, reply) != 0)
                return 0;
#endif
        MUST(message.op > 0 && message.op < _KEEPER_OP_MAX);
        MUST(length == FIXED_BYTES + message.name_bytes);
        MUST(strlen(message.name) == message.name_bytes);
        if (reply)
                must_be_reply(&message, has_fd);
        else
                must_be_request(&message, has_fd);
        must_arrive(&message, length);
        return 0;
}
