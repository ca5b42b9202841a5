/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>

/* A blocking Varlink client, for ksmctl and the tests. */

int varlink_connect(const char *path, int *ret_fd); /* -ENOENT, -ECONNREFUSED: no daemon */

/* One call, one reply. 0: *ret_parameters is the caller's; VARLINK_E_ERROR: *ret_error (the caller frees it) names it
 * and *ret_parameters are its parameters; -errno: the connection broke. timeout_nsec 0: wait for ever. */
enum { VARLINK_E_ERROR = 1 };
int varlink_call(int fd, const char *method, json_t *parameters /* taken over, may be NULL */, uint64_t timeout_nsec,
                 json_t **ret_parameters, char **ret_error);

/* A call with "more": the handler is called for every reply (parameters is borrowed); it returns false to stop reading,
 * after which the connection is good only for close(2). Ends like varlink_call(), the parameters of an error apart. */
int varlink_call_more(int fd, const char *method, json_t *parameters,
                      bool (*handler)(void *userdata, json_t *parameters), void *userdata, char **ret_error);
