/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The service manager's side (sd_notify(3), sd_listen_fds(3)). Without systemd, or built without it, every function
 * does nothing and says so by its result.
 */
void notify_ready(void);
void notify_status(const char *format, ...) _printf_(1, 2);
void notify_reloading(void);
void notify_stopping(void);
void notify_watchdog(void);
uint64_t notify_watchdog_nsec(void);    /* 0: none is wanted */
int notify_listen_fd(void);             /* the control socket passed in, or -ENOENT */
