/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/store.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

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

static bool tell(int notify_fd, char *text, int fd) {
        union {
                struct cmsghdr header;
                char bytes[CMSG_SPACE(sizeof(int))];
        } control = {};
        struct iovec iov = { text, strlen(text) };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

        if (fd >= 0) {
                msg.msg_control = &control;
                msg.msg_controllen = sizeof control;
                control.header = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
                                                   .cmsg_len = CMSG_LEN(sizeof fd) };
                memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        }
        return sendmsg(notify_fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

bool store_add(int notify_fd, int fd, uint64_t id) {
        char text[96];

        if (notify_fd < 0)
                return true;
        /* Not to be polled: the manager would take a userfaultfd's state for a hangup. */
        snprintf(text, sizeof text, "FDSTORE=1\nFDPOLL=0\nFDNAME=%llx", (unsigned long long)id);
        return tell(notify_fd, text, fd);
}

void store_remove(int notify_fd, uint64_t id) {
        char text[96];

        if (notify_fd < 0)
                return;
        snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%llx", (unsigned long long)id);
        (void)tell(notify_fd, text, -EBADF);
}
