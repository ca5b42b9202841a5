/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "conf/conf.h"

/*
 * Which section of the configuration a cgroup falls under: decisions only, no state, no files.
 */

/* '?' one character but '/', '*' any number of them, '**' any number of any characters, '\' takes the next literally.
 * The whole path must match. A leading '/' of the pattern is ignored. */
bool cgroup_pattern_match(const char *pattern, const char *path);

/* The first section whose pattern matches and whose Exclude= does not (an excluded path goes on to later sections);
 * NULL: nobody opted the cgroup in. */
const ConfCgroup *policy_find(const Conf *conf, const char *path);

/* The name of the domain the cgroup's pages belong to: Domain= with %c replaced by the path. The caller frees it. */
int policy_domain(const ConfCgroup *section, const char *path, char **ret);
