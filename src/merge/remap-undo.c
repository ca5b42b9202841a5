/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Undoing: the program that makes remapped runs plain anonymous memory again, one mapping with their neighbours. As
 * when merging, all threads stand while one of them runs it to its end.
 *
 *   scratch = an anonymous mapping registered with U, the mute guard: who faults there waits, the keeper answers nothing
 *   for each run:
 *     1. populate, for reading           what was discarded is zero pages now: protecting an empty entry would leave a
 *                                        marker that the guard can never fill
 *     2. G lets go of the run, U takes it over and write-protects it: who writes and cannot be stopped waits from now on.
 *                                        Not by G, whose faults the keeper answers: it would let him write
 *        … a page that was written may be pinned, and written by a device that knows nothing of protection: then the run
 *        stays, unless the caller knows better
 *     3. copy(run -> scratch)            the pool's pages and the copies that were written, all of them
 *     4. fresh = an anonymous mapping that touches no other (one that had pages would take it in, and its place in the
 *        order of addresses with it), registered with U; a page of the neighbour, too
 *     5. mremap(fresh -> run)            one step; it stays registered, takes the address's place in its neighbours' order
 *                                        as it was never touched, and becomes one with the neighbour's page
 *     6. move(scratch -> run)            who faulted meanwhile waited on U
 *     7. un-register, wake who waited
 *
 * A mapping that is registered gets an anon_vma of its own unless a neighbour is registered alike, and mappings with
 * different ones never merge: hence the neighbour's page (tests/kernel/remap-steps).
 *
 * mremap(2) of what U watches waits until the keeper has read the event: that is the one thing that the program waits
 * for. If the keeper dies there, the kernel lets it go on when the keeper's descriptor is closed, and the target's,
 * which the program holds, keeps the registration.
 *
 * What always holds: until 5. the run is what it was, at most protected; from 5. on its pages are in scratch, and move
 * in however often it takes.
 */
#include "merge/remap-program.h"

#include <fcntl.h>
#include <sys/syscall.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

typedef struct Undo {
        RemapProgram base;
        unsigned guard, mute, pagemap;  /* given, in a row */
        unsigned protect, copy, scan;   /* structures */
        unsigned reserve, reserve_bytes; /* room for the fresh mappings, each with a page before and behind unmapped */
        unsigned next;                  /* where in it the next one goes */
        unsigned fresh;
        unsigned beside;                /* the neighbour's page while it is registered with the mute guard; or 0 */
        unsigned whole, whole_bytes;    /* what of it and the run is to be let go of */
} Undo;

static void undo_done(Undo *u) { remap_program_done(&u->base); }

static void protect(Undo *u, uint64_t mode, unsigned on_error) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;

        remote_program_copy(p, u->protect + WORD_OF(struct uffdio_writeprotect, range.start),
                            row_value(base, ROW_START));
        remote_program_copy(p, u->protect + WORD_OF(struct uffdio_writeprotect, range.len), row_value(base, ROW_BYTES));
        remote_program_copy(p, u->protect + WORD_OF(struct uffdio_writeprotect, mode), remote_value(mode));
        REMOTE_CALL(p, on_error, base->error, SYS_ioctl, remote_word(u->mute), remote_value(UFFDIO_WRITEPROTECT),
                    remote_at(u->protect));
}

/* Step 2. Nobody can discard a page between the two, and none is absent. */
static void take_over(Undo *u, unsigned on_error) {
        RemapProgram *base = &u->base;

        remap_range(base, u->guard, UFFDIO_UNREGISTER, row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remap_register(base, u->mute, row_value(base, ROW_START), row_value(base, ROW_BYTES), REMAP_GUARD_MODE,
                       on_error);
        if (remap_guards(REMAP_GUARD_PROTECT))
                protect(u, UFFDIO_WRITEPROTECT_MODE_WP, on_error);
}

/* And back, with a result. */
static void give_back(Undo *u, RemapResult result) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;
        unsigned unguarded = remote_program_label(p), done = remote_program_label(p);

        if (remap_guards(REMAP_GUARD_PROTECT))
                protect(u, 0, REMOTE_NOWHERE);
        remap_range(base, u->mute, UFFDIO_UNREGISTER, row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remap_register(base, u->guard, row_value(base, ROW_START), row_value(base, ROW_BYTES), REMAP_GUARD_MODE,
                       unguarded);
        remap_row_result(base, result);
        remote_program_jump(p, done);
        remote_program_here(p, unguarded);
        remap_row_error(base);
        remap_row_result(base, REMAP_UNGUARDED);
        remote_program_here(p, done);
}

/* Step 3; as with moving, it says how far it came. */
static void copy_out(Undo *u, unsigned on_error) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;
        unsigned again = remote_program_label(p), failed = remote_program_label(p), some = remote_program_label(p),
                 done = remote_program_label(p), to = u->copy + WORD_OF(struct uffdio_copy, dst),
                 from = u->copy + WORD_OF(struct uffdio_copy, src), size = u->copy + WORD_OF(struct uffdio_copy, len),
                 copied = u->copy + WORD_OF(struct uffdio_copy, copy);

        remote_program_copy(p, to, remote_word(base->there));
        remote_program_copy(p, from, row_value(base, ROW_START));
        remote_program_copy(p, size, row_value(base, ROW_BYTES));
        remote_program_copy(p, u->copy + WORD_OF(struct uffdio_copy, mode), remote_value(UFFDIO_COPY_MODE_DONTWAKE));
        remote_program_here(p, again);
        remote_program_copy(p, copied, remote_value(0));
        REMOTE_CALL(p, failed, base->error, SYS_ioctl, remote_word(u->mute), remote_value(UFFDIO_COPY),
                    remote_at(u->copy));
        remote_program_jump(p, done);
        remote_program_here(p, failed);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, some, REMOTE_NOTHING, remote_word(copied), remote_value(REMOTE_NEGATIVE));
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, again, REMOTE_NOTHING, remote_word(base->error),
                       remote_value((uint64_t)(int64_t)-EAGAIN));
        remote_program_jump(p, on_error);
        remote_program_here(p, some);
        remap_go_on(base, to, from, size, copied, done);
        remote_program_jump(p, again);
        remote_program_here(p, done);
}

/* Step 4. */
static void make_fresh(Undo *u, unsigned on_error) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;
        unsigned bad = remote_program_label(p), alone = remote_program_label(p), good = remote_program_label(p);
        bool alone_at_first = remap_guards(REMAP_GUARD_BESIDE);

        remote_program_copy(p, u->fresh, remote_word(u->next));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, u->next, remote_word(u->next), row_value(base, ROW_BYTES));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, u->next, remote_word(u->next), remote_value(PAGE_BYTES));
        remap_mmap(base, remote_word(u->fresh), MAP_ANONYMOUS | MAP_FIXED, REMAP_NO_FILE, remote_value(0), on_error);
        remap_advise(base, remote_word(u->fresh), bad);
        remote_program_copy(p, u->whole, row_value(base, alone_at_first ? ROW_START : ROW_WHOLE_START));
        remote_program_copy(p, u->whole_bytes, row_value(base, alone_at_first ? ROW_BYTES : ROW_WHOLE_BYTES));
        if (remap_guards(REMAP_GUARD_MUTE)) {
                REMOTE_OPERATE(p, REMOTE_OP_EQUAL, alone, REMOTE_NOTHING, row_value(base, ROW_NEIGHBOUR),
                               remote_value(0));
                /* Refused, as it is where the run before stayed what it was: it will not merge, and that is all. But it
                 * is the guard's then, and nothing is let go of through the mute one that has a page of another's. */
                remap_register(base, u->mute, row_value(base, ROW_NEIGHBOUR), remote_value(PAGE_BYTES),
                               UFFDIO_REGISTER_MODE_MISSING, alone);
                remote_program_copy(p, u->beside, row_value(base, ROW_NEIGHBOUR));
                remote_program_copy(p, u->whole, row_value(base, ROW_WHOLE_START));
                remote_program_copy(p, u->whole_bytes, row_value(base, ROW_WHOLE_BYTES));
                remote_program_here(p, alone);
                remap_register(base, u->mute, remote_word(u->fresh), row_value(base, ROW_BYTES),
                               UFFDIO_REGISTER_MODE_MISSING, bad);
        } else
                remote_program_here(p, alone);
        remote_program_jump(p, good);
        remote_program_here(p, bad);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_word(u->fresh), row_value(base, ROW_BYTES));
        remote_program_jump(p, on_error);
        remote_program_here(p, good);
}

/* After step 2: where a page of the run was written it is given back, and that is all: goes on at done. */
static void ask_written(Undo *u, unsigned done, unsigned on_error) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;
        unsigned clean = remote_program_label(p);

        remote_program_copy(p, u->scan + WORD_OF(PagemapScan, start), row_value(base, ROW_START));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, u->scan + WORD_OF(PagemapScan, end),
                       row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remote_program_copy(p, u->scan + WORD_OF(PagemapScan, vec),
                            remote_at(u->scan + sizeof(PagemapScan) / sizeof(uint64_t)));
        REMOTE_CALL(p, on_error, base->error, SYS_ioctl, remote_word(u->pagemap), remote_value(PAGEMAP_SCAN_IOCTL),
                    remote_at(u->scan));
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, clean, REMOTE_NOTHING, remote_word(base->error), remote_value(0));
        give_back(u, REMAP_BUSY);
        remote_program_jump(p, done);
        remote_program_here(p, clean);
}

/* mremap(2) unmaps what is in its way before it moves: having failed, it may have left a hole. Then there is a mapping
 * that the pages can come home to; where there was no hole, on_error. */
static void fill_hole(Undo *u, unsigned on_error) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;

        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_word(u->fresh), row_value(base, ROW_BYTES));
        remap_mmap(base, row_value(base, ROW_START), MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, REMAP_NO_FILE, remote_value(0),
                   on_error);
        remap_advise(base, row_value(base, ROW_START), REMOTE_NOWHERE);
        remap_register(base, u->mute, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                       UFFDIO_REGISTER_MODE_MISSING, REMOTE_NOWHERE);
}

static void undo_rows(Undo *u) {
        RemapProgram *base = &u->base;
        RemoteProgram *p = base->p;
        RemapLoop loop = remap_loop_begin(base, REMAP_NOT_BEGUN, true);
        unsigned kept = remote_program_label(p), failed = remote_program_label(p), gone = remote_program_label(p),
                 in_place = remote_program_label(p), whole = remote_program_label(p), done = remote_program_label(p);

        remote_program_copy(p, u->beside, remote_value(0));
        REMOTE_CALL(p, failed, base->error, SYS_madvise, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                    remote_value(REMAP_POPULATE_READ));
        take_over(u, kept);
        if (!base->batch->written_too && remap_guards(REMAP_GUARD_WRITTEN))
                ask_written(u, done, kept);
        copy_out(u, kept);
        if (!remap_guards(REMAP_GUARD_PROTECT))
                remote_program_dawdle(p, REMAP_DAWDLE_NSEC);
        make_fresh(u, kept);
        REMOTE_CALL(p, gone, base->error, SYS_mremap, remote_word(u->fresh), row_value(base, ROW_BYTES),
                    row_value(base, ROW_BYTES), remote_value(MREMAP_MAYMOVE | MREMAP_FIXED),
                    row_value(base, ROW_START));
        if (!remap_guards(REMAP_GUARD_MUTE)) {
                remote_program_dawdle(p, REMAP_DAWDLE_NSEC);
                remap_register(base, u->mute, row_value(base, ROW_START), row_value(base, ROW_BYTES),
                               UFFDIO_REGISTER_MODE_MISSING, REMOTE_NOWHERE);
        }
        remote_program_here(p, in_place);
        remap_move_in(base, u->mute);
        remap_range(base, u->mute, UFFDIO_UNREGISTER, remote_word(u->whole), remote_word(u->whole_bytes));
        remap_range(base, u->guard, UFFDIO_WAKE, row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remap_range(base, u->mute, UFFDIO_WAKE, row_value(base, ROW_START), row_value(base, ROW_BYTES));
        remap_row_result(base, REMAP_DONE);
        remote_program_jump(p, done);

        remote_program_here(p, gone);
        remap_row_error(base);
        fill_hole(u, whole);
        remote_program_jump(p, in_place);

        /* As it was. */
        remote_program_here(p, kept);
        remap_row_error(base);
        remote_program_here(p, whole);
        if (remap_guards(REMAP_GUARD_MUTE)) {
                unsigned alone = remote_program_label(p);

                REMOTE_OPERATE(p, REMOTE_OP_EQUAL, alone, REMOTE_NOTHING, remote_word(u->beside), remote_value(0));
                remap_range(base, u->mute, UFFDIO_UNREGISTER, remote_word(u->beside), remote_value(PAGE_BYTES));
                remote_program_here(p, alone);
        }
        give_back(u, REMAP_FAILED);
        remote_program_jump(p, done);
        remote_program_here(p, failed);
        remap_row_error(base);
        remap_row_result(base, REMAP_FAILED);
        remote_program_here(p, done);
        remap_loop_next(base, &loop);
}

int remap_undo(Remote *remote, Target *target, RemapBatch *batch) {
        _cleanup_(undo_done) Undo u = {};
        RemapProgram *program = &u.base;
        int r;

        if (batch->n == 0 || batch->n > REMAP_BATCH_MAX)
                return -EINVAL;
        r = remap_program_new(batch, program);
        if (r < 0)
                return r;
        RemoteProgram *p = program->p;
        _cleanup_close_ int pagemap = openat(target->procfd, "pagemap", O_RDONLY | O_CLOEXEC);
        if (pagemap < 0)
                return -errno;
        u.guard = remote_program_words(p, 3);
        u.mute = u.guard + 1;
        u.pagemap = u.guard + 2;
        u.scan = remote_program_words(p, (sizeof(PagemapScan) + sizeof(PagemapRegion)) / sizeof(uint64_t));
        const PagemapScan scan = {
                .size = sizeof scan,
                .vec_len = 1,
                .max_pages = 1,
                .category_inverted = PAGEMAP_SCAN_FILE | PAGEMAP_SCAN_PFNZERO,
                .category_mask = PAGEMAP_SCAN_FILE | PAGEMAP_SCAN_PFNZERO,
                .category_anyof_mask = PAGEMAP_SCAN_PRESENT | PAGEMAP_SCAN_SWAPPED,
                .return_mask = PAGEMAP_SCAN_PRESENT,
        };
        for (unsigned i = 0; i < sizeof scan / sizeof(uint64_t); i++)
                remote_program_set(p, u.scan + i, ((const uint64_t *)(const void *)&scan)[i]);
        u.protect = remote_program_words(p, sizeof(struct uffdio_writeprotect) / sizeof(uint64_t));
        u.copy = remote_program_words(p, sizeof(struct uffdio_copy) / sizeof(uint64_t));
        u.fresh = remote_program_words(p, 1);
        u.beside = remote_program_words(p, 1);
        u.whole = remote_program_words(p, 1);
        u.whole_bytes = remote_program_words(p, 1);
        u.reserve = remote_program_words(p, 1);
        u.reserve_bytes = remote_program_words(p, 1);
        u.next = remote_program_words(p, 1);
        remote_program_set(p, u.reserve_bytes,
                           remote_program_get(p, program->scratch_bytes) + (batch->n + 1) * PAGE_BYTES);

        unsigned out = remote_program_label(p), unscratch = remote_program_label(p);
        remap_ask(program, true);
        remote_program_give(p, (int[]){ batch->guard->zero, batch->guard->mute, pagemap }, 3, u.guard, out);
        remap_scratch(program, u.mute, out);
        REMOTE_CALL(p, unscratch, u.reserve, SYS_mmap, remote_value(0), remote_word(u.reserve_bytes),
                    remote_value(PROT_NONE), remote_value(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE),
                    REMAP_NO_FILE, remote_value(0));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, u.next, remote_word(u.reserve), remote_value(PAGE_BYTES));
        undo_rows(&u);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_word(u.reserve),
                    remote_word(u.reserve_bytes));
        remote_program_here(p, unscratch);
        remap_unscratch(program);
        remote_program_here(p, out);
        for (unsigned i = 0; i < 3; i++)
                remote_program_close(p, u.guard + i);
        return remap_transact(remote, target, program);
}
