/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "config.h"

#if HAVE_PROBES
#include "probe/probe-objects.h"

#include <bpf/libbpf.h>

#include <faults.skel.h>
#include <faults_raw.skel.h>
#include <flushes.skel.h>
#include <flushes_raw.skel.h>
#include <ksm.skel.h>
#include <ksm_raw.skel.h>
#include <roster.skel.h>
#include <roster_raw.skel.h>
#include <vmas.skel.h>
#include <walks.skel.h>

const ProbeObject probe_objects[_PROBE_MAX][2] = {
        [PROBE_ROSTER] = { { roster__elf_bytes }, { roster_raw__elf_bytes } },
        [PROBE_FAULTS] = { { faults__elf_bytes }, { faults_raw__elf_bytes } },
        [PROBE_FLUSHES] = { { flushes__elf_bytes }, { flushes_raw__elf_bytes } },
        [PROBE_KSM] = { { ksm__elf_bytes }, { ksm_raw__elf_bytes } },
        [PROBE_WALKS] = { { walks__elf_bytes }, { NULL } },
        [PROBE_VMAS] = { { vmas__elf_bytes }, { NULL } },
};
#endif
