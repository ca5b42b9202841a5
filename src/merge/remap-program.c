/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The pieces of which route remap's two programs consist.
 *
 * The way back (remap_move_in()) is what makes both safe: wherever a program stops, the pages that it took away are in
 * the scratch mapping, and only this brings them home. UFFDIO_MOVE goes from the front to the back and says how far it
 * came. What it may answer, and what that means here:
 *
 *      EAGAIN          some pages were moved, or none for now (a page is locked, being migrated): again from there
 *      EEXIST          the page at home was never taken away: nor was any behind it
 *      ENOENT, EINVAL  nothing at home or nothing in the scratch mapping that could be moved: the end
 *      anything else   want of memory, somebody looks at the page: it passes, so again, for as long as it takes; to leave
 *                      would lose the page
 */
#include "merge/remap-program.h"

#include "target/remote-map.h"

#include <sys/syscall.h>

static const char *const result_names[_REMAP_RESULT_MAX] = {
        [REMAP_NOT_BEGUN] = "not begun",
        [REMAP_MOVED] = "moved",
        [REMAP_DONE] = "done",
        [REMAP_CHANGED] = "changed",
        [REMAP_REFUSED] = "refused",
        [REMAP_BUSY] = "busy",
        [REMAP_DIFFERENT] = "different",
        [REMAP_FAILED] = "failed",
        [REMAP_UNGUARDED] = "unguarded",
};

const char *remap_result_name(RemapResult result) {
        return (unsigned)result < _REMAP_RESULT_MAX ? result_names[result] : "?";
}

/* The address of a field of the row at hand. */
static void find_field(RemapProgram *program, unsigned field) {
        REMOTE_OPERATE(program->p, REMOTE_OP_ADD, REMOTE_NOWHERE, program->field, remote_word(program->row),
                       remote_value(field * sizeof(uint64_t)));
}

static void set_row(RemapProgram *program, unsigned i, const RemapRange *range, uint64_t scratch) {
        const struct {
                bool wanted;
                int advice;
        } advice[] = {
                { range->advice & VMA_DONTFORK, MADV_DONTFORK },
                { range->advice & VMA_DONTDUMP, MADV_DONTDUMP },
                { range->advice & VMA_NOHUGEPAGE, MADV_NOHUGEPAGE },
                { range->mergeable, MADV_MERGEABLE },
                { range->advice & VMA_SEQUENTIAL, MADV_SEQUENTIAL },
                { range->advice & VMA_RANDOM, MADV_RANDOM },
        };
        unsigned row = program->rows + i * ROW_WORDS, n = 0;
        uint64_t bytes = range->n_pages * PAGE_BYTES, whole = range->start, end = range->start + bytes;

        if (range->neighbour) {
                whole = MIN_OF(whole, range->neighbour);
                end = MAX_OF(end, range->neighbour + PAGE_BYTES);
        }
        remote_program_set(program->p, row + ROW_START, range->start);
        remote_program_set(program->p, row + ROW_BYTES, bytes);
        remote_program_set(program->p, row + ROW_PAGES, range->n_pages);
        remote_program_set(program->p, row + ROW_OFFSET, range->page * PAGE_BYTES);
        remote_program_set(program->p, row + ROW_NEIGHBOUR, range->neighbour);
        remote_program_set(program->p, row + ROW_WHOLE_START, whole);
        remote_program_set(program->p, row + ROW_WHOLE_BYTES, end - whole);
        remote_program_set(program->p, row + ROW_SCRATCH, scratch);
        remote_program_set(program->p, row + ROW_ALONE, range->alone);
        remote_program_set(program->p, row + ROW_FLAGS,
                           MAP_PRIVATE | (range->advice & VMA_NORESERVE ? MAP_NORESERVE : 0));
        for (size_t k = 0; k < ELEMENTSOF(advice) && n < REMAP_ADVICE_MAX; k++)
                if (advice[k].wanted)
                        remote_program_set(program->p, row + ROW_ADVICE + n++, (uint64_t)advice[k].advice);
}

int remap_program_new(RemapBatch *batch, RemapProgram *ret) {
        RemapProgram program = { .batch = batch };
        uint64_t scratch = 0;
        int r = remote_program_new(&program.p);

        if (r < 0)
                return r;
        program.rows = remote_program_words(program.p, batch->n * ROW_WORDS);
        program.row = remote_program_words(program.p, 1);
        program.rows_end = remote_program_words(program.p, 1);
        program.field = remote_program_words(program.p, 1);
        program.values = remote_program_words(program.p, ROW_WORDS);
        program.there = remote_program_words(program.p, 1);
        program.scratch = remote_program_words(program.p, 1);
        program.scratch_bytes = remote_program_words(program.p, 1);
        program.reg = remote_program_words(program.p, sizeof(struct uffdio_register) / sizeof(uint64_t));
        program.range = remote_program_words(program.p, sizeof(struct uffdio_range) / sizeof(uint64_t));
        program.move = remote_program_words(program.p, sizeof(UffdMove) / sizeof(uint64_t));
        program.error = remote_program_words(program.p, 1);
        program.temporary = remote_program_words(program.p, 1);
        for (unsigned i = 0; i < batch->n; i++) {
                set_row(&program, i, &batch->ranges[i], scratch);
                scratch += batch->ranges[i].n_pages * PAGE_BYTES;
        }
        remote_program_set(program.p, program.scratch_bytes, scratch);
        remote_program_set(program.p, program.move + WORD_OF(UffdMove, mode), UAPI_UFFD_MOVE_DONTWAKE);
        *ret = program;
        return 0;
}

void remap_program_done(RemapProgram *program) {
        program->p = remote_program_free(program->p);
}

RemapLoop remap_loop_begin(RemapProgram *program, RemapResult only, bool until_stopped) {
        RemoteProgram *p = program->p;
        RemapLoop loop = { remote_program_label(p), remote_program_label(p), remote_program_label(p) };
        unsigned body = remote_program_label(p), first = remote_program_label(p), chosen = remote_program_label(p);

        remote_program_copy(program->p, program->row, remote_at(program->rows));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, program->rows_end, remote_at(program->rows),
                       remote_value(program->batch->n * ROW_WORDS * sizeof(uint64_t)));
        /* Else a machine on which getting here takes as long as a stop should would be stopped for nothing, for ever. */
        if (remap_guards(REMAP_GUARD_FIRST))
                remote_program_jump(p, first);
        else if (until_stopped)
                remote_program_dawdle(p, 20 * REMAP_DAWDLE_NSEC); /* longer than we are ever patient (remote_run_deadline()) */
        remote_program_here(p, loop.again);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, body, REMOTE_NOTHING, remote_word(program->row),
                       remote_word(program->rows_end));
        remote_program_jump(p, loop.end);
        remote_program_here(p, body);
        if (until_stopped)
                remote_program_op(p, REMOTE_OP_STOPPED, loop.end, REMOTE_NOTHING, 0, NULL);
        remote_program_here(p, first);
        for (unsigned field = 0; field <= ROW_RESULT; field++) {
                find_field(program, field);
                REMOTE_OPERATE(p, REMOTE_OP_LOAD, REMOTE_NOWHERE, program->values + field, remote_word(program->field));
        }
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, chosen, REMOTE_NOTHING, row_value(program, ROW_RESULT), remote_value(only));
        remote_program_jump(p, loop.next);
        remote_program_here(p, chosen);
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, program->there, remote_word(program->scratch),
                       row_value(program, ROW_SCRATCH));
        return loop;
}

void remap_loop_next(RemapProgram *program, const RemapLoop *loop) {
        remote_program_here(program->p, loop->next);
        REMOTE_OPERATE(program->p, REMOTE_OP_ADD, REMOTE_NOWHERE, program->row, remote_word(program->row),
                       remote_value(ROW_WORDS * sizeof(uint64_t)));
        remote_program_jump(program->p, loop->again);
        remote_program_here(program->p, loop->end);
}

static void store(RemapProgram *program, unsigned field, RemoteOperand value) {
        find_field(program, field);
        REMOTE_OPERATE(program->p, REMOTE_OP_STORE, REMOTE_NOWHERE, REMOTE_NOTHING, remote_word(program->field), value);
}

void remap_row_result(RemapProgram *program, RemapResult result) { store(program, ROW_RESULT, remote_value(result)); }

void remap_row_error(RemapProgram *program) { store(program, ROW_ERROR, remote_word(program->error)); }

void remap_row_done(RemapProgram *program) {
        store(program, ROW_DONE_BYTES, remote_word(program->move + WORD_OF(UffdMove, move)));
}

void remap_register(RemapProgram *program, unsigned uffd, RemoteOperand start, RemoteOperand bytes, uint64_t mode,
                    unsigned on_error) {
        remote_program_copy(program->p, program->reg + WORD_OF(struct uffdio_register, range.start), start);
        remote_program_copy(program->p, program->reg + WORD_OF(struct uffdio_register, range.len), bytes);
        remote_program_copy(program->p, program->reg + WORD_OF(struct uffdio_register, mode), remote_value(mode));
        REMOTE_CALL(program->p, on_error, program->error, SYS_ioctl, remote_word(uffd), remote_value(UFFDIO_REGISTER),
                    remote_at(program->reg));
}

void remap_range(RemapProgram *program, unsigned uffd, uint64_t request, RemoteOperand start, RemoteOperand bytes) {
        remote_program_copy(program->p, program->range + WORD_OF(struct uffdio_range, start), start);
        remote_program_copy(program->p, program->range + WORD_OF(struct uffdio_range, len), bytes);
        REMOTE_CALL(program->p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_ioctl, remote_word(uffd), remote_value(request),
                    remote_at(program->range));
}

void remap_mmap(RemapProgram *program, RemoteOperand start, int flags, RemoteOperand fd, RemoteOperand offset,
                unsigned on_error) {
        REMOTE_OPERATE(program->p, REMOTE_OP_ADD, REMOTE_NOWHERE, program->temporary, row_value(program, ROW_FLAGS),
                       remote_value((uint64_t)flags));
        REMOTE_CALL(program->p, on_error, program->error, SYS_mmap, start, row_value(program, ROW_BYTES),
                    remote_value(PROT_READ | PROT_WRITE), remote_word(program->temporary), fd, offset);
}

void remap_advise(RemapProgram *program, RemoteOperand start, unsigned on_error) {
        unsigned done = remote_program_label(program->p);

        for (unsigned i = 0; i < REMAP_ADVICE_MAX; i++) {
                REMOTE_OPERATE(program->p, REMOTE_OP_EQUAL, done, REMOTE_NOTHING, row_value(program, ROW_ADVICE + i),
                               remote_value(0));
                REMOTE_CALL(program->p, on_error, program->error, SYS_madvise, start, row_value(program, ROW_BYTES),
                            row_value(program, ROW_ADVICE + i));
        }
        remote_program_here(program->p, done);
}

void remap_scratch(RemapProgram *program, unsigned uffd, unsigned on_error) {
        RemoteProgram *p = program->p;
        unsigned bad = remote_program_label(p), good = remote_program_label(p);

        REMOTE_CALL(p, on_error, program->temporary, SYS_mmap, remote_value(0), remote_word(program->scratch_bytes),
                    remote_value(PROT_READ | PROT_WRITE),
                    remote_value(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), REMAP_NO_FILE,
                    remote_value(0));
        remote_program_copy(program->p, program->scratch, remote_word(program->temporary));
        REMOTE_CALL(p, bad, REMOTE_NOTHING, SYS_madvise, remote_word(program->scratch),
                    remote_word(program->scratch_bytes), remote_value(MADV_DONTFORK));
        /* -EINVAL where the kernel has no huge pages. */
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_madvise, remote_word(program->scratch),
                    remote_word(program->scratch_bytes), remote_value(MADV_NOHUGEPAGE));
        remap_register(program, uffd, remote_word(program->scratch), remote_word(program->scratch_bytes),
                       UFFDIO_REGISTER_MODE_MISSING, bad);
        remote_program_jump(p, good);
        remote_program_here(p, bad);
        remap_unscratch(program);
        remote_program_jump(p, on_error);
        remote_program_here(p, good);
}

void remap_unscratch(RemapProgram *program) {
        REMOTE_CALL(program->p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_word(program->scratch),
                    remote_word(program->scratch_bytes));
}

void remap_go_on(RemapProgram *program, unsigned to, unsigned from, unsigned size, unsigned came, unsigned done) {
        RemoteProgram *p = program->p;

        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, to, remote_word(to), remote_word(came));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, from, remote_word(from), remote_word(came));
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, size, remote_word(size), remote_word(came));
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, done, REMOTE_NOTHING, remote_word(size), remote_value(0));
}

void remap_move_in(RemapProgram *program, unsigned uffd) {
        RemoteProgram *p = program->p;
        unsigned again = remote_program_label(p), failed = remote_program_label(p), some = remote_program_label(p),
                 done = remote_program_label(p), to = program->move + WORD_OF(UffdMove, dst),
                 from = program->move + WORD_OF(UffdMove, src), size = program->move + WORD_OF(UffdMove, len),
                 moved = program->move + WORD_OF(UffdMove, move);

        remote_program_copy(program->p, to, row_value(program, ROW_START));
        remote_program_copy(program->p, from, remote_word(program->there));
        remote_program_copy(program->p, size, row_value(program, ROW_BYTES));
        remote_program_here(p, again);
        remote_program_copy(program->p, moved, remote_value(0));
        REMOTE_CALL(p, failed, program->temporary, SYS_ioctl, remote_word(uffd), remote_value(UAPI_UFFDIO_MOVE),
                    remote_at(program->move));
        remote_program_jump(p, done);
        remote_program_here(p, failed);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, some, REMOTE_NOTHING, remote_word(moved), remote_value(REMOTE_NEGATIVE));
        const int ends[] = { -EEXIST, -ENOENT, -EINVAL };
        for (size_t i = 0; i < ELEMENTSOF(ends); i++)
                REMOTE_OPERATE(p, REMOTE_OP_EQUAL, done, REMOTE_NOTHING, remote_word(program->temporary),
                               remote_value((uint64_t)(int64_t)ends[i]));
        remote_program_jump(p, again);
        remote_program_here(p, some);
        remap_go_on(program, to, from, size, moved, done);
        remote_program_jump(p, again);
        remote_program_here(p, done);
}

static bool is_plain(const RemoteMap *map) {
        return map->read && map->write && !map->exec && !map->shared && !map->inode && !map->dev && !map->main_stack;
}

/* Of an address that is still the range's: whether all of it lies in one mapping, of the kind that was planned for. */
static bool still_there(const RemapProgram *program, const RemoteMaps *maps, const RemapRange *range) {
        const RemapBatch *batch = program->batch;
        RemoteMap map;

        if (!remote_maps_find(maps, range->start, &map) || map.end < range->start + range->n_pages * PAGE_BYTES)
                return false;
        return program->undo ? !map.shared && map.read && map.write && map.inode == batch->pool_inode &&
                                       map.dev == batch->pool_dev
                             : is_plain(&map);
}

/* The neighbour is what the range before will have become by then. */
static bool is_ahead(const RemapProgram *program, unsigned i) {
        const RemapRange *range = &program->batch->ranges[i];

        return i > 0 && range[-1].start + range[-1].n_pages * PAGE_BYTES == range->start &&
               range->neighbour == range->start - PAGE_BYTES;
}

static void check_range(const RemapProgram *program, const RemoteMaps *maps, unsigned i) {
        const RemapRange *range = &program->batch->ranges[i];
        unsigned row = program->rows + i * ROW_WORDS;
        RemoteMap map;

        if (!still_there(program, maps, range))
                remote_program_set(program->p, row + ROW_RESULT, REMAP_CHANGED);
        else if (range->neighbour && !is_ahead(program, i) &&
                 (!remote_maps_find(maps, range->neighbour, &map) || !is_plain(&map))) {
                remote_program_set(program->p, row + ROW_NEIGHBOUR, 0);
                remote_program_set(program->p, row + ROW_WHOLE_START, range->start);
                remote_program_set(program->p, row + ROW_WHOLE_BYTES, range->n_pages * PAGE_BYTES);
        }
}

static int answer(void *userdata, RemoteProgram *p, const Target *target) {
        const RemapProgram *program = userdata;
        const RemapBatch *batch = program->batch;
        _cleanup_(remote_maps_done) RemoteMaps maps = { .fd = -EBADF };
        int r;

        /* io_uring's workers cannot be stopped, and may discard pages for the process while these are away. */
        if (program->transaction->workers > 0 && remap_guards(REMAP_GUARD_WORKERS))
                return -EBUSY;
        r = remote_maps_open(target, &maps);
        if (r != 0)
                return r;
        for (unsigned i = 0; i < batch->n; i++)
                check_range(program, &maps, i);
        return batch->settle && remap_guards(REMAP_GUARD_SETTLE) ? batch->settle(batch->userdata) : 0;
}

void remap_ask(RemapProgram *program, bool undo) {
        program->undo = undo;
        if (remap_guards(REMAP_GUARD_HOLD))
                remote_program_hold(program->p);
        remote_program_ask_along(program->p, answer, program);
}

static void read_results(const RemapProgram *program) {
        RemapBatch *batch = program->batch;

        for (unsigned i = 0; i < batch->n; i++) {
                RemapRange *range = &batch->ranges[i];
                unsigned row = program->rows + i * ROW_WORDS;
                uint64_t done = remote_program_get(program->p, row + ROW_DONE_BYTES);

                range->result = (RemapResult)remote_program_get(program->p, row + ROW_RESULT);
                range->error = (int)remote_program_get(program->p, row + ROW_ERROR);
                range->done_pages = done < REMOTE_NEGATIVE ? (uint32_t)(done / PAGE_BYTES) : 0;
        }
}

int remap_transact(Remote *remote, Target *target, RemapProgram *program) {
        RemapBatch *batch = program->batch;
        RemoteTransaction transaction = {
                .program = program->p,
                .patience_nsec = batch->patience_nsec,
                .run_nsec = batch->run_nsec,
                .expect_nsec = batch->expect_nsec,
                .on_standing = batch->settle ? batch->settle_begin : NULL,
                .userdata = batch->userdata,
        };
        int r;

        for (size_t i = 0; i < batch->n; i++)
                batch->ranges[i].result = REMAP_NOT_BEGUN;
        program->transaction = &transaction;
        r = remote_transact(remote, target, &transaction);
        program->transaction = NULL;
        batch->stop_nsec = transaction.stop_nsec;
        batch->ran_nsec = transaction.ran_nsec;
        batch->threads = transaction.threads;
        batch->workers = transaction.workers;
        if (r == 0)
                read_results(program);
        return r;
}
