/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/store.h"

#include "base/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define AWAIT_TRIES 200U
#define AWAIT_USEC 10000U

int store_open(void) {
        const char *path = getenv("NOTIFY_SOCKET");
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int fd;

        if (!path || (path[0] != '/' && path[0] != '@') || strlen(path) >= sizeof address.sun_path)
                return -EBADF;
        memcpy(address.sun_path, path, strlen(path));
        if (path[0] == '@')
                address.sun_path[0] = 0;
        fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd >= 0 && connect(fd, (struct sockaddr *)&address,
                               (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path))) < 0)
                fd = safe_close(fd);
        return fd;
}

static bool tell(int notify_fd, const char *text, int fd) {
        return send_with_fd(notify_fd, text, strlen(text), fd, MSG_DONTWAIT) == 0;
}

bool store_add(int notify_fd, int fd, uint64_t id) {
        char text[96];

        if (notify_fd < 0)
                return true;
        /* Not to be polled: the manager would take a userfaultfd's state for a hangup. */
        snprintf(text, sizeof text, "FDSTORE=1\nFDPOLL=0\nFDNAME=%llx", (unsigned long long)id);
        return tell(notify_fd, text, fd);
}

bool store_remove(int notify_fd, uint64_t id) {
        char text[96];

        if (notify_fd < 0)
                return true;
        snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%llx", (unsigned long long)id);
        return tell(notify_fd, text, -EBADF);
}

/* sd_notify_barrier(3): the manager closes the other end. */
void store_await(int notify_fd) {
        static const char barrier[] = "BARRIER=1";
        bool told = false;
        int ends[2];
        char byte;

        if (notify_fd < 0 || pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
                return;
        for (unsigned i = 0; i < AWAIT_TRIES; i++) {
                if (!told && tell(notify_fd, barrier, ends[1])) {
                        told = true;
                        ends[1] = safe_close(ends[1]);
                }
                if (told && (read(ends[0], &byte, 1) == 0 || errno != EAGAIN))
                        break;
                usleep(AWAIT_USEC);
        }
        safe_close(ends[0]);
        safe_close(ends[1]);
}
