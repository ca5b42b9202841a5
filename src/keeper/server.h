/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/hold.h"

/*
 * The serving process: answers faults and requests until nothing is held and nobody is connected. All it knows it finds
 * in its descriptor table and in hold; it may be killed at any instruction and begun anew.
 */
typedef struct ServerOptions {
        int listen_fd;          /* kept open; never closed by it */
        int notify_fd;          /* connected to the service manager, or -EBADF */
        int keeper_pidfd;       /* of the process that starts it again */
} ServerOptions;

enum {
        SERVER_E_DONE = 1,      /* nothing is held, nobody is connected: the keeper may end */
        SERVER_E_ALONE,         /* who starts it again is gone: somebody else has to */
};

/* SERVER_E_*, -errno. */
int server_run(Hold *hold, const ServerOptions *options);
