/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "steps.h"
#include "zero-victim.h"

#include "merge/zero-program.h"
#include "merge/zero.h"

#include <getopt.h>
#include <signal.h>
#include <sys/wait.h>

#define AFTER_NSEC (10 * NSEC_PER_SEC)

/*
 * Gives pages of two victims back as fast as can be, whatever they hold: runs of any length anywhere, zero or not, so
 * that in nearly each stop something has to be put back. The victims look at every byte. Built with sources of its own
 * (REMOTE_TEST, ZERO_TEST) so that single safeguards can be left out, which must show, and it can end itself at any step.
 */
typedef struct Hammer {
        ZeroVictim *victims[2];
        double seconds;
        bool kill_at_random, kill_at_steps, churn;
        ZeroResult result;
        uint64_t outcomes[8], kills;
        Steps steps;
} Hammer;

unsigned remote_test_leave_out, zero_test_leave_out;
uint64_t remote_test_program_wait_nsec = NSEC_PER_SEC, zero_test_patience_nsec = 30 * NSEC_PER_MSEC;
uint64_t zero_test_dawdle_nsec = 400 * NSEC_PER_USEC, zero_test_units_min = 400;
static int end_at_step = -1;
static unsigned long end_after;

void remote_test_step(RemoteStep step) {
        if ((int)step == end_at_step && end_after-- == 0)
                raise(SIGKILL);
}

static void add_runs(ZeroPlan *plan, uint64_t start, uint64_t pages, unsigned longest) {
        for (uint64_t page = 0; page < pages;) {
                uint64_t n = 1 + (uint64_t)random() % longest, at = start + page * PAGE_BYTES;
                uint64_t end = MIN_OF(n, pages - page) * PAGE_BYTES + at;
                end = MIN_OF(end, (at / BLOCK_BYTES + 1) * BLOCK_BYTES);
                if (random() % 4 == 0) {
                        CHECK(GROW(plan->runs, plan->n, plan->allocated) == 0);
                        plan->runs[plan->n++] = (ZeroRun){.start = at, .end = end};
                }
                page += (end - at) / PAGE_BYTES;
        }
}

/* One visit: what is planned is chance. */
static void visit(Hammer *hammer, Zero *zero, ZeroVictim *victim) {
        _cleanup_(zero_plan_done) ZeroPlan plan = {};
        _cleanup_(target_freep) Target *target = NULL;
        _cleanup_(block_table_done) BlockTable table = {};
        if (target_new(victim->pid, &target) != 0)
                return;
        CHECK(target_open_memory(target) == 0);
        _cleanup_(space_done) Space space = {.target = target, .table = &table};
        char *churn = hammer->churn ? victim->churn : NULL;
        if (churn)
                add_runs(&plan, (uint64_t)(uintptr_t)churn, ZERO_VICTIM_CHURN, ZERO_VICTIM_CHURN);
        add_runs(&plan, (uint64_t)(uintptr_t)victim->memory, ZERO_VICTIM_PAGES + ZERO_VICTIM_STILL, 1U << (random() % 8));
        for (size_t i = 0; i < plan.n; i++) {
                uint64_t addr = plan.runs[i].start - plan.runs[i].start % BLOCK_BYTES;
                if (i == 0 || !space_find(&space, addr))
                        CHECK(space_add(&space, &addr, 1) == 0);
        }
        int r = zero_give_back(zero, &space, NULL, &plan, NULL, NULL, &hammer->result);
        CHECK(r >= 0, "%s", strerror(-r));
        hammer->outcomes[r]++;
        usleep(200);
}

static bool noticed(const Hammer *hammer) { return hammer->victims[0]->errors + hammer->victims[1]->errors > 0; }

static void hammer_on(Hammer *hammer, Zero *zero, uint64_t end_nsec) {
        for (unsigned i = 0; now_nsec() < end_nsec && !noticed(hammer); i++)
                visit(hammer, zero, hammer->victims[i % 2]);
}

static void hammer_and_die(Hammer *hammer, Zero *zero, uint64_t end_nsec) {
        const uint64_t last_nsec = end_nsec + (hammer->kill_at_steps ? STEPS_PATIENCE_NSEC : 0);
        for (unsigned i = 0; now_nsec() < end_nsec || (now_nsec() < last_nsec && !steps_are_complete(&hammer->steps)); i++) {
                int status, step = hammer->kill_at_steps ? (int)(i % _REMOTE_STEP_MAX) : -1;
                bool late = false; /* it did not come there in time */
                if (step >= 0 && !steps_wants(&hammer->steps, (unsigned)step, now_nsec() >= end_nsec))
                        continue;
                pid_t caller = fork();
                CHECK(caller >= 0);
                if (caller == 0) {
                        srandom(i);
                        end_at_step = step;
                        end_after = (unsigned long)random() % 6;
                        hammer_on(hammer, zero, UINT64_MAX);
                }
                if (hammer->kill_at_random)
                        usleep(300 + (useconds_t)random() % 8000);
                for (unsigned wait = 0; waitpid(caller, &status, WNOHANG) == 0; wait++) {
                        late |= wait == 1000;
                        if (hammer->kill_at_random || late)
                                kill(caller, SIGKILL);
                        usleep(100);
                }
                CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the caller ended with %#x", status);
                hammer->kills++;
                if (step >= 0)
                        hammer->steps.reached[step] += !late;
                if (i % 8 == 0)
                        visit(hammer, zero, hammer->victims[i / 8 % 2]); /* one that lives, after it */
        }
        /* The last one's program may not have come to its end. */
        uint64_t runs = hammer->result.runs;
        for (end_nsec = now_nsec() + AFTER_NSEC; hammer->result.runs == runs && now_nsec() < end_nsec;)
                visit(hammer, zero, hammer->victims[random() % 2]);
}

int main(int argc, char **argv) {
        Hammer hammer = {.seconds = 10, .churn = true};
        bool forks = true;
        int failed = 0;
        static const struct option options[] = {
                {"seconds", required_argument, NULL, 's'},  {"leave-out", required_argument, NULL, 'l'},
                {"remote-leave-out", required_argument, NULL, 'r'}, {"kill", no_argument, NULL, 'k'},
                {"kill-steps", no_argument, NULL, 'K'},     {"no-forks", no_argument, NULL, 'f'},
                {"no-churn", no_argument, NULL, 'c'},       {"dawdle-usec", required_argument, NULL, 'd'},
                {},
        };
        for (int o; (o = getopt_long(argc, argv, "", options, NULL)) >= 0;)
                switch (o) {
                case 's': hammer.seconds = atof(optarg); break;
                case 'l': zero_test_leave_out = (unsigned)strtoul(optarg, NULL, 0); break;
                case 'r': remote_test_leave_out = (unsigned)strtoul(optarg, NULL, 0); break;
                case 'k': hammer.kill_at_random = true; break;
                case 'K': hammer.kill_at_steps = true; break;
                case 'f': forks = false; break;
                case 'd': zero_test_dawdle_nsec = strtoull(optarg, NULL, 0) * NSEC_PER_USEC; break;
                case 'c': hammer.churn = false; break;
                default: return 2;
                }
        remote_test_leave_out |= REMOTE_GUARD_CALM; /* it is a hammer */
        test_need_root();
        _cleanup_(remote_freep) Remote *remote = NULL;
        _cleanup_(zero_freep) Zero *zero = NULL;
        CHECK(remote_new(&remote) == 0);
        int r = zero_new(remote, &zero);
        if (r == -EOPNOTSUPP)
                TEST_SKIP("no UFFDIO_MOVE (6.8)");
        CHECK(r == 0, "%s", strerror(-r));
        for (unsigned i = 0; i < 2; i++)
                hammer.victims[i] = zero_victim_start(forks);
        uint64_t end = now_nsec() + (uint64_t)(hammer.seconds * 1e9);
        if (hammer.kill_at_random || hammer.kill_at_steps)
                hammer_and_die(&hammer, zero, end);
        else
                hammer_on(&hammer, zero, end);
        for (unsigned wait = 0; remote_has_lingering(remote) && wait < 2000; wait++) {
                remote_reap(remote);
                usleep(1000);
        }
        for (unsigned i = 0; i < 2; i++)
                failed = MAX_OF(failed, zero_victim_end(hammer.victims[i]));
        RemoteStats stats;
        remote_stats(remote, &stats);
        printf("%lu runs: %lu pages given back, %lu put back, %lu refused, %lu lost; %lu stops, p50 %lu p99 %lu max %lu us, %lu kills;",
               hammer.result.runs, hammer.result.pages_given, hammer.result.pages_back, hammer.result.pages_refused,
               hammer.result.pages_lost, stats.stops, remote_stop_percentile(&stats, 500) / 1000,
               remote_stop_percentile(&stats, 990) / 1000, stats.stop_nsec_max / 1000, hammer.kills);
        for (int i = 0; i < (int)ELEMENTSOF(hammer.outcomes); i++)
                if (hammer.outcomes[i])
                        printf(" %s %lu", remote_error_name(i), hammer.outcomes[i]);
        printf("\n");
        CHECK_AS(failed, failed == 0, "a victim noticed, or does not end");
        if (hammer.kill_at_steps)
                steps_check(&hammer.steps);
        if (zero_test_leave_out == 0 && hammer.kills == 0)
                CHECK(hammer.result.pages_back > 0 && hammer.result.pages_refused > 0 && hammer.result.pages_lost == 0);
        CHECK(hammer.result.runs > 0, "nothing was tried");
        return 0;
}
