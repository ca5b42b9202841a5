/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Loading the probes: one object each, so that what one kernel refuses costs no more than that one; typed first, then
 * raw. A map that several objects name is made by the first that loads, and used by the others.
 *
 * Nothing survives us: maps, programs and links are descriptors, and the kernel detaches what nobody holds.
 */
#include "config.h"

#include "probe/probe.h"

#if HAVE_PROBES
#include "probe/probe-objects.h"

#include "base/log.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define PROGRAMS_MAX 8
#define INIT_PID_NAMESPACE 0xEFFFFFFCU  /* PROC_PID_INIT_INO of include/linux/proc_ns.h */
/* Blocks that hold merged pages: four times what would be all the memory if nothing were saved. */
#define BLOCKS_PER_MEMORY 4U
#define BLOCKS_MIN 4096U
#define BLOCKS_MAX ((uint64_t)1 << 24)
/* What the kernel takes for an element of a hash of such blocks (6.18: 48 of its own, rounded to a slab). */
#define BLOCK_ELEMENT_BYTES 192U
#define BUCKET_BYTES 16U
/* libbpf reads the types of the kernel (5 MB) anew for each object and copies them. malloc() keeps that memory from one
 * object to the next; to get it from the kernel each time is half of what loading the probes costs. Afterwards it works
 * as it does by default once it was given a few megabytes back. */
#define LOADING_KEEP_BYTES (64 << 20)
#define LOADING_HEAP_BYTES (32 << 20)   /* the most that it takes */
#define KEEP_BYTES (8 << 20)
#define HEAP_BYTES (4 << 20)
#define REST_SOON_NSEC (10 * NSEC_PER_SEC) /* a storm that comes so soon after a rest is the same one */

enum { SHARED_CGROUPS, SHARED_TARGETS, SHARED_BLOCKS, SHARED_EVENTS, SHARED_COSTS, N_SHARED };

static const char *const shared_names[N_SHARED] = {
        [SHARED_CGROUPS] = "cgroups",
        [SHARED_TARGETS] = "targets",
        [SHARED_BLOCKS] = "blocks",
        [SHARED_EVENTS] = "events",
        [SHARED_COSTS] = "costs",
};

/* Those that come in storms. */
static const ProbeId stormy[] = { PROBE_FAULTS, PROBE_FLUSHES };

typedef struct Probe {
        struct bpf_object *object;
        struct bpf_link *links[PROGRAMS_MAX];
        size_t n_links;
        int iterator;                   /* of PROBE_VMAS: what each reading is a link of; the object's */
        ProbeState state;
} Probe;

typedef struct Watched {
        pid_t pid;
        size_t n_blocks;                /* that are set */
} Watched;

struct Probes {
        Probe probes[_PROBE_MAX];
        int shared[N_SHARED];           /* of maps that are loaded; -EBADF */
        struct ring_buffer *ring;
        ProbeHandler handler;           /* while events are read */
        void *userdata;
        bool dear;                      /* as the events say that were read */
        uint64_t rest_begun_nsec, rest_ends_nsec; /* UINT64_MAX: nothing rests, since rest_begun_nsec */
        uint64_t rest_nsec;             /* how long the last one was */
        uint64_t rested_nsec;           /* all that have ended */
        int n_cpus;
        uint64_t blocks_max, n_blocks;
        uint64_t *cgroups;              /* told, ascending */
        size_t n_cgroups;
        Watched *targets;
        size_t n_targets;
};

static __attribute__((format(printf, 2, 0))) int print(enum libbpf_print_level level, const char *format, va_list ap) {
        _cleanup_free_ char *text = NULL;

        if (level == LIBBPF_DEBUG || log_level() < LOG_LEVEL_DEBUG)
                return 0;
        if (vasprintf(&text, format, ap) < 0)
                text = NULL;
        if (text)
                log_debug("%.*s", (int)strcspn(text, "\n"), text);
        return 0;
}

static int probe_attach(Probe *probe) {
        struct bpf_program *program;

        bpf_object__for_each_program(program, probe->object) {
                struct bpf_link *link = probe->n_links < PROGRAMS_MAX ? bpf_program__attach(program) : NULL;

                if (!link)
                        return errno ? -errno : -EINVAL;
                probe->links[probe->n_links++] = link;
                probe->iterator = bpf_program__fd(program);
        }
        return 0;
}

static void probe_detach(Probe *probe) {
        while (probe->n_links > 0)
                bpf_link__destroy(probe->links[--probe->n_links]);
}

static void probe_close(Probe *probe) {
        probe_detach(probe);
        bpf_object__close(probe->object);
        probe->object = NULL;
}

/* The section of the object's variables: its name is cut off and has the object's before it. */
static struct bpf_map *section(const struct bpf_object *object, const char *name) {
        struct bpf_map *map;

        bpf_object__for_each_map(map, object)
                if (strstr(bpf_map__name(map), name))
                        return map;
        return NULL;
}

static int use_shared(const Probes *probes, const struct bpf_object *object) {
        for (size_t i = 0; i < N_SHARED; i++) {
                struct bpf_map *map = bpf_object__find_map_by_name(object, shared_names[i]);
                int r = 0;

                if (!map)
                        continue;
                if (probes->shared[i] >= 0)
                        r = bpf_map__reuse_fd(map, probes->shared[i]);
                else if (i == SHARED_BLOCKS)
                        r = bpf_map__set_max_entries(map, (uint32_t)probes->blocks_max);
                if (r < 0)
                        return r;
        }
        return 0;
}

static void keep_shared(Probes *probes, const struct bpf_object *object) {
        for (size_t i = 0; i < N_SHARED; i++)
                if (probes->shared[i] < 0) {
                        int fd = bpf_object__find_map_fd_by_name(object, shared_names[i]);

                        if (fd >= 0)
                                probes->shared[i] = fcntl(fd, F_DUPFD_CLOEXEC, 0);
                }
}

static int probe_open(Probes *probes, const ProbeOptions *options, Probe *probe, const ProbeObject *from,
                      const char *name) {
        LIBBPF_OPTS(bpf_object_open_opts, opts, .object_name = name);
        struct probe_settings settings = { .daemon_tgid = (uint32_t)getpid(), .ksmd_tgid = (uint32_t)options->ksmd };
        struct bpf_map *rodata;
        size_t size = 0;
        int r;

        const void *bytes = from->bytes(&size);
        probe->object = bpf_object__open_mem(bytes, size, &opts);
        if (!probe->object)
                return -errno;
        rodata = section(probe->object, ".rodata");
        if (rodata)
                (void)bpf_map__set_initial_value(rodata, &settings, sizeof settings);
        r = use_shared(probes, probe->object);
        if (r == 0)
                r = bpf_object__load(probe->object);
        if (r == 0)
                r = probe_attach(probe);
        if (r < 0)
                return r;
        keep_shared(probes, probe->object);
        return 0;
}

/* Why the typed way failed is what is told, unless there is a raw one. */
static void probe_try(Probes *probes, const ProbeOptions *options, ProbeId id) {
        Probe *probe = &probes->probes[id];

        for (unsigned way = 0; way < 2; way++) {
                const ProbeObject *object = &probe_objects[id][way];
                int r;

                if (!object->bytes || (way == 0 ? options->raw_only : options->typed_only))
                        continue;
                r = probe_open(probes, options, probe, object, probe_name(id));
                if (r == 0) {
                        probe->state = (ProbeState){ .way = way == 0 ? PROBE_WAY_TYPED : PROBE_WAY_RAW };
                        return;
                }
                log_debug("probe %s, %s: %s", probe_name(id), probe_way_name(way == 0 ? PROBE_WAY_TYPED : PROBE_WAY_RAW),
                          strerror(-r));
                probe_close(probe);
                probe->state.error = r;
        }
}

/* Processes and ksmd are told apart by their number in the first pid namespace. */
static bool in_first_namespace(void) {
        struct stat st;

        return stat("/proc/self/ns/pid", &st) < 0 || st.st_ino == INIT_PID_NAMESPACE;
}

static void probes_load(Probes *probes, const ProbeOptions *options) {
        libbpf_print_fn_t before = libbpf_set_print(print);

        (void)mallopt(M_MMAP_THRESHOLD, LOADING_HEAP_BYTES);
        (void)mallopt(M_TRIM_THRESHOLD, LOADING_KEEP_BYTES);
        for (size_t i = 0; i < _PROBE_MAX; i++)
                probe_try(probes, options, (ProbeId)i);
        (void)mallopt(M_MMAP_THRESHOLD, HEAP_BYTES);
        (void)mallopt(M_TRIM_THRESHOLD, KEEP_BYTES);
        (void)malloc_trim(0);
        libbpf_set_print(before);
}

static int on_event(void *userdata, void *data, size_t size) {
        Probes *probes = userdata;

        const struct probe_event *event = data;

        if (size < sizeof *event)
                return 0;
        if (event->kind == PROBE_EVENT_DEAR)
                probes->dear = true;
        else if (probes->handler)
                probes->handler(probes->userdata, event);
        return 0;
}

/* Those that say what must be heard. */
static const ProbeId tellers[] = { PROBE_ROSTER, PROBE_FAULTS, PROBE_FLUSHES };

int probes_new(const ProbeOptions *options, Probes **ret) {
        _cleanup_(probes_freep) Probes *probes = calloc(1, sizeof *probes);
        int error = options->off ? -ECANCELED : !in_first_namespace() ? -EXDEV : -ENOSYS;

        if (!probes)
                return -ENOMEM;
        for (size_t i = 0; i < N_SHARED; i++)
                probes->shared[i] = -EBADF;
        for (size_t i = 0; i < _PROBE_MAX; i++)
                probes->probes[i].state.error = error;
        probes->blocks_max = MAX_OF(options->memory_bytes / BLOCK_BYTES * BLOCKS_PER_MEMORY, (uint64_t)BLOCKS_MIN);
        probes->blocks_max = MIN_OF(probes->blocks_max, BLOCKS_MAX);
        probes->n_cpus = libbpf_num_possible_cpus();
        if (error == -ENOSYS && probes->n_cpus > 0)
                probes_load(probes, options);
        probes->rest_ends_nsec = UINT64_MAX;
        if (probes->shared[SHARED_EVENTS] >= 0) {
                probes->ring = ring_buffer__new(probes->shared[SHARED_EVENTS], on_event, probes, NULL);
                error = -errno;
                for (size_t i = 0; i < ELEMENTSOF(tellers) && !probes->ring; i++)
                        if (probes_have(probes, tellers[i]))
                                probes_refuse(probes, tellers[i], error);
        }
        *ret = TAKE_PTR(probes);
        return 0;
}

Probes *probes_free(Probes *probes) {
        if (!probes)
                return NULL;
        ring_buffer__free(probes->ring);
        for (size_t i = 0; i < _PROBE_MAX; i++)
                probe_close(&probes->probes[i]);
        for (size_t i = 0; i < N_SHARED; i++)
                safe_close(probes->shared[i]);
        free(probes->cgroups);
        free(probes->targets);
        free(probes);
        return NULL;
}

ProbeState probes_state(const Probes *probes, ProbeId id) { return probes->probes[id].state; }

int probes_event_fd(const Probes *probes) { return probes && probes->ring ? ring_buffer__epoll_fd(probes->ring) : -EBADF; }

void probes_read_events(Probes *probes, ProbeHandler handler, void *userdata) {
        if (!probes->ring)
                return;
        probes->handler = handler;
        probes->userdata = userdata;
        (void)ring_buffer__consume(probes->ring);
        probes->handler = NULL;
}

static void rest_begin(Probes *probes, uint64_t now_nsec) {
        bool again = probes->rest_nsec > 0 && now_nsec - probes->rest_begun_nsec < probes->rest_nsec + REST_SOON_NSEC;

        probes->rest_nsec = again ? MIN_OF(2 * probes->rest_nsec, PROBES_REST_MAX_NSEC) : PROBES_REST_MIN_NSEC;
        probes->rest_begun_nsec = now_nsec;
        probes->rest_ends_nsec = now_nsec + probes->rest_nsec;
        for (size_t i = 0; i < ELEMENTSOF(stormy); i++) {
                probe_detach(&probes->probes[stormy[i]]);
                probes->probes[stormy[i]].state.resting = probes_have(probes, stormy[i]);
        }
}

/* What cannot be attached again now rests on: what it counted so far is not lost. */
static void rest_end(Probes *probes, uint64_t now_nsec) {
        probes->rested_nsec += now_nsec - probes->rest_begun_nsec;
        probes->rest_begun_nsec = now_nsec;
        probes->rest_ends_nsec = UINT64_MAX;
        for (size_t i = 0; i < ELEMENTSOF(stormy); i++) {
                Probe *probe = &probes->probes[stormy[i]];

                if (!probe->state.resting)
                        continue;
                probe->state.resting = probe_attach(probe) < 0;
                if (probe->state.resting) {
                        probe_detach(probe);
                        probes->rest_ends_nsec = now_nsec + probes->rest_nsec;
                }
        }
}

uint64_t probes_rest(Probes *probes, uint64_t now_nsec) {
        if (now_nsec >= probes->rest_ends_nsec)
                rest_end(probes, now_nsec);
        else if (probes->dear && probes->rest_ends_nsec == UINT64_MAX)
                rest_begin(probes, now_nsec);
        probes->dear = false;
        return probes->rest_ends_nsec;
}

uint64_t probes_rested(const Probes *probes, uint64_t now_nsec) {
        return probes->rested_nsec + (probes->rest_ends_nsec != UINT64_MAX ? now_nsec - probes->rest_begun_nsec : 0);
}

static int note(int *result, int r) {
        if (r < 0 && r != -ENOENT)
                *result = r;
        return r;
}

int probes_watch_cgroups(Probes *probes, const uint64_t *ids, size_t n) {
        int fd = probes->shared[SHARED_CGROUPS], r = 0;
        const uint32_t watched = PROBE_WATCHED;
        size_t i = 0, k = 0;
        uint64_t *copy;

        if (fd < 0)
                return 0;
        copy = malloc((n + 1) * sizeof *copy);
        if (!copy)
                return -ENOMEM;
        memcpy(copy, ids, n * sizeof *copy);
        while (i < n || k < probes->n_cgroups)
                if (i < n && (k >= probes->n_cgroups || ids[i] < probes->cgroups[k]))
                        note(&r, bpf_map_update_elem(fd, &ids[i++], &watched, BPF_ANY));
                else if (i >= n || probes->cgroups[k] < ids[i])
                        note(&r, bpf_map_delete_elem(fd, &probes->cgroups[k++]));
                else {
                        i++;
                        k++;
                }
        free(probes->cgroups);
        probes->cgroups = copy;
        probes->n_cgroups = n;
        return r;
}

static Watched *find_watched(const Probes *probes, uint32_t tgid) {
        size_t low = 0, high = probes->n_targets;

        while (low < high) {
                size_t middle = low + (high - low) / 2;

                if ((uint32_t)probes->targets[middle].pid < tgid)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low < probes->n_targets && (uint32_t)probes->targets[low].pid == tgid ? &probes->targets[low] : NULL;
}

size_t probes_blocks(const Probes *probes, pid_t pid) {
        const Watched *watched = probes ? find_watched(probes, (uint32_t)pid) : NULL;

        return watched ? watched->n_blocks : 0;
}

static void count_block(Probes *probes, uint32_t tgid, bool set) {
        Watched *watched = find_watched(probes, tgid);
        int change = set ? 1 : -1;

        probes->n_blocks += (uint64_t)change;
        if (watched)
                watched->n_blocks += (size_t)change;
}

static void delete_block(Probes *probes, const struct probe_block_key *key) {
        if (bpf_map_delete_elem(probes->shared[SHARED_BLOCKS], key) == 0)
                count_block(probes, key->tgid, false);
}

/* Deletes the blocks of one process, or (0) those of all that are not watched. Deleting the element before the next is
 * asked for would begin the walk anew. */
static void forget_blocks(Probes *probes, uint32_t tgid) {
        int fd = probes->shared[SHARED_BLOCKS];
        struct probe_block_key key, next;
        bool more;

        if (fd < 0 || probes->n_blocks == 0)
                return;
        more = bpf_map_get_next_key(fd, NULL, &next) == 0;
        while (more) {
                key = next;
                more = bpf_map_get_next_key(fd, &key, &next) == 0;
                if (tgid ? key.tgid == tgid : !find_watched(probes, key.tgid))
                        delete_block(probes, &key);
        }
}

void probes_forget_blocks(Probes *probes, pid_t pid) {
        if (probes_blocks(probes, pid) > 0)
                forget_blocks(probes, (uint32_t)pid);
}

int probes_watch_targets(Probes *probes, const pid_t *pids, size_t n) {
        const struct probe_target nothing = { 0 };
        int fd = probes->shared[SHARED_TARGETS], r = 0;
        size_t i = 0, k = 0, left = 0;
        Watched *watched;

        if (fd < 0)
                return 0;
        watched = calloc(n + 1, sizeof *watched);
        if (!watched)
                return -ENOMEM;
        while (i < n || k < probes->n_targets)
                if (i < n && (k >= probes->n_targets || pids[i] < probes->targets[k].pid)) {
                        note(&r, bpf_map_update_elem(fd, &pids[i], &nothing, BPF_ANY));
                        watched[i].pid = pids[i];
                        i++;
                } else if (i >= n || probes->targets[k].pid < pids[i]) {
                        note(&r, bpf_map_delete_elem(fd, &probes->targets[k].pid));
                        left += probes->targets[k++].n_blocks;
                } else
                        watched[i++] = probes->targets[k++];
        free(probes->targets);
        probes->targets = watched;
        probes->n_targets = n;
        if (left > 0)
                forget_blocks(probes, 0);
        return r;
}

static struct probe_block_key key_of(pid_t pid, uint64_t addr) {
        return (struct probe_block_key){ .block = addr >> PROBE_BLOCK_SHIFT, .tgid = (uint32_t)pid };
}

bool probes_block_get(const Probes *probes, pid_t pid, uint64_t addr, struct probe_block *ret) {
        struct probe_block_key key = key_of(pid, addr);

        return probes_have(probes, PROBE_FAULTS) &&
               bpf_map_lookup_elem(probes->shared[SHARED_BLOCKS], &key, ret) == 0;
}

int probes_block_set(Probes *probes, pid_t pid, uint64_t addr, const struct probe_block *block) {
        struct probe_block_key key = key_of(pid, addr);
        int fd = probes->shared[SHARED_BLOCKS], r;
        uint64_t any = 0;

        if (!probes_have(probes, PROBE_FAULTS))
                return 0;
        for (size_t i = 0; i < PROBE_BLOCK_WORDS; i++)
                any |= block->merged[i];
        if (any == 0) {
                delete_block(probes, &key);
                return 0;
        }
        if (!find_watched(probes, key.tgid))
                return -ESRCH; /* nobody would forget it */
        r = bpf_map_update_elem(fd, &key, block, BPF_NOEXIST);
        if (r == 0)
                count_block(probes, key.tgid, true);
        if (r == -EEXIST)
                r = bpf_map_update_elem(fd, &key, block, BPF_EXIST);
        return r == -E2BIG ? -ENOSPC : r;
}

uint64_t probes_cow_breaks(const Probes *probes) {
        const uint32_t zero = 0;
        const struct bpf_map *bss;
        uint64_t value = 0;

        if (!probes_have(probes, PROBE_FAULTS))
                return 0;
        bss = section(probes->probes[PROBE_FAULTS].object, ".bss"); /* it holds this one variable */
        if (!bss || bpf_map__value_size(bss) != sizeof value || bpf_map_lookup_elem(bpf_map__fd(bss), &zero, &value) < 0)
                return 0;
        return value;
}

/* Adds up an array's only element over the CPUs, word by word; returns the words of all of them, the caller frees it. */
static uint64_t *sum_cpus(const Probes *probes, ProbeId id, const char *map, void *ret, size_t size) {
        uint64_t *words, *sum = ret;
        const uint32_t zero = 0;
        size_t n = size / sizeof *words;
        int fd;

        memset(ret, 0, size);
        if (!probes_have(probes, id))
                return NULL;
        fd = bpf_object__find_map_fd_by_name(probes->probes[id].object, map);
        words = calloc((size_t)probes->n_cpus, size);
        if (!words || bpf_map_lookup_elem(fd, &zero, words) < 0) {
                free(words);
                return NULL;
        }
        for (size_t i = 0; i < (size_t)probes->n_cpus * n; i++)
                sum[i % n] += words[i];
        return words;
}

void probes_flushes(const Probes *probes, struct probe_flushes *ret) {
        free(sum_cpus(probes, PROBE_FLUSHES, "flushes", ret, sizeof *ret));
}

void probes_ksm(const Probes *probes, struct probe_ksm *ret) {
        free(sum_cpus(probes, PROBE_KSM, "ksm", ret, sizeof *ret));
}

void probes_walks(const Probes *probes, struct probe_walks *ret) {
        uint64_t *words = sum_cpus(probes, PROBE_WALKS, "walks", ret, sizeof *ret);

        ret->nsec_max = 0;
        for (int i = 0; words && i < probes->n_cpus; i++)
                ret->nsec_max = MAX_OF(ret->nsec_max, ((const struct probe_walks *)words)[i].nsec_max);
        free(words);
}

void probes_target(const Probes *probes, pid_t pid, struct probe_target *ret) {
        const uint32_t tgid = (uint32_t)pid;

        if (!probes || probes->shared[SHARED_TARGETS] < 0 ||
            bpf_map_lookup_elem(probes->shared[SHARED_TARGETS], &tgid, ret) < 0)
                *ret = (struct probe_target){ 0 };
}

int probes_open_vmas(const Probes *probes, pid_t pid) {
        union bpf_iter_link_info which = { .task = { .tid = (uint32_t)pid } };
        LIBBPF_OPTS(bpf_link_create_opts, options, .iter_info = &which, .iter_info_len = sizeof which);
        _cleanup_close_ int link = -EBADF;

        if (!probes_have(probes, PROBE_VMAS))
                return -ENOSYS;
        link = bpf_link_create(probes->probes[PROBE_VMAS].iterator, 0, BPF_TRACE_ITER, &options);
        if (link < 0)
                return link;
        return bpf_iter_create(link); /* it needs the link no longer */
}

void probes_refuse(Probes *probes, ProbeId id, int error) {
        probe_close(&probes->probes[id]);
        probes->probes[id].state = (ProbeState){ .error = error };
}

uint64_t probes_bytes(const Probes *probes) {
        if (!probes_have(probes, PROBE_FAULTS))
                return 0;
        return probes->n_blocks * BLOCK_ELEMENT_BYTES + probes->blocks_max * BUCKET_BYTES;
}
#endif
