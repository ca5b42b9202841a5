/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * The service manager's store of descriptors (sd_pid_notify_with_fds(3), FDSTORE=1): a copy of what is held, for a
 * keeper whose processes were all killed. Nothing is waited for, and failing is no error: the store is the third copy.
 *
 * It gives them back with their names in one environment variable (sd_listen_fds_with_names(3)), and a variable of more
 * than 128 KiB cannot be passed on (MAX_ARG_STRLEN in execve(2)): the service could not be started again. So names are
 * short, numbers that serve to remove them, and the unit bounds how many there are (tools/check-units counts). What a
 * descriptor is, who is given it asks the kernel.
 */
#define STORE_NAME_BYTES_MAX 16U

int store_open(void);           /* connected to $NOTIFY_SOCKET, or -EBADF: there is none */
bool store_add(int notify_fd, int fd, uint64_t id);     /* false: not now */
bool store_remove(int notify_fd, uint64_t id);
/* Returns when the manager has read all that was told, which it does not believe of who is gone by then; or after some
 * time. */
void store_await(int notify_fd);
