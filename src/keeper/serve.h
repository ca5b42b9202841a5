/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "keeper/hold.h"

/* The fault server: reads what a held userfaultfd has to tell, and answers. */

/* A child of the owner of fd was forked: its userfaultfd is the table's already and is to be watched too. */
typedef void (*ServeForked)(void *userdata, int fd);

/* Takes in up to so many messages. False: it has no more now. */
bool serve_read(Hold *hold, int fd, unsigned n_max, ServeForked forked, void *userdata);

/* Safeguards that a test build leaves out, to see that the test notices. */
enum {
        SERVE_LEAVE_OUT_ZERO = 1,       /* answers with what the pool holds */
        SERVE_LEAVE_OUT_FORK = 2,       /* lets the child's userfaultfd go */
        SERVE_LEAVE_OUT_MUTE = 4,       /* answers the faults of mute ones with zeros */
        SERVE_LEAVE_OUT_REQUEUE = 8,    /* a new server does not ask again what the last one took along */
        SERVE_LEAVE_OUT_HASTE = 16,     /* of two that fault on one page the second is answered late */
};
#ifdef KEEPER_TEST
extern unsigned serve_left_out;
#else
#define serve_left_out 0U
#endif
