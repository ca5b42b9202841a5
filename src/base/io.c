/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/io.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define FILE_MAX_BYTES ((size_t)256 << 20)

int read_fd(int fd, char **ret, size_t *ret_size) {
        size_t size = 0, allocated = 4096;
        _cleanup_free_ char *buffer = malloc(allocated);

        if (!buffer)
                return -ENOMEM;
        for (;;) {
                ssize_t n;

                if (allocated - size < 2) {
                        char *p;
                        if (allocated >= FILE_MAX_BYTES)
                                return -EFBIG;
                        p = realloc(buffer, allocated * 2);
                        if (!p)
                                return -ENOMEM;
                        buffer = p;
                        allocated *= 2;
                }
                n = pread(fd, buffer + size, allocated - size - 1, (off_t)size);
                if (n < 0) {
                        if (errno == EINTR)
                                continue;
                        return -errno;
                }
                if (n == 0)
                        break;
                size += (size_t)n;
        }
        buffer[size] = 0;
        *ret = TAKE_PTR(buffer);
        if (ret_size)
                *ret_size = size;
        return 0;
}

int read_file(int at, const char *path, char **ret, size_t *ret_size) {
        _cleanup_close_ int fd = openat(at, path, O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return -errno;
        return read_fd(fd, ret, ret_size);
}

int open_directory(int at, const char *path, DIR **ret) {
        int fd = openat(at, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        DIR *dir = fd < 0 ? NULL : fdopendir(fd);

        if (!dir) {
                int r = -errno;
                safe_close(fd);
                return r;
        }
        *ret = dir;
        return 0;
}

int read_u64(int at, const char *path, uint64_t *ret) {
        char text[32];
        char *end;
        ssize_t n;
        unsigned long long value;
        _cleanup_close_ int fd = openat(at, path, O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return -errno;
        n = read(fd, text, sizeof text - 1);
        if (n < 0)
                return -errno;
        text[n] = 0;
        if (!isdigit((unsigned char)text[0]))
                return -EINVAL;
        errno = 0;
        value = strtoull(text, &end, 10);
        if (errno || (*end && *end != '\n'))
                return -EINVAL;
        *ret = value;
        return 0;
}

int write_text(int at, const char *path, const char *text) {
        size_t size = strlen(text);
        ssize_t n;
        _cleanup_close_ int fd = openat(at, path, O_WRONLY | O_CLOEXEC);

        if (fd < 0)
                return -errno;
        n = write(fd, text, size);
        if (n < 0)
                return -errno;
        return (size_t)n == size ? 0 : -EIO;
}

int write_bytes_atomic(int at, const char *path, const void *bytes, size_t size) {
        _cleanup_free_ char *temporary = NULL;
        size_t done = 0;
        int r;
        _cleanup_close_ int fd = -EBADF;

        if (asprintf(&temporary, "%s.new", path) < 0)
                return -ENOMEM;
        fd = openat(at, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd < 0)
                return -errno;
        while (done < size) {
                ssize_t n = write(fd, (const char *)bytes + done, size - done);
                if (n < 0) {
                        r = -errno;
                        goto fail;
                }
                done += (size_t)n;
        }
        if (renameat(at, temporary, at, path) < 0) {
                r = -errno;
                goto fail;
        }
        return 0;
fail:
        unlinkat(at, temporary, 0);
        return r;
}

int write_file_atomic(int at, const char *path, const char *text) {
        return write_bytes_atomic(at, path, text, strlen(text));
}

int send_with_fd(int socket, const void *data, size_t size, int fd, int flags) {
        union {
                struct cmsghdr header;
                char bytes[CMSG_SPACE(sizeof(int))];
        } control = {};
        struct iovec iov = { (void *)data, size };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
        ssize_t n;

        if (fd >= 0) {
                msg.msg_control = &control;
                msg.msg_controllen = sizeof control;
                control.header = (struct cmsghdr){ .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
                                                   .cmsg_len = CMSG_LEN(sizeof fd) };
                memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        }
        do
                n = sendmsg(socket, &msg, flags | MSG_NOSIGNAL);
        while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : 0;
}
