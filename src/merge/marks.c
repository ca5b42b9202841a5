/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Whose mark is it? The kernel keeps one bit per mapping (VM_MERGEABLE) and not who set it, and it outlives us. So at
 * first contact, before anything of a target is marked, what is mergeable already goes to a state file: that is
 * foreign and stays. Everything mergeable beyond it is ours, for whoever reads the file: so nothing has to be written
 * when marks come and go, and a daemon that is killed leaves nothing that the next one cannot undo.
 *
 * A file is named PID.STARTTICKS (/proc/PID/stat field 22): a reused pid has other ticks, and the directory is below
 * /run, so that it does not outlive the boot that the ticks count from. Both outlive execve(2), of which nobody tells
 * while no daemon runs: so the file says which layout it is of, and where the process has another it is as if there were
 * none. It is replaced atomically and read strictly: from one that is not as we write it nothing is concluded, and then
 * everything is foreign. So it is where there is none; that one cannot be read just now (no file descriptor is left,
 * say) means neither.
 *
 * fork(2) copies the bit and execve(2) drops it. A child of a target is born with our marks in it; it would count them
 * as its own. So a process without a file that has the same memory layout as its parent (start of code, of stack and
 * of brk: chosen anew by each execve) takes over the parent's file, and the grandparent's if that has none.
 */

#include "merge/marks.h"

#include "base/io.h"

#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define STATE_HEADER "ksmd-user marks 2\n"
#define STATE_NAME_BYTES 48
#define NUMBER_DIGITS 16U
#define ANCESTORS_MAX 16

static void state_name(pid_t pid, uint64_t start_ticks, char *ret) {
        snprintf(ret, STATE_NAME_BYTES, "%d.%llu", pid, (unsigned long long)start_ticks);
}

/* 16 hexadecimal digits and what separates them from the next. -EBADMSG. */
static int state_parse_number(const char **text, char separator, uint64_t *ret) {
        char number[NUMBER_DIGITS + 1] = {};

        for (unsigned i = 0; i < NUMBER_DIGITS; i++) {
                if (!isxdigit((unsigned char)(*text)[i]))
                        return -EBADMSG;
                number[i] = (*text)[i];
        }
        if ((*text)[NUMBER_DIGITS] != separator)
                return -EBADMSG;
        *text += NUMBER_DIGITS + 1;
        *ret = strtoull(number, NULL, 16);
        return 0;
}

static int state_parse_layout(const char **text, TargetOrigin *ret) {
        int r = state_parse_number(text, ' ', &ret->start_code);

        if (r == 0)
                r = state_parse_number(text, ' ', &ret->start_stack);
        return r == 0 ? state_parse_number(text, '\n', &ret->start_brk) : r;
}

/* The header, "CODE STACK BRK\n", "START-END\n" by address. -ENOENT: it is of another program; -EBADMSG. */
static int state_parse(const char *text, const TargetOrigin *origin, Ranges *ret) {
        _cleanup_(ranges_done) Ranges ranges = {};
        size_t header = strlen(STATE_HEADER);
        TargetOrigin written = {};
        int r;

        if (strncmp(text, STATE_HEADER, header) != 0)
                return -EBADMSG;
        text += header;
        r = state_parse_layout(&text, &written);
        if (r < 0)
                return r;
        while (*text) {
                uint64_t start, end;

                r = state_parse_number(&text, '-', &start);
                if (r == 0)
                        r = state_parse_number(&text, '\n', &end);
                if (r < 0)
                        return r;
                if ((start | end) % PAGE_BYTES || start >= end ||
                    (ranges.n > 0 && start < ranges.ranges[ranges.n - 1].end))
                        return -EBADMSG;
                if (ranges_append(&ranges, start, end) < 0)
                        return -ENOMEM;
        }
        if (target_origin_differs(&written, origin))
                return -ENOENT;
        ranges_done(ret);
        *ret = ranges;
        ranges = (Ranges){};
        return 0;
}

static int state_read(int statefd, pid_t pid, uint64_t start_ticks, const TargetOrigin *origin, Ranges *ret) {
        _cleanup_free_ char *text = NULL;
        char name[STATE_NAME_BYTES];
        size_t size;
        int r;

        state_name(pid, start_ticks, name);
        r = read_file(statefd, name, &text, &size);
        if (r < 0)
                return r;
        return strlen(text) == size ? state_parse(text, origin, ret) : -EBADMSG;
}

/* Of the processes that ended with marks of ours in them, the one this was forked from. -ENOENT: none is known. */
static int ended_inherited(const Advise *advise, const Target *target, const TargetOrigin *origin, Ranges *ret) {
        for (size_t i = 0; i < advise->n_ended; i++) {
                const MarksEnded *ended = &advise->ended[i];

                if (target_origin_precedes(&ended->origin, origin))
                        return target_layout_is_fixed(target) ? -ENOENT
                                                              : ranges_unite(&ended->foreign, &(Ranges){}, ret);
        }
        return -ENOENT;
}

/* Looks for the state file of a process that this one was forked from. -ENOENT: there is none; -EBADMSG; -errno: it
 * cannot be told. */
static int state_inherited(Advise *advise, const Target *target, const TargetOrigin *own, Ranges *ret) {
        TargetOrigin origin = *own, parent;
        int r = 0;

        for (unsigned i = 0; r == 0 && i < ANCESTORS_MAX && origin.parent > 1; i++) {
                r = target_origin_of(origin.parent, &parent);
                if (r < 0 && !target_origin_is_gone(r))
                        return r;
                if (r < 0 || !target_origin_precedes(&parent, &origin))
                        break;
                r = state_read(advise->statefd, origin.parent, parent.start_ticks, &parent, ret);
                if (r != -ENOENT)
                        return r;
                r = 0;
                origin = parent;
        }
        return ended_inherited(advise, target, own, ret);
}

int marks_mergeable(const VmaList *vmas, Ranges *ret) {
        _cleanup_(ranges_done) Ranges ranges = {};

        for (size_t i = 0; i < vmas->n; i++)
                if (vmas->vmas[i].mergeable && ranges_append(&ranges, vmas->vmas[i].start, vmas->vmas[i].end) < 0)
                        return -ENOMEM;
        ranges_done(ret);
        *ret = ranges;
        ranges = (Ranges){};
        return 0;
}

int marks_load(Advise *advise, Target *target, const VmaList *vmas, Marks *ret) {
        _cleanup_(marks_done) Marks marks = {};
        _cleanup_(ranges_done) Ranges mergeable = {};
        int origin_known = target_origin(target, &marks.origin), r;

        if (origin_known < 0 && !target_origin_is_gone(origin_known))
                return origin_known;
        r = marks_mergeable(vmas, &mergeable);
        if (r < 0)
                return r;
        r = state_read(advise->statefd, target->pid, target->start_ticks, &marks.origin, &marks.foreign);
        marks.recorded = r == 0;
        if (r == -ENOENT && mergeable.n > 0) {
                r = origin_known < 0 ? -ENOENT : state_inherited(advise, target, &marks.origin, &marks.foreign);
                /* From here on it does not depend on its parent; where that fails, the next daemon may ask again. */
                if (r == 0)
                        (void)marks_record(advise, target, &marks);
        }
        if (r < 0 && r != -ENOENT && r != -EBADMSG)
                return r;
        if (r == 0)
                r = ranges_subtract(&mergeable, &marks.foreign, &marks.ours);
        else
                r = ranges_unite(&mergeable, &(Ranges){}, &marks.foreign);
        if (r < 0)
                return r;
        marks.marks_itself = marks.foreign.n > 0;
        *ret = marks;
        marks = (Marks){};
        return 0;
}

void marks_done(Marks *marks) {
        ranges_done(&marks->ours);
        ranges_done(&marks->foreign);
        marks_forget_undo(marks);
        free(marks->idle);
        *marks = (Marks){};
}

int marks_record(Advise *advise, const Target *target, Marks *marks) {
        _cleanup_free_ char *text = NULL;
        char name[STATE_NAME_BYTES];
        size_t size;
        FILE *file;
        int r;

        if (marks->recorded)
                return 0;
        file = open_memstream(&text, &size);
        if (!file)
                return -ENOMEM;
        fprintf(file, STATE_HEADER "%016llx %016llx %016llx\n", (unsigned long long)marks->origin.start_code,
                (unsigned long long)marks->origin.start_stack, (unsigned long long)marks->origin.start_brk);
        for (size_t i = 0; i < marks->foreign.n; i++)
                fprintf(file, "%016llx-%016llx\n", (unsigned long long)marks->foreign.ranges[i].start,
                        (unsigned long long)marks->foreign.ranges[i].end);
        if (fclose(file) != 0)
                return -ENOMEM;
        state_name(target->pid, target->start_ticks, name);
        r = write_file_atomic(advise->statefd, name, text);
        if (r < 0)
                return r;
        marks->recorded = true;
        return 0;
}

void marks_unrecord(Advise *advise, const Target *target, Marks *marks) {
        char name[STATE_NAME_BYTES];

        if (!marks->recorded)
                return;
        state_name(target->pid, target->start_ticks, name);
        unlinkat(advise->statefd, name, 0);
        marks->recorded = false;
}

/* The state files of a directory, and what a write that was cut off left ("NAME.new": rest is then ".new"). */
static int state_each(int statefd, void (*handler)(void *userdata, int statefd, const char *name, pid_t pid,
                                                   bool alive, const char *rest),
                      void *userdata) {
        _cleanup_closedir_ DIR *dir = NULL;
        int r = open_directory(statefd, ".", &dir);

        if (r < 0)
                return r;
        for (const struct dirent *entry; (entry = readdir(dir));) {
                char name[STATE_NAME_BYTES];
                unsigned long long ticks;
                TargetOrigin origin;
                int pid, end = 0;

                if (sscanf(entry->d_name, "%d.%llu%n", &pid, &ticks, &end) != 2 || pid <= 0)
                        continue;
                state_name(pid, ticks, name);
                if (strncmp(entry->d_name, name, strlen(name)) != 0)
                        continue;
                r = target_origin_of(pid, &origin);
                handler(userdata, statefd, entry->d_name, pid,
                        r == 0 ? origin.start_ticks == ticks : !target_origin_is_gone(r), entry->d_name + end);
        }
        return 0;
}

static void sweep_one(void *userdata, int statefd, const char *name, pid_t pid, bool alive, const char *rest) {
        /* Of a write that was cut off the file it was to replace is whole. */
        if (strcmp(rest, ".new") == 0 || (!*rest && !alive))
                unlinkat(statefd, name, 0);
}

int marks_sweep(int statefd) { return state_each(statefd, sweep_one, NULL); }

void marks_end(Advise *advise, Marks *marks) {
        MarksEnded *at = NULL;

        if (marks->ours.n == 0 || marks->origin.start_stack == 0)
                return;
        for (size_t i = 0; i < advise->n_ended && !at; i++)
                if (target_origin_same(&advise->ended[i].origin, &marks->origin))
                        at = &advise->ended[i];
        if (at && at->origin.start_ticks <= marks->origin.start_ticks)
                return;
        if (!at)
                at = &advise->ended[advise->n_ended < MARKS_ENDED_MAX ? advise->n_ended++
                                                                      : advise->ended_next++ % MARKS_ENDED_MAX];
        ranges_done(&at->foreign);
        *at = (MarksEnded){ .origin = marks->origin, .foreign = marks->foreign };
        marks->foreign = (Ranges){};
}

typedef struct Recorded {
        AdviseRecorded handler;
        void *userdata;
} Recorded;

static void tell_one(void *userdata, int statefd, const char *name, pid_t pid, bool alive, const char *rest) {
        const Recorded *recorded = userdata;

        if (!*rest && alive)
                recorded->handler(recorded->userdata, pid);
}

int advise_recorded(Advise *advise, AdviseRecorded handler, void *userdata) {
        Recorded recorded = { handler, userdata };

        return state_each(advise->statefd, tell_one, &recorded);
}
