/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Framing and parsing of Varlink messages.
 *
 * jansson checks UTF-8, number ranges, NUL escapes and duplicate keys; its own limit of nesting (2048) is compiled in
 * and costs that many frames of stack, so depth is looked at before it sees the text. A buffer is one piece of memory
 * with a window that moves; `searched` keeps a peer that sends byte by byte from costing the square of its message.
 */

#include "control/varlink-message.h"

#include <string.h>
#include <sys/socket.h>

#define BUFFER_STEP ((size_t)4 << 10)
/* An empty buffer that has grown past this gives its memory back. */
#define BUFFER_KEEP ((size_t)64 << 10)

static bool depth_allowed(const char *text, size_t size) {
        unsigned depth = 0;
        bool string = false;

        for (size_t i = 0; i < size; i++) {
                char c = text[i];

                if (string) {
                        if (c == '\\')
                                i++;
                        else if (c == '"')
                                string = false;
                } else if (c == '"')
                        string = true;
                else if (c == '{' || c == '[') {
                        if (++depth > VARLINK_DEPTH_MAX)
                                return false;
                } else if ((c == '}' || c == ']') && depth > 0)
                        depth--;
        }
        return true;
}

int varlink_message_parse(const char *text, size_t size, json_t **ret) {
        json_error_t error;
        json_t *message;

        if (!depth_allowed(text, size))
                return -EBADMSG;
        message = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
        if (!message)
                return json_error_code(&error) == json_error_out_of_memory ? -ENOMEM : -EBADMSG;
        if (!json_is_object(message)) {
                json_decref(message);
                return -EBADMSG;
        }
        *ret = message;
        return 0;
}

void varlink_buffer_done(VarlinkBuffer *buffer) {
        free(buffer->data);
        *buffer = (VarlinkBuffer){};
}

/* Makes room for `more` bytes at the end. */
static int buffer_reserve(VarlinkBuffer *buffer, size_t more) {
        size_t size = varlink_buffer_size(buffer), wanted;
        char *data;

        if (more <= buffer->allocated - buffer->end)
                return 0;
        if (buffer->start > 0) {
                memmove(buffer->data, buffer->data + buffer->start, size);
                buffer->searched -= buffer->start;
                buffer->start = 0;
                buffer->end = size;
                if (more <= buffer->allocated - size)
                        return 0;
        }
        wanted = MAX_OF(size + more, buffer->allocated * 2);
        data = realloc(buffer->data, wanted);
        if (!data)
                return -ENOMEM;
        buffer->data = data;
        buffer->allocated = wanted;
        return 0;
}

static void buffer_advance(VarlinkBuffer *buffer, size_t size) {
        buffer->start += size;
        buffer->searched = MAX_OF(buffer->searched, buffer->start);
        if (buffer->start < buffer->end)
                return;
        if (buffer->allocated > BUFFER_KEEP)
                varlink_buffer_done(buffer);
        else
                buffer->start = buffer->end = buffer->searched = 0;
}

int varlink_buffer_receive(VarlinkBuffer *buffer, int fd, size_t max) {
        size_t size = varlink_buffer_size(buffer), room;
        ssize_t n;
        int r;

        if (size > max)
                return 0;
        r = buffer_reserve(buffer, MIN_OF(BUFFER_STEP, max + 1 - size));
        if (r < 0)
                return r;
        room = MIN_OF(buffer->allocated - buffer->end, max + 1 - size);
        n = recv(fd, buffer->data + buffer->end, room, MSG_DONTWAIT);
        if (n < 0)
                return errno == EAGAIN || errno == EINTR ? VARLINK_MESSAGE_E_NONE : -errno;
        if (n == 0)
                return VARLINK_MESSAGE_E_EOF;
        buffer->end += (size_t)n;
        return 0;
}

/* The NUL that ends the first message, or NULL. */
static const char *buffer_find_end(VarlinkBuffer *buffer) {
        const char *nul;

        if (buffer->searched == buffer->end)
                return NULL;
        nul = memchr(buffer->data + buffer->searched, 0, buffer->end - buffer->searched);
        buffer->searched = nul ? (size_t)(nul - buffer->data) : buffer->end;
        return nul;
}

bool varlink_buffer_ready(VarlinkBuffer *buffer, size_t max) {
        return buffer_find_end(buffer) || varlink_buffer_size(buffer) > max;
}

int varlink_buffer_take(VarlinkBuffer *buffer, size_t max, json_t **ret) {
        const char *text = buffer->data + buffer->start, *nul = buffer_find_end(buffer);
        size_t size = nul ? (size_t)(nul - text) : varlink_buffer_size(buffer);
        int r;

        if (size > max)
                return -EMSGSIZE;
        if (!nul)
                return VARLINK_MESSAGE_E_NONE;
        r = varlink_message_parse(text, size, ret);
        buffer_advance(buffer, size + 1);
        return r;
}

int varlink_buffer_add(VarlinkBuffer *buffer, const json_t *message) {
        size_t flags = JSON_COMPACT, size = json_dumpb(message, NULL, 0, flags);
        int r;

        if (size == 0)
                return -ENOMEM;
        r = buffer_reserve(buffer, size + 1);
        if (r < 0)
                return r;
        if (json_dumpb(message, buffer->data + buffer->end, size, flags) != size)
                return -ENOMEM;
        buffer->end += size;
        buffer->data[buffer->end++] = 0;
        return 0;
}

int varlink_buffer_send(VarlinkBuffer *buffer, int fd) {
        while (varlink_buffer_size(buffer) > 0) {
                ssize_t n = send(fd, buffer->data + buffer->start, varlink_buffer_size(buffer),
                                 MSG_DONTWAIT | MSG_NOSIGNAL);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return errno == EAGAIN ? VARLINK_MESSAGE_E_NONE : -errno;
                buffer_advance(buffer, (size_t)n);
        }
        return 0;
}
