/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* How ksmctl talks to the daemon, and what it says when that fails. */

#include "control/varlink-client.h"
#include "ctl/ctl.h"
#include "ctl/format.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define INTERFACE "org.ksmduser.Daemon"
#define TIMEOUT_NSEC (30 * NSEC_PER_SEC)

int ctl_fail(const char *format, ...) {
        _cleanup_free_ char *text = NULL;
        va_list ap;

        va_start(ap, format);
        if (vasprintf(&text, format, ap) < 0)
                text = NULL;
        va_end(ap);
        fprintf(stderr, "ksmctl: %s\n", text ? format_printable(text) : "out of memory");
        return CTL_FAILED;
}

/* The daemon refused: the sentence it gave, or the name of the error. */
static int fail_error(const char *error, const json_t *parameters) {
        const char *detail = NULL;

        if (strcmp(error, "org.varlink.service.PermissionDenied") == 0)
                return ctl_fail("only root may do this");
        if (strncmp(error, INTERFACE ".", strlen(INTERFACE ".")) == 0) {
                detail = json_string_value(json_object_get(parameters, "reason"));
                if (!detail)
                        detail = json_string_value(json_object_get(parameters, "what"));
                error += strlen(INTERFACE ".");
        } else
                detail = json_string_value(json_object_get(parameters, "parameter"));
        return detail ? ctl_fail("%s: %s", error, detail) : ctl_fail("%s", error);
}

int ctl_call(const Ctl *ctl, const char *method, json_t *parameters, bool patient, json_t **ret) {
        _cleanup_free_ char *name = NULL, *error = NULL;
        _cleanup_close_ int fd = -EBADF;
        json_t *reply = NULL;
        int r;

        r = varlink_connect(ctl->socket, &fd);
        if (r < 0) {
                json_decref(parameters);
                if (r == -ENOENT || r == -ECONNREFUSED || r == -ENOTDIR) {
                        ctl_fail("no daemon listens on %s", ctl->socket);
                        return CTL_NO_DAEMON;
                }
                if (r == -EACCES || r == -EPERM)
                        return ctl_fail("%s: %s: only root, or whom the socket's mode lets, may connect", ctl->socket,
                                        strerror(-r));
                return ctl_fail("%s: %s", ctl->socket, strerror(-r));
        }
        if (asprintf(&name, "%s.%s", INTERFACE, method) < 0) {
                name = NULL;
                json_decref(parameters);
                return ctl_fail("out of memory");
        }
        r = varlink_call(fd, name, parameters, patient ? 0 : TIMEOUT_NSEC, &reply, &error);
        if (r == VARLINK_E_ERROR) {
                r = fail_error(error, reply);
                json_decref(reply);
                return r;
        }
        if (r == -ECONNRESET)
                return ctl_fail("the daemon closed the connection: it is stopping, or too many others are connected");
        if (r == -ETIMEDOUT)
                return ctl_fail("the daemon does not answer");
        if (r < 0)
                return ctl_fail("talking to the daemon: %s", strerror(-r));
        *ret = reply;
        return CTL_DONE;
}

int ctl_print_json(const json_t *value) {
        if (json_dumpf(value, stdout, JSON_INDENT(2)) < 0 || putchar('\n') == EOF)
                return ctl_fail("the output could not be written");
        return CTL_DONE;
}
