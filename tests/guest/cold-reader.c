/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * cold-reader restore|leave PID...: for each line on its standard input, reads all that may be read of the processes,
 * by the daemon's scanner, puts what was cold back or leaves it, and answers how many MiB of each were cold.
 */

#include "scan/cold.h"
#include "scan/scan.h"
#include "tests/test.h"

#define PROCESSES_MAX 8

typedef struct Process {
        Target *target;
        Space space;
} Process;

/* Returns what was cold. */
static uint64_t read_once(Scanner *scanner, Process *process, bool restore) {
        VmaList vmas;
        ColdList list = {};
        uint64_t bytes = 0;

        CHECK(target_read_vmas(process->target, false, &vmas) == 0, "smaps");
        CHECK(space_refresh(&process->space, &vmas) == 0, "space");
        for (size_t i = 0; i < process->space.n; i++) {
                static ScanBatch batch;

                batch = (ScanBatch){ .target = process->target, .vmas = &vmas };
                scan_batch_whole(&batch, process->space.blocks[i]);
                CHECK(scan_batch(scanner, 0, &batch) == 0, "scan");
                CHECK(cold_collect(&list, &vmas, process->space.blocks[i]->addr) == 0, "memory");
        }
        if (restore)
                CHECK(cold_restore(process->target, list.ranges, list.n) == 0, "cold_restore");
        for (size_t i = 0; i < list.n; i++)
                bytes += list.ranges[i].end - list.ranges[i].start;
        cold_list_done(&list);
        vma_list_done(&vmas);
        return bytes;
}

int main(int argc, char **argv) {
        Process processes[PROCESSES_MAX];
        BlockTable table = {};
        HashSecret *secret;
        Scanner *scanner;
        char line[16];
        uint32_t pass = 0;
        int n = argc - 2;

        CHECK(n > 0 && n <= PROCESSES_MAX, "usage");
        CHECK(hash_secret_new(&secret) == 0 && scanner_new(secret, 1, &scanner) == 0, "scanner");
        for (int i = 0; i < n; i++) {
                Process *p = &processes[i];

                CHECK(target_new((pid_t)atoi(argv[2 + i]), &p->target) == 0, "process %s", argv[2 + i]);
                CHECK(target_open_memory(p->target) == 0, "process %s", argv[2 + i]);
                p->space = (Space){ .target = p->target, .table = &table };
        }
        while (fgets(line, sizeof line, stdin)) {
                scanner_begin_pass(scanner, ++pass);
                for (int i = 0; i < n; i++)
                        printf("%llu%s", (unsigned long long)read_once(scanner, &processes[i], argv[1][0] == 'r') >> 20,
                               i + 1 < n ? " " : "\n");
                fflush(stdout);
        }
        return 0; /* what is held goes with the process */
}
