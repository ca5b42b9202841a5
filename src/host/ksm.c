/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The knobs of the kernel's KSM, changed so that they can always be put back.
 *
 * What must hold at every instant, a SIGKILL between any two lines included: a knob that holds a value of ours is
 * in the state file, with the value it had before. So the file is written (atomically) before the knob; a knob that
 * changes for the second time has both of our values on file, at least until the write is done; and a knob leaves the
 * file only after it was put back. What reads neither as ours was changed by somebody else, and is his.
 *
 * The state file is text, one line a knob: "KNOB FOUND OURS [OURS-BEFORE]". It is read as a whole or not at all: only
 * knobs of the table below, only values such a knob can hold, only a plain file of our own user.
 *
 * Leans on mm/ksm.c: a store that returns an error changed nothing; max_page_sharing and merge_across_nodes fail with
 * EBUSY while a stable node exists; advisor_mode (since 6.8) owns pages_to_scan while it is not "none", sets it to a
 * default of its own whenever it is written, and makes a write to pages_to_scan fail with EINVAL.
 */

#include "host/ksm.h"

#include "base/io.h"
#include "host/ksmd.h"

#include <ctype.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define VALUE_BYTES 24U         /* a decimal uint64_t, or "scan-time" */
#define STATE_BYTES_MAX 2048    /* more than every knob of the table with four long values */

/* In the order of putting back. The advisor comes before pages_to_scan: returning to it overwrites that one, which
 * then no longer holds our value and is rightly left alone. run comes last: whatever it starts runs with the settings
 * it was found with, and after sleep_millisecs is back a running ksmd no longer keeps its mutex busy. */
static const char *const knob_names[] = {
        "advisor_mode", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages", "max_page_sharing",
        "merge_across_nodes", "run",
};
enum { KNOB_ADVISOR, KNOB_SLEEP, KNOB_PAGES, KNOB_SMART, KNOB_ZERO, KNOB_SHARING, KNOB_NODES, KNOB_RUN, N_KNOBS };

typedef struct KnobRecord {
        char found[VALUE_BYTES];        /* empty: not changed by us */
        char ours[VALUE_BYTES];
        char before[VALUE_BYTES];       /* ours before that; empty: none */
        bool changed;                   /* it holds ours: before is on file, and nothing else any more */
} KnobRecord;

/* The first few tell how far ksmd is. */
enum { COUNTER_SHARING, COUNTER_ZERO, COUNTER_SCANS, COUNTER_SCANNED, N_PROGRESS, COUNTER_UNSHARED = N_PROGRESS,
       COUNTER_VOLATILE };

static const struct {
        const char *name;
        size_t offset;
} counters[] = {
        [COUNTER_SHARING] = { "pages_sharing", offsetof(KsmCounters, pages_sharing) },
        /* Signed too: a child's zero pages are not counted when fork(2) copies them, but when they go (seen: -15). */
        [COUNTER_ZERO] = { "ksm_zero_pages", offsetof(KsmCounters, ksm_zero_pages) },
        [COUNTER_SCANS] = { "full_scans", offsetof(KsmCounters, full_scans) },
        [COUNTER_SCANNED] = { "pages_scanned", offsetof(KsmCounters, pages_scanned) },
        [COUNTER_UNSHARED] = { "pages_unshared", offsetof(KsmCounters, pages_unshared) },
        [COUNTER_VOLATILE] = { "pages_volatile", offsetof(KsmCounters, pages_volatile) },
        { "pages_shared", offsetof(KsmCounters, pages_shared) },
        { "pages_skipped", offsetof(KsmCounters, pages_skipped) },
        { "stable_node_chains", offsetof(KsmCounters, stable_node_chains) },
        { "stable_node_dups", offsetof(KsmCounters, stable_node_dups) },
        { "general_profit", offsetof(KsmCounters, general_profit) }, /* signed */
};

struct Ksm {
        int directory;
        char *state_path;               /* NULL: reading only */
        int run;                        /* these are kept open: a burst reads them every few milliseconds */
        int counter_fds[ELEMENTSOF(counters)];
        KnobRecord records[N_KNOBS];
        bool left_changed;
        int state_error;                /* of an unusable state file, to be told once */
        bool state_unsure;              /* the file may say something else than records */
        Ksmd ksmd;
};

static int knob_by_name(const char *name) {
        for (int i = 0; i < N_KNOBS; i++)
                if (strcmp(knob_names[i], name) == 0)
                        return i;
        return -EINVAL;
}

static bool knob_value_ok(int knob, const char *value) {
        size_t n = strlen(value);

        if (knob == KNOB_ADVISOR)
                return strcmp(value, "none") == 0 || strcmp(value, "scan-time") == 0;
        return n > 0 && n < VALUE_BYTES && strspn(value, "0123456789") == n;
}

/* The value as it would be written: of advisor_mode ("none [scan-time]") the word in brackets. */
static int knob_read(const Ksm *ksm, int knob, char ret[static VALUE_BYTES]) {
        _cleanup_free_ char *text = NULL;
        char *value;
        int r;

        r = read_file(ksm->directory, knob_names[knob], &text, NULL);
        if (r < 0)
                return r;
        value = text;
        if (knob == KNOB_ADVISOR) {
                value = strchr(text, '[');
                if (!value)
                        return -EINVAL;
                value++;
                value[strcspn(value, "]")] = 0;
        } else
                value[strcspn(value, "\n")] = 0;
        if (!knob_value_ok(knob, value))
                return -EINVAL;
        memcpy(ret, value, strlen(value) + 1);
        return 0;
}

static bool is_ours(const KnobRecord *record, const char *now) {
        return strcmp(now, record->ours) == 0 || (!record->changed && strcmp(now, record->before) == 0);
}

/* O_TRUNC means nothing to sysfs; it lets a plain file stand in for a knob. */
static int knob_write(const Ksm *ksm, int knob, const char *value) {
        _cleanup_close_ int fd = openat(ksm->directory, knob_names[knob], O_WRONLY | O_TRUNC | O_CLOEXEC);
        size_t size = strlen(value);
        ssize_t n;

        if (fd < 0)
                return -errno;
        do
                n = write(fd, value, size);
        while (n < 0 && errno == EINTR);
        if (n < 0)
                return -errno;
        return (size_t)n == size ? 0 : -EIO;
}

static int state_write(const Ksm *ksm) {
        char text[STATE_BYTES_MAX];
        size_t size = 0;

        for (int i = 0; i < N_KNOBS; i++) {
                const KnobRecord *record = ksm->records + i;
                if (record->found[0])
                        size += (size_t)snprintf(text + size, sizeof text - size, "%s %s %s%s%s\n", knob_names[i],
                                                 record->found, record->ours, record->before[0] ? " " : "",
                                                 record->before);
        }
        if (size == 0)
                return unlink(ksm->state_path) < 0 && errno != ENOENT ? -errno : 0;
        return write_file_atomic(AT_FDCWD, ksm->state_path, text);
}

static int state_parse_line(char *line, KnobRecord *records) {
        char *rest = NULL, *words[5] = {};
        size_t n = 0;
        int knob;

        for (char *word = strtok_r(line, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
                if (n == 4)
                        return -EBADMSG;
                words[n++] = word;
        }
        if (n < 3)
                return -EBADMSG;
        knob = knob_by_name(words[0]);
        if (knob < 0 || records[knob].found[0])
                return -EBADMSG;
        for (size_t i = 1; i < n; i++)
                if (!knob_value_ok(knob, words[i]))
                        return -EBADMSG;
        strcpy(records[knob].found, words[1]);
        strcpy(records[knob].ours, words[2]);
        if (words[3])
                strcpy(records[knob].before, words[3]);
        return 0;
}

/* 0: nothing was left; 1: records are filled in; -EBADMSG: the file is not to be trusted. */
static int state_read(const char *path, KnobRecord records[static N_KNOBS]) {
        _cleanup_free_ char *text = NULL;
        KnobRecord parsed[N_KNOBS] = {};
        _cleanup_close_ int fd = -EBADF;
        struct stat st;
        size_t size;
        int r;

        fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
                return errno == ENOENT ? 0 : errno == ELOOP ? -EBADMSG : -errno;
        if (fstat(fd, &st) < 0)
                return -errno;
        if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & (S_IWGRP | S_IWOTH)) ||
            st.st_size > STATE_BYTES_MAX)
                return -EBADMSG;
        r = read_fd(fd, &text, &size);
        if (r < 0)
                return r;
        if (size == 0 || text[size - 1] != '\n' || strlen(text) != size)
                return -EBADMSG;
        for (char *line = text, *end; *line; line = end + 1) {
                end = strchr(line, '\n');
                *end = 0;
                r = state_parse_line(line, parsed);
                if (r < 0)
                        return r;
        }
        memcpy(records, parsed, sizeof parsed);
        return 1;
}

int ksm_new(const char *sysfs, const char *state_path, Ksm **ret) {
        _cleanup_(ksm_freep) Ksm *ksm = calloc(1, sizeof *ksm);
        int r;

        if (!ksm)
                return -ENOMEM;
        for (size_t i = 0; i < ELEMENTSOF(counters); i++)
                ksm->counter_fds[i] = -EBADF;
        ksm->run = -EBADF;
        ksm->ksmd = KSMD_NULL;
        ksm->directory = open(sysfs ?: "/sys/kernel/mm/ksm", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (ksm->directory < 0)
                return -errno;
        ksm->run = openat(ksm->directory, "run", O_RDONLY | O_CLOEXEC);
        if (ksm->run < 0)
                return -errno;
        for (size_t i = 0; i < ELEMENTSOF(counters); i++) {
                ksm->counter_fds[i] = openat(ksm->directory, counters[i].name, O_RDONLY | O_CLOEXEC);
                if (ksm->counter_fds[i] < 0 && errno != ENOENT) /* several came with later kernels */
                        return -errno;
        }
        if (state_path) {
                /* Not faccessat(): an opening for writing also asks the security modules, and changes nothing. */
                _cleanup_close_ int fd = openat(ksm->directory, "run", O_WRONLY | O_CLOEXEC);

                if (fd < 0)
                        return -errno;
                ksm->state_path = strdup(state_path);
                if (!ksm->state_path)
                        return -ENOMEM;
                r = state_read(state_path, ksm->records);
                if (r < 0 && r != -EBADMSG)
                        return r;
                ksm->left_changed = r > 0;
                ksm->state_error = r < 0 ? r : 0;
        }
        *ret = TAKE_PTR(ksm);
        return 0;
}

/* Of a file of "name value" lines. */
static bool find_number(const char *text, const char *name, uint64_t *ret) {
        const char *found = strstr(text, name);

        if (found)
                *ret = strtoull(found + strlen(name), NULL, 10);
        return found;
}

int ksm_process(int proc_fd, const char *pid, KsmProcess *ret) {
        _cleanup_free_ char *stat = NULL;
        uint64_t items = 0;
        char path[64];
        int r;

        *ret = (KsmProcess){};
        snprintf(path, sizeof path, "%.20s/ksm_stat", pid);
        r = read_file(proc_fd, path, &stat, NULL);
        if (r == -EACCES || r == -EPERM)
                return -EACCES;
        if (!stat || !find_number(stat, "ksm_merging_pages ", &ret->merging_pages)) {
                snprintf(path, sizeof path, "%.20s/ksm_merging_pages", pid);
                r = read_u64(proc_fd, path, &ret->merging_pages);
                if (r == -EACCES || r == -EPERM)
                        return -EACCES;
                if (r < 0)
                        ret->merging_pages = 0;
        }
        ret->offers = ret->merging_pages > 0;
        if (!stat)
                return 0;
        if (strstr(stat, "ksm_mergeable:"))
                ret->offers |= strstr(stat, "ksm_mergeable: yes") || strstr(stat, "ksm_merge_any: yes");
        else
                ret->offers |= find_number(stat, "ksm_rmap_items ", &items) && items > 0;
        return 0;
}

bool ksm_tells_offers(int proc_fd) {
        _cleanup_free_ char *stat = NULL;

        return read_file(proc_fd, "self/ksm_stat", &stat, NULL) == 0 && strstr(stat, "ksm_mergeable:");
}

Ksm *ksm_free(Ksm *ksm) {
        if (!ksm)
                return NULL;
        for (size_t i = 0; i < ELEMENTSOF(counters); i++)
                safe_close(ksm->counter_fds[i]);
        safe_close(ksm->run);
        safe_close(ksm->directory);
        ksmd_done(&ksm->ksmd);
        free(ksm->state_path);
        free(ksm);
        return NULL;
}

/* A number that is all the file holds; a counter that this kernel does not have stays as it is. */
static int number_read(int fd, bool may_be_negative, uint64_t *ret) {
        char text[VALUE_BYTES + 1], *end;
        bool negative;
        uint64_t value;
        ssize_t n;

        if (fd < 0)
                return 0;
        n = pread(fd, text, sizeof text - 1, 0);
        if (n < 0)
                return -errno;
        text[n] = 0;
        negative = may_be_negative && text[0] == '-';
        if (!isdigit((unsigned char)text[negative]))
                return -EINVAL;
        errno = 0;
        value = strtoull(text + negative, &end, 10);
        if (errno || (*end && *end != '\n'))
                return -EINVAL;
        *ret = negative ? -value : value;
        return 0;
}

static int counter_read(const Ksm *ksm, size_t i, KsmCounters *all) {
        uint64_t value = 0;
        int r;

        r = number_read(ksm->counter_fds[i],
                        i == COUNTER_ZERO || counters[i].offset == offsetof(KsmCounters, general_profit), &value);
        if (r < 0)
                return r;
        /* The signed ones are int64_t, of the same size, and are read as their two's complement. */
        memcpy((char *)all + counters[i].offset, &value, sizeof value);
        return 0;
}

int ksm_counters(const Ksm *ksm, KsmCounters *ret) {
        KsmCounters all = {};

        for (size_t i = 0; i < ELEMENTSOF(counters); i++) {
                int r = counter_read(ksm, i, &all);
                if (r < 0)
                        return r;
        }
        *ret = all;
        return 0;
}

int ksm_progress(const Ksm *ksm, KsmCounters *ret, uint64_t *ret_run) {
        size_t n = ksm->counter_fds[COUNTER_SCANNED] < 0 ? COUNTER_VOLATILE + 1 : N_PROGRESS;
        KsmCounters some = {};
        uint64_t run = 0;
        int r;

        for (size_t i = 0; i < n; i++) {
                r = counter_read(ksm, i, &some);
                if (r < 0)
                        return r;
        }
        r = number_read(ksm->run, false, &run);
        if (r < 0)
                return r;
        *ret = some;
        *ret_run = run;
        return 0;
}

/* A knob that came with a later kernel reads as 0. */
static int knob_read_u64(const Ksm *ksm, int knob, bool optional, uint64_t *ret) {
        char text[VALUE_BYTES];
        int r = knob_read(ksm, knob, text);

        if (r == -ENOENT && optional) {
                *ret = 0;
                return 0;
        }
        if (r < 0)
                return r;
        errno = 0;
        *ret = strtoull(text, NULL, 10);
        return errno ? -EINVAL : 0;
}

int ksm_knobs(const Ksm *ksm, KsmKnobs *ret) {
        KsmKnobs knobs = {};
        char advisor[VALUE_BYTES];
        int r;

        r = knob_read_u64(ksm, KNOB_RUN, false, &knobs.run);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_PAGES, false, &knobs.pages_to_scan);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_SLEEP, false, &knobs.sleep_millisecs);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_ZERO, true, &knobs.use_zero_pages);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_SMART, true, &knobs.smart_scan);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_SHARING, true, &knobs.max_page_sharing);
        if (r >= 0)
                r = knob_read_u64(ksm, KNOB_NODES, true, &knobs.merge_across_nodes);
        if (r < 0)
                return r;
        r = knob_read(ksm, KNOB_ADVISOR, advisor);
        if (r < 0 && r != -ENOENT)
                return r;
        knobs.advisor = r == 0 && strcmp(advisor, "none") != 0;
        *ret = knobs;
        return 0;
}

int ksm_set_text(Ksm *ksm, const char *name, const char *value) {
        char now[VALUE_BYTES];
        KnobRecord *record, old;
        bool on_file;
        int knob, r;

        knob = knob_by_name(name);
        if (knob < 0 || !knob_value_ok(knob, value))
                return -EINVAL;
        if (!ksm->state_path)
                return -EROFS;
        r = knob_read(ksm, knob, now);
        if (r < 0)
                return r;
        if (strcmp(now, value) == 0)
                return 0;

        record = ksm->records + knob;
        old = *record;
        on_file = false;
        if (record->found[0] && is_ours(record, now)) {
                /* To and fro between two values, as in pauses of a burst: the file names both. */
                on_file = strcmp(now, record->ours) == 0 && strcmp(value, record->before) == 0 && !ksm->state_unsure;
                strcpy(record->before, now);
        } else {
                /* The first change, or somebody else's value came in between: that one is found now. */
                strcpy(record->found, now);
                record->before[0] = 0;
        }
        strcpy(record->ours, value);
        record->changed = false;
        r = on_file ? 0 : state_write(ksm);
        if (r < 0) {
                *record = old;
                return r;
        }
        ksm->state_unsure = false;
        r = knob_write(ksm, knob, value);
        if (r < 0) {
                *record = old;
                /* Where that fails, what is on file says more than is true, which restores nothing wrong. */
                ksm->state_unsure = !on_file && state_write(ksm) < 0;
                return r == -EBUSY ? KSM_E_BUSY : r;
        }
        record->changed = true;
        return 0;
}

int ksm_set(Ksm *ksm, const char *knob, uint64_t value) {
        char text[VALUE_BYTES];

        snprintf(text, sizeof text, "%" PRIu64, value);
        return ksm_set_text(ksm, knob, text);
}

/* 0: the knob is what it should be, and no longer ours; KSM_E_BUSY; -errno. */
static int knob_restore(Ksm *ksm, int knob) {
        KnobRecord *record = ksm->records + knob;
        char now[VALUE_BYTES];
        int r;

        if (!record->found[0])
                return 0;
        r = knob_read(ksm, knob, now);
        if (r < 0 && r != -ENOENT)
                return r;
        if (r == 0 && is_ours(record, now)) {
                r = knob_write(ksm, knob, record->found);
                if (r == -EBUSY)
                        return KSM_E_BUSY;
                if (r == -EINVAL && knob == KNOB_PAGES) {
                        /* The advisor is on, and owns the value whatever it reads. */
                        char advisor[VALUE_BYTES];
                        if (knob_read(ksm, KNOB_ADVISOR, advisor) == 0 && strcmp(advisor, "none") != 0)
                                r = 0;
                }
                if (r < 0)
                        return r;
        }
        *record = (KnobRecord){};
        return 0;
}

static int restore(Ksm *ksm, const bool wanted[static N_KNOBS]) {
        int error = 0;
        bool busy = false, left = false;
        int r;

        if (!ksm->state_path)
                return 0;
        for (int i = 0; i < N_KNOBS; i++) {
                if (wanted[i]) {
                        r = knob_restore(ksm, i);
                        if (r < 0)
                                error = error ?: r;
                        else if (r == KSM_E_BUSY)
                                busy = true;
                }
                left |= ksm->records[i].found[0] != 0;
        }
        r = state_write(ksm);
        if (r < 0)
                error = error ?: r;
        if (!left)
                ksm->left_changed = false;
        if (!error && ksm->state_error) {
                error = ksm->state_error;
                ksm->state_error = 0;
        }
        return error ?: busy ? KSM_E_BUSY : 0;
}

int ksm_restore(Ksm *ksm) {
        bool wanted[N_KNOBS];

        for (int i = 0; i < N_KNOBS; i++)
                wanted[i] = true;
        return restore(ksm, wanted);
}

int ksm_restore_knobs(Ksm *ksm, const char *const *knobs, size_t n) {
        bool wanted[N_KNOBS] = {};

        for (size_t i = 0; i < n; i++) {
                int knob = knob_by_name(knobs[i]);
                if (knob < 0)
                        return knob;
                wanted[knob] = true;
        }
        return restore(ksm, wanted);
}

bool ksm_was_left_changed(const Ksm *ksm) { return ksm->left_changed; }

int ksmd_cpu_nsec(Ksm *ksm, uint64_t *ret) { return ksmd_cpu(&ksm->ksmd, ret); }
