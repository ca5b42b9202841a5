/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/notify.h"

#include "config.h"

#include <stdarg.h>
#include <stdio.h>

#if HAVE_SYSTEMD

#include "base/clock.h"

#include <sys/socket.h>
#include <systemd/sd-daemon.h>

void notify_ready(void) { sd_notify(0, "READY=1"); }

void notify_status(const char *format, ...) {
        char text[512];
        va_list ap;

        va_start(ap, format);
        vsnprintf(text, sizeof text, format, ap);
        va_end(ap);
        sd_notifyf(0, "STATUS=%s", text);
}

void notify_reloading(void) {
        sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu", (unsigned long long)(now_nsec() / NSEC_PER_USEC));
}

void notify_stopping(void) { sd_notify(0, "STOPPING=1"); }

void notify_watchdog(void) { sd_notify(0, "WATCHDOG=1"); }

uint64_t notify_watchdog_nsec(void) {
        uint64_t usec;

        return sd_watchdog_enabled(0, &usec) > 0 ? usec * NSEC_PER_USEC : 0;
}

int notify_listen_fd(void) {
        int n = sd_listen_fds(0);

        for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + n; fd++)
                if (sd_is_socket(fd, AF_UNIX, SOCK_STREAM, 1) > 0)
                        return fd;
        return -ENOENT;
}

#else

void notify_ready(void) {}
void notify_status(const char *format, ...) {}
void notify_reloading(void) {}
void notify_stopping(void) {}
void notify_watchdog(void) {}
uint64_t notify_watchdog_nsec(void) { return 0; }
int notify_listen_fd(void) { return -ENOENT; }

#endif
