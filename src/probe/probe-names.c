/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What people are told of the probes.
 */
#include "probe/probe.h"

#include <string.h>

static const struct {
        const char *name, *works, *absent;
} texts[_PROBE_MAX] = {
        [PROBE_ROSTER] = { "roster", "Processes that come, leave or run another program are known at once.",
                           "Processes that come or leave are known within a second." },
        [PROBE_FAULTS] = { "faults", "Writes that take a merged page apart are counted, and known within a second.",
                           "Merged pages that were taken apart are found when frames are counted: later, and not all "
                           "of them." },
        [PROBE_FLUSHES] = { "flushes", "TLB flushes are counted, by who made them.", "TLB flushes are not counted." },
        [PROBE_KSM] = { "ksm", "What ksmd did with what was marked is counted, and why a page did not merge.",
                        "Why ksmd did not merge a page is not known (Linux 6.7 has the tracepoints)." },
        [PROBE_WALKS] = { "walks", "Reverse-map walks over merged pages are counted and timed.",
                          "Reverse-map walks over merged pages are not timed: the kernel refuses fentry, or has it not." },
        [PROBE_VMAS] = { "vmas", "Mappings are read without a look at their pages.",
                         "Mappings are read from smaps, for which the kernel looks at each of their pages." },
};

const char *probe_name(ProbeId id) { return texts[id].name; }

const char *probe_follows(ProbeId id, bool works) { return works ? texts[id].works : texts[id].absent; }

const char *probe_error_name(int error) {
        switch (error) {
        case -ENOSYS:
                return "not part of this build";
        case -ECANCELED:
                return "switched off by Probes=";
        case -EXDEV:
                return "the daemon runs in a pid namespace of its own";
        case -ESRCH:
                return "this kernel has nothing to attach to";
        case -EBADMSG:
                return "what it says of mappings cannot be made out";
        case -EOPNOTSUPP:
                return "of no use without PAGEMAP_SCAN";
        case -EPERM:
        case -EACCES:
                return "refused: Operation not permitted";
        }
        return strerrordesc_np(-error) ?: "unknown error";
}

const char *probe_way_name(ProbeWay way) {
        static const char *const names[] = { [PROBE_WAY_NONE] = "none", [PROBE_WAY_TYPED] = "btf",
                                             [PROBE_WAY_RAW] = "raw" };
        return names[way];
}
