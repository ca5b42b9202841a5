/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scan/reader.h"

#include <string.h>
#include <sys/uio.h>

/* The pages from addrs[i] on that follow each other without a gap, up to n. */
static unsigned run_length(const uint64_t *addrs, unsigned i, unsigned n) {
        unsigned length = 1;

        while (i + length < n && addrs[i + length] == addrs[i] + length * PAGE_BYTES)
                length++;
        return length;
}

/* Notes the whole pages among so many bytes, from page first on. Returns how many. */
static unsigned note_read(bool *read, unsigned first, ssize_t bytes) {
        unsigned n = (unsigned)((uint64_t)bytes / PAGE_BYTES);

        for (unsigned i = first; i < first + n; i++)
                read[i] = true;
        return n;
}

/* One call for everything; it ends early at a page it cannot read (process_vm_rw_core() hands out whole pages), and
 * goes on behind that. */
static int read_pinning(const Target *target, const uint64_t *addrs, unsigned n, uint8_t *buffer, bool *read) {
        struct iovec remote[READER_PAGES];

        for (unsigned done = 0; done < n;) {
                struct iovec local = { buffer + done * PAGE_BYTES, (n - done) * PAGE_BYTES };
                unsigned runs = 0;
                ssize_t got;

                for (unsigned i = done; i < n; runs++) {
                        unsigned length = run_length(addrs, i, n);
                        remote[runs] = (struct iovec) { (void *)(uintptr_t)addrs[i], length * PAGE_BYTES };
                        i += length;
                }
                got = process_vm_readv(target->pid, &local, 1, remote, runs, 0);
                if (got < 0) {
                        if (errno != EFAULT && errno != EIO && errno != ENOMEM)
                                return -errno;
                        got = 0;
                }
                done += note_read(read, done, got) + 1;
        }
        return 0;
}

static int read_keeping(const Target *target, const uint64_t *addrs, unsigned n, uint8_t *buffer, bool *read) {
        for (unsigned done = 0; done < n;) {
                unsigned length = run_length(addrs, done, n);
                ssize_t got = pread(target->memfd, buffer + done * PAGE_BYTES, length * PAGE_BYTES, (off_t)addrs[done]);

                if (got < 0) {
                        if (errno == EINTR)
                                continue;
                        if (errno != EFAULT && errno != EIO && errno != ENOMEM)
                                return -errno;
                        got = 0;
                } else if (got == 0)
                        return -ESRCH; /* mem_rw(): the memory that was opened is no more */
                done += note_read(read, done, got) + ((uint64_t)got < length * PAGE_BYTES);
        }
        return 0;
}

int reader_read(const Target *target, ReaderWay way, const uint64_t *addrs, unsigned n, void *buffer, bool *ret_read) {
        int r = -ENOSYS;

        memset(ret_read, 0, n * sizeof *ret_read);
        if (way == READER_PINS)
                r = read_pinning(target, addrs, n, buffer, ret_read);
        /* A kernel may lack the call (CONFIG_CROSS_MEMORY_ATTACH); nothing depends on it but speed. */
        if (r == -ENOSYS)
                r = read_keeping(target, addrs, n, buffer, ret_read);
        return r == -ESRCH ? TARGET_E_GONE : r;
}
