/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The reader without its safeguard: pins everything. Linked in place of scan/reader.c, it makes the tests of sharing
 * show what they guard against.
 */
#include "scan/reader.h"

#include <sys/uio.h>

int reader_read(const Target *target, ReaderWay way, const uint64_t *addrs, unsigned n, void *buffer, bool *ret_read) {
        for (unsigned i = 0; i < n; i++) {
                struct iovec local = { (uint8_t *)buffer + i * PAGE_BYTES, PAGE_BYTES };
                struct iovec remote = { (void *)(uintptr_t)addrs[i], PAGE_BYTES };

                ret_read[i] = process_vm_readv(target->pid, &local, 1, &remote, 1, 0) == (ssize_t)PAGE_BYTES;
        }
        return 0;
}
