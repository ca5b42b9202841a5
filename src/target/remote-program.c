/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "target/remote-internal.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

/*
 * Building a transaction's program: no process is touched here. What a program consists of is laid out for the stub
 * (RemoteInstruction); this file hands out words and labels, and puts together what takes several instructions:
 * bringing descriptors in, and closing them again if they are still the same.
 */
int remote_program_new(RemoteProgram **ret) {
        RemoteProgram *program = calloc(1, sizeof *program);
        if (!program)
                return -ENOMEM;
        *ret = program;
        return 0;
}

RemoteProgram *remote_program_free(RemoteProgram *program) {
        free(program);
        return NULL;
}

static void fail(RemoteProgram *program, int error) {
        if (program->error == 0)
                program->error = error;
}

unsigned remote_program_words(RemoteProgram *program, size_t n) {
        if (n == 0 || n > REMOTE_PROGRAM_WORDS_MAX - program->n_words) {
                fail(program, -E2BIG);
                return 0;
        }
        unsigned word = program->n_words;
        program->n_words += (unsigned)n;
        return word;
}

void remote_program_set(RemoteProgram *program, unsigned word, uint64_t value) {
        if (word < program->n_words)
                program->words[word] = value;
        else
                fail(program, -EINVAL);
}

uint64_t remote_program_get(const RemoteProgram *program, unsigned word) {
        return word < program->n_words ? program->words[word] : 0;
}

unsigned remote_program_label(RemoteProgram *program) {
        if (program->n_labels == REMOTE_PROGRAM_LABELS_MAX) {
                fail(program, -E2BIG);
                return 0;
        }
        program->labels[program->n_labels] = REMOTE_NOWHERE;
        return program->n_labels++;
}

void remote_program_here(RemoteProgram *program, unsigned label) {
        if (label >= program->n_labels || program->labels[label] != REMOTE_NOWHERE)
                fail(program, -EINVAL);
        else
                program->labels[label] = (uint16_t)program->n_ops;
}

static void emit(RemoteProgram *program, RemoteOp op, long nr, unsigned label, unsigned result, size_t n,
                 const RemoteOperand *operands) {
        if (program->n_ops == REMOTE_PROGRAM_OPS_MAX) {
                fail(program, -E2BIG);
                return;
        }
        bool resolvable = label == REMOTE_NOWHERE || label < program->n_labels;
        if (!resolvable || (result != REMOTE_NOTHING && result >= program->n_words) || n > 6 || op >= _REMOTE_OP_MAX) {
                fail(program, -EINVAL);
                return;
        }
        RemoteInstruction *instruction = &program->ops[program->n_ops++];
        *instruction = (RemoteInstruction){
                .nr = (uint64_t)nr,
                .op = (uint8_t)op,
                .result = (uint16_t)result,
                .target = (uint16_t)label,
        };
        for (size_t i = 0; i < n; i++) {
                if (operands[i].kind != REMOTE_VALUE && operands[i].value >= program->n_words)
                        fail(program, -EINVAL);
                instruction->args[i] = operands[i].value;
                instruction->modes |= (uint16_t)(operands[i].kind << (2 * i));
        }
}

void remote_program_op(RemoteProgram *program, RemoteOp op, unsigned label, unsigned result, size_t n,
                       const RemoteOperand *operands) {
        if (op == REMOTE_OP_CALL || op == REMOTE_OP_ASK)
                fail(program, -EINVAL); /* they have functions of their own */
        emit(program, op, 0, label, result, n, operands);
}

void remote_program_copy(RemoteProgram *program, unsigned word, RemoteOperand from) {
        REMOTE_OPERATE(program, REMOTE_OP_ADD, REMOTE_NOWHERE, word, from, remote_value(0));
}

void remote_program_call(RemoteProgram *program, unsigned on_error, unsigned result, long nr, size_t n,
                         const RemoteOperand *operands) {
        emit(program, REMOTE_OP_CALL, nr, on_error, result, n, operands);
}

void remote_program_jump(RemoteProgram *program, unsigned label) {
        emit(program, REMOTE_OP_JUMP, 0, label, REMOTE_NOTHING, 0, NULL);
}

void remote_program_ask_along(RemoteProgram *program, RemoteAnswer answer, void *userdata) {
        if (program->n_asks == REMOTE_PROGRAM_ASKS_MAX)
                fail(program, -E2BIG);
        else
                program->asks[program->n_asks++] = (RemoteAsk){ answer, userdata, program->n_questions + 1 };
}

void remote_program_ask(RemoteProgram *program, RemoteAnswer answer, void *userdata, unsigned on_error) {
        remote_program_ask_along(program, answer, userdata);
        const RemoteOperand number = remote_value(++program->n_questions);
        emit(program, REMOTE_OP_ASK, 0, on_error, REMOTE_NOTHING, 1, &number);
}

static int park(void *userdata, RemoteProgram *program, const Target *target) {
        return remote_guards(REMOTE_GUARD_PARK) ? remote_crowd_park(program->crowd, program->runner) : 0;
}

void remote_program_hold(RemoteProgram *program) {
        program->holds = true;
        remote_program_ask_along(program, park, NULL);
}

void remote_program_dawdle(RemoteProgram *program, uint64_t nsec) {
        unsigned time = remote_program_words(program, 2);

        remote_program_set(program, time, nsec / NSEC_PER_SEC);
        remote_program_set(program, time + 1, nsec % NSEC_PER_SEC);
        REMOTE_CALL(program, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_nanosleep, remote_at(time), remote_value(0));
}

/* What is known of the descriptor in this word: its number among the notes. */
static RemoteNote *note_of(RemoteProgram *program, unsigned word) {
        for (unsigned i = 0; i < program->n_notes; i++)
                if (program->notes[i].word == word)
                        return &program->notes[i];
        if (program->n_notes == REMOTE_PROGRAM_NOTES_MAX) {
                fail(program, -E2BIG);
                return NULL;
        }
        if (program->n_notes == 0)
                program->stat_word = remote_program_words(program, DIV_ROUND_UP(sizeof(struct stat), sizeof(uint64_t)));
        RemoteNote *note = &program->notes[program->n_notes++];
        *note = (RemoteNote){ .word = word, .noted = remote_program_words(program, 3) };
        return note;
}

_Static_assert(offsetof(struct stat, st_dev) % 8 == 0 && sizeof(dev_t) == 8 && offsetof(struct stat, st_ino) % 8 == 0 &&
               sizeof(ino_t) == 8, "words of a program");

void remote_program_note(RemoteProgram *program, unsigned word) {
        RemoteNote *note = note_of(program, word);
        if (!note)
                return;
        unsigned skip = remote_program_label(program), stat = program->stat_word;
        remote_program_copy(program, note->noted, remote_value(0));
        REMOTE_CALL(program, skip, REMOTE_NOTHING, SYS_fstat, remote_word(word), remote_at(stat));
        remote_program_copy(program, note->noted + 1, remote_word(stat + WORD_OF(struct stat, st_dev)));
        remote_program_copy(program, note->noted + 2, remote_word(stat + WORD_OF(struct stat, st_ino)));
        remote_program_copy(program, note->noted, remote_value(1));
        remote_program_here(program, skip);
}

/* Other threads run on if we die: one of them may have closed our number and opened something of its own there. */
void remote_program_close(RemoteProgram *program, unsigned word) {
        RemoteNote *note = note_of(program, word);
        if (!note || !remote_guards(REMOTE_GUARD_CLOSE))
                return;
        unsigned skip = remote_program_label(program), dev = remote_program_label(program),
                 ino = remote_program_label(program), stat = program->stat_word;
        REMOTE_OPERATE(program, REMOTE_OP_EQUAL, skip, REMOTE_NOTHING, remote_word(note->noted), remote_value(0));
        REMOTE_CALL(program, skip, REMOTE_NOTHING, SYS_fstat, remote_word(word), remote_at(stat));
        REMOTE_OPERATE(program, REMOTE_OP_EQUAL, dev, REMOTE_NOTHING, remote_word(note->noted + 1),
                       remote_word(stat + WORD_OF(struct stat, st_dev)));
        remote_program_jump(program, skip);
        remote_program_here(program, dev);
        REMOTE_OPERATE(program, REMOTE_OP_EQUAL, ino, REMOTE_NOTHING, remote_word(note->noted + 2),
                       remote_word(stat + WORD_OF(struct stat, st_ino)));
        remote_program_jump(program, skip);
        remote_program_here(program, ino);
        REMOTE_CALL(program, REMOTE_NOWHERE, REMOTE_NOTHING, SYS_close, remote_word(word));
        remote_program_here(program, skip);
        remote_program_copy(program, note->noted, remote_value(0));
}

/* struct msghdr and what it points to, as words. */
typedef struct Message {
        unsigned header, vector, byte, control;
} Message;

#define CONTROL_WORDS DIV_ROUND_UP(CMSG_SPACE(REMOTE_PROGRAM_GIVE_MAX * sizeof(int)), sizeof(uint64_t))

static Message message_words(RemoteProgram *program, size_t n) {
        Message m = {
                .header = remote_program_words(program, DIV_ROUND_UP(sizeof(struct msghdr), sizeof(uint64_t))),
                .vector = remote_program_words(program, 2),
                .byte = remote_program_words(program, 1),
                .control = remote_program_words(program, CONTROL_WORDS),
        };
        for (unsigned i = 0; i < CONTROL_WORDS; i++)
                remote_program_set(program, m.control + i, UINT64_MAX); /* no descriptors */
        remote_program_set(program, m.vector + 1, 1);
        remote_program_set(program, m.header + WORD_OF(struct msghdr, msg_iovlen), 1);
        remote_program_set(program, m.header + WORD_OF(struct msghdr, msg_controllen), CMSG_SPACE(n * sizeof(int)));
        /* Where they lie in the target is not known yet: stored by the program. */
        remote_program_copy(program, m.vector, remote_at(m.byte));
        remote_program_copy(program, m.header + WORD_OF(struct msghdr, msg_iov), remote_at(m.vector));
        remote_program_copy(program, m.header + WORD_OF(struct msghdr, msg_control), remote_at(m.control));
        return m;
}

static void load_int(RemoteProgram *program, unsigned to, unsigned base, uint64_t offset) {
        REMOTE_OPERATE(program, REMOTE_OP_ADD, REMOTE_NOWHERE, to, remote_at(base), remote_value(offset));
        REMOTE_OPERATE(program, REMOTE_OP_LOAD_INT, REMOTE_NOWHERE, to, remote_word(to));
}

/* Answers the question of remote_program_give(): sends them into the socket. */
static int send_given(void *userdata, RemoteProgram *program, const Target *target) {
        RemoteGiven *given = userdata;
        char control[CMSG_SPACE(REMOTE_PROGRAM_GIVE_MAX * sizeof(int))] __attribute__((aligned(8))) = {};
        char byte = 0;
        struct iovec vector = { &byte, 1 };
        struct msghdr header = {
                .msg_iov = &vector,
                .msg_iovlen = 1,
                .msg_control = control,
                .msg_controllen = CMSG_SPACE(given->n * sizeof(int)),
        };
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(given->n * sizeof(int));
        memcpy(CMSG_DATA(cmsg), given->fds, given->n * sizeof(int));
        _cleanup_close_ int theirs = remote_program_take(program, target, given->socket);
        if (theirs < 0)
                return theirs;
        return sendmsg(theirs, &header, MSG_DONTWAIT | MSG_NOSIGNAL) == 1 ? 0 : -errno;
}

void remote_program_give(RemoteProgram *program, const int *fds, size_t n, unsigned word, unsigned on_error) {
        if (n == 0 || n > REMOTE_PROGRAM_GIVE_MAX || program->n_given == REMOTE_PROGRAM_GIVEN_MAX) {
                fail(program, -E2BIG);
                return;
        }
        unsigned pair = remote_program_words(program, 1), ours = remote_program_words(program, 2);
        unsigned bad = remote_program_label(program), good = remote_program_label(program);
        RemoteGiven *given = &program->given[program->n_given++];
        *given = (RemoteGiven){ .n = n, .socket = ours + 1 };
        memcpy(given->fds, fds, n * sizeof *fds);

        Message m = message_words(program, n);
        REMOTE_CALL(program, on_error, REMOTE_NOTHING, SYS_socketpair, remote_value(AF_UNIX),
                    remote_value(SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK), remote_value(0), remote_at(pair));
        load_int(program, ours, pair, 0);
        load_int(program, ours + 1, pair, 4);
        remote_program_note(program, ours);
        remote_program_note(program, ours + 1);
        remote_program_ask(program, send_given, given, bad);
        REMOTE_CALL(program, bad, REMOTE_NOTHING, SYS_recvmsg, remote_word(ours), remote_at(m.header),
                    remote_value(MSG_CMSG_CLOEXEC | MSG_DONTWAIT));
        for (unsigned i = 0; i < n; i++) {
                load_int(program, word + i, m.control, CMSG_LEN(i * sizeof(int)));
                remote_program_note(program, word + i);
        }
        remote_program_close(program, ours);
        remote_program_close(program, ours + 1);
        /* Fewer than were sent: no number was free for the rest. */
        REMOTE_OPERATE(program, REMOTE_OP_EQUAL, good, REMOTE_NOTHING, remote_word(m.control),
                       remote_value(CMSG_LEN(n * sizeof(int))));
        remote_program_jump(program, on_error);
        remote_program_here(program, bad);
        remote_program_close(program, ours);
        remote_program_close(program, ours + 1);
        remote_program_jump(program, on_error);
        remote_program_here(program, good);
}

int remote_program_take(const RemoteProgram *program, const Target *target, unsigned word) {
        struct stat st;
        int number = (int)remote_program_get(program, word);
        _cleanup_close_ int fd = (int)syscall(SYS_pidfd_getfd, target->pidfd, number, 0);
        if (fd < 0)
                return -errno;
        if (fstat(fd, &st) < 0)
                return -errno;
        /* The table that pidfd_getfd(2) looks into is the first thread's; another one may have its own. */
        for (unsigned i = 0; i < program->n_notes; i++) {
                const RemoteNote *note = &program->notes[i];
                if (note->word == word &&
                    (!program->words[note->noted] || program->words[note->noted + 1] != st.st_dev ||
                     program->words[note->noted + 2] != st.st_ino))
                        return -EBADF;
        }
        return TAKE_FD(fd);
}

int remote_program_finish(RemoteProgram *program) {
        if (program->error < 0 || program->finished)
                return program->error;
        emit(program, REMOTE_OP_END, 0, REMOTE_NOWHERE, REMOTE_NOTHING, 0, NULL);
        for (unsigned i = 0; i < program->n_ops; i++) {
                RemoteInstruction *instruction = &program->ops[i];
                if (instruction->target == REMOTE_NOWHERE)
                        continue;
                instruction->target = program->labels[instruction->target];
                if (instruction->target == REMOTE_NOWHERE)
                        fail(program, -EINVAL);
        }
        if (program->n_asks > 0 && program->asks[program->n_asks - 1].question > program->n_questions)
                fail(program, -EINVAL); /* there was no next question */
        program->finished = true;
        return program->error;
}

/* As seccomp will see it. What is known only when it is run stands as a descriptor's number would. */
bool remote_program_call_at(const RemoteProgram *program, unsigned i, uint64_t region, RemoteCall *ret) {
        const RemoteInstruction *instruction = &program->ops[i];
        if (instruction->op != REMOTE_OP_CALL)
                return false;
        *ret = (RemoteCall){ .nr = (long)instruction->nr };
        for (unsigned a = 0; a < 6; a++) {
                unsigned mode = instruction->modes >> (2 * a) & 3;
                ret->args[a] = mode == REMOTE_WORD ? 3 :
                               mode == REMOTE_AT ? region + REMOTE_REGION_WORDS_OFFSET + 8 * instruction->args[a] :
                               instruction->args[a];
        }
        return true;
}
