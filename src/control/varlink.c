/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The Varlink server.
 *
 * A connection works on one call at a time and takes the next one only when the answer to the last has left: what a
 * peer pipelines waits in its own socket, so its queue never holds more than one answer, except for a call that answers
 * again and again ("more"), whose queue has a limit. In every state the connection waits for exactly one thing
 * (connection_update() is the whole of that machine), and wherever it waits for the peer to get on with something there
 * is a deadline for the whole of it, not one that each byte moves.
 *
 * Connections end in their own handlers only, never inside varlink_call_*(): whoever answers cannot lose the ground
 * under his feet. A call outlives its connection when nobody asked to be told: its answer then goes nowhere.
 */

#include "control/varlink.h"

#include "control/varlink-message.h"

#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>

#define CONNECTIONS_MAX 32U
#define CONNECTIONS_OTHERS_MAX 24U              /* of them, of who is not root: root always gets in */
#define ACCEPTS_MAX 64U                         /* in one go */
#define QUEUE_MAX ((size_t)1 << 20)             /* bytes, before another answer of a call with "more" is queued */
#define PATIENCE_NSEC (10 * NSEC_PER_SEC)
#define ACCEPT_PAUSE_NSEC (100 * NSEC_PER_MSEC) /* when the process or the host is out of descriptors or memory */

typedef struct Connection Connection;

struct VarlinkCall {
        Connection *connection;         /* NULL: the peer has gone */
        uid_t uid;
        bool more, oneway;
        void (*on_close)(void *userdata, VarlinkCall *call);
        void *on_close_userdata;
};

/* What a deadline is running for. */
typedef enum Deadline {
        DEADLINE_NONE,
        DEADLINE_REQUEST,               /* the peer owes the rest of a message, or its first one */
        DEADLINE_DRAIN,                 /* the peer is to read what is queued */
} Deadline;

struct Connection {
        VarlinkServer *server;
        TAILQ_ENTRY(Connection) link;
        int fd;
        LoopSource *io, *timer;
        struct ucred peer;
        VarlinkBuffer input, output;
        VarlinkCall *call;              /* being worked on */
        Deadline deadline;
        bool called;                    /* has sent a whole message */
        bool eof;                       /* sends no more */
        bool doomed;                    /* ends as soon as its timer runs */
};

struct VarlinkServer {
        Loop *loop;
        int fd;
        LoopSource *accept, *accept_pause;
        const VarlinkMethod *methods;
        size_t n_methods;
        const VarlinkInterface *interfaces;
        size_t n_interfaces;
        void *userdata;
        uint64_t patience_nsec;
        TAILQ_HEAD(, Connection) connections;
        unsigned n_connections, n_others;
        VarlinkServerStats stats;
};

static Connection *connection_free(Connection *connection) {
        VarlinkCall *call;

        if (!connection)
                return NULL;
        TAILQ_REMOVE(&connection->server->connections, connection, link);
        connection->server->n_connections--;
        connection->server->n_others -= connection->peer.uid != 0;
        call = TAKE_PTR(connection->call);
        if (call) {
                call->connection = NULL;
                if (call->on_close) {
                        call->on_close(call->on_close_userdata, call);
                        free(call);
                }
        }
        loop_source_free(connection->io);
        loop_source_free(connection->timer);
        safe_close(connection->fd);
        varlink_buffer_done(&connection->input);
        varlink_buffer_done(&connection->output);
        free(connection);
        return NULL;
}

static void connection_doom(Connection *connection) {
        connection->doomed = true;
        loop_source_set_timer(connection->timer, 0, 0);
}

/* What to wait for now, and for how long. */
static void connection_update(Connection *connection) {
        uint32_t events = POLLHUP;
        Deadline deadline = DEADLINE_NONE;

        if (connection->doomed)
                return;
        if (varlink_buffer_size(&connection->output) > 0) {
                events |= POLLOUT;
                deadline = DEADLINE_DRAIN;
        } else if (connection->call)
                ;
        else if (connection->eof || varlink_buffer_ready(&connection->input, VARLINK_REQUEST_MAX))
                events |= POLLOUT; /* it is writable: comes back for the next message after the others had their turn */
        else {
                events |= POLLIN;
                if (!connection->called || varlink_buffer_size(&connection->input) > 0)
                        deadline = DEADLINE_REQUEST;
        }
        loop_source_set_events(connection->io, events);
        if (deadline != connection->deadline) {
                connection->deadline = deadline;
                loop_source_set_timer(connection->timer,
                                      deadline == DEADLINE_NONE ? UINT64_MAX : connection->server->patience_nsec, 0);
        }
}

/* Consumes parameters, which may be NULL: {}. */
static void connection_queue(Connection *connection, const char *error, json_t *parameters, bool continues) {
        json_t *message;
        int r = -ENOMEM;

        if (!parameters)
                parameters = json_object();
        message = json_pack("{so*}", "parameters", parameters); /* takes over parameters, also when it fails */
        if (message && (!error || json_object_set_new(message, "error", json_string(error)) == 0) &&
            (!continues || json_object_set_new(message, "continues", json_true()) == 0))
                r = varlink_buffer_add(&connection->output, message);
        json_decref(message);
        if (r < 0)
                connection_doom(connection);
        else
                connection_update(connection);
}

/* Ends the call; parameters is taken over. */
static void call_end(VarlinkCall *call, const char *error, json_t *parameters) {
        Connection *connection = call->connection;

        if (connection) {
                connection->call = NULL;
                if (error)
                        connection->server->stats.errors++;
        }
        if (connection && !call->oneway)
                connection_queue(connection, error, parameters, false);
        else {
                json_decref(parameters);
                if (connection)
                        connection_update(connection);
        }
        free(call);
}

void varlink_call_reply(VarlinkCall *call, json_t *parameters) {
        call_end(call, NULL, parameters);
}

void varlink_call_error(VarlinkCall *call, const char *error, json_t *parameters) {
        call_end(call, error, parameters);
}

void varlink_call_continues(VarlinkCall *call, json_t *parameters) {
        Connection *connection = call->connection;

        if (!connection || !call->more || connection->doomed)
                json_decref(parameters);
        else if (varlink_buffer_size(&connection->output) > QUEUE_MAX) {
                json_decref(parameters);
                connection->server->stats.dropped_slow++;
                connection_doom(connection);
        } else
                connection_queue(connection, NULL, parameters, true);
}

bool varlink_call_wants_more(const VarlinkCall *call) { return call->more; }

void varlink_call_on_close(VarlinkCall *call, void (*handler)(void *userdata, VarlinkCall *call), void *userdata) {
        call->on_close = handler;
        call->on_close_userdata = userdata;
}

void varlink_call_invalid_parameter(VarlinkCall *call, const char *name) {
        varlink_call_error(call, "org.varlink.service.InvalidParameter", json_pack("{ss}", "parameter", name));
}

static void get_info(VarlinkServer *server, VarlinkCall *call, const json_t *params) {
        json_t *names = json_array();

        json_array_append_new(names, json_string("org.varlink.service"));
        for (size_t i = 0; i < server->n_interfaces; i++)
                json_array_append_new(names, json_string(server->interfaces[i].name));
        varlink_call_reply(call, json_pack("{ssssssssso}", "vendor", "ksmd-user", "product", "ksmd-user", "version",
                                           KSMD_USER_VERSION, "url", "", "interfaces", names));
}

/* Told by https://varlink.org/Service. */
static const char service_description[] =
        "# The Varlink Service Interface is provided by every varlink service.\n"
        "interface org.varlink.service\n\n"
        "method GetInfo() -> (\n"
        "  vendor: string,\n  product: string,\n  version: string,\n  url: string,\n  interfaces: []string\n)\n\n"
        "method GetInterfaceDescription(interface: string) -> (description: string)\n\n"
        "error InterfaceNotFound (interface: string)\n"
        "error MethodNotFound (method: string)\n"
        "error MethodNotImplemented (method: string)\n"
        "error InvalidParameter (parameter: string)\n"
        "error PermissionDenied ()\n"
        "error ExpectedMore ()\n";

static void get_interface_description(VarlinkServer *server, VarlinkCall *call, const json_t *params) {
        const char *name = json_string_value(json_object_get(params, "interface"));
        const char *description = NULL;

        if (!name) {
                varlink_call_invalid_parameter(call, "interface");
                return;
        }
        if (strcmp(name, "org.varlink.service") == 0)
                description = service_description;
        for (size_t i = 0; i < server->n_interfaces; i++)
                if (strcmp(name, server->interfaces[i].name) == 0)
                        description = server->interfaces[i].description;
        if (description)
                varlink_call_reply(call, json_pack("{ss}", "description", description));
        else
                varlink_call_error(call, "org.varlink.service.InterfaceNotFound", json_pack("{ss}", "interface", name));
}

/* Neither a method of ours: says what is unknown about it. */
static void call_unknown(VarlinkServer *server, VarlinkCall *call, const char *method) {
        const char *dot = strrchr(method, '.');
        size_t size = dot ? (size_t)(dot - method) : strlen(method);
        bool known = size == strlen("org.varlink.service") && memcmp(method, "org.varlink.service", size) == 0;

        for (size_t i = 0; i < server->n_interfaces; i++)
                known |= size == strlen(server->interfaces[i].name) &&
                         memcmp(method, server->interfaces[i].name, size) == 0;
        if (known)
                varlink_call_error(call, "org.varlink.service.MethodNotFound", json_pack("{ss}", "method", method));
        else
                varlink_call_error(call, "org.varlink.service.InterfaceNotFound",
                                   json_pack("{ss%}", "interface", method, size));
}

static void call_dispatch(VarlinkServer *server, VarlinkCall *call, const char *method, const json_t *params) {
        if (strcmp(method, "org.varlink.service.GetInfo") == 0) {
                get_info(server, call, params);
                return;
        }
        if (strcmp(method, "org.varlink.service.GetInterfaceDescription") == 0) {
                get_interface_description(server, call, params);
                return;
        }
        for (size_t i = 0; i < server->n_methods; i++) {
                const VarlinkMethod *m = &server->methods[i];

                if (strcmp(method, m->name) != 0)
                        continue;
                if (m->privileged && call->uid != 0) {
                        varlink_call_error(call, "org.varlink.service.PermissionDenied", NULL);
                        return;
                }
                call->more &= m->more;
                m->handler(server->userdata, call, params);
                return;
        }
        call_unknown(server, call, method);
}

/* An absent flag is false. -EBADMSG: it is no flag. */
static int message_flag(const json_t *message, const char *name, bool *ret) {
        json_t *value = json_object_get(message, name);

        if (value && !json_is_boolean(value))
                return -EBADMSG;
        *ret = json_is_true(value);
        return 0;
}

/* Takes the next message and begins its call. -errno: the connection is beyond use. */
static int connection_begin_call(Connection *connection) {
        json_t *message, *params, *none = NULL;
        const char *method;
        VarlinkCall *call;
        bool more, oneway, upgrade;
        int r;

        r = varlink_buffer_take(&connection->input, VARLINK_REQUEST_MAX, &message);
        if (r != 0)
                return r > 0 ? 0 : r;
        connection->called = true;
        connection->deadline = DEADLINE_NONE;
        loop_source_set_timer(connection->timer, UINT64_MAX, 0);

        method = json_string_value(json_object_get(message, "method"));
        params = json_object_get(message, "parameters");
        if (!method || (params && !json_is_object(params)) || message_flag(message, "more", &more) < 0 ||
            message_flag(message, "oneway", &oneway) < 0 || message_flag(message, "upgrade", &upgrade) < 0 ||
            (more && oneway)) {
                json_decref(message);
                return -EBADMSG;
        }
        call = calloc(1, sizeof *call);
        if (!call) {
                json_decref(message);
                return -ENOMEM;
        }
        *call = (VarlinkCall){
                .connection = connection,
                .uid = connection->peer.uid,
                .more = more,
                .oneway = oneway,
        };
        connection->call = call;
        connection->server->stats.calls++;
        if (!params)
                params = none = json_object();
        if (upgrade)
                varlink_call_invalid_parameter(call, "upgrade");
        else
                call_dispatch(connection->server, call, method, params);
        json_decref(none);
        json_decref(message);
        return 0;
}

/* Moves on as far as that goes without waiting, but by one call only. VARLINK_MESSAGE_E_EOF: it is over. */
static int connection_step(Connection *connection) {
        int r;

        r = varlink_buffer_send(&connection->output, connection->fd);
        if (r == 0 && !connection->call)
                r = connection_begin_call(connection);
        if (r == 0)
                r = varlink_buffer_send(&connection->output, connection->fd);
        if (r < 0)
                return r;
        if (connection->eof && !connection->call && varlink_buffer_size(&connection->output) == 0 &&
            !varlink_buffer_ready(&connection->input, VARLINK_REQUEST_MAX))
                return VARLINK_MESSAGE_E_EOF;
        connection_update(connection);
        return 0;
}

static int on_connection_io(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Connection *connection = userdata;
        int r = 0;

        if (connection->doomed)
                return 0;
        if (revents & POLLIN) {
                r = varlink_buffer_receive(&connection->input, fd, VARLINK_REQUEST_MAX);
                if (r == VARLINK_MESSAGE_E_EOF)
                        connection->eof = true;
        } else if (revents & (POLLHUP | POLLERR) && connection->call)
                r = -EPIPE;
        if (r >= 0)
                r = connection_step(connection);
        if (r == -EMSGSIZE)
                connection->server->stats.dropped_oversized++;
        else if (r == -EBADMSG)
                connection->server->stats.dropped_malformed++;
        if (r != 0)
                connection_free(connection);
        return 0;
}

static int on_connection_timer(void *userdata, LoopSource *source) {
        Connection *connection = userdata;

        if (!connection->doomed)
                connection->server->stats.dropped_slow++;
        connection_free(connection);
        return 0;
}

static int connection_new(VarlinkServer *server, int fd /* taken over */, const struct ucred *peer) {
        Connection *connection = calloc(1, sizeof *connection);
        int r;

        if (!connection) {
                safe_close(fd);
                return -ENOMEM;
        }
        connection->server = server;
        connection->fd = fd;
        connection->peer = *peer;
        TAILQ_INSERT_TAIL(&server->connections, connection, link);
        server->n_connections++;
        server->n_others += peer->uid != 0;
        r = loop_add_io(server->loop, fd, POLLHUP, on_connection_io, connection, &connection->io);
        if (r == 0)
                r = loop_add_timer(server->loop, UINT64_MAX, 0, on_connection_timer, connection, &connection->timer);
        if (r < 0) {
                connection_free(connection);
                return r;
        }
        connection_update(connection);
        server->stats.connections++;
        return 0;
}

static bool has_room(const VarlinkServer *server, const struct ucred *peer) {
        return server->n_connections < CONNECTIONS_MAX && (peer->uid == 0 || server->n_others < CONNECTIONS_OTHERS_MAX);
}

static int on_accept(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        VarlinkServer *server = userdata;

        for (unsigned i = 0; i < ACCEPTS_MAX; i++) {
                int connected = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
                struct ucred peer;
                socklen_t size = sizeof peer;

                if (connected < 0 && (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR))
                        return 0;
                if (connected < 0) {
                        /* It stays ready and would spin: looks again a little later. */
                        loop_source_set_events(server->accept, 0);
                        loop_source_set_timer(server->accept_pause, ACCEPT_PAUSE_NSEC, 0);
                        return 0;
                }
                if (getsockopt(connected, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || !has_room(server, &peer)) {
                        server->stats.refused++;
                        safe_close(connected);
                } else
                        connection_new(server, connected, &peer);
        }
        return 0;
}

static int on_accept_pause(void *userdata, LoopSource *source) {
        VarlinkServer *server = userdata;

        return loop_source_set_events(server->accept, POLLIN);
}

int varlink_server_new(Loop *loop, int fd, const VarlinkMethod *methods, size_t n_methods,
                       const VarlinkInterface *interfaces, size_t n_interfaces, void *userdata, VarlinkServer **ret) {
        _cleanup_(varlink_server_freep) VarlinkServer *server = calloc(1, sizeof *server);
        int r;

        if (!server) {
                safe_close(fd);
                return -ENOMEM;
        }
        *server = (VarlinkServer){
                .loop = loop,
                .fd = fd,
                .methods = methods,
                .n_methods = n_methods,
                .interfaces = interfaces,
                .n_interfaces = n_interfaces,
                .userdata = userdata,
                .patience_nsec = PATIENCE_NSEC,
        };
        TAILQ_INIT(&server->connections);
        r = fcntl(fd, F_GETFL);
        if (r < 0 || fcntl(fd, F_SETFL, r | O_NONBLOCK) < 0)
                return -errno;
        r = loop_add_io(loop, fd, POLLIN, on_accept, server, &server->accept);
        if (r < 0)
                return r;
        r = loop_add_timer(loop, UINT64_MAX, 0, on_accept_pause, server, &server->accept_pause);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(server);
        return 0;
}

VarlinkServer *varlink_server_free(VarlinkServer *server) {
        Connection *connection;

        if (!server)
                return NULL;
        while ((connection = TAILQ_FIRST(&server->connections)))
                connection_free(connection);
        loop_source_free(server->accept);
        loop_source_free(server->accept_pause);
        safe_close(server->fd);
        free(server);
        return NULL;
}

void varlink_server_set_patience(VarlinkServer *server, uint64_t nsec) { server->patience_nsec = nsec; }
void varlink_server_stats(const VarlinkServer *server, VarlinkServerStats *ret) { *ret = server->stats; }
