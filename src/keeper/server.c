/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/server.h"

#include "base/clock.h"
#include "base/log.h"
#include "keeper/protocol.h"
#include "keeper/serve.h"
#include "keeper/store.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/*
 * One thread, one epoll instance, level-triggered: faults before requests, and of each descriptor only so many messages
 * in a round, so that none starves the others.
 *
 * Nothing here waits for a peer. A reply that does not fit into the socket ends that connection. So notices leave room for
 * replies: a few go when the socket is writable, which to the kernel it is while no more than a quarter of it is full; the
 * others are kept back until it is again (a child's userfaultfd is held by us meanwhile, and offered until somebody has a
 * copy).
 */
#define PEERS_MAX 8U
#define READ_MAX 64U                    /* messages of one userfaultfd in a round */
#define DRAIN_MAX 65536U                /* in a KEEPER_SYNC: its process has no more threads than that */
#define EVENTS_MAX 64
#define NOTICES_MAX 16U                  /* at a time: less than a quarter of any socket */
#define OTHERS_MAX (PEERS_MAX + 2)      /* that are watched beside guards */
#define SWEEP_NSEC NSEC_PER_SEC
/* Waiting for the first daemon to say something: it started us, so it will. */
#define PATIENCE_NSEC (10 * NSEC_PER_SEC)

typedef struct Server {
        Hold *hold;
        const ServerOptions *options;
        int epoll_fd;
        int peers[PEERS_MAX];
        uint32_t n_peers;
        int daemon;             /* the peer that is told of children: who greeted last; -EBADF */
        int unsent_from;        /* no child to be offered is a lower descriptor; hold->end: there is none */
        bool telling;           /* the daemon's socket is watched for being writable */
        bool had_peer;
        bool starving;          /* there was no descriptor left for a child's guard since the last sweep */
        uint64_t started_nsec, swept_nsec, sweep_nsec; /* when the last one was, and the next one is due */
} Server;

static int watch(Server *server, int fd) {
        struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

        return epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 || errno == EEXIST ? 0 : -errno;
}

static bool is_peer(const Server *server, int fd) {
        for (uint32_t i = 0; i < server->n_peers; i++)
                if (server->peers[i] == fd)
                        return true;
        return false;
}

static void close_peer(Server *server, int fd) {
        for (uint32_t i = 0; i < server->n_peers; i++)
                if (server->peers[i] == fd) {
                        server->peers[i] = server->peers[--server->n_peers];
                        break;
                }
        if (server->daemon == fd) {
                server->daemon = -EBADF;
                server->telling = false;
        }
        safe_close(fd);
}

static void set_telling(Server *server, bool telling) {
        struct epoll_event event = { .events = EPOLLIN | (telling ? EPOLLOUT : 0), .data.fd = server->daemon };

        if (server->daemon >= 0 && telling != server->telling &&
            epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, server->daemon, &event) == 0)
                server->telling = telling;
}

/* Offers the daemon, whose socket is writable, copies of children's userfaultfds it has not got. */
static void send_children(Server *server) {
        Hold *hold = server->hold;
        unsigned n = 0;

        for (int fd = server->unsent_from; fd < hold->end; fd++) {
                KeeperMessage notice = { .op = KEEPER_FORKED, .protocol = KEEPER_PROTOCOL };

                server->unsent_from = fd;
                if (!hold->entries[fd].id || !hold->entries[fd].unsent)
                        continue;
                if (n++ == NOTICES_MAX)
                        return;
                notice.item = hold->entries[fd].item;
                if (keeper_message_send(server->daemon, &notice, fd, MSG_DONTWAIT) < 0)
                        return;
                hold->entries[fd].unsent = false;
        }
        server->unsent_from = hold->end;
        set_telling(server, false);
}

static void on_forked(void *userdata, int fd) {
        Server *server = userdata;

        (void)watch(server, fd);
        server->unsent_from = MIN_OF(server->unsent_from, fd);
}

/* Those whose address space is gone. Nobody else notices that for us, see guard_is_dead(). How long it took to look at
 * the others: each that is gone is looked at once. */
static uint64_t sweep(Server *server) {
        Hold *hold = server->hold;
        uint64_t in_vain_nsec = 0;

        for (int fd = 0; fd < hold->end; fd++) {
                HoldEntry *entry = &hold->entries[fd];
                uint64_t begun;

                if (!entry->id)
                        continue;
                begun = now_nsec();
                if (!guard_is_dead(fd)) {
                        /* Most children do not live that long: the service manager is spared those. */
                        entry->stored = entry->stored || store_add(server->options->notify_fd, fd, entry->id);
                        in_vain_nsec += now_nsec() - begun;
                        continue;
                }
                if (entry->stored)
                        (void)store_remove(server->options->notify_fd, entry->id);
                hold_drop(hold, fd);
        }
        return in_vain_nsec;
}

static void sweep_if_due(Server *server) {
        uint64_t now = now_nsec();

        if (now < server->sweep_nsec && !(server->starving && now >= server->swept_nsec + SWEEP_NSEC))
                return;
        /* However many there are, looking after them takes one thousandth of the time. */
        server->sweep_nsec = now + MAX_OF(SWEEP_NSEC, sweep(server) * 1000);
        server->swept_nsec = now;
        server->starving = false;
}

/* What of the events is a guard's; -EBUSY: one has more to say than max. */
static int serve_guards(Server *server, const struct epoll_event *events, int n, unsigned max) {
        Hold *hold = server->hold;
        int n_guards = 0, r = 0;

        for (int i = 0; i < n; i++) {
                int fd = events[i].data.fd;

                if (fd >= hold->end || !hold->entries[fd].id)
                        continue;
                n_guards++;
                if (serve_read(hold, fd, max, on_forked, server))
                        r = -EBUSY;
        }
        return r ?: n_guards;
}

/* Everything that could be read when it is called has been answered when it returns. All threads of a process stand
 * meanwhile: only who has something to say is listened to. The kernel tells those in turn, in the order in which they
 * had, so that nobody has to be waited for who goes on talking: after as many as there are each had his turn. */
static int drain(Server *server) {
        const KeeperStats *stats = server->hold->stats;
        uint32_t rounds = (stats->guards + stats->mutes + OTHERS_MAX) / EVENTS_MAX + 1;
        struct epoll_event events[EVENTS_MAX];
        int r = 1;

        _Static_assert(OTHERS_MAX < EVENTS_MAX, "a full round has a guard in it");
        for (uint32_t i = 0; i < rounds && r > 0; i++) {
                int n = epoll_wait(server->epoll_fd, events, EVENTS_MAX, 0);

                r = n < 0 ? -errno : serve_guards(server, events, n, DRAIN_MAX);
        }
        return MIN_OF(r, 0);
}

static int add_held(Server *server, const KeeperMessage *request, int *fd) {
        KeeperItem item = { .owner = request->item.owner };
        int held = hold_find(server->hold, guard_id(*fd)), r;

        if (held >= 0) {
                server->hold->entries[held].item.owner = request->item.owner;
                return 0;
        }
        if (fcntl(*fd, F_GETFL) < 0 || !(fcntl(*fd, F_GETFL) & O_NONBLOCK))
                return -EINVAL; /* one read too many would stop everything */
        r = hold_add(server->hold, *fd, &item);
        if (r < 0)
                return r;
        held = TAKE_FD(*fd);
        r = watch(server, held);
        if (r < 0) {
                hold_drop(server->hold, held);
                return r;
        }
        /* A daemon gives it to us that had a copy, when a keeper died with all its processes: what that one had read
         * and not answered nobody else knows of. */
        if (!(serve_left_out & SERVE_LEAVE_OUT_REQUEUE))
                (void)guard_requeue(held);
        server->hold->entries[held].stored = store_add(server->options->notify_fd, held, guard_id(held));
        return 0;
}

static int drop_pool(Server *server, int fd) {
        if (fd < 0)
                return fd;
        (void)store_remove(server->options->notify_fd, guard_id(fd));
        hold_pool_drop(server->hold, fd);
        return 0;
}

static int drop_held(Server *server, uint64_t id) {
        Hold *hold = server->hold;
        int fd = hold_find(hold, id);

        for (uint32_t i = 0; fd < 0 && i < hold->stats->pools; i++)
                if (guard_id(hold->pools[i]) == id)
                        return drop_pool(server, hold->pools[i]);
        if (fd < 0)
                return fd;
        (void)store_remove(server->options->notify_fd, id);
        hold_drop(hold, fd);
        return 0;
}

static int next_held(const Hold *hold, uint64_t cursor, KeeperMessage *reply, int *ret_fd) {
        uint64_t fd, end = (uint64_t)hold->n;

        for (fd = cursor; fd < (uint64_t)hold->end; fd++)
                if (hold->entries[fd].id) {
                        reply->item = hold->entries[fd].item;
                        reply->cursor = fd + 1;
                        *ret_fd = (int)fd;
                        return 0;
                }
        cursor = MAX_OF(cursor, end);
        if (cursor - end >= hold->stats->pools)
                return -ENOENT;
        *ret_fd = hold->pools[cursor - end];
        reply->item = (KeeperItem){ .id = guard_id(*ret_fd) };
        reply->cursor = cursor + 1;
        return 0;
}

static int add_pool(Server *server, int *fd) {
        int r = hold_pool_add(server->hold, *fd);

        if (r < 0)
                return r;
        (void)store_add(server->options->notify_fd, *fd, guard_id(*fd));
        *fd = -EBADF;
        return 0;
}

/* fd: what came along; taken (-EBADF) where it is kept. *ret_fd: to be sent, borrowed. */
static int carry_out(Server *server, int peer, const KeeperMessage *request, int *fd, KeeperMessage *reply,
                     int *ret_fd) {
        switch (request->op) {
        case KEEPER_HELLO:
                set_telling(server, false);
                server->daemon = peer;
                /* Who comes anew has no copies of what was offered to somebody else. */
                for (int i = 0; i < server->hold->end; i++)
                        server->hold->entries[i].unsent = server->hold->entries[i].item.parent != 0;
                server->unsent_from = 0;
                return 0;
        case KEEPER_NEXT:
                return next_held(server->hold, request->cursor, reply, ret_fd);
        case KEEPER_DROP:
                return drop_held(server, request->item.id);
        case KEEPER_ADD:
                return add_held(server, request, fd);
        case KEEPER_SYNC:
                return drain(server);
        case KEEPER_POOL_ADD:
                return add_pool(server, fd);
        case KEEPER_POOL_GET:
                *ret_fd = hold_pool_find(server->hold, request->name);
                return *ret_fd < 0 ? *ret_fd : 0;
        case KEEPER_POOL_DROP:
                return drop_pool(server, hold_pool_find(server->hold, request->name));
        case KEEPER_STATS:
                reply->stats = *server->hold->stats;
                reply->stats.pid = getpid();
                return 0;
        default:
                return -EOPNOTSUPP;
        }
}

static void answer_peer(Server *server, int peer) {
        KeeperMessage request, reply;
        int fd = -EBADF, answer_fd = -EBADF, r;
        size_t size;

        r = keeper_message_receive(peer, &request, &size, &fd, MSG_DONTWAIT);
        if (r == -EAGAIN)
                return;
        if (r == 0)
                r = keeper_message_check(&request, size, fd >= 0, false);
        if (r < 0) {
                safe_close(fd);
                close_peer(server, peer);
                return;
        }
        reply = (KeeperMessage){ .op = request.op, .protocol = KEEPER_PROTOCOL };
        reply.result = carry_out(server, peer, &request, &fd, &reply, &answer_fd);
        safe_close(fd);
        if (keeper_message_send(peer, &reply, reply.result == 0 ? answer_fd : -EBADF, MSG_DONTWAIT) < 0)
                close_peer(server, peer);
}

static void accept_peer(Server *server) {
        int fd = accept4(server->options->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        struct ucred peer;
        socklen_t size = sizeof peer;

        if (fd < 0) {
                server->hold->stats->starved += errno == EMFILE || errno == ENFILE;
                return;
        }
        if (server->n_peers == PEERS_MAX || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ||
            peer.uid != 0 || watch(server, fd) < 0) {
                safe_close(fd);
                return;
        }
        server->peers[server->n_peers++] = fd;
        server->had_peer = true;
}

/* What the last server left open beside what it held: its connections, its epoll instance. */
static void on_other(void *userdata, int fd) {
        const ServerOptions *options = ((Server *)userdata)->options;

        if (fd > STDERR_FILENO && fd != options->listen_fd && fd != options->notify_fd && fd != options->keeper_pidfd)
                safe_close(fd);
}

static int begin(Server *server) {
        Hold *hold = server->hold;
        int r = hold_discover(hold, on_other, server);

        if (r < 0)
                return r;
        server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        if (server->epoll_fd < 0)
                return -errno;
        for (int fd = 0; fd < hold->end && r == 0; fd++)
                if (hold->entries[fd].id) {
                        r = watch(server, fd);
                        /* What the last one had read and not answered. */
                        if (!(serve_left_out & SERVE_LEAVE_OUT_REQUEUE))
                                (void)guard_requeue(fd);
                }
        if (r == 0)
                r = watch(server, server->options->listen_fd);
        if (r == 0)
                r = watch(server, server->options->keeper_pidfd);
        return r;
}

static int one_round(Server *server) {
        struct epoll_event events[EVENTS_MAX];
        uint64_t starved = server->hold->stats->starved;
        int n;

        sweep_if_due(server);
        if (server->unsent_from < server->hold->end)
                set_telling(server, true);
        n = epoll_wait(server->epoll_fd, events, EVENTS_MAX, (int)(SWEEP_NSEC / NSEC_PER_MSEC));
        if (n < 0)
                return errno == EINTR ? 0 : -errno;
        (void)serve_guards(server, events, n, READ_MAX);
        if (server->hold->stats->starved != starved) {
                server->starving = true;
                usleep(1000); /* it stays readable */
        }
        for (int i = 0; i < n; i++) {
                int fd = events[i].data.fd;

                if (fd == server->options->listen_fd)
                        accept_peer(server);
                else if (fd == server->options->keeper_pidfd)
                        return SERVER_E_ALONE;
                else if (is_peer(server, fd)) {
                        if (fd == server->daemon && events[i].events & EPOLLOUT)
                                send_children(server);
                        answer_peer(server, fd);
                }
        }
        return 0;
}

/* Nobody needs what is stored any more: the manager would keep it after us, and with a pool all its memory. */
static void empty_store(const Server *server) {
        const Hold *hold = server->hold;

        for (uint32_t i = 0; i <= hold->stats->pools; i++) {
                uint64_t id = i < hold->stats->pools ? guard_id(hold->pools[i]) : hold->table_id;

                if (!store_remove(server->options->notify_fd, id)) {
                        store_await(server->options->notify_fd); /* it has not read the ones before yet */
                        (void)store_remove(server->options->notify_fd, id);
                }
        }
        store_await(server->options->notify_fd);
}

int server_run(Hold *hold, const ServerOptions *options) {
        Server server = { .hold = hold, .options = options, .epoll_fd = -EBADF, .daemon = -EBADF };
        int r = begin(&server);

        server.started_nsec = now_nsec();
        while (r == 0) {
                r = one_round(&server);
                if (r == 0 && server.n_peers == 0 && hold_is_idle(hold) &&
                    (server.had_peer || now_nsec() - server.started_nsec > PATIENCE_NSEC))
                        r = SERVER_E_DONE;
        }
        if (r == SERVER_E_DONE)
                empty_store(&server);
        for (uint32_t i = 0; i < server.n_peers; i++)
                safe_close(server.peers[i]);
        safe_close(server.epoll_fd);
        return r;
}
