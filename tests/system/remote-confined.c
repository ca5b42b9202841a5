/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"
#include "tests/confine.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

/*
 * Whose seccomp filter decides: that of the thread that is used, as it is when it stands. One that is installed after the
 * look at the thread counts, and one of another thread does not, as long as there is one without, which is not looked for
 * longer than those that stand meanwhile have patience. Built with the remote sources of its own (REMOTE_TEST), whose steps
 * tell when something happens.
 */
typedef enum Confined {
        NOBODY,
        LATE,           /* the first thread, once it is seized */
        LEADER,
        OTHERS,         /* all but the first thread, which must not be woken */
        MOST,           /* all but the last one */
        EVERYBODY,
} Confined;

typedef struct Shared {
        _Atomic unsigned go, confined, ready;
} Shared;

#define PATIENCE_NSEC (20 * NSEC_PER_MSEC)

unsigned remote_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static Shared *shared;
static Confined confined;
static int full[2];
static bool late;

void remote_test_step(RemoteStep step) {
        if (step != REMOTE_STEP_SEIZED || confined != LATE || shared->go)
                return;
        shared->go = 1;
        for (int i = 0; i < 5000 && !shared->confined; i++)
                usleep(1000);
        usleep(5000); /* it sleeps again */
}

/* Kills for what the stub calls first. */
static void confine_to_death(void) {
        struct sock_filter filter[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mprotect, 0, 1),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = { .len = ELEMENTSOF(filter), .filter = filter };

        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
        shared->confined++;
}

static void *other(void *last) {
        if (confined == OTHERS || confined == EVERYBODY || (confined == MOST && !last))
                confine_to_death();
        shared->ready++;
        for (;;)
                usleep(100000);
        return NULL;
}

static void lead(unsigned n_others) {
        pthread_t thread;
        char page[PAGE_BYTES] = {};

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (unsigned i = 0; i < n_others; i++)
                CHECK(pthread_create(&thread, NULL, other, i + 1 == n_others ? &shared : NULL) == 0);
        while (shared->ready < n_others)
                usleep(1000);
        if (confined == LEADER || confined == MOST || confined == EVERYBODY)
                confine_to_death();
        shared->ready++;
        while (confined == OTHERS)
                (void)!write(full[1], page, sizeof page);
        while (confined == LATE && !shared->go)
                usleep(1000);
        if (confined == LATE)
                confine_to_death();
        for (;;)
                usleep(100000);
}

static pid_t start(Confined who, unsigned n_others) {
        confined = who;
        *shared = (Shared){};
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
                lead(n_others);
        while (shared->ready < n_others + 1)
                usleep(1000);
        usleep(20000); /* all of them sleep */
        return pid;
}

static int transact(Remote *remote, Target *target, void (*on_standing)(void *userdata)) {
        _cleanup_(remote_program_freep) RemoteProgram *program = NULL;

        CHECK(remote_program_new(&program) == 0);
        unsigned word = remote_program_words(program, 1), out = remote_program_label(program);
        REMOTE_CALL(program, out, word, SYS_getppid, remote_value(0));
        remote_program_here(program, out);
        RemoteTransaction transaction = { .program = program, .on_standing = on_standing, .patience_nsec = PATIENCE_NSEC };
        return remote_transact(remote, target, &transaction);
}

/* Whatever but busy, or busy again and again. */
static int visit(Remote *remote, Target *target, bool whole) {
        int r = REMOTE_E_BUSY;

        for (int i = 0; i < 50 && r == REMOTE_E_BUSY; i++, usleep(2000)) {
                RemoteCall call = { .nr = SYS_getppid };
                size_t done;
                r = whole ? transact(remote, target, NULL) : remote_call(remote, target, &call, 1, &done);
                CHECK(r >= 0, "%s", strerror(-r));
                remote_reap(remote);
        }
        return r;
}

static void test(Remote *remote, Confined who, unsigned n_others, bool whole, int expected) {
        _cleanup_(target_freep) Target *target = NULL;
        pid_t pid = start(who, n_others);

        CHECK(target_new(pid, &target) == 0);
        int r = visit(remote, target, whole);
        CHECK(r == expected, "confined %d of %u, %s: %s, not %s", who, n_others + 1, whole ? "all" : "one", remote_error_name(r),
              remote_error_name(expected));
        CHECK(target_alive(target));
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

static void lose_time(void *unused) {
        late = true;
        usleep(PATIENCE_NSEC / NSEC_PER_USEC);
}

/* All stand while one after the other is tried, and none is fit: not for longer than they have patience. */
static void test_impatient(Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        pid_t pid = start(EVERYBODY, 6);
        int r = REMOTE_E_BUSY;

        CHECK(target_new(pid, &target) == 0);
        for (int i = 0; i < 50 && !late; i++, usleep(2000)) {
                r = transact(remote, target, lose_time);
                remote_reap(remote);
        }
        CHECK(r == REMOTE_E_BUSY, "%s", remote_error_name(r));
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

int main(void) {
        _cleanup_(remote_freep) Remote *remote = NULL;

        test_need_root();
        shared = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(shared != MAP_FAILED && remote_new(&remote) == 0 && pipe2(full, O_CLOEXEC) == 0);
        for (int whole = 0; whole <= 1; whole++) {
                test(remote, NOBODY, 2, whole, 0);
                test(remote, LATE, 0, whole, REMOTE_E_UNFIT);
                test(remote, LEADER, 2, whole, 0);
                test(remote, OTHERS, 6, whole, REMOTE_E_BUSY);
                test(remote, OTHERS, REMOTE_UNFIT_MAX + 4, whole, REMOTE_E_BUSY);
                test(remote, MOST, REMOTE_UNFIT_MAX + 4, whole, 0);
                test(remote, EVERYBODY, 6, whole, REMOTE_E_UNFIT);
                test(remote, EVERYBODY, REMOTE_UNFIT_MAX + 4, whole, REMOTE_E_UNFIT);
        }
        test_impatient(remote);
        return 0;
}
