/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The bare floor: process_vm_readv(2) and the daemon's hash over another process's memory, nothing else, in the batch
 * size that is best here. Usage: bench-floor PID ADDRESS PAGES [plain]; plain: with XXH3 as the library has it for every
 * CPU of the architecture, not for the widest vectors of this one. Prints the nanoseconds of CPU time that a page takes:
 * the median of five readings.
 */

#include "test.h"

#include "scan/hash.h"

#define XXH_DISPATCH_DISABLE_REPLACE
#include <xxhash.h>

#include <sys/uio.h>

#define BATCH_MAX 512U
#define ROUNDS 5

static const unsigned batches[] = { 32, 64, 128, 256, 512 };

static bool plain;

static uint64_t hash(const HashSecret *secret, const uint8_t *page) {
        return plain ? XXH3_64bits(page, PAGE_BYTES) : hash_page(secret, page);
}

static double read_and_hash(pid_t pid, uint8_t *address, uint64_t pages, unsigned batch, const HashSecret *secret,
                            uint8_t *buffer) {
        uint64_t start = process_cpu_nsec();
        volatile uint64_t sum = 0;

        for (uint64_t page = 0; page < pages; page += batch) {
                unsigned n = (unsigned)MIN_OF((uint64_t)batch, pages - page);
                struct iovec local = { buffer, n * PAGE_BYTES };
                struct iovec remote = { address + page * PAGE_BYTES, n * PAGE_BYTES };

                CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)(n * PAGE_BYTES), "process %d", pid);
                for (unsigned i = 0; i < n; i++)
                        sum += hash(secret, buffer + i * PAGE_BYTES);
        }
        (void)sum;
        return (double)(process_cpu_nsec() - start) / (double)pages;
}

static int compare_doubles(const void *a, const void *b) {
        double x = *(const double *)a, y = *(const double *)b;
        return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
        _cleanup_(hash_secret_freep) HashSecret *secret = NULL;
        _cleanup_free_ uint8_t *buffer = aligned_alloc(PAGE_BYTES, BATCH_MAX * PAGE_BYTES);
        double rounds[ROUNDS], least = 1e9;
        unsigned best = 0;
        uint8_t *address;
        uint64_t pages;
        pid_t pid;

        CHECK(argc >= 4 && buffer, "usage: bench-floor PID ADDRESS PAGES [plain]");
        plain = argc > 4;
        pid = (pid_t)strtol(argv[1], NULL, 10);
        address = (uint8_t *)strtoull(argv[2], NULL, 16);
        pages = strtoull(argv[3], NULL, 10);
        CHECK(hash_secret_new(&secret) == 0);
        memset(buffer, 1, BATCH_MAX * PAGE_BYTES);
        for (size_t i = 0; i < 2 * ELEMENTSOF(batches); i++) {
                unsigned batch = batches[i % ELEMENTSOF(batches)];
                double nsec = read_and_hash(pid, address, MIN_OF(pages, (uint64_t)1 << 15), batch, secret, buffer);

                if (nsec < least) {
                        least = nsec;
                        best = batch;
                }
        }
        for (int i = 0; i < ROUNDS; i++)
                rounds[i] = read_and_hash(pid, address, pages, best, secret, buffer);
        qsort(rounds, ROUNDS, sizeof *rounds, compare_doubles);
        printf("%.2f\n", rounds[ROUNDS / 2]);
        return 0;
}
