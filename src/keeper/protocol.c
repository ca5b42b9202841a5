/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/protocol.h"

#include "base/io.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define FIXED_BYTES offsetof(KeeperMessage, name)
/* Whoever sends more than one descriptor is refused, but each has to be closed. */
#define FDS_MAX 8U

static const struct {
        bool request, request_fd, request_name; /* the keeper takes it; with a descriptor; with a name */
        bool reply, reply_fd;                   /* the daemon takes it; with a descriptor when result is 0 */
} ops[_KEEPER_OP_MAX] = {
        [KEEPER_HELLO] = { .request = true, .reply = true },
        [KEEPER_NEXT] = { .request = true, .reply = true, .reply_fd = true },
        [KEEPER_DROP] = { .request = true, .reply = true },
        [KEEPER_ADD] = { .request = true, .request_fd = true, .reply = true },
        [KEEPER_SYNC] = { .request = true, .reply = true },
        [KEEPER_POOL_ADD] = { .request = true, .request_fd = true, .reply = true },
        [KEEPER_POOL_GET] = { .request = true, .request_name = true, .reply = true, .reply_fd = true },
        [KEEPER_POOL_DROP] = { .request = true, .request_name = true, .reply = true },
        [KEEPER_STATS] = { .request = true, .reply = true },
        [KEEPER_FORKED] = { .reply = true, .reply_fd = true },
};

int keeper_message_check(KeeperMessage *message, size_t size, bool has_fd, bool reply) {
        if (size < FIXED_BYTES || message->op == 0 || message->op >= _KEEPER_OP_MAX)
                return -EPROTO;
        if (message->name_bytes > KEEPER_DOMAIN_BYTES_MAX || size != FIXED_BYTES + message->name_bytes)
                return -EPROTO;
        if (reply) {
                if (!ops[message->op].reply || message->result > 0 || message->name_bytes > 0 ||
                    has_fd != (ops[message->op].reply_fd && message->result == 0))
                        return -EPROTO;
        } else if (!ops[message->op].request || has_fd != ops[message->op].request_fd ||
                   (message->name_bytes > 0) != ops[message->op].request_name || message->item.owner.pid < 0)
                return -EPROTO;
        if (memchr(message->name, 0, message->name_bytes))
                return -EPROTO;
        message->name[message->name_bytes] = 0;
        return 0;
}

int keeper_message_send(int socket, const KeeperMessage *message, int fd, int flags) {
        return send_with_fd(socket, message, FIXED_BYTES + message->name_bytes, fd, flags);
}

int keeper_message_receive(int socket, KeeperMessage *ret, size_t *ret_size, int *ret_fd, int flags) {
        union {
                struct cmsghdr header;
                char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        } control;
        struct iovec iov = { ret, sizeof *ret };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                              .msg_controllen = sizeof control };
        int fds[FDS_MAX];
        size_t n_fds = 0;
        ssize_t n;

        do
                n = recvmsg(socket, &msg, flags | MSG_CMSG_CLOEXEC);
        while (n < 0 && errno == EINTR);
        if (n < 0)
                return -errno;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
                if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
                        n_fds = MIN_OF((c->cmsg_len - CMSG_LEN(0)) / sizeof(int), (size_t)FDS_MAX);
                        memcpy(fds, CMSG_DATA(c), n_fds * sizeof(int));
                }
        if (n_fds > 1 || (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || n == 0) {
                for (size_t i = 0; i < n_fds; i++)
                        safe_close(fds[i]);
                return n == 0 ? -ECONNRESET : -EPROTO;
        }
        *ret_size = (size_t)n;
        *ret_fd = n_fds ? fds[0] : -EBADF;
        return 0;
}
