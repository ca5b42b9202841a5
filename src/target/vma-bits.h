/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/vma.h"

/*
 * Which bit of the kernel's vm_flags stands for which VmFlag. No interface says so, and bits move between kernels: it
 * is learnt from mappings whose bits and letters are both known.
 */
typedef struct VmaBits {
        uint64_t known;         /* of these bits it is known what they mean, of no others */
        uint32_t traits[64];    /* of each of them, VmaTrait; 0: nothing that matters */
} VmaBits;

typedef struct VmaSample {
        uint64_t bits;
        const VmaLetters *letters;
} VmaSample;

/* Pure. What the samples leave open stays unknown. */
void vma_bits_learn(const VmaSample *samples, size_t n, VmaBits *ret);

/* What the bits of a mapping say; *ret_unsure: there is one among them that is not known. */
uint32_t vma_bits_traits(const VmaBits *bits, uint64_t flags, bool *ret_unsure);
