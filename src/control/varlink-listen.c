/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Creates the socket of a Varlink server in the file system.
 *
 * A socket that a crashed daemon left behind is replaced, one that somebody listens on is not. The directory is locked
 * meanwhile, so that of two daemons that start together one replaces and the other finds it taken. The kernel takes
 * down the io_uring of a killed process some time after its death, and the sockets polled there live on until then:
 * what still listens though the process that began it is gone is asked again for a second. The mode is set before
 * bind(2), which takes it over from the socket's own inode: at no moment is the file open to others, and the process's
 * umask is left alone.
 */

#include "control/varlink.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define BACKLOG 64
#define LINGER_TRIES 20U
#define LINGER_USEC 50000U

/* Every directory above path; existing ones are left as they are. */
static int make_parents(const char *path) {
        _cleanup_free_ char *copy = strdup(path);

        if (!copy)
                return -ENOMEM;
        for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
                *slash = 0;
                if (mkdir(copy, 0755) < 0 && errno != EEXIST)
                        return -errno;
                *slash = '/';
        }
        return 0;
}

/* Never waited for: whoever may open the directory may hold the lock for ever. */
static int lock_parent(const char *path, int *ret) {
        const char *slash = strrchr(path, '/');
        _cleanup_free_ char *parent = strndup(path, slash == path ? 1 : (size_t)(slash - path));
        _cleanup_close_ int fd = -EBADF;

        if (!parent)
                return -ENOMEM;
        fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) < 0)
                return -errno;
        *ret = TAKE_FD(fd);
        return 0;
}

/* Whether the process that called listen(2) lives: the kernel noted who it was. One that cannot be seen does. */
static bool listener_lives(int fd) {
        struct ucred peer = { 0 };
        socklen_t size = sizeof peer;

        return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.pid <= 0 || kill(peer.pid, 0) == 0 ||
               errno != ESRCH;
}

/* 0: the kernel listens still for a process that is gone. */
static int try_connect(const struct sockaddr_un *address) {
        _cleanup_close_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

        if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof *address) < 0)
                return -errno;
        return listener_lives(fd) ? -EADDRINUSE : 0;
}

static int remove_stale(const char *path, const struct sockaddr_un *address) {
        struct stat st;
        int r;

        if (lstat(path, &st) < 0)
                return errno == ENOENT ? 0 : -errno;
        if (!S_ISSOCK(st.st_mode))
                return -EEXIST;
        for (unsigned i = 0;; i++) {
                r = try_connect(address);
                if (r == -ECONNREFUSED)
                        return unlink(path) < 0 && errno != ENOENT ? -errno : 0;
                if (r < 0 && r != -EAGAIN) /* EAGAIN: somebody listens whose backlog is full */
                        return r;
                if (i == LINGER_TRIES)
                        return r < 0 ? -EADDRINUSE : -EAGAIN;
                usleep(LINGER_USEC);
        }
}

int varlink_listen(const char *path, int *ret_fd) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        _cleanup_close_ int fd = -EBADF, lock = -EBADF;
        int r;

        if (path[0] != '/')
                return -EINVAL;
        if (strlen(path) >= sizeof address.sun_path)
                return -ENAMETOOLONG;
        strcpy(address.sun_path, path);
        r = make_parents(path);
        if (r < 0)
                return r;
        r = lock_parent(path, &lock);
        if (r < 0)
                return r;
        r = remove_stale(path, &address);
        if (r < 0)
                return r;
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
                return -errno;
        if (fchmod(fd, 0600) < 0 || bind(fd, (const struct sockaddr *)&address, sizeof address) < 0)
                return -errno;
        if (listen(fd, BACKLOG) < 0) {
                r = -errno;
                unlink(path);
                return r;
        }
        *ret_fd = TAKE_FD(fd);
        return 0;
}
