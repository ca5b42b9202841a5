/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/keeper.h"

#include "base/clock.h"
#include "keeper/protocol.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#define KEEPER_PROGRAM KSMD_USER_LIBEXECDIR "/ksmd-user-keeper"
#define LISTEN_FD "3"
#define CONNECT_TRIES 50U
/* Until it says its first word: that it is being started, by us or by systemd, is all that is known of it. */
#define START_PATIENCE_NSEC (5 * NSEC_PER_SEC)
#define COPIES_UNSWEPT 64U
/* In a stop, for the reply to a question of before that nobody waited for. */
#define SYNC_STALE_NSEC (100 * NSEC_PER_USEC)

/* What the keeper holds too: with these a new one is given everything. */
typedef struct Copy {
        int fd;
        KeeperItem item;        /* of a pool: its id alone */
} Copy;

struct Keeper {
        int socket;             /* -EBADF: broken */
        char *path, *program;
        Copy *copies;
        size_t n_copies, allocated, sweep_at;
        pid_t child;            /* the keeper that was started here; 0: none */
        bool syncing;           /* a KEEPER_SYNC was sent, and its reply not read, … */
        bool sync_due;          /* … which keeper_sync_end() is to wait for */
};

Keeper *keeper_free(Keeper *keeper) {
        if (!keeper)
                return NULL;
        safe_close(keeper->socket);
        for (size_t i = 0; i < keeper->n_copies; i++)
                safe_close(keeper->copies[i].fd);
        if (keeper->child > 0)
                (void)waitpid(keeper->child, NULL, WNOHANG);
        free(keeper->copies);
        free(keeper->path);
        free(keeper->program);
        free(keeper);
        return NULL;
}

static Copy *find_copy(const Keeper *keeper, uint64_t id) {
        for (size_t i = 0; i < keeper->n_copies; i++)
                if (keeper->copies[i].item.id == id)
                        return &keeper->copies[i];
        return NULL;
}

/* Nobody says when an address space ends, so it is asked when there are twice as many as were alive last time. */
static void sweep_copies(Keeper *keeper) {
        for (size_t i = 0; i < keeper->n_copies;)
                if (keeper->copies[i].item.kind != GUARD_NONE && guard_is_dead(keeper->copies[i].fd)) {
                        safe_close(keeper->copies[i].fd);
                        keeper->copies[i] = keeper->copies[--keeper->n_copies];
                } else
                        i++;
        keeper->sweep_at = MAX_OF(keeper->n_copies * 2, (size_t)COPIES_UNSWEPT);
}

/* fd becomes the list's. */
static int add_copy(Keeper *keeper, int fd, const KeeperItem *item) {
        Copy *copy = find_copy(keeper, item->id);

        if (copy) {
                copy->item.owner = item->owner;
                safe_close(fd);
                return 0;
        }
        if (GROW(keeper->copies, keeper->n_copies, keeper->allocated) < 0) {
                safe_close(fd);
                return -ENOMEM;
        }
        keeper->copies[keeper->n_copies++] = (Copy){ fd, *item };
        if (keeper->n_copies >= keeper->sweep_at)
                sweep_copies(keeper);
        return 0;
}

static void drop_copy(Keeper *keeper, uint64_t id) {
        Copy *copy = find_copy(keeper, id);

        if (!copy)
                return;
        safe_close(copy->fd);
        *copy = keeper->copies[--keeper->n_copies];
}

/* Who polls the socket holds it open (io_uring does): neither side would see its end otherwise. */
static int break_off(Keeper *keeper, int error) {
        if (keeper->socket >= 0)
                (void)shutdown(keeper->socket, SHUT_RDWR);
        keeper->socket = safe_close(keeper->socket);
        keeper->syncing = keeper->sync_due = false;
        return error;
}

/* What the keeper says by itself: a child was forked. */
static bool is_notice(const KeeperMessage *message) { return message->op == KEEPER_FORKED; }

static int receive(Keeper *keeper, KeeperMessage *ret, int *ret_fd, int flags) {
        size_t size;
        int fd, r = keeper_message_receive(keeper->socket, ret, &size, &fd, flags);

        if (r < 0)
                return r;
        r = keeper_message_check(ret, size, fd >= 0, true);
        if (r < 0) {
                safe_close(fd);
                return r;
        }
        *ret_fd = fd;
        return 0;
}

static int await(Keeper *keeper, uint64_t deadline_nsec) {
        struct pollfd pollfd = { keeper->socket, POLLIN, 0 };
        int n;

        do {
                uint64_t now = now_nsec();
                if (now >= deadline_nsec)
                        return -ETIMEDOUT;
                n = poll(&pollfd, 1, (int)DIV_ROUND_UP(deadline_nsec - now, NSEC_PER_MSEC));
        } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n == 0 ? -ETIMEDOUT : 0;
}

static int send_request(const Keeper *keeper, KeeperMessage *message, int fd) {
        if (keeper->socket < 0)
                return -ENOTCONN;
        message->protocol = KEEPER_PROTOCOL;
        return keeper_message_send(keeper->socket, message, fd, 0);
}

/* The reply to what was sent last. *ret_fd (may be NULL): what came with it. */
static int await_reply(Keeper *keeper, uint32_t op, KeeperMessage *message, int *ret_fd, uint64_t patience_nsec) {
        uint64_t deadline = now_nsec() + patience_nsec;
        int r = 0, received = -EBADF;

        while (r == 0) {
                r = await(keeper, deadline);
                if (r == 0)
                        r = receive(keeper, message, &received, MSG_DONTWAIT);
                if (r == -EAGAIN)
                        r = 0;
                else if (r == 0 && is_notice(message))
                        r = add_copy(keeper, received, &message->item);
                else if (r == 0 && message->op != op) {
                        safe_close(received);
                        r = -EPROTO;
                } else
                        break;
        }
        if (r == -ETIMEDOUT && op == KEEPER_SYNC)
                return r; /* it is busy, and will answer */
        if (r < 0)
                return break_off(keeper, r);
        if (op == KEEPER_SYNC)
                keeper->syncing = false;
        if (ret_fd)
                *ret_fd = received;
        else
                safe_close(received);
        return message->result;
}

static int await_sync(Keeper *keeper, uint64_t patience_nsec) {
        KeeperMessage message;

        return await_reply(keeper, KEEPER_SYNC, &message, NULL, patience_nsec);
}

void keeper_sync_begin(Keeper *keeper) {
        KeeperMessage message = { .op = KEEPER_SYNC };
        int r;

        keeper->sync_due = false;
        if (keeper->syncing)
                (void)await_sync(keeper, SYNC_STALE_NSEC);
        if (keeper->syncing || keeper->socket < 0)
                return;
        r = send_request(keeper, &message, -EBADF);
        if (r < 0)
                (void)break_off(keeper, r);
        keeper->syncing = keeper->sync_due = r == 0;
}

static int sync_end(Keeper *keeper, uint64_t patience_nsec) {
        if (keeper->socket < 0)
                return -ENOTCONN;
        if (!keeper->sync_due)
                return -ETIMEDOUT;
        keeper->sync_due = false;
        return await_sync(keeper, patience_nsec);
}

int keeper_sync_end(Keeper *keeper) { return sync_end(keeper, KEEPER_SYNC_NSEC); }

int keeper_sync(Keeper *keeper) {
        keeper_sync_begin(keeper);
        return sync_end(keeper, KEEPER_PATIENCE_NSEC);
}

/* One request and its reply. */
static int call_patiently(Keeper *keeper, KeeperMessage *message, int fd, int *ret_fd, uint64_t patience_nsec) {
        uint32_t op = message->op;
        int r;

        if (keeper->syncing && await_sync(keeper, patience_nsec) == -ETIMEDOUT)
                return break_off(keeper, -ETIMEDOUT);
        r = send_request(keeper, message, fd);
        return r < 0 ? break_off(keeper, r) : await_reply(keeper, op, message, ret_fd, patience_nsec);
}

static int call(Keeper *keeper, KeeperMessage *message, int fd, int *ret_fd) {
        return call_patiently(keeper, message, fd, ret_fd, KEEPER_PATIENCE_NSEC);
}

static int connect_socket(Keeper *keeper) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        struct timeval patience = { .tv_sec = KEEPER_PATIENCE_NSEC / NSEC_PER_SEC };
        _cleanup_close_ int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        struct ucred peer;
        socklen_t size = sizeof peer;

        if (fd < 0)
                return -errno;
        memcpy(address.sun_path, keeper->path, strlen(keeper->path));
        if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0 ||
            connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
                return -errno;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != geteuid())
                return -EPERM;
        keeper->socket = TAKE_FD(fd);
        return 0;
}

static int make_socket(const Keeper *keeper, int *ret) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        _cleanup_close_ int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        mode_t mask;
        int r;

        if (fd < 0)
                return -errno;
        memcpy(address.sun_path, keeper->path, strlen(keeper->path));
        if (unlink(keeper->path) < 0 && errno != ENOENT)
                return -errno;
        mask = umask(0177);
        r = bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 8) < 0 ? -errno : 0;
        umask(mask);
        if (r == 0)
                *ret = TAKE_FD(fd);
        return r;
}

static int spawn(Keeper *keeper, int listen_fd) {
        char *argv[] = { keeper->program, (char *)"--listen", (char *)LISTEN_FD, NULL };
        char *envp[] = { NULL };
        posix_spawn_file_actions_t actions;
        posix_spawnattr_t attr;
        sigset_t none, all;
        int r;

        sigemptyset(&none);
        sigfillset(&all);
        if (posix_spawn_file_actions_init(&actions) != 0)
                return -ENOMEM;
        if (posix_spawnattr_init(&attr) != 0) {
                posix_spawn_file_actions_destroy(&actions);
                return -ENOMEM;
        }
        r = posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF) != 0 ||
                            posix_spawnattr_setsigmask(&attr, &none) != 0 ||
                            posix_spawnattr_setsigdefault(&attr, &all) != 0 ||
                            posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDWR, 0) != 0 ||
                            posix_spawn_file_actions_adddup2(&actions, STDIN_FILENO, STDOUT_FILENO) != 0 ||
                            posix_spawn_file_actions_adddup2(&actions, listen_fd, atoi(LISTEN_FD)) != 0
                    ? -ENOMEM
                    : -posix_spawn(&keeper->child, keeper->program, &actions, &attr, argv, envp);
        posix_spawnattr_destroy(&attr);
        posix_spawn_file_actions_destroy(&actions);
        return r;
}

/* Until somebody listens there: systemd does where the socket unit is used; else we start a keeper. */
static int reach(Keeper *keeper) {
        for (unsigned try = 0;; try++) {
                _cleanup_close_ int listen_fd = -EBADF;
                int r = connect_socket(keeper);

                if (r != -ENOENT && r != -ECONNREFUSED)
                        return r;
                if (try == CONNECT_TRIES)
                        return r;
                if (keeper->child > 0 && waitpid(keeper->child, NULL, WNOHANG) == keeper->child)
                        keeper->child = 0;
                r = make_socket(keeper, &listen_fd);
                if (r == 0)
                        r = spawn(keeper, listen_fd);
                if (r < 0)
                        return r;
        }
}

static int greet(Keeper *keeper) {
        KeeperMessage message = { .op = KEEPER_HELLO };
        int r = call_patiently(keeper, &message, -EBADF, NULL, START_PATIENCE_NSEC);

        if (r == 0 && message.protocol != KEEPER_PROTOCOL)
                return break_off(keeper, -EPROTO);
        return r;
}

/* The one behind the cursor in message. */
static int next(Keeper *keeper, KeeperMessage *message, int *ret_fd) {
        message->op = KEEPER_NEXT;
        message->name_bytes = 0;
        return call(keeper, message, -EBADF, ret_fd);
}

/* A keeper that was there already may hold what another daemon gave it: we are its second holder from now on. */
static int copy_all(Keeper *keeper) {
        KeeperMessage message = {};

        for (;;) {
                int fd = -EBADF, r = next(keeper, &message, &fd);

                if (r == 0)
                        r = add_copy(keeper, fd, &message.item);
                if (r < 0)
                        return r == -ENOENT ? 0 : r;
        }
}

static int make(const char *state_dir, const char *program, Keeper **ret) {
        _cleanup_(keeper_freep) Keeper *keeper = calloc(1, sizeof *keeper);

        if (!keeper)
                return -ENOMEM;
        keeper->socket = -EBADF;
        keeper->program = strdup(program ? program : KEEPER_PROGRAM);
        if (!keeper->program || asprintf(&keeper->path, "%s/keeper", state_dir) < 0) {
                keeper->path = NULL;
                return -ENOMEM;
        }
        if (strlen(keeper->path) >= sizeof((struct sockaddr_un *)0)->sun_path)
                return -ENAMETOOLONG;
        *ret = TAKE_PTR(keeper);
        return 0;
}

/* Whatever version it is, what it says begins with that. A greeting would make us the one who is told of children. */
int keeper_look(const char *state_dir, KeeperSeen *ret) {
        _cleanup_(keeper_freep) Keeper *keeper = NULL;
        KeeperMessage message = { .op = KEEPER_STATS };
        _cleanup_close_ int fd = -EBADF;
        size_t size;
        int r = make(state_dir, NULL, &keeper);

        if (r == 0)
                r = connect_socket(keeper);
        if (r == 0)
                r = send_request(keeper, &message, -EBADF);
        if (r == 0)
                r = await(keeper, now_nsec() + START_PATIENCE_NSEC);
        if (r == 0)
                r = keeper_message_receive(keeper->socket, &message, &size, &fd, MSG_DONTWAIT);
        if (r < 0)
                return r == -ECONNREFUSED ? -ENOENT : r;
        if (size < offsetof(KeeperMessage, result))
                return -EPROTO;
        *ret = (KeeperSeen){ .protocol = message.protocol, .our_protocol = KEEPER_PROTOCOL };
        if (message.protocol == KEEPER_PROTOCOL && keeper_message_check(&message, size, fd >= 0, true) == 0) {
                ret->pid = message.stats.pid;
                ret->guards = message.stats.guards;
                ret->pools = message.stats.pools;
        }
        return 0;
}

int keeper_new(const char *state_dir, const char *program, Keeper **ret) {
        _cleanup_(keeper_freep) Keeper *keeper = NULL;
        int r = make(state_dir, program, &keeper);

        if (r < 0)
                return r;
        if (access(keeper->program, X_OK) < 0)
                return -errno;
        r = reach(keeper);
        if (r == 0)
                r = greet(keeper);
        if (r == 0)
                r = copy_all(keeper);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(keeper);
        return 0;
}

int keeper_fd(const Keeper *keeper) { return keeper->socket; }

int keeper_dispatch(Keeper *keeper) {
        if (keeper->socket < 0)
                return -ENOTCONN;
        for (;;) {
                KeeperMessage message;
                int fd = -EBADF, r = receive(keeper, &message, &fd, MSG_DONTWAIT);

                if (r == -EAGAIN)
                        return 0;
                if (r == 0 && keeper->syncing && message.op == KEEPER_SYNC) {
                        keeper->syncing = false;
                        continue;
                }
                if (r == 0 && !is_notice(&message)) {
                        safe_close(fd);
                        r = -EPROTO;
                }
                if (r == 0)
                        r = add_copy(keeper, fd, &message.item);
                if (r < 0)
                        return break_off(keeper, r == -ENOMEM ? r : -ENOTCONN);
        }
}

static int hand_over(Keeper *keeper, int fd, const KeeperItem *item) {
        KeeperMessage message = { .op = item->kind == GUARD_NONE ? KEEPER_POOL_ADD : KEEPER_ADD, .item = *item };

        return call(keeper, &message, fd, NULL);
}

int keeper_recover(Keeper *keeper) {
        int r;

        (void)break_off(keeper, 0);
        r = reach(keeper);
        if (r == 0)
                r = greet(keeper);
        sweep_copies(keeper);
        keeper->sweep_at = SIZE_MAX; /* what notices add below goes to the end */
        for (size_t i = 0; i < keeper->n_copies && r == 0; i++) {
                r = hand_over(keeper, keeper->copies[i].fd, &keeper->copies[i].item);
                if (r == -EEXIST)
                        r = 0; /* a pool that it has already */
        }
        sweep_copies(keeper);
        return r;
}

int keeper_add(Keeper *keeper, int uffd, const KeeperOwner *owner) {
        KeeperItem item = { .id = guard_id(uffd), .kind = guard_kind(uffd), .owner = *owner };
        int fd, r;

        if (item.kind == GUARD_NONE)
                return -EINVAL;
        r = hand_over(keeper, uffd, &item);
        if (r < 0)
                return r;
        fd = fcntl(uffd, F_DUPFD_CLOEXEC, 3);
        return fd < 0 ? -errno : add_copy(keeper, fd, &item);
}

int keeper_drop(Keeper *keeper, uint64_t id) {
        KeeperMessage message = { .op = KEEPER_DROP, .item.id = id };
        int r = call(keeper, &message, -EBADF, NULL);

        if (r == 0 || r == -ENOENT)
                drop_copy(keeper, id);
        return r;
}

/* Guards, or pools: what is held there is copied here. */
static int walk(Keeper *keeper, bool pools, KeeperHandler handler, void *userdata) {
        int r = keeper_dispatch(keeper);

        for (size_t i = 0; i < keeper->n_copies && r == 0; i++)
                if (pools == (keeper->copies[i].item.kind == GUARD_NONE))
                        r = handler(userdata, &keeper->copies[i].item, keeper->copies[i].fd);
        return r;
}

int keeper_list(Keeper *keeper, KeeperHandler handler, void *userdata) {
        return walk(keeper, false, handler, userdata);
}

int keeper_pools(Keeper *keeper, KeeperHandler handler, void *userdata) {
        return walk(keeper, true, handler, userdata);
}

static int call_with_name(Keeper *keeper, uint32_t op, const char *domain, int *ret_fd) {
        KeeperMessage message = { .op = op, .name_bytes = (uint32_t)strlen(domain) };

        if (strlen(domain) > KEEPER_DOMAIN_BYTES_MAX)
                return -ENAMETOOLONG;
        memcpy(message.name, domain, strlen(domain) + 1);
        return call(keeper, &message, -EBADF, ret_fd);
}

int keeper_pool_add(Keeper *keeper, int mount_fd) {
        KeeperItem item = { .id = guard_id(mount_fd) };
        int fd, r = hand_over(keeper, mount_fd, &item);

        if (r < 0)
                return r;
        fd = fcntl(mount_fd, F_DUPFD_CLOEXEC, 3);
        return fd < 0 ? -errno : add_copy(keeper, fd, &item);
}

int keeper_pool_get(Keeper *keeper, const char *domain, int *ret_mount_fd) {
        return call_with_name(keeper, KEEPER_POOL_GET, domain, ret_mount_fd);
}

int keeper_pool_drop(Keeper *keeper, const char *domain) {
        _cleanup_close_ int fd = -EBADF;
        int r = keeper_pool_get(keeper, domain, &fd);

        if (r < 0)
                return r;
        r = call_with_name(keeper, KEEPER_POOL_DROP, domain, NULL);
        if (r == 0 || r == -ENOENT)
                drop_copy(keeper, guard_id(fd));
        return r;
}

int keeper_stats(Keeper *keeper, KeeperStats *ret) {
        KeeperMessage message = { .op = KEEPER_STATS };
        int r = call(keeper, &message, -EBADF, NULL);

        if (r == 0)
                *ret = message.stats;
        return r;
}
