/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "test.h"

#include <dirent.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/file.h>

/*
 * What a test changes on the host and how it is put back, however the test ends. tests/system/harness.py does the same with
 * the same two files: the lock, and the knobs as its holder found them, which is there while there is a holder, or when
 * the last one was killed.
 */
#define LOCK "/run/lock/ksmd-user-tests.ksm"
#define FOUND "/run/lock/ksmd-user-tests.found"
#define KSM "/sys/kernel/mm/ksm"
#define UNDO_MAX 8U

static void (*undo[UNDO_MAX])(void);
static size_t n_undo;
static pid_t owner;     /* its children inherit all of this, and are to undo nothing */

static void undo_all(void) {
        if (getpid() == owner)
                while (n_undo > 0)
                        undo[--n_undo]();
}

static void at_exit(void) {
        sigset_t both;

        sigemptyset(&both);
        sigaddset(&both, SIGTERM);
        sigaddset(&both, SIGINT);
        (void)sigprocmask(SIG_BLOCK, &both, NULL);
        undo_all();
}

/* exit() from here would deadlock where it interrupted malloc or stdio. */
static void on_signal(int number) {
        undo_all();
        (void)signal(number, SIG_DFL);
        (void)raise(number);
}

static void catch_signals(void) {
        struct sigaction action = { .sa_handler = on_signal };

        sigaddset(&action.sa_mask, SIGTERM);
        sigaddset(&action.sa_mask, SIGINT);
        CHECK(sigaction(SIGTERM, &action, NULL) == 0 && sigaction(SIGINT, &action, NULL) == 0, "handlers");
}

void test_at_end(void (*function)(void)) {
        CHECK(n_undo < UNDO_MAX, "UNDO_MAX");
        if (!owner) {
                owner = getpid();
                CHECK(atexit(at_exit) == 0, "atexit");
                catch_signals();
        }
        undo[n_undo] = function;
        atomic_signal_fence(memory_order_release);
        n_undo++;
}

void test_remove_directory(const char *path) {
        char entries[2048] __attribute__((aligned(8)));
        ssize_t n;
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

        while (fd >= 0 && (n = getdents64(fd, entries, sizeof entries)) > 0)
                for (ssize_t at = 0; at < n; at += ((struct dirent64 *)(void *)(entries + at))->d_reclen)
                        (void)unlinkat(fd, ((struct dirent64 *)(void *)(entries + at))->d_name, 0);
        safe_close(fd);
        (void)rmdir(path);
}

typedef char Value[64];
enum { ADVISOR, RUN = 7, N_KNOBS };
static const char *const knobs[N_KNOBS] = { "advisor_mode", "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages",
                                            "max_page_sharing", "merge_across_nodes", "run" };
static Value found[N_KNOBS]; /* "": there is none */
static int ksm = -EBADF;

static void knob_read(size_t i, Value value) {
        int fd = openat(ksm, knobs[i], O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? 0 : read(fd, value, sizeof(Value) - 1);

        value[MAX_OF(n, 0)] = '\0';
        value[strcspn(value, "\n")] = '\0';
        safe_close(fd);
}

static void knob_write(size_t i, const char *value, size_t size) {
        int fd = openat(ksm, knobs[i], O_WRONLY | O_CLOEXEC);

        (void)!write(fd, value, size);
        safe_close(fd);
}

/* As far as that can be. While an advisor is on, pages_to_scan is its own. */
static void put_back(Value *values) {
        Value now;
        bool changed[N_KNOBS], any = false;

        for (size_t i = 0; i < N_KNOBS; i++) {
                knob_read(i, now);
                any |= changed[i] = *values[i] && strcmp(now, values[i]) != 0;
        }
        if (!any)
                return;
        if (*values[ADVISOR])
                knob_write(ADVISOR, "none", 4);
        if (*values[RUN])
                knob_write(RUN, values[RUN], strlen(values[RUN]));
        for (size_t i = ADVISOR + 1; i < RUN; i++)
                if (changed[i])
                        knob_write(i, values[i], strlen(values[i]));
        const char *chosen = strchr(values[ADVISOR], '[');
        if (chosen)
                knob_write(ADVISOR, chosen + 1, strcspn(chosen + 1, "]"));
}

static void unlock(void) {
        put_back(found);
        (void)unlink(FOUND);
}

/* A flat object of JSON, whose strings have nothing to escape. */
static void take_over(void) {
        char text[1024] = {}, key[32];
        Value values[N_KNOBS] = {};
        int fd = open(FOUND, O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return;
        CHECK(read(fd, text, sizeof text - 1) >= 0, "%s", FOUND);
        close(fd);
        for (size_t i = 0; i < N_KNOBS; i++) {
                snprintf(key, sizeof key, "\"%s\": \"", knobs[i]);
                const char *at = strstr(text, key);
                if (at)
                        (void)sscanf(at + strlen(key), "%63[^\"]", values[i]);
        }
        printf("the test before this one was killed: KSM's knobs are put back\n");
        put_back(values);
}

static void tell(void) {
        const char *separator = "{";
        FILE *file = fopen(FOUND ".new", "we");

        CHECK(file, "%s", FOUND);
        for (size_t i = 0; i < N_KNOBS; i++)
                if (*found[i]) {
                        fprintf(file, "%s\"%s\": \"%s\"", separator, knobs[i], found[i]);
                        separator = ", ";
                }
        fputs("}", file);
        CHECK(fclose(file) == 0 && rename(FOUND ".new", FOUND) == 0, "%s", FOUND);
}

void test_lock_ksm(void) {
        int fd = open(LOCK, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

        CHECK(fd >= 0, "the test lock");
        CHECK(flock(fd, LOCK_EX) == 0, "the test lock");
        ksm = open(KSM, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (ksm < 0)
                return;
        take_over();
        for (size_t i = 0; i < N_KNOBS; i++)
                knob_read(i, found[i]);
        tell();
        test_at_end(unlock);
}
