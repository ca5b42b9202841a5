/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* A program without a C library: nowhere in it a system call followed by a return, nor a sigreturn. Sleeps until killed. */
__attribute__((noreturn, used)) void _start(void);

void _start(void) {
        static const struct {
                long sec, nsec;
        } nap = {0, 1000000};
        for (;;) {
                long result;
                __asm__ volatile("syscall\n nop"
                                 : "=a"(result)
                                 : "a"(35L /* nanosleep */), "D"(&nap), "S"(0L)
                                 : "rcx", "r11", "memory");
        }
}
