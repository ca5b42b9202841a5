/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

/*
 * What a thread's seccomp filters would say of our calls. They are suspended while we trace it, but no longer: should
 * we die while the stub runs, what it calls is judged again. A filter that answers with an error does no harm, but for
 * rt_sigreturn(2), the way home, which has to be allowed; one that kills, sends SIGSYS (all signals are blocked: that
 * kills too), or asks a supervisor who knows nothing of us, does. Such a process is left alone.
 *
 * The programs are read back from the kernel (PTRACE_SECCOMP_GET_FILTER: CAP_SYS_ADMIN, CONFIG_CHECKPOINT_RESTORE, and
 * no filter of our own) and run here: classic BPF, jumps go forward only, what may be in one seccomp_check_filter()
 * says (kernel/seccomp.c). Where they cannot be read, they are taken to do no harm.
 */
#ifndef PTRACE_SECCOMP_GET_FILTER
#define PTRACE_SECCOMP_GET_FILTER 0x420c
#endif

static uint32_t alu(uint16_t op, uint32_t a, uint32_t b) {
        switch (op) {
        case BPF_ADD: return a + b;
        case BPF_SUB: return a - b;
        case BPF_MUL: return a * b;
        case BPF_DIV: return b ? a / b : 0;
        case BPF_AND: return a & b;
        case BPF_OR: return a | b;
        case BPF_XOR: return a ^ b;
        case BPF_LSH: return b < 32 ? a << b : 0;
        case BPF_RSH: return b < 32 ? a >> b : 0;
        default: return -a; /* BPF_NEG */
        }
}

static bool jumps(uint16_t op, uint32_t a, uint32_t b) {
        switch (op) {
        case BPF_JEQ: return a == b;
        case BPF_JGT: return a > b;
        case BPF_JGE: return a >= b;
        default: return a & b; /* BPF_JSET */
        }
}

uint32_t remote_filter_run(const struct sock_filter *program, size_t n, const struct seccomp_data *data,
                           bool *ret_only_nr) {
        uint32_t a = 0, x = 0, memory[BPF_MEMWORDS] = {};
        bool only_nr = true;
        for (size_t i = 0; i < n; i++) {
                const struct sock_filter *f = &program[i];
                uint32_t operand = BPF_SRC(f->code) == BPF_X ? x : f->k;
                switch (BPF_CLASS(f->code)) {
                case BPF_LD:
                        if (BPF_MODE(f->code) == BPF_ABS && f->k <= sizeof *data - sizeof a) {
                                memcpy(&a, (const uint8_t *)data + f->k, sizeof a);
                                only_nr &= f->k < offsetof(struct seccomp_data, instruction_pointer);
                        } else if (BPF_MODE(f->code) == BPF_MEM && f->k < BPF_MEMWORDS)
                                a = memory[f->k];
                        else
                                a = BPF_MODE(f->code) == BPF_LEN ? sizeof *data : f->k;
                        break;
                case BPF_LDX:
                        if (BPF_MODE(f->code) == BPF_MEM && f->k < BPF_MEMWORDS)
                                x = memory[f->k];
                        else
                                x = BPF_MODE(f->code) == BPF_LEN ? sizeof *data : f->k;
                        break;
                case BPF_ST:
                case BPF_STX:
                        if (f->k < BPF_MEMWORDS)
                                memory[f->k] = BPF_CLASS(f->code) == BPF_ST ? a : x;
                        break;
                case BPF_ALU:
                        a = alu(BPF_OP(f->code), a, operand);
                        break;
                case BPF_JMP:
                        if (BPF_OP(f->code) == BPF_JA)
                                i += f->k;
                        else
                                i += jumps(BPF_OP(f->code), a, operand) ? f->jt : f->jf;
                        break;
                case BPF_MISC:
                        if (BPF_MISCOP(f->code) == BPF_TAX)
                                x = a;
                        else
                                a = x;
                        break;
                case BPF_RET:
                        *ret_only_nr = only_nr;
                        return BPF_RVAL(f->code) == BPF_A ? a : f->k;
                }
        }
        *ret_only_nr = false;
        return SECCOMP_RET_KILL_PROCESS; /* no program of the kernel's ends so */
}

typedef struct Filter {
        struct sock_filter *program;
        size_t n;
} Filter;

typedef struct Filters {
        Filter *filters;
        size_t n, allocated;
        struct seccomp_data last; /* judged last, by its number alone: the same again is not run again */
        uint32_t last_action;
        bool last_only_nr;
} Filters;

static void filters_done(Filters *filters) {
        for (size_t i = 0; i < filters->n; i++)
                free(filters->filters[i].program);
        free(filters->filters);
}

/* -ENODATA: cannot be read. */
static int read_filters(pid_t tid, Filters *ret) {
        for (unsigned long i = 0;; i++) {
                long n = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, i, 0);
                if (n < 0)
                        return errno == ENOENT && i > 0 ? 0 : errno == ESRCH ? -ESRCH : -ENODATA;
                if (GROW(ret->filters, ret->n, ret->allocated) < 0)
                        return -ENOMEM;
                struct sock_filter *program = calloc((size_t)n, sizeof *program);
                if (!program)
                        return -ENOMEM;
                ret->filters[ret->n++] = (Filter){ program, (size_t)n };
                if (ptrace(PTRACE_SECCOMP_GET_FILTER, tid, i, program) != n)
                        return errno == ESRCH ? -ESRCH : -ENODATA;
        }
}

/* The action that the kernel takes: of all filters the one that restricts most, which is the least as a signed number. */
static uint32_t judge(Filters *filters, long nr, const uint64_t args[6], uint64_t pc) {
        struct seccomp_data data = { .nr = (int)nr, .arch = REMOTE_ARCH_AUDIT, .instruction_pointer = pc };
        uint32_t action = SECCOMP_RET_ALLOW;
        bool all_only_nr = true;
        if (filters->last_only_nr && filters->last.nr == data.nr)
                return filters->last_action;
        memcpy(data.args, args, sizeof data.args);
        for (size_t i = 0; i < filters->n; i++) {
                bool only_nr;
                uint32_t one = remote_filter_run(filters->filters[i].program, filters->filters[i].n, &data, &only_nr) &
                               SECCOMP_RET_ACTION_FULL;
                all_only_nr &= only_nr;
                if ((int32_t)one < (int32_t)action)
                        action = one;
        }
        filters->last = data;
        filters->last_action = action;
        filters->last_only_nr = all_only_nr;
        return action;
}

static bool is_harmless(uint32_t action) {
        return action == SECCOMP_RET_ALLOW || action == SECCOMP_RET_LOG || action == SECCOMP_RET_TRACE ||
               action == SECCOMP_RET_ERRNO;
}

static bool is_allowed(uint32_t action) { return action == SECCOMP_RET_ALLOW || action == SECCOMP_RET_LOG; }

static bool may_return(Filters *filters, uint64_t sigreturn) {
        const uint64_t none[6] = {};
        return is_allowed(judge(filters, SYS_rt_sigreturn, none, sigreturn));
}

/* Bytes of a filter, the oldest is 0; -errno: there is none. */
static long filter_size(pid_t tid, size_t nth) {
        long n = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, nth, 0);
        return n < 0 ? -errno : n;
}

/* To read and to run them all for each of many threads takes longer than a stop may. */
static bool are_alike(const RemoteThread *thread, const RemoteThread *read, long *ret_beyond) {
        size_t n = read->n_filters;

        *ret_beyond = filter_size(thread->tid, n);
        return *ret_beyond < 0 && (n == 0 || filter_size(thread->tid, n - 1) == filter_size(read->tid, n - 1));
}

bool remote_filters_alike(const RemoteThread *thread, const RemoteThread *read) {
        long beyond;

        return read->n_filters > 0 && are_alike(thread, read, &beyond);
}

int remote_filter_check_return(RemoteThread *thread, const RemoteThread *runner) {
        long beyond;
        if (are_alike(thread, runner, &beyond))
                return beyond != -EACCES || !thread->seccomp ? 0 : REMOTE_E_UNFIT;
        _cleanup_(filters_done) Filters filters = {};
        int r = read_filters(thread->tid, &filters);
        if (r == -ESRCH)
                return remote_thread_gone(thread);
        if (r < 0)
                return r != -ENODATA ? r : thread->seccomp ? REMOTE_E_UNFIT : 0;
        return may_return(&filters, runner->code.sigreturn) ? 0 : REMOTE_E_UNFIT;
}

static int check_calls(RemoteThread *thread, uint64_t region, const RemoteCall *calls, size_t n, bool must_allow) {
        const uint64_t results = region + REMOTE_REGION_RESULTS_OFFSET, stub = region + sizeof(RemoteHead);
        const RemoteCall own[] = {
                { .nr = SYS_mmap, .args = { region, REMOTE_REGION_BYTES, PROT_READ | PROT_EXEC,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, UINT64_MAX, 0 } },
                { .nr = SYS_madvise, .args = { region, REMOTE_REGION_BYTES, MADV_DONTFORK } },
                { .nr = SYS_mprotect, .args = { results, REMOTE_REGION_BYTES - REMOTE_REGION_RESULTS_OFFSET,
                                                PROT_READ | PROT_WRITE } },
                /* Going home alone, if it may: */
                { .nr = SYS_fstat, .args = { 3, region + REMOTE_REGION_FOUND_OFFSET } },
                { .nr = SYS_close, .args = { 3 } },
                { .nr = SYS_munmap, .args = { region, REMOTE_REGION_BYTES } },
        };
        const size_t home = 3;
        _cleanup_(filters_done) Filters filters = {};
        int r = read_filters(thread->tid, &filters);
        if (r == -ESRCH)
                return remote_thread_gone(thread);
        if (r < 0)
                return r != -ENODATA ? r : must_allow ? REMOTE_E_UNFIT : 0;
        thread->n_filters = filters.n;
        if (!may_return(&filters, thread->code.sigreturn) || !may_return(&filters, stub))
                return REMOTE_E_UNFIT;
        bool may_clean_up = true;
        for (size_t i = 0; i < ELEMENTSOF(own); i++) {
                bool borrowed = own[i].nr == SYS_mmap || own[i].nr == SYS_munmap;
                uint32_t action = judge(&filters, own[i].nr, own[i].args, borrowed ? thread->code.call + 2 : stub);
                if (!is_harmless(action))
                        return REMOTE_E_UNFIT;
                may_clean_up &= i < home || is_allowed(action);
        }
        if (must_allow && !may_clean_up)
                return REMOTE_E_UNFIT;
        for (size_t i = 0; i < n; i++) {
                uint32_t action = judge(&filters, calls[i].nr, calls[i].args, stub);
                if (!(must_allow ? is_allowed(action) : is_harmless(action)))
                        return REMOTE_E_UNFIT;
        }
        thread->seccomp = !may_clean_up;
        return 0;
}

bool remote_status_is_fit(const RemoteThreadStatus *status) {
        return !status->shadow_stack && (status->seccomp != SECCOMP_MODE_STRICT || !remote_guards(REMOTE_GUARD_FILTER));
}

int remote_filter_check(RemoteThread *thread, const Target *target, uint64_t region, const RemoteCall *calls, size_t n,
                        bool must_allow) {
        RemoteThreadStatus status;
        int r = remote_thread_status(target, thread->tid, &status);
        if (r == 0 && !remote_status_is_fit(&status))
                r = REMOTE_E_UNFIT;
        if (r != 0)
                return r;
        thread->seccomp = status.seccomp > 0;
        r = remote_thread_suspend_seccomp(thread);
        if (r != 0 || !thread->seccomp || !remote_guards(REMOTE_GUARD_FILTER))
                return r;
        return check_calls(thread, region, calls, n, must_allow);
}
