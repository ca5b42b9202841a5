/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * smaps counts the pages of a mapping to tell its flags: 42 ns for each that is present, with the target's mmap lock
 * held. Here the flags come from a BPF iterator over the mappings (bpf/vmas.bpf.c), 0.2 us a mapping however many pages
 * it has, everything else from the text of maps.
 *
 * What must hold:
 *
 * One image. The iterator looks its thread up by number at each read(2), and takes whatever address space it has then;
 * a file of /proc is bound to the address space it was opened on. So maps is opened between two answers of the
 * iterator, and both name the same address space and the same count of programs run. The count only grows, and the
 * kernel raises it in each execve(2) after the address space was exchanged, before the next can begin: if both are the
 * same there was none in between, and the address space that maps was opened on is that one. An address alone would not
 * do, memory is used again. And the process lived at the end (its pidfd says), so that the number was its own
 * throughout.
 *
 * One moment, as far as smaps has one: it drops the mmap lock between mappings as well, but header and flags of one
 * mapping come together. Here text and answers agree in where each mapping begins and ends and in its permissions, or
 * count as changed. A mapping that was replaced in between by one that looks the same has the older one's name and the
 * newer one's flags, or the other way round; which of its pages are read is decided by flags and permissions alone, so
 * that this is as good as one of the two read at its moment.
 *
 * Nothing is believed of flags that was not seen in mappings of our own (vma-bits.c): a bit nobody has explained makes
 * this process one for smaps.
 */
#include "target/vma-reader.h"

#include <fcntl.h>
#include <string.h>

#define CHUNK_RECORDS ((size_t)680)     /* as many as the kernel hands out at once (32 KiB) */

typedef struct Records {
        struct probe_vma *vmas;
        size_t n, allocated;
} Records;

static void records_done(Records *records) { free(records->vmas); }

/* As many as fit into what is asked for. -EBADMSG: not records. */
static int read_some(int fd, struct probe_vma *vmas, size_t n, size_t *ret_n) {
        ssize_t bytes;

        do
                bytes = read(fd, vmas, n * sizeof *vmas);
        while (bytes < 0 && errno == EINTR);
        if (bytes < 0)
                return -errno;
        *ret_n = (size_t)bytes / sizeof *vmas;
        return (size_t)bytes % sizeof *vmas ? -EBADMSG : 0;
}

/* Of n records more, those up to where addresses go back. An iterator over one thread does not know its end: it begins
 * once more with what it said last (task_vma_seq_get_next(), kernel/bpf/task_iter.c, 6.18). */
static size_t count_ascending(const Records *records, size_t n) {
        const struct probe_vma *more = records->vmas + records->n;
        size_t i = 0;

        while (i < n && (more + i == records->vmas || more[i].start >= more[(ptrdiff_t)i - 1].end))
                i++;
        return i;
}

static int read_records(const VmaReader *reader, pid_t pid, Records *records) {
        _cleanup_close_ int fd = probes_open_vmas(reader->probes, pid);
        size_t n = 1;
        int r = fd < 0 ? fd : 0;

        while (r == 0 && n > 0) {
                if (records->allocated - records->n < CHUNK_RECORDS) {
                        size_t allocated = MAX_OF(records->allocated * 2, CHUNK_RECORDS);
                        void *p = reallocarray(records->vmas, allocated, sizeof *records->vmas);

                        if (!p)
                                return -ENOMEM;
                        records->vmas = p;
                        records->allocated = allocated;
                }
                r = read_some(fd, records->vmas + records->n, CHUNK_RECORDS, &n);
                if (r == 0)
                        n = count_ascending(records, n);
                records->n += r == 0 ? n : 0;
        }
        return r;
}

/* The address space is still the one that this was read of, and the program has not changed. */
static int confirm_image(const VmaReader *reader, const Target *target, const struct probe_vma *before) {
        _cleanup_close_ int fd = probes_open_vmas(reader->probes, target->pid);
        struct probe_vma now = {};
        size_t n = 0;
        int r = fd < 0 ? fd : read_some(fd, &now, 1, &n);

        if (r < 0)
                return r;
        if (VMA_LEAVE_OUT & VMA_LEAVE_OUT_IMAGE)
                return 0;
        return n == 1 && now.space == before->space && now.programs == before->programs && target_alive(target)
                       ? 0
                       : VMA_E_CHANGED;
}

/* What the records say in our terms. NULL: out of memory. */
static VmaAnswer *translate(const VmaBits *bits, const Records *records) {
        VmaAnswer *answers = malloc(records->n * sizeof *answers);

        for (size_t i = 0; answers && i < records->n; i++) {
                const struct probe_vma *vma = &records->vmas[i];

                answers[i] = (VmaAnswer){ .start = vma->start, .end = vma->end, .anonymous = vma->anonymous };
                answers[i].traits = vma_bits_traits(bits, vma->flags, &answers[i].unsure);
        }
        return answers;
}

static int read_both(const VmaReader *reader, Target *target, VmaParser *parser) {
        _cleanup_(records_done) Records records = {};
        _cleanup_free_ VmaAnswer *answers = NULL;
        _cleanup_close_ int fd = -EBADF;
        int r;

        r = read_records(reader, target->pid, &records);
        if (r < 0)
                return r;
        if (records.n == 0)
                return VMA_E_CHANGED; /* it ends */
        for (size_t i = 1; i < records.n; i++)
                if (records.vmas[i].space != records.vmas[0].space ||
                    records.vmas[i].programs != records.vmas[0].programs)
                        return VMA_E_CHANGED;
        fd = openat(target->procfd, "maps", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return -errno;
        r = confirm_image(reader, target, &records.vmas[0]);
        if (r != 0)
                return r;
        answers = translate(&reader->bits, &records);
        if (!answers)
                return -ENOMEM;
        parser->answers = answers;
        parser->n_answers = records.n;
        r = vma_parser_read(parser, fd);
        return r == 0 && parser->list.n == 0 ? VMA_E_CHANGED : r;
}

int vma_reader_read(VmaReader *reader, Target *target, bool include_dontdump, VmaList *ret) {
        _cleanup_(vma_parser_done) VmaParser parser = { .include_dontdump = include_dontdump };
        int r;

        if (!reader->probes)
                return -ENOSYS;
        r = read_both(reader, target, &parser);
        if (r == 0)
                r = vma_parser_finish(&parser, ret);
        *(r == 0                 ? &reader->n_read
          : r == VMA_E_UNSURE    ? &reader->n_unsure
          : r == VMA_E_CHANGED   ? &reader->n_changed
                                 : &reader->n_failed) += 1;
        return r;
}

/* Learns from the mappings of one process: what smaps says of them, and what the iterator does. */
static int learn_from(VmaReader *reader, Target *target) {
        _cleanup_(vma_letters_done) VmaLettersList letters = {};
        _cleanup_(vma_parser_done) VmaParser parser = { .letters = &letters };
        _cleanup_(records_done) Records records = {};
        _cleanup_close_ int fd = openat(target->procfd, "smaps", O_RDONLY | O_CLOEXEC);
        _cleanup_free_ VmaSample *samples = NULL;
        size_t at = 0, n = 0;
        int r = fd < 0 ? -errno : vma_parser_read(&parser, fd);

        if (r == 0)
                r = read_records(reader, target->pid, &records);
        if (r < 0)
                return r;
        samples = calloc(letters.n + 1, sizeof *samples);
        if (!samples)
                return -ENOMEM;
        for (size_t i = 0; i < letters.n; i++) {
                const VmaLetters *vma = &letters.vmas[i];

                if (vma->start >> 63) /* [vsyscall] */
                        continue;
                if (vma->n == VMA_LETTERS_MAX || at == records.n || records.vmas[at].start != vma->start ||
                    records.vmas[at].end != vma->end)
                        return -EBADMSG;
                samples[n++] = (VmaSample){ records.vmas[at++].flags, vma };
        }
        if (at < records.n)
                return -EBADMSG;
        vma_bits_learn(samples, n, &reader->bits);
        return reader->bits.known ? 0 : -EBADMSG;
}

static int learn(VmaReader *reader) {
        _cleanup_(target_freep) Target *target = NULL;
        pid_t pid;
        int r = vma_examples_begin(&pid);

        if (r < 0)
                return r;
        r = target_new(pid, &target);
        if (r == 0)
                r = learn_from(reader, target);
        vma_examples_end(pid);
        return r > 0 ? -ESRCH : r;
}

void vma_reader_open(VmaReader *reader, Probes *probes, bool pagemap_scan) {
        int r;

        *reader = (VmaReader){};
        if (!probes_have(probes, PROBE_VMAS))
                return;
        reader->probes = probes;
        r = pagemap_scan ? learn(reader) : -EOPNOTSUPP;
        if (r == 0)
                return;
        reader->probes = NULL;
        probes_refuse(probes, PROBE_VMAS, r);
}

void vma_reader_close(VmaReader *reader) { reader->probes = NULL; }
