/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The two userfaultfds of a target that route remap needs, made in it: a userfaultfd belongs to the address space of
 * who made it. /dev/userfaultfd is given in, as the system call is refused to most containers, and would not see faults
 * of the kernel's for others. The target closes its own copies in the same stop; nothing is registered with them by
 * then.
 */
#include "merge/remap-program.h"

#include "keeper/guard.h"

#include <fcntl.h>
#include <sys/syscall.h>

typedef struct Make {
        unsigned dev, uffds;            /* words; of uffds two */
        RemapGuard guard;
} Make;

static int take(void *userdata, RemoteProgram *program, const Target *target) {
        Make *make = userdata;

        make->guard.zero = remote_program_take(program, target, make->uffds);
        make->guard.mute = remote_program_take(program, target, make->uffds + 1);
        return make->guard.zero < 0 ? make->guard.zero : make->guard.mute < 0 ? make->guard.mute : 0;
}

void remap_guard_done(RemapGuard *guard) {
        guard->zero = safe_close(guard->zero);
        guard->mute = safe_close(guard->mute);
}

static void make_done(Make *make) { remap_guard_done(&make->guard); }

int remap_guard_make(Remote *remote, Target *target, RemapGuard *ret) {
        _cleanup_(remote_program_freep) RemoteProgram *p = NULL;
        _cleanup_(make_done) Make make = { .guard = REMAP_GUARD_NONE };
        int r;

        _cleanup_close_ int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (dev < 0)
                return -errno;
        r = remote_program_new(&p);
        if (r < 0)
                return r;
        make.dev = remote_program_words(p, 1);
        make.uffds = remote_program_words(p, 2);
        unsigned out = remote_program_label(p);
        remote_program_give(p, &dev, 1, make.dev, out);
        for (unsigned i = 0; i < 2; i++) {
                REMOTE_CALL(p, out, make.uffds + i, SYS_ioctl, remote_word(make.dev), remote_value(USERFAULTFD_IOC_NEW),
                            remote_value(O_CLOEXEC | O_NONBLOCK));
                remote_program_note(p, make.uffds + i);
        }
        remote_program_ask(p, take, &make, out);
        remote_program_here(p, out);
        for (unsigned i = 0; i < 2; i++)
                remote_program_close(p, make.uffds + i);
        remote_program_close(p, make.dev);

        RemoteTransaction transaction = { .program = p };
        r = remote_transact(remote, target, &transaction);
        if (r != 0)
                return r;
        if (make.guard.zero < 0 || make.guard.mute < 0)
                return -EOPNOTSUPP;
        r = guard_init(make.guard.zero, GUARD_ZERO);
        if (r == 0)
                r = guard_init(make.guard.mute, GUARD_MUTE);
        if (r < 0)
                return r;
        *ret = make.guard;
        make.guard = REMAP_GUARD_NONE;
        return 0;
}
