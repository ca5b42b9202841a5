/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "loop/loop.h"

#include <jansson.h>
#include <sys/types.h>

/*
 * The interface org.ksmduser.Daemon over a Varlink server: permissions, parameters, framing and Monitor are dealt with
 * here; what the methods mean is the manager's, behind plain functions. The shape of every result is told by
 * include/ksmd-user/org.ksmduser.Daemon.varlink.
 */
typedef struct Service Service;

/* An answer that is owed. It outlives its peer and the service, so whoever accepted it need not know of either. */
typedef struct VarlinkCall ServiceCall;

/* What an operation that was not done says, beside a negative errno (org.ksmduser.Daemon.Failed). */
enum {
        SERVICE_E_NOT_FOUND = 1,        /* .NotFound: the process or cgroup that was named */
        SERVICE_E_BUSY,                 /* .Busy: not now */
        SERVICE_E_REFUSED,              /* .Refused: not in this state or configuration */
};

/*
 * Run on the loop's thread, never re-entered, must not block. The get functions return a new reference, NULL only when
 * out of memory. The others return 0, -errno or SERVICE_E_*; where it is not 0, *ret_reason may be set to a
 * sentence for people (static or owned by the callee till the next call); outputs are new references.
 *
 * scan_now and unmerge answer later: having returned 0, they own the call and end it exactly once, now or at any time,
 * by service_call_end(); otherwise they have nothing to do with it.
 */
typedef struct ServiceOps {
        json_t *(*get_status)(void *userdata);          /* the parameters of GetStatus's reply */
        json_t *(*get_stats)(void *userdata);           /* {"daemon": …, "domains": […], "cgroups": […]} */
        json_t *(*list_targets)(void *userdata);        /* an array of Target */
        int (*explain)(void *userdata, pid_t pid, json_t **ret, const char **ret_reason);
        int (*scan_now)(void *userdata, ServiceCall *call, const char **ret_reason);
        int (*pause)(void *userdata, const char **ret_reason);
        int (*resume)(void *userdata, const char **ret_reason);
        int (*unmerge)(void *userdata, const char *cgroup /* borrowed, no leading '/' */, ServiceCall *call,
                       const char **ret_reason);
        int (*reload)(void *userdata, json_t **ret_warnings /* an array of strings */, const char **ret_reason);
} ServiceOps;

/* result and reason as the operations above return them; parameters is taken over (NULL: none) and used with result 0:
 * scan_now NULL, unmerge {"pages": N}. */
void service_call_end(ServiceCall *call, int result, const char *reason, json_t *parameters);

/* fd: a listening socket (varlink_listen(), or from systemd), taken over also on failure. ops is borrowed. Every
 * function of it must be there. */
int service_new(Loop *loop, int fd, const ServiceOps *ops, void *userdata, Service **ret);
Service *service_free(Service *service); /* drops every connection; answers that are owed go nowhere. Not
                                        * from inside an operation. */
DEFINE_CLEANUP(Service, service_free)

/* The text of the interface file, as installed. */
extern const char service_interface_description[];
