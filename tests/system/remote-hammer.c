/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "remote-transaction.h"
#include "test.h"

#include <getopt.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* One after the other, as long as there is a step at which nobody died: on a busy machine few die in the time of one. */
#define VICTIMS_MAX 5U

/*
 * Makes remote calls in a victim (victims.c) as fast as the victim can bear, and asks it afterwards whether it noticed.
 * Built with the remote sources of its own (REMOTE_TEST): it can end itself at each step of the protocol, and leave
 * single safeguards out, whose absence the victim then must notice (the negative controls).
 */
typedef struct Hammer {
        const char *kind;
        double seconds;
        size_t calls;           /* in a batch */
        uint64_t pause_usec;    /* between batches, at most; random */
        bool kill_at_random, kill_at_steps;
        int kill_at;            /* a step that all of them end at; 0: none in particular */
        bool lenient;           /* it may be that no thread could be had */
        int expect;             /* a REMOTE_E_* that every batch must end with; 0: most must succeed */
        pid_t victim, parent, target_pid;
        int output;             /* of the victim */
        FILE *lines;
        uint64_t range, range_bytes;
        uint64_t outcomes[8];   /* by REMOTE_E_* */
        unsigned reached[_REMOTE_STEP_MAX]; /* how many ended there */
        uint64_t kills, made, taken, transacted, moved;
        bool transact;          /* always; otherwise now and then */
        bool calls_only;        /* neither transactions nor adoptions */
        bool insist;            /* no thread is reached in time: by patience at first, then insisting */
        uint64_t stops_had[2], stops_refused[2]; /* by patience, insisting */
} Hammer;

unsigned remote_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC;
static int end_at_step = -1;
static unsigned long end_after;
static useconds_t dawdle_usec; /* while a descriptor is held */
static useconds_t slow_usec;   /* to get a thread to where its calls are made */
static useconds_t reach_usec;  /* until one that was interrupted is seen to stand */
static useconds_t late_usec;   /* between a look at the target and the stop, at most; random */

void remote_test_step(RemoteStep step) {
        if ((int)step == end_at_step && end_after-- == 0)
                raise(SIGKILL);
        if (step == REMOTE_STEP_TAKEN && dawdle_usec)
                usleep(dawdle_usec);
        if (step == REMOTE_STEP_INTERRUPTED && reach_usec)
                usleep(reach_usec);
        if (step == REMOTE_STEP_CODE && slow_usec)
                usleep(slow_usec);
        if (step == REMOTE_STEP_SEIZED && late_usec)
                usleep((useconds_t)random() % late_usec);
}

/* For what somebody must notice when these safeguards are left out. */
static int status_without(unsigned guards) {
        return (remote_test_leave_out & guards) == guards ? TEST_NOTICED : TEST_FAILED;
}

/* The victim's parent, which tells how it ended: its tracer, us, would collect an end that comes in a stop. */
static void wait_for_victim(const char *path, const char *kind, const char *seconds, int output, int pid_to) {
        int status;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pid_t victim = fork();
        CHECK(victim >= 0);
        if (victim == 0) {
                dup2(output, STDOUT_FILENO);
                execl(path, "victims", kind, seconds, NULL);
                _exit(127);
        }
        close(output);
        CHECK(write(pid_to, &victim, sizeof victim) == sizeof victim);
        CHECK(waitpid(victim, &status, 0) == victim);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void start_victim(Hammer *hammer) {
        char path[4096], seconds[32];
        int fds[2], pids[2];
        ssize_t n = readlink("/proc/self/exe", path, sizeof path - 16);
        CHECK(n > 0);
        path[n] = '\0';
        strcpy(strrchr(path, '/') + 1, "victims");
        snprintf(seconds, sizeof seconds, "%f", hammer->seconds);
        CHECK(pipe2(fds, O_CLOEXEC) == 0 && pipe2(pids, O_CLOEXEC) == 0);
        hammer->parent = fork();
        CHECK(hammer->parent >= 0);
        if (hammer->parent == 0) {
                if (hammer->kill_at_random || hammer->kill_at_steps)
                        setenv("VICTIM_TOLERATES_EINTR", "1", 1);
                wait_for_victim(path, hammer->kind, seconds, fds[1], pids[1]);
        }
        CHECK(read(pids[0], &hammer->victim, sizeof hammer->victim) == sizeof hammer->victim);
        close(pids[0]);
        close(pids[1]);
        close(fds[1]);
        hammer->output = fds[0];
        CHECK((hammer->lines = fdopen(fds[0], "r")));
        setvbuf(hammer->lines, NULL, _IONBF, 0); /* so that poll() tells the truth */
        hammer->target_pid = hammer->victim;
}

/* Takes what the victim said. False: it said its last. */
static bool listen_to_victim(Hammer *hammer, int timeout_msec) {
        char line[512];
        struct pollfd fd = {.fd = hammer->output, .events = POLLIN};
        while (poll(&fd, 1, timeout_msec) > 0) {
                if (!fgets(line, sizeof line, hammer->lines))
                        return false;
                if (sscanf(line, "ready %lx %lu", &hammer->range, &hammer->range_bytes) == 2)
                        return true;
                if (sscanf(line, "child %d", &hammer->target_pid) == 1)
                        continue;
                printf("  %s", line);
                timeout_msec = 0;
        }
        return true;
}

/* The userfaultfd is one, of memory that is not ours, and nobody has used it. */
static void check_uffd(int uffd) {
        struct uffdio_api api = {.api = UFFD_API};
        CHECK(fcntl(uffd, F_GETFD) == FD_CLOEXEC);
        CHECK(ioctl(uffd, UFFDIO_API, &api) == 0, "the descriptor that was taken");
        close(uffd);
}

static void check_results(const Hammer *hammer, const RemoteCall *calls, size_t done) {
        for (size_t i = 0; i < done; i++)
                CHECK(calls[i].ret >= 0 || calls[i].ret < -4095, "call %zu (nr %ld) returned %ld", i, calls[i].nr, calls[i].ret);
}

/* One batch: advice on the victim's own pages that changes nothing it can see, mixed with calls that do nothing. */
static int hammer_once(Hammer *hammer, Remote *remote) {
        RemoteCall calls[REMOTE_BATCH_MAX];
        size_t n = 1 + (size_t)random() % hammer->calls, done = 0;
        for (size_t i = 0; i < n; i++) {
                uint64_t page = hammer->range + (uint64_t)i * PAGE_BYTES % hammer->range_bytes;
                calls[i] = i % 2 && hammer->target_pid == hammer->victim ? (RemoteCall){.nr = SYS_madvise, .args = {page, PAGE_BYTES, i & 2 ? MADV_DONTDUMP : MADV_DODUMP}}
                                 : (RemoteCall){.nr = SYS_getppid};
        }
        _cleanup_(target_freep) Target *target = NULL;
        int r = target_new(hammer->target_pid, &target), uffd = -EBADF;
        if (r == 0 && !hammer->calls_only && (hammer->transact || random() % 3 == 0)) {
                bool moved = false;
                uint64_t page = hammer->range + (uint64_t)random() % (hammer->range_bytes / PAGE_BYTES) * PAGE_BYTES;
                r = transaction_once(remote, target, hammer->target_pid == hammer->victim ? page : 0, &moved);
                hammer->transacted += r == 0;
                hammer->moved += moved;
        } else if (r == 0 && !hammer->calls_only && random() % 2) { /* every other visit is an adoption */
                TargetSkip skip;
                r = remote_adopt(remote, target, &uffd, &skip);
                if (r == 0) {
                        CHECK(uffd >= 0 || hammer->lenient, "no userfaultfd");
                        if (uffd >= 0)
                                check_uffd(uffd);
                        hammer->taken += uffd >= 0;
                }
        } else if (r == 0) {
                r = remote_call(remote, target, calls, n, &done);
                check_results(hammer, calls, done);
                CHECK(r != 0 || done == n, "%zu of %zu calls", done, n);
        } else
                r = REMOTE_E_GONE;
        CHECK(r >= 0, "remote_call: %s", strerror(-r));
        hammer->outcomes[r]++;
        hammer->made += done;
        return r;
}

static bool has_ended(const Hammer *hammer) {
        siginfo_t info = {};
        return waitid(P_PID, (id_t)hammer->parent, &info, WEXITED | WNOHANG | WNOWAIT) < 0 || info.si_pid != 0;
}

static void hammer_until_killed(Hammer *hammer, Remote *remote) {
        for (;;) {
                (void)hammer_once(hammer, remote);
                usleep((useconds_t)random() % 300);
        }
}

/* At which nobody was killed yet, though it should have been tried; -1: there is none. */
static int missing_step(const Hammer *hammer) {
        if (hammer->kill_at)
                return hammer->reached[hammer->kill_at] > 0 ? -1 : hammer->kill_at;
        for (int step = 0; hammer->kill_at_steps && step < _REMOTE_STEP_MAX; step++)
                /* Some victims have no other thread, and one only is sent signals. */
                if (hammer->reached[step] == 0 && step != REMOTE_STEP_PARK_REGS &&
                    (step != REMOTE_STEP_SIGNAL || strcmp(hammer->kind, "signals") == 0))
                        return step;
        return -1;
}

/* A caller that dies, again and again; then one that lives finds and removes what they left. */
static void hammer_and_die(Hammer *hammer, Remote *remote, uint64_t end_nsec) {
        for (unsigned i = 0; now_nsec() < end_nsec && listen_to_victim(hammer, 0); i++) {
                int step = hammer->kill_at ? hammer->kill_at : hammer->kill_at_steps ? (int)(hammer->kills % _REMOTE_STEP_MAX) : -1;
                pid_t caller = fork();
                CHECK(caller >= 0);
                if (caller == 0) {
                        srandom(i);
                        end_at_step = step;
                        end_after = (unsigned long)random() % 4;
                        hammer_until_killed(hammer, remote);
                }
                if (step < 0) {
                        usleep(300 + (useconds_t)random() % 4000);
                        kill(caller, SIGKILL);
                }
                int status = 0;
                bool late = false; /* it did not come there in time */
                for (int wait = 0; waitpid(caller, &status, WNOHANG) == 0; wait++) {
                        if (wait == 2000) {
                                late = true;
                                kill(caller, SIGKILL);
                        }
                        usleep(100);
                }
                CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the caller ended with %#x", status);
                hammer->kills++;
                if (has_ended(hammer)) {
                        printf("  the victim ended after kill %lu, at step %d\n", hammer->kills, step);
                        return;
                }
                if (step >= 0)
                        hammer->reached[step] += !late;
                if (i % 8 == 0)
                        (void)hammer_once(hammer, remote);
                usleep(2000);
        }
}

static void check_steps(const Hammer *hammer) {
        int step = missing_step(hammer);
        CHECK(step < 0, "step %d was never reached", step);
}

/* The last visit: an adoption cleans up what dead callers left, before the victim looks at itself. */
static void clean_up(Hammer *hammer, Remote *remote) {
        _cleanup_(target_freep) Target *target = NULL;
        if (target_new(hammer->target_pid, &target) != 0)
                return;
        for (int i = 0; i < 400; i++) {
                TargetSkip skip;
                int r = remote_adopt(remote, target, NULL, &skip);
                if (r == 0 || r == REMOTE_E_GONE)
                        return;
                usleep(5000);
        }
}

/* Every stop takes too long, as where CPUs are scarce. Who has patience is refused all but a few; who insists gets them for a
 * sixteenth of the time, and no more. */
static void hammer_patiently_and_not(Hammer *hammer, Remote *remote, uint64_t end) {
        const uint64_t half = (end - now_nsec()) / 2;

        for (unsigned insist = 0; insist < 2; insist++) {
                uint64_t began = now_nsec(), last = 0, sum = 0;
                uint64_t had = hammer->outcomes[0], refused = hammer->outcomes[REMOTE_E_BUSY];

                remote_insist(remote, insist);
                while (now_nsec() < began + half && listen_to_victim(hammer, 0)) {
                        if (hammer_once(hammer, remote) == 0)
                                sum += last, last = remote->slow_stop_took_nsec;
                        usleep((useconds_t)random() % 20000);
                }
                hammer->stops_had[insist] = hammer->outcomes[0] - had;
                hammer->stops_refused[insist] = hammer->outcomes[REMOTE_E_BUSY] - refused;
                CHECK(!insist || 16 * sum <= now_nsec() - began, "it stood for %lu of %lu us", sum / 1000, half / 1000);
        }
}

static void check_insisting(const Hammer *hammer) {
        const uint64_t *had = hammer->stops_had, *refused = hammer->stops_refused;

        printf("  by patience %lu stops and %lu refused, insisting %lu and %lu\n", had[0], refused[0], had[1], refused[1]);
        CHECK(had[0] > 0 && refused[0] > 0 && refused[1] > 0, "not enough was tried, so this proves nothing");
        CHECK_AS(status_without(REMOTE_GUARD_INSIST), had[1] > had[0] + 2, "insisting gained nothing");
}

static void hammer_victim(Hammer *hammer) {
        _cleanup_(remote_freep) Remote *remote = NULL;
        CHECK(remote_new(&remote) == 0);
        start_victim(hammer);
        while (hammer->range == 0 && listen_to_victim(hammer, 1000))
                if (has_ended(hammer))
                        break;
        if (hammer->expect)
                usleep(50000); /* what is to be refused it becomes after it said so */
        uint64_t end = now_nsec() + (uint64_t)(hammer->seconds * 0.9e9);
        if (hammer->kill_at_random || hammer->kill_at_steps)
                hammer_and_die(hammer, remote, end);
        else if (hammer->insist)
                hammer_patiently_and_not(hammer, remote, end);
        else
                while (now_nsec() < end && listen_to_victim(hammer, 0)) {
                        (void)hammer_once(hammer, remote);
                        if (hammer->pause_usec)
                                usleep((useconds_t)random() % hammer->pause_usec);
                }
        clean_up(hammer, remote);
        int status = 0;
        uint64_t late = now_nsec() + (uint64_t)((hammer->seconds + 10) * 1e9);
        pid_t ended;
        while ((ended = waitpid(hammer->parent, &status, WNOHANG)) == 0) {
                remote_reap(remote);
                listen_to_victim(hammer, 1);
                if (now_nsec() > late) {
                        kill(hammer->victim, SIGKILL);
                        CHECK(false, "%s: the victim does not end", hammer->kind);
                }
        }
        /* What it still said; a child it left behind may hold the pipe for longer. */
        for (uint64_t until = now_nsec() + NSEC_PER_SEC; now_nsec() < until && listen_to_victim(hammer, 10);)
                ;

        RemoteStats stats;
        remote_stats(remote, &stats);
        CHECK(stats.reach_nsec_max < (uint64_t)(hammer->seconds + 10) * NSEC_PER_SEC, "reached in %lu ns", stats.reach_nsec_max);
        printf("%s: %lu stops, %lu calls, %lu userfaultfds, %lu transactions (%lu pages moved), stop p50 %lu p99 %lu max %lu us, reached p50 %lu p99 %lu us, %lu kills;",
               hammer->kind, stats.stops, stats.calls, hammer->taken, hammer->transacted, hammer->moved,
               remote_stop_percentile(&stats, 500) / 1000, remote_stop_percentile(&stats, 990) / 1000,
               stats.stop_nsec_max / 1000, remote_reach_percentile(&stats, 500) / 1000,
               remote_reach_percentile(&stats, 990) / 1000, hammer->kills);
        for (int i = 0; i < (int)ELEMENTSOF(hammer->outcomes); i++)
                if (hammer->outcomes[i])
                        printf(" %s %lu", remote_error_name(i), hammer->outcomes[i]);
        printf("\n");
        fflush(stdout);
        CHECK(ended == hammer->parent, "%s: the victim's parent", hammer->kind);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
                exit(77);
        CHECK(WIFEXITED(status), "%s: the victim's parent ended with %#x", hammer->kind, status);
        const int ended_with = WEXITSTATUS(status);
        CHECK_AS(ended_with == TEST_NOTICED || ended_with > 128 ? TEST_NOTICED : TEST_FAILED, ended_with == 0,
                 "%s: the victim ended with %d", hammer->kind, ended_with);
        if (hammer->insist)
                check_insisting(hammer);
        /* However long it took to get there: each stop is refused or makes a call, and most of them make many. */
        if (hammer->calls_only && !hammer->insist) {
                uint64_t refused = (stats.failures - hammer->outcomes[REMOTE_E_LOST]) * REMOTE_CANDIDATES;

                CHECK_AS(status_without(REMOTE_GUARD_FIRST), hammer->outcomes[REMOTE_E_LOST] <= hammer->outcomes[0],
                         "stops were made for nothing");
                CHECK_AS(remote_test_leave_out == REMOTE_GUARD_LATE ? TEST_NOTICED : TEST_FAILED,
                         4 * stats.stops < stats.calls + 4 * refused, "stops were made for a call or two");
        }
        CHECK(hammer->expect == REMOTE_E_DENIED || hammer->outcomes[REMOTE_E_DENIED] == 0, "denied, which is for good");
        if (hammer->expect)
                CHECK(hammer->outcomes[hammer->expect] > 0 && hammer->outcomes[0] == 0, "%s was expected", remote_error_name(hammer->expect));
        else if (!hammer->lenient)
                CHECK(hammer->outcomes[0] > 0, "no call was ever made");
}

int main(int argc, char **argv) {
        Hammer hammer = {.seconds = 2, .calls = 64, .pause_usec = 3000};
        static const struct option options[] = {
                {"seconds", required_argument, NULL, 's'},   {"calls", required_argument, NULL, 'c'},
                {"pause-usec", required_argument, NULL, 'p'}, {"leave-out", required_argument, NULL, 'l'},
                {"kill", no_argument, NULL, 'k'},            {"kill-steps", no_argument, NULL, 'K'},
                {"expect", required_argument, NULL, 'e'},    {"lenient", no_argument, NULL, 'L'},
                {"kill-taking", no_argument, NULL, 'T'},      {"late-usec", required_argument, NULL, 'a'},
                {"dawdle-usec", required_argument, NULL, 'd'}, {"transact", no_argument, NULL, 't'},
                {"program-wait-usec", required_argument, NULL, 'w'}, {"slow-usec", required_argument, NULL, 'S'},
                {"insist", no_argument, NULL, 'i'},
                {},
        };
        for (int o; (o = getopt_long(argc, argv, "", options, NULL)) >= 0;)
                switch (o) {
                case 's': hammer.seconds = atof(optarg); break;
                case 'c': hammer.calls = MIN_OF((size_t)atoi(optarg), (size_t)REMOTE_BATCH_MAX); break;
                case 'p': hammer.pause_usec = (uint64_t)atoi(optarg); break;
                case 'l': remote_test_leave_out = (unsigned)strtoul(optarg, NULL, 0); break;
                case 'k': hammer.kill_at_random = true; break;
                case 'K': hammer.kill_at_steps = true; break;
                case 'L': hammer.lenient = true; break;
                case 't': hammer.transact = true; break;
                case 'w': remote_test_program_wait_nsec = strtoull(optarg, NULL, 0) * NSEC_PER_USEC; break;
                case 'T': hammer.kill_at_steps = true, hammer.kill_at = REMOTE_STEP_TAKEN; break;
                case 'S': hammer.calls_only = true, slow_usec = (useconds_t)atoi(optarg); break;
                case 'i': hammer.insist = hammer.calls_only = true, reach_usec = 2000; break;
                case 'a': late_usec = (useconds_t)atoi(optarg); break;
                case 'd': dawdle_usec = (useconds_t)atoi(optarg); break;
                case 'e':
                        for (int e = 1; e < 8; e++)
                                if (strcmp(remote_error_name(e), optarg) == 0)
                                        hammer.expect = e;
                        break;
                default: return 2;
                }
        test_need_root();
        if (optind == argc)
                return fprintf(stderr, "usage: remote-hammer [--seconds S] [--calls N] [--kill|--kill-steps] KIND...\n"), 2;
        for (int i = optind; i < argc; i++) {
                Hammer one = hammer;
                one.kind = argv[i];
                for (unsigned victims = 0; victims == 0 || (missing_step(&one) >= 0 && victims < VICTIMS_MAX); victims++) {
                        one.range = 0;
                        hammer_victim(&one);
                }
                check_steps(&one);
        }
        return 0;
}
