/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/wait.h>

/* What a thread carries with it: registers, signal mask and dispositions, restartable sequences. */

#if defined(__x86_64__)
/* Fills everything, counts down for a while with nothing spilled, compares. avx: 0 none, 1 ymm, 2 zmm too. */
static uint64_t spin_with_state(uint64_t rounds, int avx) {
        uint64_t bad;
        uint32_t mxcsr = 0x1f80 | 0x6000, mxcsr_after = 0, mxcsr_before;
        uint16_t control = 0x0f7f, control_after = 0, control_before;
        asm volatile("stmxcsr %0\n fnstcw %1" : "=m"(mxcsr_before), "=m"(control_before));
        asm volatile("ldmxcsr %0\n fldcw %1" : : "m"(mxcsr), "m"(control));
        asm volatile(
                "mov %%rsp, %%rbx\n sub $512, %%rsp\n"
                "movabs $0x1111111111111111, %%r8\n movabs $0x2222222222222222, %%r9\n"
                "movabs $0x3333333333333333, %%r10\n movabs $0x4444444444444444, %%r11\n"
                "movabs $0x5555555555555555, %%r12\n movabs $0x6666666666666666, %%r13\n"
                "movabs $0x7777777777777777, %%r14\n movabs $0x1234567812345678, %%r15\n"
                "movabs $0x0123456789abcdef, %%rdx\n movabs $0x7edcba9876543210, %%rsi\n"
                "movq %%r8, %%xmm1\n movq %%r14, %%xmm15\n"
                "test %%edi, %%edi\n jz 1f\n vpbroadcastq %%xmm1, %%ymm1\n vpbroadcastq %%xmm15, %%ymm15\n"
                "cmp $2, %%edi\n jne 1f\n vpbroadcastq %%r15, %%zmm20\n kmovq %%r13, %%k3\n"
                "1: mov %%r9, -8(%%rsp)\n mov %%r10, -128(%%rsp)\n"
                "stc\n"
                "2: dec %%rcx\n jnz 2b\n" /* dec leaves the carry flag alone */
                "mov $1, %%eax\n jnc 9f\n"
                "inc %%eax\n cmp %%r9, -8(%%rsp)\n jne 9f\n cmp %%r10, -128(%%rsp)\n jne 9f\n"
                "inc %%eax\n movabs $0x1111111111111111, %%rcx\n cmp %%rcx, %%r8\n jne 9f\n"
                "movabs $0x2222222222222222, %%rcx\n cmp %%rcx, %%r9\n jne 9f\n"
                "movabs $0x3333333333333333, %%rcx\n cmp %%rcx, %%r10\n jne 9f\n"
                "movabs $0x4444444444444444, %%rcx\n cmp %%rcx, %%r11\n jne 9f\n"
                "movabs $0x5555555555555555, %%rcx\n cmp %%rcx, %%r12\n jne 9f\n"
                "movabs $0x6666666666666666, %%rcx\n cmp %%rcx, %%r13\n jne 9f\n"
                "movabs $0x7777777777777777, %%rcx\n cmp %%rcx, %%r14\n jne 9f\n"
                "movabs $0x1234567812345678, %%rcx\n cmp %%rcx, %%r15\n jne 9f\n"
                "movabs $0x0123456789abcdef, %%rcx\n cmp %%rcx, %%rdx\n jne 9f\n"
                "movabs $0x7edcba9876543210, %%rcx\n cmp %%rcx, %%rsi\n jne 9f\n"
                "inc %%eax\n movq %%xmm1, %%rcx\n cmp %%rcx, %%r8\n jne 9f\n movq %%xmm15, %%rcx\n cmp %%rcx, %%r14\n jne 9f\n"
                "test %%edi, %%edi\n jz 8f\n"
                "inc %%eax\n vextracti128 $1, %%ymm15, %%xmm2\n movq %%xmm2, %%rcx\n cmp %%rcx, %%r14\n jne 9f\n"
                "cmp $2, %%edi\n jne 8f\n"
                "inc %%eax\n vextracti64x4 $1, %%zmm20, %%ymm3\n movq %%xmm3, %%rcx\n cmp %%rcx, %%r15\n jne 9f\n"
                "kmovq %%k3, %%rcx\n cmp %%rcx, %%r13\n jne 9f\n"
                "8: xor %%eax, %%eax\n"
                "9: mov %%rbx, %%rsp\n"
                : "=&a"(bad), "+c"(rounds), "+D"(avx)
                :
                : "rbx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
                  "xmm1", "xmm2", "xmm3", "xmm15");
        asm volatile("stmxcsr %0\n fnstcw %1" : "=m"(mxcsr_after), "=m"(control_after));
        asm volatile("ldmxcsr %0\n fldcw %1" : : "m"(mxcsr_before), "m"(control_before));
        if (!bad && ((mxcsr_after & ~0x3fU) != mxcsr || control_after != control))
                bad = 100;
        return bad & 0xffffffff;
}

static int vector_level(void) {
        return __builtin_cpu_supports("avx512bw") ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
}

void victim_registers(void) {
        int avx = vector_level();
        victim_ready();
        while (victim_goes_on()) {
                uint64_t bad = spin_with_state(1000000, avx);
                CHECK(bad == 0, "check %lu", bad);
        }
        printf("vector level %d\n", avx);
}

/* counts[cpu]++ as a restartable sequence with a long middle. False: aborted, to be tried again. */
#define COUNT_CPUS 1024
static volatile uint64_t counts[COUNT_CPUS][8];

static bool rseq_count(struct rseq *area) {
        uint64_t done = 0;
        asm volatile(
                ".pushsection __rseq_cs, \"aw\"\n.balign 32\n"
                "7: .long 0, 0\n .quad 1f, (2f - 1f), 4f\n.popsection\n"
                "lea 7b(%%rip), %%rax\n mov %%rax, %c[cs](%[area])\n"
                "1: mov %c[cpu](%[area]), %%eax\n"
                "shl $6, %%rax\n add %[counts], %%rax\n"
                "mov (%%rax), %%rdx\n"
                "mov $200, %%ecx\n 3: dec %%ecx\n jnz 3b\n"
                "inc %%rdx\n"
                "mov %%rdx, (%%rax)\n"
                "2: mov $1, %[done]\n jmp 5f\n"
                ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
                "4: \n"
                "5:\n"
                : [done] "+r"(done)
                : [area] "r"(area), [counts] "r"(counts), [cs] "i"(offsetof(struct rseq, rseq_cs)),
                  [cpu] "i"(offsetof(struct rseq, cpu_id_start))
                : "rax", "rcx", "rdx", "memory", "cc");
        return done;
}

static uint64_t counted;
/* The thread that is given an argument looks after the memory. */
static void *count_thread(void *arg) {
        struct rseq *area = (struct rseq *)(void *)((char *)__builtin_thread_pointer() + __rseq_offset);
        uint64_t n = 0;
        while (now_nsec() < victim_end_nsec) {
                for (int i = 0; i < 1000; i++)
                        n += rseq_count(area);
                if (arg)
                        victim_memory_tick();
        }
        __atomic_add_fetch(&counted, n, __ATOMIC_SEQ_CST);
        return NULL;
}

void victim_rseq(void) {
        if (__rseq_size == 0)
                TEST_SKIP("the C library registers no rseq");
        pthread_t threads[4];
        victim_ready();
        for (size_t i = 0; i < ELEMENTSOF(threads); i++)
                CHECK(pthread_create(&threads[i], NULL, count_thread, NULL) == 0);
        count_thread(&counted);
        for (size_t i = 0; i < ELEMENTSOF(threads); i++)
                pthread_join(threads[i], NULL);
        uint64_t sum = 0;
        for (size_t i = 0; i < COUNT_CPUS; i++)
                sum += counts[i][0];
        victim_rounds = counted;
        CHECK(sum == counted, "the counters say %lu, the threads %lu", sum, counted);
}
#else
void victim_registers(void) { TEST_SKIP("written for x86_64"); }
void victim_rseq(void) { TEST_SKIP("written for x86_64"); }
#endif

void victim_sigtrap(void) {
        sigset_t set, now;
        sigemptyset(&set);
        sigaddset(&set, SIGTRAP);
        sigaddset(&set, SIGUSR2);
        CHECK(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
        CHECK(signal(SIGTRAP, SIG_IGN) != SIG_ERR);
        victim_ready();
        do {
                for (volatile int i = 0; i < 20000; i++)
                        ;
                struct sigaction action;
                CHECK(sigprocmask(SIG_SETMASK, NULL, &now) == 0);
                for (int s = 1; s < 64; s++)
                        CHECK(sigismember(&now, s) == sigismember(&set, s), "signal %d in the mask", s);
                CHECK(sigaction(SIGTRAP, NULL, &action) == 0 && action.sa_handler == SIG_IGN);
        } while (victim_goes_on());
}

/* Queued signals carry numbers; a handler on an alternate stack expects them in order. */
static volatile uint64_t expected;
static volatile uint64_t wrong, came;   /* signals out of order; the number of the first */
static volatile uint64_t foreign;       /* where in code of ours a signal interrupted it */

static void on_numbered(int sig, siginfo_t *info, void *context) {
        if (info->si_value.sival_int != (int)(expected & 0x7fffffff) && wrong++ == 0)
                came = (uint64_t)info->si_value.sival_int;
#if defined(__x86_64__)
        /* Collectors read their roots from here: it has to be this thread's own code that was interrupted. */
        const ucontext_t *uc = context;
        if (((uint64_t)uc->uc_mcontext.gregs[REG_RIP] >> 28) == 0x6b736)
                foreign = (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
#endif
        expected++;
}

void victim_signals(void) {
        static uint64_t *sent;
        sent = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(sent != MAP_FAILED);
        static char alternate[65536];
        stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
        CHECK(sigaltstack(&stack, NULL) == 0);
        struct sigaction action = {.sa_sigaction = on_numbered, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
        CHECK(sigaction(SIGRTMIN, &action, NULL) == 0);
        pid_t parent = getpid(), sender = fork();
        CHECK(sender >= 0);
        if (sender == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (uint64_t n = 0;;) {
                        union sigval value = {.sival_int = (int)(n & 0x7fffffff)};
                        /* In time for what is queued by then, and for whoever is waiting for a quiet moment. */
                        if (now_nsec() + 300 * NSEC_PER_MSEC >= victim_end_nsec)
                                _exit(0);
                        if (sigqueue(parent, SIGRTMIN, value) == 0)
                                *sent = ++n;
                        if (n % 16 == 0)
                                usleep(200);
                }
        }
        victim_ready();
        sigset_t before = {}, now = {}; /* the kernel fills in 64 signals only */
        sigprocmask(SIG_SETMASK, NULL, &before);
        while (victim_goes_on()) {
                usleep(100);
                sigprocmask(SIG_SETMASK, NULL, &now);
                CHECK(memcmp(&before, &now, sizeof now) == 0, "the mask changed");
                CHECK(wrong == 0, "%lu came, %lu of %lu out of order", came, wrong, expected);
                CHECK(foreign == 0, "a signal that interrupted it at 0x%lx", foreign);
                stack_t is;
                CHECK(sigaltstack(NULL, &is) == 0 && is.ss_sp == stack.ss_sp && is.ss_size == stack.ss_size,
                      "the alternate stack changed");
        }
        CHECK(TEMP_FAILURE_RETRY(waitpid(sender, NULL, 0)) == sender);
        for (int i = 0; i < 1000 && expected != *sent; i++)
                usleep(1000);
        CHECK(expected == *sent && !wrong && !foreign, "%lu sent, %lu came", *sent, expected);
        printf("%lu signals\n", *sent);
}

static void *busy_thread(void *arg) {
        while (now_nsec() < victim_end_nsec) {
#if defined(__x86_64__)
                uint64_t bad = spin_with_state(300000, vector_level());
                CHECK(bad == 0, "check %lu", bad);
#else
                for (volatile int i = 0; i < 300000; i++)
                        ;
#endif
                __atomic_add_fetch(&victim_rounds, 1, __ATOMIC_RELAXED);
                if (arg)
                        victim_memory_tick();
        }
        return NULL;
}

void victim_threads64(void) {
        pthread_t threads[63];
        for (size_t i = 0; i < ELEMENTSOF(threads); i++)
                CHECK(pthread_create(&threads[i], NULL, busy_thread, NULL) == 0);
        victim_ready();
        busy_thread(threads);
        for (size_t i = 0; i < ELEMENTSOF(threads); i++)
                pthread_join(threads[i], NULL);
}
