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

/*
 * Whether the cgroups of one domain may share a pool (Route=remap). A process that has huge pages made of pool pages
 * (MADV_COLLAPSE; it has to move its mapping to where the two line up) makes others that map them read zeros. So they
 * have to trust each other, every one of them saying so (TrustedTogether=yes), or nobody may be able to
 * (host_shmem_huge_denied(), which is to be asked each time: it may change while we run). One cgroup alone trusts
 * itself.
 *
 * Starts zeroed; add the cgroups that have processes now. path is borrowed.
 */
typedef struct PolicyTrust {
        const char *path;       /* the first one's; NULL: none yet */
        bool several;           /* there is a different one */
        bool doubted;           /* one of them does not trust the others */
} PolicyTrust;

void policy_trust_add(PolicyTrust *trust, const ConfCgroup *section, const char *path);
/* Why nothing may be remapped; NULL: it may. Static. */
const char *policy_trust_problem(const PolicyTrust *trust, bool shmem_denied);

/* Why route remap merges nothing on a host of so many NUMA nodes; NULL: nothing speaks against it. Static. */
const char *policy_nodes_problem(const Conf *conf, unsigned n_nodes);
