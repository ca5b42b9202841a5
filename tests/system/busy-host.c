/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preloaded into the daemon: a host whose CPUs are never idle, by /proc/stat, each look at which is told on standard error;
 * and on which a daemon that starts gets its lock so late that what it looked at before is old enough to tell something.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#define LATE_USEC 600000
#define SAID "the others were looked at\n"

int openat64(int at, const char *path, int flags, ...);

static int never_idle(void) {
        static const char text[] = "cpu  4711 0 4711 1000 0 0 0 0 0 0\n";
        int fd = memfd_create("stat", MFD_CLOEXEC);

        if (fd < 0 || write(fd, text, sizeof text - 1) < 0 || write(STDERR_FILENO, SAID, sizeof SAID - 1) < 0)
                _exit(1);
        lseek(fd, 0, SEEK_SET);
        return fd;
}

int openat64(int at, const char *path, int flags, ...) {
        static int (*next)(int, const char *, int, ...);
        va_list ap;
        int mode;

        va_start(ap, flags);
        mode = va_arg(ap, int);
        va_end(ap);
        if (strcmp(path, "/proc/stat") == 0)
                return never_idle();
        if (!next)
                *(void **)&next = dlsym(RTLD_NEXT, "openat64");
        return next(at, path, flags, mode);
}

int flock(int fd, int operation) {
        static int (*next)(int, int);

        usleep(LATE_USEC);
        if (!next)
                *(void **)&next = dlsym(RTLD_NEXT, "flock");
        return next(fd, operation);
}
