/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/* The file system of a pool (pool.c): made, and opened again. For pool.c alone. */

/* A detached tmpfs with the pool's file and the domain's name in it; *ret_reason as in pool_new(). */
int pool_fs_new(const char *domain, int *ret_mount_fd, int *ret_rw_fd, const char **ret_reason);
/* The domain's name in such a mount; the caller's to free. -EBADMSG: it is none of ours. */
int pool_fs_domain(int mount_fd, char **ret);
/* The pool's file of such a mount, for reading and writing. -EBADMSG: it is another domain's, or none of ours. */
int pool_fs_open(const char *domain, int mount_fd, int *ret_rw_fd);
/* The pool's file for reading, through a copy of the mount that is read-only. */
int pool_fs_open_readonly(int mount_fd, int *ret_fd, const char **ret_reason);
/* The pool's file becomes longer, so that who looks at its length finds out (pool_note_lost()). */
int pool_fs_lengthen(int rw_fd);
