/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/keeper.h"

/*
 * What daemon and keeper say to each other: one packet of an AF_UNIX SOCK_SEQPACKET socket each, with at most one
 * descriptor. Each request gets one reply with the same op; KEEPER_FORKED comes by itself.
 *
 * KEEPER_HELLO, KEEPER_NEXT and KEEPER_DROP never change: with them a daemon of any version can take everything from a
 * keeper of any version and hand it to one of its own. Everything else may change with KEEPER_PROTOCOL.
 */
#define KEEPER_PROTOCOL 1U

typedef enum KeeperOp {
        KEEPER_HELLO = 1,       /* reply: the keeper's protocol */
        KEEPER_NEXT,            /* the held descriptor behind cursor; reply: it, and its cursor; -ENOENT: no more. Pools
                                 * come last, as GUARD_NONE */
        KEEPER_DROP,            /* item.id, of a pool too */
        KEEPER_ADD,             /* item.owner, a userfaultfd */
        KEEPER_SYNC,
        KEEPER_POOL_ADD,        /* a mount; its name is in it */
        KEEPER_POOL_GET,        /* name; reply: the mount */
        KEEPER_POOL_DROP,       /* name */
        KEEPER_STATS,
        KEEPER_FORKED,          /* to the daemon: item, the child's userfaultfd */
        _KEEPER_OP_MAX,
} KeeperOp;

typedef struct KeeperMessage {
        uint32_t op;            /* KeeperOp */
        uint32_t protocol;
        int32_t result;         /* of a reply: 0, -errno */
        uint32_t name_bytes;    /* as many of name are sent */
        uint64_t cursor;
        KeeperItem item;
        KeeperStats stats;
        char name[KEEPER_DOMAIN_BYTES_MAX + 1]; /* NUL-terminated by the receiver */
} KeeperMessage;

/* Whether size bytes at message, which came with that many descriptors, are a request as a keeper accepts it, or a
 * reply or notice as a daemon does; terminates name. -EPROTO. */
int keeper_message_check(KeeperMessage *message, size_t size, bool has_fd, bool reply);

/* fd: passed along, or -EBADF. flags: send(2)'s. -EAGAIN: the peer does not read; -errno. */
int keeper_message_send(int socket, const KeeperMessage *message, int fd, int flags);
/* *ret_fd: the caller's, or -EBADF. -EAGAIN; -EPROTO; -ECONNRESET: the peer is gone. Not checked yet: *ret_size. */
int keeper_message_receive(int socket, KeeperMessage *ret, size_t *ret_size, int *ret_fd, int flags);
