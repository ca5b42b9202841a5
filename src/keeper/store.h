/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The service manager's store of descriptors (sd_pid_notify_with_fds(3), FDSTORE=1): a copy of what is held, for a
 * keeper whose processes were all killed. Nothing is waited for, and failing is no error: the store is the third copy.
 */
int store_open(void);           /* connected to $NOTIFY_SOCKET, or -EBADF: there is none */
bool store_add(int notify_fd, int fd, uint64_t id);     /* false: not now */
void store_remove(int notify_fd, uint64_t id);
