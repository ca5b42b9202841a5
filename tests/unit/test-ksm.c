/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * host/ksm on a directory of plain files that stands in for /sys/kernel/mm/ksm. write(2), renameat(2) and unlink(2)
 * are replaced by ones that know the kernel's refusals, and that can end the process at any one of them: whatever
 * instant a daemon dies at, the next one must put back what the first had found.
 */

#include "base/io.h"
#include "host/ksm.h"
#include "tests/test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>

#include <cmocka.h>
#include <ftw.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static char root[] = "/tmp/test-ksm.XXXXXX";
static char sysfs[64], state[64];
static bool shared;             /* pages are shared: two knobs are busy */
static int die_at = -1;         /* end the process at this system call */

/* What each knob held before it was opened with O_TRUNC: sysfs forgets nothing when the write never comes. */
static struct {
        char name[24], value[24];
} held[24];

static char *held_value(const char *name) {
        for (size_t i = 0;; i++)
                if (!held[i].name[0] || strcmp(held[i].name, name) == 0) {
                        strcpy(held[i].name, name);
                        return held[i].value;
                }
}

static void count(void) {
        if (die_at == 0)
                _exit(0);
        if (die_at > 0)
                die_at--;
}

ssize_t write(int fd, const void *data, size_t n) {
        char link[32], path[256] = "";
        const char *name;

        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, path, sizeof path - 1) < 0 || !strstr(path, sysfs)) {
                count();
                return syscall(SYS_write, fd, data, n);
        }
        name = strrchr(path, '/') + 1;
        if (shared && (strcmp(name, "max_page_sharing") == 0 || strcmp(name, "merge_across_nodes") == 0))
                errno = EBUSY;
        else if (strcmp(name, "pages_to_scan") == 0 && strstr(held_value("advisor_mode"), "[scan-time]"))
                errno = EINVAL;
        else if (die_at != 0) {
                count();
                snprintf(held_value(name), sizeof held[0].value, "%.*s", (int)n, (const char *)data);
                return syscall(SYS_write, fd, data, n);
        }
        syscall(SYS_write, fd, held_value(name), strlen(held_value(name)));
        count();
        return -1;
}

static unsigned renames;

int renameat(int from_at, const char *from, int to_at, const char *to) {
        count();
        renames++;
        return (int)syscall(SYS_renameat2, from_at, from, to_at, to, 0);
}

int unlink(const char *path) {
        count();
        return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

static void put_file(const char *name, const char *text) {
        char path[128];
        FILE *f;

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        f = fopen(path, "we");
        assert_non_null(f);
        fputs(text, f);
        fclose(f);
}

static void put(const char *name, const char *text) {
        put_file(name, text);
        strcpy(held_value(name), text);
}

static void put_state(const char *text) {
        FILE *f = fopen(state, "we");
        assert_non_null(f);
        fputs(text, f);
        fclose(f);
        assert_int_equal(chmod(state, 0600), 0);
}

static void assert_knob(const char *name, const char *value) {
        char path[128];
        _cleanup_free_ char *text = NULL;

        snprintf(path, sizeof path, "%s/%s", sysfs, name);
        assert_int_equal(read_file(AT_FDCWD, path, &text, NULL), 0);
        text[strcspn(text, "\n")] = 0;
        assert_string_equal(text, value);
}

static bool state_exists(void) { return access(state, F_OK) == 0; }

static int setup(void **unused) {
        static const char *const zero[] = { "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile",
                                            "pages_scanned", "pages_skipped", "full_scans", "stable_node_chains",
                                            "stable_node_dups", "ksm_zero_pages", "use_zero_pages", "run" };
        shared = false;
        die_at = -1;
        snprintf(sysfs, sizeof sysfs, "%s/k", root);
        snprintf(state, sizeof state, "%s/state", root);
        mkdir(sysfs, 0755);
        for (size_t i = 0; i < ELEMENTSOF(zero); i++)
                put(zero[i], "0\n");
        put("pages_to_scan", "100\n");
        put("sleep_millisecs", "20\n");
        put("smart_scan", "1\n");
        put("max_page_sharing", "256\n");
        put("merge_across_nodes", "1\n");
        put("general_profit", "-640\n");
        put("advisor_mode", "[none] scan-time\n");
        (void)unlink(state);
        return 0;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) { return remove(path); }

static void test_reads(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        KsmCounters counters;
        KsmKnobs knobs;

        put("pages_sharing", "12345\n");
        put("full_scans", "18446744073709551615\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_false(ksm_was_left_changed(ksm));
        assert_int_equal(ksm_counters(ksm, &counters), 0);
        assert_int_equal(counters.pages_sharing, 12345);
        assert_int_equal(counters.full_scans, UINT64_MAX);
        assert_int_equal(counters.general_profit, -640);
        put("pages_sharing", "7\n"); /* the descriptors are kept open */
        assert_int_equal(ksm_counters(ksm, &counters), 0);
        assert_int_equal(counters.pages_sharing, 7);
        assert_int_equal(ksm_knobs(ksm, &knobs), 0);
        assert_int_equal(knobs.pages_to_scan, 100);
        assert_int_equal(knobs.sleep_millisecs, 20);
        assert_int_equal(knobs.max_page_sharing, 256);
        assert_false(knobs.advisor);
        put("advisor_mode", "none [scan-time]\n");
        assert_int_equal(ksm_knobs(ksm, &knobs), 0);
        assert_true(knobs.advisor);
}

static void test_restores(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;

        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "run", 0), 0);
        assert_false(state_exists()); /* it was 0: nothing changed, nothing to remember */
        assert_int_equal(ksm_set(ksm, "run", 1), 0);
        assert_true(state_exists());
        assert_int_equal(ksm_set(ksm, "sleep_millisecs", 0), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1000), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 2000), 0);
        assert_knob("pages_to_scan", "2000");
        assert_int_equal(ksm_restore_knobs(ksm, (const char *const[]){ "run", "sleep_millisecs" }, 2), 0);
        assert_knob("run", "0");
        assert_knob("sleep_millisecs", "20");
        assert_knob("pages_to_scan", "2000");
        assert_true(state_exists());
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("pages_to_scan", "100");
        assert_false(state_exists());
}

static void test_next_start_restores(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL, *next = NULL;

        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "run", 1), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1000), 0);
        assert_int_equal(ksm_set(ksm, "use_zero_pages", 1), 0);
        put("use_zero_pages", "0\n"); /* the administrator's hand, after the crash */
        put("pages_to_scan", "3000\n");
        assert_int_equal(ksm_new(sysfs, state, &next), 0);
        assert_true(ksm_was_left_changed(next));
        assert_int_equal(ksm_restore(next), 0);
        assert_false(ksm_was_left_changed(next));
        assert_knob("run", "0");
        assert_knob("pages_to_scan", "3000");
        assert_knob("use_zero_pages", "0");
        assert_false(state_exists());
}

static void test_foreign_value_becomes_found(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;

        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1000), 0);
        put("pages_to_scan", "3000\n");
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1000), 0);
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("pages_to_scan", "3000");
}

static void test_busy(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL, *next = NULL;

        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        shared = true;
        assert_int_equal(ksm_set(ksm, "max_page_sharing", 1024), KSM_E_BUSY);
        assert_false(state_exists());
        assert_knob("max_page_sharing", "256");
        shared = false;
        assert_int_equal(ksm_set(ksm, "max_page_sharing", 64), 0);
        shared = true;
        assert_int_equal(ksm_restore(ksm), KSM_E_BUSY);
        assert_true(state_exists());
        assert_knob("max_page_sharing", "64");
        assert_int_equal(ksm_new(sysfs, state, &next), 0);
        assert_true(ksm_was_left_changed(next));
        shared = false;
        assert_int_equal(ksm_restore(next), 0);
        assert_knob("max_page_sharing", "256");
        assert_false(state_exists());
}

/* Back to the advisor first; then pages_to_scan is its own, and refused. */
static void test_advisor(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;

        put("advisor_mode", "none [scan-time]\n");
        put("pages_to_scan", "500\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1000), -EINVAL);
        assert_false(state_exists());
        assert_int_equal(ksm_set(ksm, "advisor_mode", 0), -EINVAL);
        assert_int_equal(ksm_set_text(ksm, "advisor_mode", "none"), 0);
        assert_knob("advisor_mode", "none");
        put("advisor_mode", "[none] scan-time\n"); /* as the kernel shows it */
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 2000), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 500), 0);
        put("advisor_mode", "none [scan-time]\n"); /* as if the administrator turned it on: then 500 is not ours */
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("pages_to_scan", "500");
        assert_knob("advisor_mode", "none [scan-time]");
        assert_false(state_exists());

        assert_int_equal(ksm_set_text(ksm, "advisor_mode", "none"), 0);
        put("advisor_mode", "[none] scan-time\n");
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("advisor_mode", "scan-time");
}

static void test_refusals(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        KsmCounters counters;
        KsmKnobs knobs;
        char path[128];

        assert_int_equal(ksm_new("/nonexistent", state, &ksm), -ENOENT);
        snprintf(path, sizeof path, "%s/run", sysfs);
        assert_int_equal(unlink(path), 0);
        assert_int_equal(ksm_new(sysfs, state, &ksm), -ENOENT);
        put("run", "0\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "pages_shared", 1), -EINVAL);
        assert_int_equal(ksm_set(ksm, "../state", 1), -EINVAL);
        assert_int_equal(ksm_set_text(ksm, "run", "-1"), -EINVAL);
        assert_int_equal(ksm_set_text(ksm, "run", "1\n"), -EINVAL);
        snprintf(path, sizeof path, "%s/smart_scan", sysfs); /* a kernel before 6.7 */
        assert_int_equal(unlink(path), 0);
        assert_int_equal(ksm_set(ksm, "smart_scan", 0), -ENOENT);
        assert_int_equal(ksm_knobs(ksm, &knobs), 0);
        assert_int_equal(knobs.smart_scan, 0);
        put("pages_sharing", "many\n");
        assert_int_equal(ksm_counters(ksm, &counters), -EINVAL);
        put("pages_sharing", "-3\n");
        assert_int_equal(ksm_counters(ksm, &counters), -EINVAL);
        put("pages_sharing", "");
        assert_int_equal(ksm_counters(ksm, &counters), -EINVAL);
        put("run", "?\n");
        assert_int_equal(ksm_knobs(ksm, &knobs), -EINVAL);
        assert_int_equal(ksm_set(ksm, "run", 1), -EINVAL);
        ksm = ksm_free(ksm);

        assert_int_equal(ksm_new(sysfs, NULL, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1), -EROFS);
        assert_int_equal(ksm_restore(ksm), 0);
        ksm = ksm_free(ksm);

        /* No place to remember: then nothing is changed. */
        assert_int_equal(ksm_new(sysfs, "/nonexistent/state", &ksm), 0);
        assert_int_equal(ksm_set(ksm, "pages_to_scan", 1), -ENOENT);
        assert_knob("pages_to_scan", "100");
}

static void test_read_only(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        char path[128];
        int status;
        pid_t child;

        snprintf(path, sizeof path, "%s/run", sysfs);
        assert_int_equal(chmod(path, 0444), 0);
        assert_int_equal(chmod(root, 0755), 0);
        child = fork();
        if (child == 0) {
                if (geteuid() == 0 && setresuid(65534, 65534, 65534) < 0)
                        _exit(2);
                _exit(ksm_new(sysfs, state, &ksm) == -EACCES && ksm_new(sysfs, NULL, &ksm) == 0 ? 0 : 1);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
        assert_int_equal(chmod(path, 0644), 0);
}

static void test_hostile_state(void **unused) {
        static const char *const bad[] = {
                "", "\n", "run 0 1", "run 0\n", "run 0 1 1 1\n", "run 0 1\nrun 2 1\n", "pages_shared 0 1\n",
                "../../../etc/passwd 0 1\n", "run 0 1\nmore", "run -1 1\n", "run 0x1 1\n", "run 0 one\n",
                "advisor_mode none 1\n", "run 000000000000000000000000000 1\n", "run none 1\n", " \n", "run 0 1\n\n",
        };
        _cleanup_(ksm_freep) Ksm *ksm = NULL;

        put("run", "1\n");
        for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
                put_state(bad[i]);
                assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
                assert_false(ksm_was_left_changed(ksm));
                assert_int_equal(ksm_restore(ksm), -EBADMSG);
                assert_false(state_exists());
                assert_int_equal(ksm_restore(ksm), 0);
                assert_knob("run", "1");
                ksm = ksm_free(ksm);
        }
        /* Whole, but others could have written it; and a link to somewhere. */
        put_state("run 0 1\n");
        assert_int_equal(chmod(state, 0622), 0);
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_restore(ksm), -EBADMSG);
        assert_knob("run", "1");
        ksm = ksm_free(ksm);
        assert_int_equal(symlink("/etc/passwd", state), 0);
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_restore(ksm), -EBADMSG);
        assert_false(state_exists());
        ksm = ksm_free(ksm);
        /* The control: the same line in a proper file is followed. */
        put_state("run 0 1\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_true(ksm_was_left_changed(ksm));
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("run", "0");
}

/* In pauses of a burst, ten times a second: not a file each time, and whatever somebody else sets is his. */
static void test_to_and_fro(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        unsigned before;

        put("sleep_millisecs", "20\n");
        assert_int_equal(ksm_new(sysfs, state, &ksm), 0);
        assert_int_equal(ksm_set(ksm, "sleep_millisecs", 0), 0);
        assert_int_equal(ksm_set(ksm, "sleep_millisecs", 600), 0);
        before = renames;
        for (unsigned i = 0; i < 10; i++) {
                assert_int_equal(ksm_set(ksm, "sleep_millisecs", i % 2 ? 600 : 0), 0);
                assert_knob("sleep_millisecs", i % 2 ? "600" : "0");
        }
        assert_int_equal(renames, before);
        assert_int_equal(ksm_set(ksm, "sleep_millisecs", 50), 0);
        assert_int_equal(ksm_set(ksm, "sleep_millisecs", 0), 0);
        assert_int_equal(renames, before + 2);
        put("sleep_millisecs", "50\n"); /* what was ours, but is not now */
        assert_int_equal(ksm_restore(ksm), 0);
        assert_knob("sleep_millisecs", "50");
        assert_false(state_exists());
}

static void daemon_life(bool careless) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;

        if (careless) { /* the control: changes the knob before it is on file */
                put("run", "1\n");
                count();
        }
        if (ksm_new(sysfs, state, &ksm) < 0)
                _exit(1);
        if (ksm_set(ksm, "use_zero_pages", 1) || ksm_set(ksm, "pages_to_scan", 1000) ||
            ksm_set(ksm, "pages_to_scan", 2000) || ksm_set(ksm, "pages_to_scan", 3000) || ksm_set(ksm, "run", 1) ||
            ksm_set(ksm, "run", 0) || ksm_set(ksm, "run", 1) || ksm_set(ksm, "pages_to_scan", 2000) ||
            ksm_set(ksm, "use_zero_pages", 2) || ksm_set(ksm, "pages_to_scan", 3000) ||
            ksm_set(ksm, "pages_to_scan", 2000) || ksm_restore(ksm))
                _exit(1);
        _exit(3); /* lived to the end */
}

/* Ends a daemon at its n-th system call that leaves a trace, for every n; true: all knobs were put back each time. */
static bool all_deaths_are_healed(bool careless, int *ret_deaths) {
        for (int n = 0;; n++) {
                _cleanup_(ksm_freep) Ksm *next = NULL;
                KsmKnobs knobs;
                int status;
                pid_t child;

                setup(NULL);
                child = fork();
                if (child == 0) {
                        die_at = n;
                        daemon_life(careless);
                }
                assert_int_equal(waitpid(child, &status, 0), child);
                assert_true(WIFEXITED(status) && WEXITSTATUS(status) != 1);
                assert_int_equal(ksm_new(sysfs, state, &next), 0);
                assert_int_equal(ksm_restore(next), 0);
                assert_int_equal(ksm_knobs(next, &knobs), 0);
                if (knobs.run != 0 || knobs.pages_to_scan != 100 || knobs.use_zero_pages != 0)
                        return false;
                if (state_exists())
                        return false;
                if (WEXITSTATUS(status) == 3) {
                        *ret_deaths = n;
                        return true;
                }
        }
}

static void test_every_death_is_healed(void **unused) {
        int deaths;

        assert_true(all_deaths_are_healed(false, &deaths));
        assert_true(deaths >= 20);
        assert_false(all_deaths_are_healed(true, &deaths));
}

static void test_ksmd(void **unused) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        uint64_t first, second;
        int r;

        assert_int_equal(ksm_new(sysfs, NULL, &ksm), 0);
        r = ksmd_cpu_nsec(ksm, &first);
        if (r == -ENOENT) { /* no KSM, or another pid namespace */
                ksm_free(TAKE_PTR(ksm)); /* skip() does not return */
                skip();
        }
        assert_int_equal(r, 0);
        assert_int_equal(ksmd_cpu_nsec(ksm, &second), 0);
        assert_true(second >= first);
}

/* What each kernel tells of who uses KSM. */
static void test_processes(void **unused) {
        static const struct {
                const char *stat, *merging;
                bool tells, offers;
                uint64_t pages;
        } cases[] = {
                { "ksm_rmap_items 5\nksm_merging_pages 3\nksm_merge_any: no\nksm_mergeable: yes\n", NULL, true, true, 3 },
                { "ksm_rmap_items 0\nksm_merging_pages 0\nksm_merge_any: yes\nksm_mergeable: no\n", NULL, true, true, 0 },
                { "ksm_rmap_items 5\nksm_merging_pages 0\nksm_merge_any: no\nksm_mergeable: no\n", NULL, true, false, 0 },
                { "ksm_rmap_items 5\nzero_pages_sharing 0\nksm_merging_pages 0\n", NULL, false, true, 0 }, /* 6.4 */
                { "ksm_rmap_items 0\n", "7\n", false, true, 7 },  /* 6.1 */
                { "ksm_rmap_items 0\n", "0\n", false, false, 0 },
                { NULL, "7\n", false, true, 7 },                 /* 5.19 */
                { NULL, NULL, false, false, 0 },
        };
        char path[80];
        int proc;

        snprintf(path, sizeof path, "%s/self", sysfs);
        assert_int_equal(mkdir(path, 0700), 0);
        proc = open(sysfs, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        assert_true(proc >= 0);
        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                KsmProcess process;

                (void)unlinkat(proc, "self/ksm_stat", 0);
                (void)unlinkat(proc, "self/ksm_merging_pages", 0);
                if (cases[i].stat)
                        put_file("self/ksm_stat", cases[i].stat);
                if (cases[i].merging)
                        put_file("self/ksm_merging_pages", cases[i].merging);
                ksm_process(proc, "self", &process);
                assert_int_equal(process.offers, cases[i].offers);
                assert_int_equal(process.merging_pages, cases[i].pages);
                assert_int_equal(ksm_tells_offers(proc), cases[i].tells);
        }
        close(proc);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_setup(test_reads, setup),
                cmocka_unit_test_setup(test_restores, setup),
                cmocka_unit_test_setup(test_next_start_restores, setup),
                cmocka_unit_test_setup(test_foreign_value_becomes_found, setup),
                cmocka_unit_test_setup(test_busy, setup),
                cmocka_unit_test_setup(test_advisor, setup),
                cmocka_unit_test_setup(test_refusals, setup),
                cmocka_unit_test_setup(test_read_only, setup),
                cmocka_unit_test_setup(test_hostile_state, setup),
                cmocka_unit_test_setup(test_every_death_is_healed, setup),
                cmocka_unit_test_setup(test_to_and_fro, setup),
                cmocka_unit_test_setup(test_ksmd, setup),
                cmocka_unit_test_setup(test_processes, setup),
        };
        int failed;

        if (!mkdtemp(root))
                return 1;
        failed = cmocka_run_group_tests(tests, NULL, NULL);
        nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS);
        return failed;
}
