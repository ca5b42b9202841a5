/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A build without probes: all of them say so.
 */
#include "config.h"

#include "probe/probe.h"

#if !HAVE_PROBES
#include <string.h>

struct Probes {
        int error;
};

int probes_new(const ProbeOptions *options, Probes **ret) {
        Probes *probes = calloc(1, sizeof *probes);

        if (!probes)
                return -ENOMEM;
        probes->error = options->off ? -ECANCELED : -ENOSYS;
        *ret = probes;
        return 0;
}

Probes *probes_free(Probes *probes) {
        free(probes);
        return NULL;
}

ProbeState probes_state(const Probes *probes, ProbeId id) { return (ProbeState){ .error = probes->error }; }

int probes_watch_cgroups(Probes *probes, const uint64_t *ids, size_t n) { return 0; }

int probes_watch_targets(Probes *probes, const pid_t *pids, size_t n) { return 0; }

void probes_forget_blocks(Probes *probes, pid_t pid) {}

size_t probes_blocks(const Probes *probes, pid_t pid) { return 0; }

int probes_event_fd(const Probes *probes) { return -EBADF; }

void probes_read_events(Probes *probes, ProbeHandler handler, void *userdata) {}

uint64_t probes_rest(Probes *probes, uint64_t now_nsec) { return UINT64_MAX; }

uint64_t probes_rested(const Probes *probes, uint64_t now_nsec) { return 0; }

bool probes_block_get(const Probes *probes, pid_t pid, uint64_t addr, struct probe_block *ret) { return false; }

int probes_block_set(Probes *probes, pid_t pid, uint64_t addr, const struct probe_block *block) { return 0; }

uint64_t probes_cow_breaks(const Probes *probes) { return 0; }

void probes_flushes(const Probes *probes, struct probe_flushes *ret) { memset(ret, 0, sizeof *ret); }

void probes_ksm(const Probes *probes, struct probe_ksm *ret) { memset(ret, 0, sizeof *ret); }

void probes_walks(const Probes *probes, struct probe_walks *ret) { memset(ret, 0, sizeof *ret); }

void probes_target(const Probes *probes, pid_t pid, struct probe_target *ret) { memset(ret, 0, sizeof *ret); }

int probes_open_vmas(const Probes *probes, pid_t pid) { return -ENOSYS; }

void probes_refuse(Probes *probes, ProbeId id, int error) {}

uint64_t probes_bytes(const Probes *probes) { return 0; }
#endif
