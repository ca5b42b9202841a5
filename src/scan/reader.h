/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "target/target.h"

/*
 * Reads pages of another process, by whichever of two readers does not disturb them.
 *
 * process_vm_readv(2) pins what it reads, and a pin on an anonymous page that is not its mapper's alone first gives
 * the mapper a copy of its own (gup_must_unshare(), since 5.19): it un-shares. read(2) of /proc/PID/mem takes plain
 * references and leaves all sharing as it is, but copies everything twice.
 */
#define READER_PAGES 128U /* at most in one call: 512 KiB stay in the L2 cache until they are hashed */

typedef enum ReaderWay {
        READER_PINS,            /* process_vm_readv: for pages mapped once that no KSM can merge meanwhile */
        READER_KEEPS_SHARING,   /* /proc/PID/mem */
} ReaderWay;

/* Reads the n pages at addrs (ascending, anywhere in the process), each into its PAGE_BYTES of buffer. ret_read[i] says
 * whether page i was read whole; the others went away, or the kernel cannot read them. What was read is the process's
 * only if target_alive() afterwards. Pages that follow each other cost less than scattered ones. TARGET_E_GONE; -errno,
 * -EPERM among them. */
int reader_read(const Target *target, ReaderWay way, const uint64_t *addrs, unsigned n, void *buffer, bool *ret_read);
