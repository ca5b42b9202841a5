/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * org.ksmduser.Daemon: turns Varlink calls into the manager's plain operations and their outcomes into replies.
 *
 * Parameters are checked to the letter (a misspelt one must not be taken for a default). A call that is answered later
 * is the Varlink call itself: nobody asks to be told of its end, so the server keeps it usable after its peer has gone.
 * Monitor needs no more of the manager than GetStats: each peer has a timer of its own, and a peer that does not read
 * is dropped by the server's queue limit.
 */

#include "control/service.h"

#include "control/varlink.h"

#include <limits.h>
#include <string.h>

#define INTERFACE "org.ksmduser.Daemon"
#define MONITOR_MSEC_MIN 100
#define MONITOR_MSEC_MAX 86400000

typedef struct Monitor {
        Service *service;
        VarlinkCall *call;
        LoopSource *timer;
} Monitor;

struct Service {
        Loop *loop;
        const ServiceOps *ops;
        void *userdata;
        VarlinkServer *server;
};

/* Answers with the error that a result other than 0 stands for. */
static void answer_error(VarlinkCall *call, int result, const char *reason) {
        switch (result) {
        case SERVICE_E_NOT_FOUND:
                varlink_call_error(call, INTERFACE ".NotFound", json_pack("{ss}", "what", reason ?: "no such object"));
                break;
        case SERVICE_E_BUSY:
                varlink_call_error(call, INTERFACE ".Busy", json_pack("{ss}", "reason", reason ?: "busy"));
                break;
        case SERVICE_E_REFUSED:
                varlink_call_error(call, INTERFACE ".Refused", json_pack("{ss}", "reason", reason ?: "refused"));
                break;
        default:
                varlink_call_error(call, INTERFACE ".Failed",
                                   json_pack("{ss}", "reason", reason ?: strerror(result < 0 ? -result : EIO)));
        }
}

void service_call_end(ServiceCall *call, int result, const char *reason, json_t *parameters) {
        if (result == 0)
                varlink_call_reply(call, parameters);
        else {
                json_decref(parameters);
                answer_error(call, result, reason);
        }
}

/* Whether only parameters of these names are given (NULL: none more); otherwise the call has ended. */
static bool only_known(VarlinkCall *call, const json_t *params, const char *known) {
        const char *name;
        json_t *value;

        json_object_foreach((json_t *)params, name, value)
                if (!known || strcmp(name, known) != 0) {
                        varlink_call_invalid_parameter(call, name);
                        return false;
                }
        return true;
}

/* The one integer parameter of a call; otherwise the call has ended. */
static bool get_integer(VarlinkCall *call, const json_t *params, const char *name, json_int_t min, json_int_t max,
                        json_int_t *ret) {
        json_t *value = json_object_get(params, name);

        if (!only_known(call, params, name))
                return false;
        if (!json_is_integer(value) || json_integer_value(value) < min || json_integer_value(value) > max) {
                varlink_call_invalid_parameter(call, name);
                return false;
        }
        *ret = json_integer_value(value);
        return true;
}

/* Answers with what a get operation returned. */
static void answer_with(VarlinkCall *call, json_t *parameters) {
        service_call_end(call, parameters ? 0 : -ENOMEM, NULL, parameters);
}

static void on_get_status(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;

        if (only_known(call, params, NULL))
                answer_with(call, service->ops->get_status(service->userdata));
}

static void on_get_stats(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;

        if (only_known(call, params, NULL))
                answer_with(call, service->ops->get_stats(service->userdata));
}

static void on_list_targets(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        json_t *targets;

        if (!only_known(call, params, NULL))
                return;
        targets = service->ops->list_targets(service->userdata);
        answer_with(call, targets ? json_pack("{so}", "targets", targets) : NULL);
}

static void on_explain(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *reason = NULL;
        json_t *explanation = NULL;
        json_int_t pid;
        int r;

        if (!get_integer(call, params, "pid", 1, INT_MAX, &pid))
                return;
        r = service->ops->explain(service->userdata, (pid_t)pid, &explanation, &reason);
        service_call_end(call, r, reason, explanation);
}

static void on_scan_now(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *reason = NULL;
        int r;

        if (!only_known(call, params, NULL))
                return;
        r = service->ops->scan_now(service->userdata, call, &reason);
        if (r != 0)
                answer_error(call, r, reason);
}

static void on_pause(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *reason = NULL;
        int r;

        if (!only_known(call, params, NULL))
                return;
        r = service->ops->pause(service->userdata, &reason);
        service_call_end(call, r, reason, NULL);
}

static void on_resume(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *reason = NULL;
        int r;

        if (!only_known(call, params, NULL))
                return;
        r = service->ops->resume(service->userdata, &reason);
        service_call_end(call, r, reason, NULL);
}

static void on_unmerge(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *cgroup, *reason = NULL;
        int r;

        if (!only_known(call, params, "cgroup"))
                return;
        cgroup = json_string_value(json_object_get(params, "cgroup"));
        if (!cgroup) {
                varlink_call_invalid_parameter(call, "cgroup");
                return;
        }
        cgroup += strspn(cgroup, "/");
        r = service->ops->unmerge(service->userdata, cgroup, call, &reason);
        if (r != 0)
                answer_error(call, r, reason);
}

static void on_reload(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        const char *reason = NULL;
        json_t *warnings = NULL;
        int r;

        if (!only_known(call, params, NULL))
                return;
        r = service->ops->reload(service->userdata, &warnings, &reason);
        if (r == 0)
                answer_with(call, json_pack("{so}", "warnings", warnings ?: json_array()));
        else
                service_call_end(call, r, reason, warnings);
}

static void monitor_send(Monitor *monitor) {
        Service *service = monitor->service;
        json_t *stats = service->ops->get_stats(service->userdata);

        if (stats) /* else out of memory: perhaps not the next time */
                varlink_call_continues(monitor->call, stats);
}

static int on_monitor_timer(void *userdata, LoopSource *source) {
        monitor_send(userdata);
        return 0;
}

static void on_monitor_close(void *userdata, VarlinkCall *call) {
        Monitor *monitor = userdata;

        loop_source_free(monitor->timer);
        free(monitor);
}

static void on_monitor(void *userdata, VarlinkCall *call, const json_t *params) {
        Service *service = userdata;
        json_int_t msec;
        uint64_t nsec;
        Monitor *monitor;
        int r;

        if (!get_integer(call, params, "interval", 1, MONITOR_MSEC_MAX, &msec))
                return;
        if (!varlink_call_wants_more(call)) {
                varlink_call_error(call, "org.varlink.service.ExpectedMore", NULL);
                return;
        }
        nsec = (uint64_t)MAX_OF(msec, (json_int_t)MONITOR_MSEC_MIN) * NSEC_PER_MSEC;
        monitor = calloc(1, sizeof *monitor);
        if (!monitor) {
                answer_error(call, -ENOMEM, NULL);
                return;
        }
        *monitor = (Monitor){ .service = service, .call = call };
        r = loop_add_timer(service->loop, nsec, nsec, on_monitor_timer, monitor, &monitor->timer);
        if (r < 0) {
                free(monitor);
                answer_error(call, r, NULL);
                return;
        }
        varlink_call_on_close(call, on_monitor_close, monitor);
        monitor_send(monitor);
}

static const VarlinkMethod methods[] = {
        { .name = INTERFACE ".GetStatus", .handler = on_get_status },
        { .name = INTERFACE ".GetStats", .handler = on_get_stats },
        { .name = INTERFACE ".ListTargets", .handler = on_list_targets },
        { .name = INTERFACE ".Explain", .handler = on_explain },
        { .name = INTERFACE ".ScanNow", .privileged = true, .handler = on_scan_now },
        { .name = INTERFACE ".Pause", .privileged = true, .handler = on_pause },
        { .name = INTERFACE ".Resume", .privileged = true, .handler = on_resume },
        { .name = INTERFACE ".Unmerge", .privileged = true, .handler = on_unmerge },
        { .name = INTERFACE ".Reload", .privileged = true, .handler = on_reload },
        { .name = INTERFACE ".Monitor", .more = true, .handler = on_monitor },
};

static const VarlinkInterface interfaces[] = {
        { .name = INTERFACE, .description = service_interface_description },
};

int service_new(Loop *loop, int fd, const ServiceOps *ops, void *userdata, Service **ret) {
        _cleanup_free_ Service *service = calloc(1, sizeof *service);
        int r;

        if (!service) {
                safe_close(fd);
                return -ENOMEM;
        }
        *service = (Service){ .loop = loop, .ops = ops, .userdata = userdata };
        r = varlink_server_new(loop, fd, methods, ELEMENTSOF(methods), interfaces, ELEMENTSOF(interfaces), service,
                               &service->server);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(service);
        return 0;
}

Service *service_free(Service *service) {
        if (!service)
                return NULL;
        varlink_server_free(service->server);
        free(service);
        return NULL;
}
