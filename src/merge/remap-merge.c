/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Merging: the program that puts pages of the pool in the place of runs of a target's pages. It runs in one of the
 * target's threads, all others standing, to its end, whatever becomes of us.
 *
 *   M = a userfaultfd; scratch = an anonymous mapping registered with it
 *   for each run:
 *     1. register(M, run, MISSING)       who cannot be stopped (process_vm_writev, io_uring's workers) waits from now on
 *     2. move(run -> scratch)            refuses what is pinned or shared by a fork: then the run goes back. After a fork
 *                                        that is over pages are nobody's alone only once they are written: they are
 *                                        populated for writing, which changes nothing, and moved once more
 *   3. one call that takes the mmap lock for writing: who found a page before, and writes to it under that lock, is done
 *   4. ask us to compare with the pool   nobody else can reach either; those that are different go back. All do if we do
 *                                        not answer
 *   for each run:
 *     5. mmap(run, the pool's pages)     one step; nobody runs who could have put anything else there
 *     6. populate, for reading           every entry is there; the pool's frames, no copies. The pool's file is as long as
 *                                        it was: else the run goes back, as its pages may be others by now
 *     7. register(G, run)                absent entries mean discarded pages from now on
 *     8. wake whoever waits on M
 *   unmap scratch (which frees what was moved); close M and what was given
 *
 * What always holds: a page of the run is in exactly one of two places, at home or in scratch, until the pool's equal
 * page is mapped, populated and guarded; every failure on the way leads back through remap_move_in(). Until 8. whoever
 * faults on the run waits on M. The userfaultfd is not told of unmapping (EVENT_UNMAP): the program's own step 5 would
 * wait for an answer that never comes.
 *
 * Between 4. and 6. a process may be frozen for as long as somebody likes. We lose sight of it then, or die, and pages that
 * nobody maps are freed one day and become others. Before they are counted for that the pool's file is made longer
 * (pool_note_lost()), and here it is looked at after they are mapped: one of the two sees the other. It is looked at before
 * 5., too, so that next to never anything else is to be seen there, however short.
 *
 * We compare, and not the target: it would look at each page once, in mappings that are new. That is two misses of the
 * TLB and of its caches for each, and where a hypervisor shadows the page tables a fault (7 us a page, of 8 in all; 0.6
 * when they are copied to where we look).
 *
 * Why the order matters is what the controls of the hammer show: each REMAP_GUARD_* left out is a byte lost.
 */
#include "merge/remap-program.h"

#include "scan/reader.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define COMPARED_PAGES 16U              /* at once: both sides stay in the cache */

typedef struct Merge {
        RemapProgram base;
        unsigned dev, pool, guard;      /* given, in a row */
        unsigned uffd;                  /* M */
        unsigned api;                   /* struct uffdio_api */
        unsigned again;                 /* the run at hand may be moved once more */
        unsigned stat, length;          /* struct stat of the pool; how long it was */
} Merge;

static void merge_done(Merge *m) { remap_program_done(&m->base); }

/* The pages go home, into the mapping that is there. */
static void put_back(Merge *m) {
        RemapProgram *base = &m->base;

        remap_move_in(base, m->uffd);
        remap_range(base, m->uffd, UFFDIO_UNREGISTER, row_value(base, ROW_START), row_value(base, ROW_BYTES));
}

/* Steps 1 and 2. */
static void take_away(Merge *m) {
        RemapProgram *base = &m->base;
        RemoteProgram *p = base->p;
        RemapLoop loop = remap_loop_begin(base, REMAP_NOT_BEGUN, true);
        unsigned refused = remote_program_label(p), busy = remote_program_label(p), moved = remote_program_label(p);
        unsigned again = remote_program_label(p), given_up = remote_program_label(p), move = base->move;

        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, m->again, row_value(base, ROW_ALONE), remote_value(0));
        remote_program_here(p, again);
        if (remap_guards(REMAP_GUARD_BLOCK))
                remap_register(base, m->uffd, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                               UFFDIO_REGISTER_MODE_MISSING, refused);
        if (!remap_guards(REMAP_GUARD_HASTE))
                remote_program_dawdle(p, REMAP_DAWDLE_NSEC);
        if (remap_guards(REMAP_GUARD_MOVE)) {
                REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, move + WORD_OF(UffdMove, dst),
                               remote_word(base->there), remote_value(0));
                REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, move + WORD_OF(UffdMove, src),
                               row_value(base, ROW_START), remote_value(0));
                REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, move + WORD_OF(UffdMove, len),
                               row_value(base, ROW_BYTES), remote_value(0));
                REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, move + WORD_OF(UffdMove, move), remote_value(0),
                               remote_value(0));
                REMOTE_CALL(p, busy, base->error, SYS_ioctl, remote_word(m->uffd), remote_value(UAPI_UFFDIO_MOVE),
                            remote_at(move));
        }
        remap_row_result(base, REMAP_MOVED);
        remote_program_jump(p, moved);

        remote_program_here(p, refused);
        remap_row_result(base, REMAP_REFUSED);
        remap_row_error(base);
        remote_program_jump(p, moved);

        remote_program_here(p, busy);
        remap_row_done(base);
        remap_row_error(base);
        put_back(m);
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, given_up, REMOTE_NOTHING, remote_word(m->again), remote_value(0));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, m->again, remote_value(0), remote_value(0));
        REMOTE_CALL(p, refused, base->error, SYS_madvise, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                    remote_value(REMAP_POPULATE_WRITE));
        remote_program_jump(p, again);
        remote_program_here(p, given_up);
        remap_row_result(base, REMAP_BUSY);

        remote_program_here(p, moved);
        remap_loop_next(base, &loop);
}

/* A mapping of the pool is in place, and cannot stay: an anonymous one again, blocked, and the pages into it. Where
 * even that fails the mapping of the scratch pages themselves goes there: the contents are right, though it will not
 * become one with its neighbours. */
static void put_back_anonymous(Merge *m) {
        RemapProgram *base = &m->base;
        RemoteProgram *p = base->p;
        unsigned whole = remote_program_label(p), unguarded = remote_program_label(p), done = remote_program_label(p);

        remap_mmap(base, row_value(base, ROW_START), MAP_FIXED | MAP_ANONYMOUS, REMAP_NO_FILE, remote_value(0), unguarded);
        remap_advise(base, row_value(base, ROW_START), REMOTE_NOWHERE);
        remap_register(base, m->uffd, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                       UFFDIO_REGISTER_MODE_MISSING, whole);
        put_back(m);
        remap_row_result(base, REMAP_FAILED);
        remote_program_jump(p, done);
        remote_program_here(p, whole);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_mremap, remote_word(base->there), row_value(base, ROW_BYTES),
                    row_value(base, ROW_BYTES), remote_value(MREMAP_MAYMOVE | MREMAP_FIXED),
                    row_value(base, ROW_START));
        remap_row_result(base, REMAP_FAILED);
        remote_program_jump(p, done);
        remote_program_here(p, unguarded);
        remap_row_result(base, REMAP_UNGUARDED);
        remote_program_here(p, done);
}

/* Whether all of the range's pages, which lie at address there, were read, and are the pool's. */
static bool is_pools(const RemapRange *range, const Target *target, uint64_t there, int pool_fd) {
        uint8_t theirs[COMPARED_PAGES * PAGE_BYTES], ours[COMPARED_PAGES * PAGE_BYTES];

        for (uint32_t at = 0, n; at < range->n_pages; at += n) {
                uint64_t addrs[COMPARED_PAGES];
                bool read[COMPARED_PAGES] = {};

                n = MIN_OF(range->n_pages - at, COMPARED_PAGES);
                for (uint32_t i = 0; i < n; i++)
                        addrs[i] = there + (at + i) * PAGE_BYTES;
                if (reader_read(target, READER_PINS, addrs, n, theirs, read) != 0 || memchr(read, false, n))
                        return false;
                if (pread(pool_fd, ours, n * PAGE_BYTES, (off_t)((range->page + at) * PAGE_BYTES)) !=
                            (ssize_t)(n * PAGE_BYTES) ||
                    memcmp(theirs, ours, n * PAGE_BYTES) != 0)
                        return false;
        }
        return true;
}

/* Step 4, in the daemon. */
static int compare(void *userdata, RemoteProgram *p, const Target *target) {
        const RemapProgram *base = userdata;
        const RemapBatch *batch = base->batch;
        uint64_t scratch = remote_program_get(p, base->scratch);

        for (size_t i = 0; i < batch->n; i++) {
                unsigned row = base->rows + (unsigned)i * ROW_WORDS;

                if (remote_program_get(p, row + ROW_RESULT) == REMAP_MOVED &&
                    !is_pools(&batch->ranges[i], target, scratch + remote_program_get(p, row + ROW_SCRATCH),
                              batch->pool_fd))
                        remote_program_set(p, row + ROW_RESULT, REMAP_DIFFERENT);
        }
        return 0;
}

/* Those with this result go back, and have another one then. */
static void put_back_all(Merge *m, RemapResult only, RemapResult then) {
        RemapLoop loop = remap_loop_begin(&m->base, only, false);

        put_back(m);
        remap_row_result(&m->base, then);
        remap_loop_next(&m->base, &loop);
}

_Static_assert(offsetof(struct stat, st_size) % 8 == 0 && sizeof(off_t) == 8, "words of a program");

/* The pool's pages may be others by now: goes there. */
static void check_late(Merge *m, unsigned late) {
        RemoteProgram *p = m->base.p;
        unsigned same = remote_program_label(p);

        if (remap_guards(REMAP_GUARD_LATE)) {
                REMOTE_CALL(p, late, m->base.error, SYS_fstat, remote_word(m->pool), remote_at(m->stat));
                REMOTE_OPERATE(p, REMOTE_OP_EQUAL, same, REMOTE_NOTHING, remote_word(m->length),
                               remote_word(m->stat + WORD_OF(struct stat, st_size)));
                remote_program_jump(p, late);
        }
        remote_program_here(p, same);
}

/* Steps 5 to 8. */
static void put_pool(Merge *m) {
        RemapProgram *base = &m->base;
        RemoteProgram *p = base->p;
        RemapLoop loop = remap_loop_begin(base, REMAP_MOVED, false);
        unsigned failed = remote_program_label(p), undo = remote_program_label(p), done = remote_program_label(p);

        check_late(m, failed);
        remap_mmap(base, row_value(base, ROW_START), MAP_FIXED, remote_word(m->pool), row_value(base, ROW_OFFSET), failed);
        if (remap_guards(REMAP_GUARD_POPULATE))
                REMOTE_CALL(p, undo, base->error, SYS_madvise, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                            remote_value(REMAP_POPULATE_READ));
        check_late(m, undo);
        remap_advise(base, row_value(base, ROW_START), undo);
        if (remap_guards(REMAP_GUARD_REGISTER))
                remap_register(base, m->guard, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                               remap_guards(REMAP_GUARD_FORK) ? REMAP_GUARD_MODE
                                                              : REMAP_GUARD_MODE & ~UFFDIO_REGISTER_MODE_WP,
                               undo);
        remap_range(base, m->uffd, UFFDIO_WAKE, row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remap_row_result(base, REMAP_DONE);
        remote_program_jump(p, done);

        /* Kernels before 6.12 may have unmapped what was there. What is still there can be registered, again. */
        remote_program_here(p, failed);
        remap_row_error(base);
        remap_register(base, m->uffd, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                       UFFDIO_REGISTER_MODE_MISSING, undo);
        put_back(m);
        remap_row_result(base, REMAP_FAILED);
        remote_program_jump(p, done);

        remote_program_here(p, undo);
        remap_row_error(base);
        put_back_anonymous(m);
        remote_program_here(p, done);
        remap_loop_next(base, &loop);
}

static void build(Merge *m, const int fds[static 3]) {
        RemapProgram *base = &m->base;
        RemoteProgram *p = base->p;
        unsigned out = remote_program_label(p), unanswered = remote_program_label(p), over = remote_program_label(p);

        remap_ask(base, false);
        remote_program_give(p, fds, 3, m->dev, out);
        REMOTE_CALL(p, out, m->uffd, SYS_ioctl, remote_word(m->dev), remote_value(USERFAULTFD_IOC_NEW),
                    remote_value(O_CLOEXEC | O_NONBLOCK));
        remote_program_note(p, m->uffd);
        REMOTE_CALL(p, out, REMOTE_NOTHING, SYS_ioctl, remote_word(m->uffd), remote_value(UFFDIO_API),
                    remote_at(m->api));
        remap_scratch(base, m->uffd, out);
        take_away(m);
        if (!remap_guards(REMAP_GUARD_HASTE) && !remap_guards(REMAP_GUARD_WORKERS))
                remote_program_dawdle(p, REMAP_DAWDLE_NSEC);
        if (remap_guards(REMAP_GUARD_BARRIER))
                REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_madvise, remote_word(base->scratch),
                            remote_value(PAGE_BYTES), remote_value(MADV_DONTFORK));
        if (remap_guards(REMAP_GUARD_COMPARE) && remap_guards(REMAP_GUARD_MOVE))
                remote_program_ask(p, compare, base, unanswered);
        put_back_all(m, REMAP_DIFFERENT, REMAP_DIFFERENT);
        put_pool(m);
        remote_program_jump(p, over);
        remote_program_here(p, unanswered);
        put_back_all(m, REMAP_MOVED, REMAP_NOT_BEGUN);
        remote_program_here(p, over);
        remap_unscratch(base);
        remote_program_here(p, out);
        remote_program_close(p, m->uffd);
        for (unsigned i = 0; i < 3; i++)
                remote_program_close(p, m->dev + i);
}

int remap_merge(Remote *remote, Target *target, RemapBatch *batch) {
        _cleanup_(merge_done) Merge m = {};
        RemapProgram *program = &m.base;
        struct stat pool;
        int r;

        if (batch->n == 0 || batch->n > REMAP_BATCH_MAX)
                return -EINVAL;
        _cleanup_close_ int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (dev < 0 || fstat(batch->pool_fd, &pool) < 0)
                return -errno;
        r = remap_program_new(batch, program);
        if (r < 0)
                return r;
        RemoteProgram *p = program->p;
        m.dev = remote_program_words(p, 3);
        m.pool = m.dev + 1;
        m.guard = m.dev + 2;
        m.uffd = remote_program_words(p, 1);
        m.api = remote_program_words(p, sizeof(struct uffdio_api) / sizeof(uint64_t));
        m.again = remote_program_words(p, 1);
        m.stat = remote_program_words(p, DIV_ROUND_UP(sizeof pool, sizeof(uint64_t)));
        m.length = remote_program_words(p, 1);
        remote_program_set(p, m.api, UFFD_API);
        remote_program_set(p, m.length, (uint64_t)pool.st_size);
        build(&m, (int[]){ dev, batch->pool_fd, batch->guard->zero });
        return remap_transact(remote, target, program);
}
