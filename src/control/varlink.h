/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "loop/loop.h"

#include <jansson.h>
#include <sys/types.h>

/*
 * A Varlink server (https://varlink.org/Wire-Protocol): NUL-terminated JSON messages over a Unix stream socket.
 * Bounded for hostile peers: 64 KiB a request, 32 connections (24 of who is not root), one call at a time a connection, a
 * peer that does not read its replies is dropped when its queue passes a limit; nothing here ever blocks.
 */
typedef struct VarlinkServer VarlinkServer;
typedef struct VarlinkCall VarlinkCall;

typedef struct VarlinkMethod {
        const char *name;       /* fully qualified: "org.ksmduser.Daemon.GetStats" */
        bool privileged;        /* root (SO_PEERCRED uid 0) only: others get org.varlink.service.PermissionDenied */
        bool more;              /* may be called with "more" */
        /* Must end the call, now or later, by varlink_call_reply() or varlink_call_error(). params is borrowed. */
        void (*handler)(void *userdata, VarlinkCall *call, const json_t *params);
} VarlinkMethod;

typedef struct VarlinkInterface {
        const char *name, *description; /* description: the interface file's text */
} VarlinkInterface;

/* fd: a listening socket, taken over. methods and interfaces are borrowed for the server's life. org.varlink.service
 * (GetInfo, GetInterfaceDescription) is added by the server. */
int varlink_server_new(Loop *loop, int fd, const VarlinkMethod *methods, size_t n_methods,
                       const VarlinkInterface *interfaces, size_t n_interfaces, void *userdata, VarlinkServer **ret);
VarlinkServer *varlink_server_free(VarlinkServer *server); /* drops every connection; not from inside a handler */
DEFINE_CLEANUP(VarlinkServer, varlink_server_free)

/* How long a peer may take over its first request, over the rest of one it has begun, and over reading what is queued
 * for it, before it is dropped. Default: 10 s. For connections and deadlines that begin afterwards. */
void varlink_server_set_patience(VarlinkServer *server, uint64_t nsec);

/* Binds and listens at path (absolute; mode 0600, parents made), replacing a socket nobody listens on. -EADDRINUSE: a
 * daemon is already there. -EAGAIN, to be tried again: one that was killed, whose socket the kernel has not closed yet; or
 * somebody has locked the directory (flock(2)), another daemon that starts perhaps. -EEXIST: something else is there.
 * -ENAMETOOLONG: longer than a socket's path may be. */
int varlink_listen(const char *path, int *ret_fd);

/* Each takes over parameters (NULL: {}) and, but for continues, ends the call. */
void varlink_call_reply(VarlinkCall *call, json_t *parameters);
void varlink_call_continues(VarlinkCall *call, json_t *parameters);
void varlink_call_error(VarlinkCall *call, const char *error, json_t *parameters);
void varlink_call_invalid_parameter(VarlinkCall *call, const char *name); /* org.varlink.service.InvalidParameter */
bool varlink_call_wants_more(const VarlinkCall *call);
/* A call that is not answered at once: told when the peer went away first (the call must not be used afterwards). Who
 * does not ask to be told ends the call as if nothing had happened. */
void varlink_call_on_close(VarlinkCall *call, void (*handler)(void *userdata, VarlinkCall *call), void *userdata);

typedef struct VarlinkServerStats {
        uint64_t connections, refused, calls, errors, dropped_slow, dropped_oversized, dropped_malformed;
} VarlinkServerStats;
void varlink_server_stats(const VarlinkServer *server, VarlinkServerStats *ret);
