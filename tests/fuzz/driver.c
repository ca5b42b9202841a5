/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * main() for a fuzz target where there is no libFuzzer: runs LLVMFuzzerTestOneInput() on the seeds as they are and then
 * on a fixed number of mutations of them. Iteration i makes the same input on every machine, so a failure in the
 * tests repeats; the input that failed is written to crash-PROGRAM and can be given as an argument.
 *
 *     fuzz-X [-n ITERATIONS] [-m MAX_BYTES] FILE|DIRECTORY...
 */

#include "base/io.h"
#include "fuzz.h"

#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

/* So that the sanitizers' findings come by on_crash() as well. */
const char *__asan_default_options(void) { return "abort_on_error=1:handle_abort=0"; }
const char *__ubsan_default_options(void) { return "halt_on_error=1:abort_on_error=1:print_stacktrace=1"; }

typedef struct Seed {
        char *name;
        uint8_t *data;
        size_t size;
} Seed;

static Seed *seeds;
static size_t n_seeds, allocated_seeds;

/* The input that is running, for on_crash(). */
static uint8_t *input;
static size_t input_size;
static char crash_name[256];

static uint64_t random_state;

/* splitmix64 */
static uint64_t random_next(void) {
        uint64_t z = (random_state += 0x9e3779b97f4a7c15U);

        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
        return z ^ (z >> 31);
}

static size_t random_below(size_t n) { return n ? (size_t)(random_next() % n) : 0; }

static void on_crash(int signal_number) {
        int fd = open(crash_name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        static const char said[] = "the input is in crash-PROGRAM here\n";

        if (fd >= 0 && write(fd, input, input_size) == (ssize_t)input_size && write(STDERR_FILENO, said, sizeof said - 1) > 0)
                close(fd);
        signal(signal_number, SIG_DFL);
        raise(signal_number);
}

static int compare_seeds(const void *a, const void *b) {
        return strcmp(((const Seed *)a)->name, ((const Seed *)b)->name);
}

static void seed_add(const char *path) {
        Seed seed = { .name = strdup(path) };
        char *text;

        CHECK(seed.name && GROW(seeds, n_seeds, allocated_seeds) == 0, "memory");
        CHECK(read_file(AT_FDCWD, path, &text, &seed.size) == 0, "%s", path);
        seed.data = (uint8_t *)text;
        seeds[n_seeds++] = seed;
}

static void seeds_add(const char *path) {
        struct dirent *entry;
        struct stat st;
        DIR *directory;

        CHECK(stat(path, &st) == 0, "%s", path);
        if (!S_ISDIR(st.st_mode)) {
                seed_add(path);
                return;
        }
        directory = opendir(path);
        CHECK(directory, "%s", path);
        while ((entry = readdir(directory))) {
                _cleanup_free_ char *file = NULL;

                if (entry->d_name[0] == '.')
                        continue;
                CHECK(asprintf(&file, "%s/%s", path, entry->d_name) > 0, "memory");
                seed_add(file);
        }
        closedir(directory);
}

/* Makes room for n bytes at at; fewer if there is no more. */
static size_t open_gap(uint8_t *data, size_t *size, size_t max, size_t at, size_t n) {
        n = MIN_OF(n, max - *size);
        memmove(data + at + n, data + at, *size - at);
        *size += n;
        return n;
}

static void mutate(uint8_t *data, size_t *size, size_t max) {
        static const uint8_t interesting[] = { 0, '\n', '\r', ' ', '\\', '"', '/', '*', '%', '=', '[', ']', '{', '}', ':', ',',
                                               '#', '-', '0', '9', 0x7f, 0x80, 0xc0, 0xff };
        const Seed *other = &seeds[random_below(n_seeds)];
        size_t at = random_below(*size + 1), n = 1 + random_below(32), from = random_below(other->size + 1);

        switch (random_next() % 8) {
        case 0: /* a bit */
                if (at < *size)
                        data[at] ^= (uint8_t)(1U << random_below(8));
                break;
        case 1: /* a byte */
                if (at < *size)
                        data[at] = interesting[random_below(sizeof interesting)];
                break;
        case 2: /* one more */
                if (open_gap(data, size, max, at, 1))
                        data[at] = interesting[random_below(sizeof interesting)];
                break;
        case 3: /* some fewer */
                n = MIN_OF(n, *size - at);
                memmove(data + at, data + at + n, *size - at - n);
                *size -= n;
                break;
        case 4: /* a piece of another seed */
                n = random_below(200);
                n = open_gap(data, size, max, at, MIN_OF(n, other->size - from));
                memcpy(data + at, other->data + from, n);
                break;
        case 5: /* a piece of itself, moved by copying */
                from = random_below(*size + 1);
                n = MIN_OF(n, *size - from);
                n = MIN_OF(n, *size - at);
                memmove(data + at, data + from, n);
                break;
        case 6: /* a run of one byte */
                n = open_gap(data, size, max, at, (size_t)1 << random_below(13));
                memset(data + at, interesting[random_below(sizeof interesting)], n);
                break;
        default: /* the end is missing */
                if (random_below(4) == 0)
                        *size = at;
        }
}

/* The target gets a block of exactly the input's size, so that the sanitizer sees a read past its end. */
static void run(const uint8_t *data, size_t size) {
        uint8_t *copy = malloc(size ? size : 1);

        CHECK(copy, "memory");
        memcpy(copy, data, size);
        input = copy;
        input_size = size;
        LLVMFuzzerTestOneInput(copy, size);
        input_size = 0;
        free(copy);
}

int main(int argc, char **argv) {
        unsigned long iterations = 0;
        size_t max = 16384;
        uint8_t *data;
        int option;

        while ((option = getopt(argc, argv, "n:m:")) != -1)
                if (option == 'n')
                        iterations = strtoul(optarg, NULL, 10);
                else if (option == 'm')
                        max = strtoul(optarg, NULL, 10);
                else
                        return 2;
        for (; optind < argc; optind++)
                seeds_add(argv[optind]);
        CHECK(n_seeds, "no seeds given");
        qsort(seeds, n_seeds, sizeof *seeds, compare_seeds);
        for (size_t i = 0; i < n_seeds; i++)
                max = MAX_OF(max, seeds[i].size);

        snprintf(crash_name, sizeof crash_name, "crash-%s", program_invocation_short_name);
        signal(SIGABRT, on_crash);
        signal(SIGSEGV, on_crash);
        signal(SIGBUS, on_crash);
        signal(SIGFPE, on_crash);
        signal(SIGILL, on_crash);
        data = malloc(max + 1);
        CHECK(data, "memory");
        for (size_t i = 0; i < n_seeds; i++)
                run(seeds[i].data, seeds[i].size);
        for (unsigned long i = 0; i < iterations; i++) {
                const Seed *seed;
                size_t size;

                random_state = i;
                seed = &seeds[random_below(n_seeds)];
                size = seed->size;
                memcpy(data, seed->data, size);
                for (size_t n = 1 + random_below(8); n; n--)
                        mutate(data, &size, max);
                run(data, size);
        }
        printf("%zu seeds, %lu mutations\n", n_seeds, iterations);
        free(data);
        for (size_t i = 0; i < n_seeds; i++) {
                free(seeds[i].name);
                free(seeds[i].data);
        }
        free(seeds);
        return 0;
}
