/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-program.h"

/*
 * Where remote calls are not to be had: every architecture but x86_64. On aarch64 the protocol would hold as it is (svc
 * #0; ret from the vDSO or the C library, __kernel_rt_sigreturn, a frame whose fpsimd and SVE records are complete),
 * but code that stops other people's threads is not shipped before it survived the hammer of tests/system on such a
 * machine. remote_new() says so, and what needs no call (estimate, status) works.
 */
int remote_new(Remote **ret) { return -EOPNOTSUPP; }
Remote *remote_free(Remote *remote) { return NULL; }
int remote_call(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) { return -EOPNOTSUPP; }
int remote_call_some(Remote *remote, Target *target, RemoteCall *calls, size_t n, size_t *ret_done) { return -EOPNOTSUPP; }
void remote_insist(Remote *remote, bool insist) {}
int remote_adopt(Remote *remote, Target *target, int *ret_uffd, TargetSkip *ret) { return -EOPNOTSUPP; }
int remote_transact(Remote *remote, Target *target, RemoteTransaction *transaction) { return -EOPNOTSUPP; }
void remote_reap(Remote *remote) {}
bool remote_has_lingering(const Remote *remote) { return false; }
void remote_stats(const Remote *remote, RemoteStats *ret) { *ret = (RemoteStats){}; }
