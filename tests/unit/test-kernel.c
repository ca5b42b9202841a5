/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * host/kernel: probing neither fails nor leaves anything behind, as root and as nobody, and says what it means.
 */

#include "base/io.h"
#include "host/kernel.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>
#include <dirent.h>
#include <grp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

static size_t count_entries(const char *path) {
        DIR *directory = opendir(path);
        size_t n = 0;

        assert_non_null(directory);
        while (readdir(directory))
                n++;
        closedir(directory);
        return n;
}

static size_t count_mappings(void) {
        _cleanup_free_ char *text = NULL;
        size_t n = 0;

        assert_int_equal(read_file(AT_FDCWD, "/proc/self/maps", &text, NULL), 0);
        for (const char *p = text; (p = strchr(p, '\n')); p++)
                n++;
        return n;
}

static const HostFeature *feature(const HostKernel *host, const char *name) {
        for (size_t i = 0; i < host->n_features; i++)
                if (strcmp(host->features[i].name, name) == 0)
                        return host->features + i;
        return NULL;
}

static bool sane(const HostKernel *host) {
        if (host->n_features == 0 || host->n_features > ELEMENTSOF(host->features) || host->n_cpus == 0 ||
            host->n_nodes == 0 || host->memory_bytes == 0 || host->max_map_count == 0 || !host->release[0])
                return false;
        for (size_t i = 0; i < host->n_features; i++) {
                const HostFeature *f = host->features + i;
                size_t n = f->follows ? strlen(f->follows) : 0;

                if (!f->name || !*f->name || n == 0 || f->follows[n - 1] != '.' || f->state > 1 || f->state < -4095)
                        return false;
                if (feature(host, f->name) != f) /* each once */
                        return false;
        }
        return true;
}

static void test_leaves_nothing(void **unused) {
        HostKernel host;
        size_t fds, mappings;

        for (int i = 0; i < 20; i++) /* ThreadSanitizer keeps what belonged to the last 16 threads or so */
                host_kernel_probe(&host);
        assert_true(sane(&host));
        fds = count_entries("/proc/self/fd");
        mappings = count_mappings();
        assert_int_equal(feature(&host, "the zero page")->state, test_has_zero_page());
        for (int i = 0; i < 40; i++)
                host_kernel_probe(&host);
        assert_int_equal(count_entries("/proc/self/fd"), fds);
        assert_true(count_mappings() < mappings + 40); /* the allocator may have made a few of its own */
        assert_int_equal(waitpid(-1, NULL, WNOHANG | __WALL), -1);
        assert_int_equal(errno, ECHILD);
}

static void test_as_root(void **unused) {
        HostKernel host;

        if (geteuid() != 0)
                skip();
        host_kernel_probe(&host);
        /* What no supported kernel refuses to root outside a sandbox. */
        if (!host.pagemap_pfns)
                skip();
        assert_true(host.page_size_supported);
        assert_true(host.process_vm_readv);
        assert_true(host.proc_mem);
        assert_true(host.pidfd);
        assert_int_equal(feature(&host, "/proc/kpageflags")->state, 1);
        assert_true(host.kpageflags);
}

static void run_in_child(int (*f)(void)) {
        int status;
        pid_t child = fork();

        if (child == 0)
                _exit(f());
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
}

static int as_nobody(void) {
        HostKernel host;

        if (geteuid() == 0 && (setgroups(0, NULL) < 0 || setresgid(65534, 65534, 65534) < 0 ||
                               setresuid(65534, 65534, 65534) < 0))
                return 2;
        host_kernel_probe(&host);
        if (!sane(&host))
                return 3;
        /* Frame numbers are not for nobody: and the probe says so. */
        if (host.pagemap_pfns || feature(&host, "page frame numbers in /proc/PID/pagemap")->state > 0)
                return 4;
        return host.ksm_writable ? 5 : 0;
}

static int without_processes(void) {
        const struct rlimit none = { 0, 0 };
        HostKernel host;

        if (geteuid() == 0 && setresuid(65534, 65534, 65534) < 0)
                return 2;
        if (setrlimit(RLIMIT_NPROC, &none) < 0)
                return 2;
        host_kernel_probe(&host);
        return !sane(&host) || host.ptrace || host.process_vm_readv || feature(&host, "ptrace")->state != -EAGAIN;
}

static int without_descriptors(void) {
        const struct rlimit none = { 0, 0 };
        HostKernel host;

        if (setrlimit(RLIMIT_NOFILE, &none) < 0)
                return 2;
        host_kernel_probe(&host);
        return host.n_features == 0 || host.io_uring || host.proc_mem;
}

static void test_as_nobody(void **unused) { run_in_child(as_nobody); }
static void test_without_processes(void **unused) { run_in_child(without_processes); }
static void test_without_descriptors(void **unused) { run_in_child(without_descriptors); }

int main(int argc, char **argv) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_leaves_nothing),    cmocka_unit_test(test_as_root),
                cmocka_unit_test(test_as_nobody),         cmocka_unit_test(test_without_processes),
                cmocka_unit_test(test_without_descriptors),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
