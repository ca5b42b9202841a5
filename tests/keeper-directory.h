/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "test.h"

/* A directory for a keeper, gone however the test ends; the keeper ends by itself when it holds nothing. */
static char keeper_directory[] = "/tmp/ksmd-keeper-XXXXXX";
static pid_t keeper_directory_owner;

static void keeper_directory_remove(void) {
        char path[64];

        if (getpid() != keeper_directory_owner)
                return;
        snprintf(path, sizeof path, "%s/keeper", keeper_directory);
        (void)unlink(path);
        (void)rmdir(keeper_directory);
}

static inline void keeper_directory_make(void) {
        CHECK(mkdtemp(keeper_directory), "directory");
        keeper_directory_owner = getpid();
        CHECK(atexit(keeper_directory_remove) == 0, "directory");
}
