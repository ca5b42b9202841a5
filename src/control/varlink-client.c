/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The blocking Varlink client. It trusts the server no more than the server trusts it: bounded, and checked. */

#include "control/varlink-client.h"

#include "base/clock.h"
#include "control/varlink-message.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

int varlink_connect(const char *path, int *ret_fd) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        _cleanup_close_ int fd = -EBADF;

        if (strlen(path) >= sizeof address.sun_path)
                return -ENAMETOOLONG;
        strcpy(address.sun_path, path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return -errno;
        if (connect(fd, (const struct sockaddr *)&address, sizeof address) < 0)
                return -errno;
        *ret_fd = TAKE_FD(fd);
        return 0;
}

/* until UINT64_MAX: for ever. */
static int wait_for(int fd, short events, uint64_t until) {
        struct pollfd pollfd = { .fd = fd, .events = events };

        for (;;) {
                uint64_t now = now_nsec(), left = until > now ? until - now : 0;
                struct timespec ts = { .tv_sec = (time_t)(left / NSEC_PER_SEC), .tv_nsec = (long)(left % NSEC_PER_SEC) };
                int r = ppoll(&pollfd, 1, until == UINT64_MAX ? NULL : &ts, NULL);

                if (r > 0)
                        return 0;
                if (r == 0)
                        return -ETIMEDOUT;
                if (errno != EINTR)
                        return -errno;
        }
}

static int send_call(int fd, const char *method, json_t *parameters /* taken over */, bool more, uint64_t until) {
        _cleanup_(varlink_buffer_done) VarlinkBuffer output = {};
        json_t *message = json_pack("{ss so*}", "method", method, "parameters", parameters);
        int r;

        if (!message)
                return -ENOMEM;
        r = more && json_object_set_new(message, "more", json_true()) < 0 ? -ENOMEM : 0;
        if (r == 0)
                r = varlink_buffer_add(&output, message);
        json_decref(message);
        while (r == 0) {
                r = varlink_buffer_send(&output, fd);
                if (r != VARLINK_MESSAGE_E_NONE)
                        return r;
                r = wait_for(fd, POLLOUT, until);
        }
        return r;
}

static int receive_message(int fd, VarlinkBuffer *input, uint64_t until, json_t **ret) {
        for (;;) {
                int r;

                if (varlink_buffer_ready(input, VARLINK_REPLY_MAX))
                        return varlink_buffer_take(input, VARLINK_REPLY_MAX, ret);
                r = varlink_buffer_receive(input, fd, VARLINK_REPLY_MAX);
                if (r == VARLINK_MESSAGE_E_EOF)
                        return -ECONNRESET;
                if (r == VARLINK_MESSAGE_E_NONE)
                        r = wait_for(fd, POLLIN, until);
                if (r < 0)
                        return r;
        }
}

/* 0, VARLINK_E_ERROR with *ret_error; *ret_parameters is a new reference in both cases. */
static int receive_reply(int fd, VarlinkBuffer *input, uint64_t until, bool *ret_continues, json_t **ret_parameters,
                         char **ret_error) {
        json_t *message, *error, *parameters;
        int r = receive_message(fd, input, until, &message);

        if (r < 0)
                return r;
        error = json_object_get(message, "error");
        parameters = json_object_get(message, "parameters");
        if ((error && !json_is_string(error)) || (parameters && !json_is_object(parameters)))
                r = -EBADMSG;
        else if (error) {
                char *name = strdup(json_string_value(error));

                r = name ? VARLINK_E_ERROR : -ENOMEM;
                if (name)
                        *ret_error = name;
        }
        if (r >= 0) {
                *ret_parameters = parameters ? json_incref(parameters) : json_object();
                *ret_continues = r == 0 && json_is_true(json_object_get(message, "continues"));
        }
        json_decref(message);
        return r;
}

int varlink_call(int fd, const char *method, json_t *parameters, uint64_t timeout_nsec, json_t **ret_parameters,
                 char **ret_error) {
        _cleanup_(varlink_buffer_done) VarlinkBuffer input = {};
        uint64_t until = timeout_nsec == 0 ? UINT64_MAX : now_nsec() + timeout_nsec;
        bool continues;
        int r;

        r = send_call(fd, method, parameters, false, until);
        if (r < 0 && r != -EPIPE) /* who refused us may have said why */
                return r;
        return receive_reply(fd, &input, until, &continues, ret_parameters, ret_error);
}

int varlink_call_more(int fd, const char *method, json_t *parameters,
                      bool (*handler)(void *userdata, json_t *parameters), void *userdata, char **ret_error) {
        _cleanup_(varlink_buffer_done) VarlinkBuffer input = {};
        bool continues = true;
        int r;

        r = send_call(fd, method, parameters, true, UINT64_MAX);
        while (r == 0 && continues) {
                json_t *reply;

                r = receive_reply(fd, &input, UINT64_MAX, &continues, &reply, ret_error);
                if (r < 0)
                        return r;
                if (r == 0)
                        continues &= handler(userdata, reply);
                json_decref(reply);
        }
        return r;
}
