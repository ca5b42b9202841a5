/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>

/*
 * Messages of the Varlink wire protocol for both ends: JSON objects, each ended by a NUL. Text comes from hostile
 * peers: what is not plainly a message of bounded size and depth is refused as a whole.
 */

#define VARLINK_REQUEST_MAX ((size_t)64 << 10)  /* bytes, without the NUL */
#define VARLINK_REPLY_MAX ((size_t)64 << 20)
#define VARLINK_DEPTH_MAX 16U                   /* objects and arrays within each other */

enum {
        VARLINK_MESSAGE_E_NONE = 1,     /* no complete message is there */
        VARLINK_MESSAGE_E_EOF,          /* the peer sends no more */
};

/* A JSON object and nothing else: no duplicate keys, no NUL in strings, no number out of range, no deeper than
 * VARLINK_DEPTH_MAX. -EBADMSG: it is not. The caller owns *ret. */
int varlink_message_parse(const char *text, size_t size, json_t **ret);

/* Bytes received and not yet taken, or queued and not yet sent. {} is empty. */
typedef struct VarlinkBuffer {
        char *data;
        size_t start, end, allocated;
        size_t searched;                /* no NUL in [start, searched) */
} VarlinkBuffer;

void varlink_buffer_done(VarlinkBuffer *buffer);
static inline size_t varlink_buffer_size(const VarlinkBuffer *buffer) { return buffer->end - buffer->start; }

/* One recv(2) of at most what is missing to a message of max bytes. 0: something came; VARLINK_MESSAGE_E_NONE: nothing
 * now; VARLINK_MESSAGE_E_EOF; -errno. */
int varlink_buffer_receive(VarlinkBuffer *buffer, int fd, size_t max);

/* Whether varlink_buffer_take() has something to say. */
bool varlink_buffer_ready(VarlinkBuffer *buffer, size_t max);

/* Takes the first message out of the buffer. VARLINK_MESSAGE_E_NONE; -EMSGSIZE: more than max bytes without a NUL;
 * -EBADMSG: it is no message. */
int varlink_buffer_take(VarlinkBuffer *buffer, size_t max, json_t **ret);

/* Queues a message; -ENOMEM. */
int varlink_buffer_add(VarlinkBuffer *buffer, const json_t *message);

/* Sends as much as the socket takes without waiting. 0: all of it; VARLINK_MESSAGE_E_NONE: something is left;
 * -errno. */
int varlink_buffer_send(VarlinkBuffer *buffer, int fd);
