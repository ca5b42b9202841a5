/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "merge/zero-program.h"

#include "host/uapi.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/*
 * Giving zero pages back, as a program that the target runs itself (target/remote-program.h), all its threads standing,
 * to its end, whatever becomes of us:
 *
 *      Z = a userfaultfd of this process, which only it holds, for this one stop
 *      scratch = a mapping, registered with Z
 *      each run:  register it with Z (MISSING)         who touches it from outside from here on will wait
 *                 move its pages to scratch            not those that are pinned or shared
 *      unregister scratch                              takes the lock of the mappings for writing: whoever had looked up one
 *                                                      of the pages to write into it has written by now
 *      each run:  look at what lies in scratch         where nobody else can write
 *                 move back what is not zero
 *      close Z, unmap scratch                          what was zero is gone; who waits goes on, and finds a hole: zeros
 *
 * Why a page cannot be looked at where it is and then dropped (MADV_DONTNEED): threads that stand do not write, but
 * io_uring's workers and other processes do (process_vm_writev(2), /proc/PID/mem), and what they wrote between the look
 * and the drop would be lost.
 *
 * What always holds:
 *   - A page that is away is in scratch, which nobody but this program touches, and whose place nobody can fill: an
 *     accessor waits, for Z says MISSING and nobody answers. It waits until Z is closed.
 *   - Nothing is unmapped before everything that is not zero is back. Whatever fails on the way back is tried again, but
 *     for one thing: that the mapping is not there any more, when its content has no place either.
 *   - No thread forks, maps or unmaps: they stand even if we die (remote_program_hold()). io_uring's workers do not, and
 *     can discard pages for the process (IORING_OP_MADVISE): Z asks for that event (REMOVE), so they wait until Z was
 *     read, and moving fails (EAGAIN) until then; what they discard does not come back.
 *   - Where the kernel refuses (no memory for a table, too many mappings) before anything was moved, the run is skipped;
 *     a page that cannot be moved stays where it is.
 *
 * UFFDIO_MOVE's own promises (Linux 6.8, mm/userfaultfd.c; tests/kernel/zero-move): it moves a page only if this
 * process alone maps it and nobody has it pinned, else EBUSY; it says how many bytes it moved before it failed.
 */
/* A run, in the table. */
typedef enum Row {
        ROW_ADDRESS,
        ROW_BYTES,
        ROW_SCRATCH,            /* where in scratch */
        ROW_MOVED,              /* bytes */
        ROW_SPAN_START,         /* what is to be registered before it … */
        ROW_SPAN_BYTES,         /* … 0: nothing */
        _ROW_WORDS,
} Row;
#define ROW_SIZE (_ROW_WORDS * sizeof(uint64_t))
#define SCRATCH_BYTES (ZERO_SCRATCH_PAGES * PAGE_BYTES)
/* After so many pages of a run that could not be moved it is let be. */
#define FAILURES_MAX 16U

typedef struct Words {
        unsigned device, uffd;
        unsigned api, range, move, message; /* what the ioctls take */
        unsigned row, end;              /* of the table: addresses */
        unsigned address, bytes, scratch; /* of the row at hand */
        unsigned registered;            /* what the run at hand lies in is */
        unsigned offset, length, moved, failures, result;
        unsigned each, low, high, at;   /* while an event is looked into */
        unsigned blind;                 /* scratch could not be looked at: everything goes back */
        unsigned visited, taken, back, lost; /* runs, bytes, bytes, pages */
} Words;

static Words words_new(RemoteProgram *p) {
        Words w = {
                .device = remote_program_words(p, 1),
                .uffd = remote_program_words(p, 1),
                .api = remote_program_words(p, sizeof(struct uffdio_api) / 8),
                .range = remote_program_words(p, sizeof(struct uffdio_register) / 8),
                .move = remote_program_words(p, sizeof(UffdMove) / 8),
                .message = remote_program_words(p, sizeof(struct uffd_msg) / 8),
        };
        unsigned *each[] = { &w.row, &w.end, &w.address, &w.bytes, &w.scratch, &w.registered, &w.offset, &w.length,
                             &w.moved, &w.failures, &w.result, &w.each, &w.low, &w.high, &w.at, &w.blind, &w.visited,
                             &w.taken, &w.back, &w.lost };
        for (size_t i = 0; i < ELEMENTSOF(each); i++)
                *each[i] = remote_program_words(p, 1);
        remote_program_set(p, w.api, UFFD_API);
        remote_program_set(p, w.api + WORD_OF(struct uffdio_api, features),
                           zero_guards(ZERO_GUARD_EVENT) ? UFFD_FEATURE_EVENT_REMOVE : 0);
        remote_program_set(p, w.range + WORD_OF(struct uffdio_register, mode), UFFDIO_REGISTER_MODE_MISSING);
        remote_program_set(p, w.move + WORD_OF(UffdMove, mode), UAPI_UFFD_MOVE_DONTWAKE);
        return w;
}

static void add(RemoteProgram *p, unsigned word, RemoteOperand value) {
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, word, remote_word(word), value);
}

static void jump_equal(RemoteProgram *p, unsigned label, unsigned word, uint64_t value) {
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, label, REMOTE_NOTHING, remote_word(word), remote_value(value));
}

static void jump_below(RemoteProgram *p, unsigned label, unsigned word, RemoteOperand limit) {
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, label, REMOTE_NOTHING, remote_word(word), limit);
}

static void load_field(RemoteProgram *p, const Words *w, Row field, unsigned to) {
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, to, remote_word(w->row), remote_value(8 * field));
        REMOTE_OPERATE(p, REMOTE_OP_LOAD, REMOTE_NOWHERE, to, remote_word(to));
}

static void load_row(RemoteProgram *p, const Words *w) {
        load_field(p, w, ROW_ADDRESS, w->address);
        load_field(p, w, ROW_BYTES, w->bytes);
        load_field(p, w, ROW_SCRATCH, w->scratch);
        load_field(p, w, ROW_MOVED, w->moved);
}

static void store_moved(RemoteProgram *p, const Words *w) {
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->result, remote_word(w->row), remote_value(8 * ROW_MOVED));
        REMOTE_OPERATE(p, REMOTE_OP_STORE, REMOTE_NOWHERE, REMOTE_NOTHING, remote_word(w->result), remote_word(w->moved));
        add(p, w->taken, remote_word(w->moved));
}

static void uffd_call(RemoteProgram *p, const Words *w, unsigned on_error, unsigned long request, unsigned argument) {
        REMOTE_CALL(p, on_error, w->result, SYS_ioctl, remote_word(w->uffd), remote_value(request), remote_at(argument));
}

/* What UFFDIO_REGISTER takes, and in its beginning UFFDIO_UNREGISTER. */
static void set_range(RemoteProgram *p, const Words *w, RemoteOperand start, RemoteOperand bytes) {
        remote_program_copy(p, w->range + WORD_OF(struct uffdio_register, range.start), start);
        remote_program_copy(p, w->range + WORD_OF(struct uffdio_register, range.len), bytes);
}

/* to + offset <- from + offset. */
static void move(RemoteProgram *p, const Words *w, unsigned on_error, unsigned to, unsigned from, RemoteOperand length) {
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->move + WORD_OF(UffdMove, dst), remote_word(to),
                       remote_word(w->offset));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->move + WORD_OF(UffdMove, src), remote_word(from),
                       remote_word(w->offset));
        remote_program_copy(p, w->move + WORD_OF(UffdMove, len), length);
        remote_program_copy(p, w->move + WORD_OF(UffdMove, move), remote_value(0));
        uffd_call(p, w, on_error, UAPI_UFFDIO_MOVE, w->move);
}

/* A loop over the table: begin, …, next. */
typedef struct Rows {
        unsigned first, each, next, over;
} Rows;

static Rows rows_begin(RemoteProgram *p, const Words *w, unsigned table) {
        Rows rows = { remote_program_label(p), remote_program_label(p), remote_program_label(p), remote_program_label(p) };
        remote_program_copy(p, w->row, remote_at(table));
        remote_program_here(p, rows.each);
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, rows.over, REMOTE_NOTHING, remote_word(w->row), remote_word(w->end));
        return rows;
}

static void rows_next(RemoteProgram *p, const Words *w, const Rows *rows) {
        remote_program_here(p, rows->next);
        add(p, w->row, remote_value(ROW_SIZE));
        remote_program_jump(p, rows->each);
        remote_program_here(p, rows->over);
}

/* Takes one run's pages away, around those that cannot be moved. */
static void take_run(RemoteProgram *p, const Words *w, unsigned next) {
        unsigned again = remote_program_label(p), partly = remote_program_label(p), skip = remote_program_label(p),
                 same = remote_program_label(p), on = remote_program_label(p), taken = remote_program_label(p),
                 came = w->move + WORD_OF(UffdMove, move);
        load_row(p, w);
        load_field(p, w, ROW_SPAN_START, w->range + WORD_OF(struct uffdio_register, range.start));
        load_field(p, w, ROW_SPAN_BYTES, w->range + WORD_OF(struct uffdio_register, range.len));
        jump_equal(p, same, w->range + WORD_OF(struct uffdio_register, range.len), 0);
        remote_program_copy(p, w->registered, remote_value(0));
        if (zero_guards(ZERO_GUARD_MISSING))
                uffd_call(p, w, next, UFFDIO_REGISTER, w->range);
        remote_program_copy(p, w->registered, remote_value(1));
        remote_program_here(p, same);
        jump_equal(p, next, w->registered, 0);
        remote_program_copy(p, w->offset, remote_value(0));
        remote_program_copy(p, w->moved, remote_value(0));
        remote_program_copy(p, w->failures, remote_value(0));

        remote_program_here(p, again);
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->length, remote_word(w->bytes), remote_word(w->offset));
        move(p, w, partly, w->scratch, w->address, remote_word(w->length));
        add(p, w->moved, remote_word(w->length));
        remote_program_jump(p, taken);

        remote_program_here(p, partly);
        jump_equal(p, skip, came, 0);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, on, REMOTE_NOTHING, remote_word(came), remote_value(REMOTE_NEGATIVE));
        remote_program_here(p, skip);
        remote_program_copy(p, came, remote_value(0));
        add(p, w->offset, remote_value(PAGE_BYTES));
        add(p, w->failures, remote_value(1));
        jump_equal(p, taken, w->failures, FAILURES_MAX);
        remote_program_here(p, on);
        add(p, w->moved, remote_word(came));
        add(p, w->offset, remote_word(came));
        jump_below(p, again, w->offset, remote_word(w->bytes));
        remote_program_here(p, taken);
        store_moved(p, w);
}

/* What a worker discards is emptied in scratch too. It waits for us to read this. */
static void heed_event(RemoteProgram *p, const Words *w, unsigned table, unsigned done) {
        unsigned low = remote_program_label(p), high = remote_program_label(p), overlap = remote_program_label(p),
                 next = remote_program_label(p), each = remote_program_label(p), begin = remote_program_label(p),
                 start = w->message + WORD_OF(struct uffd_msg, arg.remove.start),
                 end = w->message + WORD_OF(struct uffd_msg, arg.remove.end);
        jump_equal(p, begin, w->message, UFFD_EVENT_REMOVE);
        remote_program_jump(p, done);
        remote_program_here(p, begin);
        remote_program_copy(p, w->each, remote_at(table));
        remote_program_here(p, each);
        REMOTE_OPERATE(p, REMOTE_OP_EQUAL, done, REMOTE_NOTHING, remote_word(w->each), remote_word(w->end));
        REMOTE_OPERATE(p, REMOTE_OP_LOAD, REMOTE_NOWHERE, w->low, remote_word(w->each));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->at, remote_word(w->each), remote_value(8 * ROW_BYTES));
        REMOTE_OPERATE(p, REMOTE_OP_LOAD, REMOTE_NOWHERE, w->high, remote_word(w->at));
        add(p, w->high, remote_word(w->low));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->at, remote_word(w->each), remote_value(8 * ROW_SCRATCH));
        REMOTE_OPERATE(p, REMOTE_OP_LOAD, REMOTE_NOWHERE, w->at, remote_word(w->at));
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->at, remote_word(w->at), remote_word(w->low));

        REMOTE_OPERATE(p, REMOTE_OP_BELOW, low, REMOTE_NOTHING, remote_word(start), remote_word(w->low));
        remote_program_copy(p, w->low, remote_word(start));
        remote_program_here(p, low);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, high, REMOTE_NOTHING, remote_word(w->high), remote_word(end));
        remote_program_copy(p, w->high, remote_word(end));
        remote_program_here(p, high);
        jump_below(p, overlap, w->low, remote_word(w->high));
        remote_program_jump(p, next);
        remote_program_here(p, overlap);
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->high, remote_word(w->high), remote_word(w->low));
        add(p, w->at, remote_word(w->low));
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_madvise, remote_word(w->at), remote_word(w->high),
                    remote_value(MADV_DONTNEED));
        remote_program_here(p, next);
        add(p, w->each, remote_value(ROW_SIZE));
        remote_program_jump(p, each);
}

/* length bytes at offset go back, whatever it takes. */
static void put_back(RemoteProgram *p, const Words *w, unsigned table, unsigned look) {
        unsigned again = remote_program_label(p), failed = remote_program_label(p), some = remote_program_label(p),
                 read = remote_program_label(p), none = remote_program_label(p), stayed = remote_program_label(p),
                 passed = remote_program_label(p), done = remote_program_label(p),
                 came = w->move + WORD_OF(UffdMove, move);
        remote_program_here(p, again);
        move(p, w, failed, w->address, w->scratch, remote_word(w->length));
        add(p, w->back, remote_word(w->length));
        add(p, w->offset, remote_word(w->length));
        remote_program_jump(p, done);

        remote_program_here(p, failed);
        jump_equal(p, none, came, 0);
        REMOTE_OPERATE(p, REMOTE_OP_BELOW, some, REMOTE_NOTHING, remote_word(came), remote_value(REMOTE_NEGATIVE));
        remote_program_here(p, none);
        jump_equal(p, read, w->result, (uint64_t)-EAGAIN);
        jump_equal(p, again, w->result, (uint64_t)-EBUSY);
        jump_equal(p, again, w->result, (uint64_t)-ENOMEM);
        jump_equal(p, stayed, w->result, (uint64_t)-EEXIST); /* it was not taken away: blind, we come by such pages */
        /* No mapping of the kind it left is there. */
        add(p, w->lost, remote_value(1));
        remote_program_here(p, stayed);
        remote_program_copy(p, came, remote_value(PAGE_BYTES));
        remote_program_jump(p, passed);
        remote_program_here(p, some);
        add(p, w->back, remote_word(came));
        remote_program_here(p, passed);
        add(p, w->offset, remote_word(came));
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->length, remote_word(w->length), remote_word(came));
        jump_equal(p, done, w->length, 0);
        remote_program_jump(p, again);
        remote_program_here(p, read);
        REMOTE_CALL(p, again, REMOTE_NOTHING, SYS_read, remote_word(w->uffd), remote_at(w->message),
                    remote_value(sizeof(struct uffd_msg)));
        jump_equal(p, again, w->blind, 1); /* scratch is registered: discarding there would wait for ourselves */
        heed_event(p, w, table, look);
        remote_program_here(p, done);
}

/* Looks at what was taken of one run; what is not zero goes back. */
static void look_at_run(RemoteProgram *p, const Words *w, unsigned table, unsigned next) {
        unsigned look = remote_program_label(p), all = remote_program_label(p), back = remote_program_label(p),
                 found = remote_program_label(p), at = w->failures;
        load_row(p, w);
        jump_equal(p, next, w->moved, 0);
        if (!zero_guards(ZERO_GUARD_MISSING)) { /* only where it comes back to must be registered, by then */
                set_range(p, w, remote_word(w->address), remote_word(w->bytes));
                uffd_call(p, w, next, UFFDIO_REGISTER, w->range);
        }
        remote_program_copy(p, w->offset, remote_value(0));

        remote_program_here(p, look);
        jump_equal(p, all, w->blind, 1);
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->length, remote_word(w->bytes), remote_word(w->offset));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, at, remote_word(w->scratch), remote_word(w->offset));
        REMOTE_OPERATE(p, REMOTE_OP_ZEROS, REMOTE_NOWHERE, w->length, remote_word(at), remote_word(w->length));
        add(p, w->offset, remote_word(w->length));
        jump_below(p, found, w->offset, remote_word(w->bytes));
        remote_program_jump(p, next);
        remote_program_here(p, found);
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->length, remote_word(w->bytes), remote_word(w->offset));
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, at, remote_word(w->scratch), remote_word(w->offset));
        REMOTE_OPERATE(p, REMOTE_OP_NONZEROS, REMOTE_NOWHERE, w->length, remote_word(at), remote_word(w->length));
        remote_program_jump(p, back);
        remote_program_here(p, all);
        REMOTE_OPERATE(p, REMOTE_OP_SUB, REMOTE_NOWHERE, w->length, remote_word(w->bytes), remote_word(w->offset));
        remote_program_here(p, back);
        if (zero_guards(ZERO_GUARD_BACK))
                put_back(p, w, table, look);
        else
                add(p, w->offset, remote_word(w->length));
        jump_below(p, look, w->offset, remote_word(w->bytes));
}

/* The control: looked at in place, and dropped when all were looked at. */
static void look_in_place(RemoteProgram *p, const Words *w) {
        load_row(p, w);
        REMOTE_OPERATE(p, REMOTE_OP_ZEROS, REMOTE_NOWHERE, w->moved, remote_word(w->address), remote_word(w->bytes));
        store_moved(p, w);
}

static void drop_in_place(RemoteProgram *p, const Words *w, unsigned next) {
        load_row(p, w);
        jump_equal(p, next, w->moved, 0);
        REMOTE_CALL(p, next, REMOTE_NOTHING, SYS_madvise, remote_word(w->address), remote_word(w->moved),
                    remote_value(MADV_DONTNEED));
}

static void begin(RemoteProgram *p, const Words *w, const int *devicefd, unsigned out, unsigned unmap) {
        remote_program_hold(p);
        remote_program_give(p, devicefd, 1, w->device, out);
        REMOTE_CALL(p, out, w->uffd, SYS_ioctl, remote_word(w->device), remote_value(USERFAULTFD_IOC_NEW),
                    remote_value(O_CLOEXEC | O_NONBLOCK));
        remote_program_note(p, w->uffd);
        uffd_call(p, w, out, UFFDIO_API, w->api);
        REMOTE_CALL(p, out, w->result, SYS_mmap, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES),
                    remote_value(PROT_READ | PROT_WRITE),
                    remote_value(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE),
                    remote_value(UINT64_MAX), remote_value(0));
        REMOTE_CALL(p, unmap, w->result, SYS_madvise, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES),
                    remote_value(MADV_DONTFORK));
        REMOTE_CALL(p, REMOTE_NOWHERE, w->result, SYS_madvise, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES),
                    remote_value(MADV_NOHUGEPAGE)); /* a kernel without huge pages knows no such advice */
        set_range(p, w, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES));
        uffd_call(p, w, unmap, UFFDIO_REGISTER, w->range);
}

static void take(RemoteProgram *p, const Words *w, const ZeroBatch *batch) {
        REMOTE_OPERATE(p, REMOTE_OP_ADD, REMOTE_NOWHERE, w->end, remote_at(batch->table),
                       remote_value(ROW_SIZE * batch->n_runs));
        Rows rows = rows_begin(p, w, batch->table);
        /* The first in any case: else a machine on which getting here takes that long would be stopped for nothing. */
        jump_equal(p, rows.first, w->visited, 0);
        REMOTE_OPERATE(p, REMOTE_OP_STOPPED, rows.over, REMOTE_NOTHING, remote_value(0));
        remote_program_here(p, rows.first);
        add(p, w->visited, remote_value(1));
        if (zero_guards(ZERO_GUARD_MOVE))
                take_run(p, w, rows.next);
        else
                look_in_place(p, w);
        rows_next(p, w, &rows);
        remote_program_copy(p, w->end, remote_word(w->row));
}

static void build(RemoteProgram *p, const Words *w, const ZeroBatch *batch, const int *devicefd) {
        unsigned out = remote_program_label(p), unmap = remote_program_label(p), blind = remote_program_label(p),
                 seeing = remote_program_label(p);
        begin(p, w, devicefd, out, unmap);
        take(p, w, batch);
        if (zero_test_dawdle_nsec > 0)
                remote_program_dawdle(p, zero_test_dawdle_nsec);
        set_range(p, w, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES));
        uffd_call(p, w, blind, UFFDIO_UNREGISTER, w->range);
        remote_program_jump(p, seeing);
        remote_program_here(p, blind);
        remote_program_copy(p, w->blind, remote_value(1));
        remote_program_copy(p, w->move + WORD_OF(UffdMove, mode),
                            remote_value(UAPI_UFFD_MOVE_DONTWAKE | UAPI_UFFD_MOVE_ALLOW_SRC_HOLES));
        remote_program_here(p, seeing);
        Rows rows = rows_begin(p, w, batch->table);
        if (zero_guards(ZERO_GUARD_MOVE))
                look_at_run(p, w, batch->table, rows.next);
        else
                drop_in_place(p, w, rows.next);
        rows_next(p, w, &rows);

        /* Z first: unmapping what is registered with it would wait for somebody to read of that. */
        remote_program_here(p, unmap);
        remote_program_close(p, w->uffd);
        REMOTE_CALL(p, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_munmap, remote_value(ZERO_SCRATCH), remote_value(SCRATCH_BYTES));
        remote_program_here(p, out);
        remote_program_close(p, w->uffd);
        remote_program_close(p, w->device);
}

size_t zero_span(const ZeroRun *runs, size_t n, uint64_t *ret_end) {
        size_t i = 1;
        while (i < n && runs[i].mapping == runs[0].mapping &&
               runs[i].start - runs[i - 1].end <= ZERO_SPAN_GAP_PAGES * PAGE_BYTES)
                i++;
        *ret_end = runs[i - 1].end;
        return i;
}

static void set_spans(RemoteProgram *p, unsigned table, const ZeroRun *runs, size_t n) {
        uint64_t end;
        for (size_t i = 0; i < n; i += zero_span(runs + i, n - i, &end)) {
                (void)zero_span(runs + i, n - i, &end);
                remote_program_set(p, table + _ROW_WORDS * (unsigned)i + ROW_SPAN_START, runs[i].start);
                remote_program_set(p, table + _ROW_WORDS * (unsigned)i + ROW_SPAN_BYTES, end - runs[i].start);
        }
}

int zero_batch_make(const ZeroRun *runs, size_t n, int devicefd, ZeroBatch *ret) {
        _cleanup_(remote_program_freep) RemoteProgram *p = NULL;
        uint64_t at = ZERO_SCRATCH;
        size_t n_runs = 0;
        int r = remote_program_new(&p);
        if (r < 0)
                return r;
        Words w = words_new(p);
        unsigned table = remote_program_words(p, _ROW_WORDS * MIN_OF(n, (size_t)ZERO_RUNS_MAX));
        for (; n_runs < MIN_OF(n, (size_t)ZERO_RUNS_MAX); n_runs++) {
                const ZeroRun *run = &runs[n_runs];
                unsigned row = table + _ROW_WORDS * (unsigned)n_runs;
                if (run->huge)
                        at = (at + BLOCK_BYTES - 1) & ~(BLOCK_BYTES - 1);
                if (at + (run->end - run->start) > ZERO_SCRATCH + SCRATCH_BYTES)
                        break;
                remote_program_set(p, row + ROW_ADDRESS, run->start);
                remote_program_set(p, row + ROW_BYTES, run->end - run->start);
                remote_program_set(p, row + ROW_SCRATCH, at);
                at += run->end - run->start;
        }
        if (n_runs == 0)
                return -EINVAL;
        set_spans(p, table, runs, n_runs);
        *ret = (ZeroBatch){ .n_runs = n_runs, .table = table, .visited = w.visited, .taken = w.taken,
                            .back = w.back, .lost = w.lost };
        build(p, &w, ret, &devicefd);
        ret->program = TAKE_PTR(p);
        return 0;
}
