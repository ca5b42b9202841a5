/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/* What a target's maps file says, by address. */
typedef struct RemoteMap {
        uint64_t start, end, offset, inode;
        uint32_t dev;
        bool read, write, exec, shared;
        bool main_stack;        /* [stack] */
        bool vdso;
        bool libc;              /* by its name: searched first */
} RemoteMap;

typedef struct RemoteMaps {
        RemoteMap *maps;
        size_t n, allocated;
        int fd;                 /* answers for one address at a time, as it is then; -EBADF: maps holds all of them */
} RemoteMaps;

void remote_maps_done(RemoteMaps *maps);
int remote_maps_parse(char *text, RemoteMaps *ret);     /* pure; cuts text up */
/* Both: REMOTE_E_GONE, REMOTE_E_DENIED, -errno. open: for find only, which then costs the same however many mappings
 * there are (Linux 6.11); read: all of them. */
int remote_maps_open(const Target *target, RemoteMaps *ret);
int remote_maps_read(const Target *target, RemoteMaps *ret);
bool remote_maps_find(const RemoteMaps *maps, uint64_t address, RemoteMap *ret);
bool remote_maps_find_or_next(const RemoteMaps *maps, uint64_t address, RemoteMap *ret); /* … or the first one above it */
