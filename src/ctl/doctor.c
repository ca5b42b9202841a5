/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What works here, what does not, and what follows: the kernel's features, the configuration against the cgroups that
 * exist, KSM as it is set, and who else shares its merge space. Needs no daemon and changes nothing. Collected as JSON
 * first, so that people and programs are told the same.
 */
#include "ctl/ctl.h"

#include "base/io.h"
#include "cgroup/policy.h"
#include "cgroup/tree.h"
#include "conf/conf.h"
#include "control/json-text.h"
#include "ctl/format.h"
#include "host/kernel.h"
#include "host/ksm.h"
#include "host/thp.h"
#include "keeper/keeper.h"
#include "merge/pool.h"
#include "probe/probe.h"
#include "target/vma-reader.h"

#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

typedef struct Section {
        size_t n_cgroups, n_processes;
        PolicyTrust trust;              /* of its domain, at the first section of it; paths are the tree's */
} Section;

typedef struct Doctor {
        Conf *conf;
        HostKernel kernel;
        json_t *warnings, *sections, *foreign;
        Section *of;                    /* each section of the configuration */
        CgroupTree *tree;
        const char *no_ksm;             /* why route advise is not possible; NULL: it is */
        char *no_remap;                 /* the same of route remap */
        bool shmem_denied;
} Doctor;

static const char *state_name(int state) {
        return state == 1 ? "works" : state == 0 ? "absent" : strerrordesc_np(-state);
}

static json_t *features_json(const HostKernel *kernel) {
        json_t *array = json_array();

        for (size_t i = 0; i < kernel->n_features; i++) {
                const HostFeature *feature = &kernel->features[i];
                json_array_append_new(array, json_pack("{s:s, s:s, s:b, s:b, s:s}", "name", feature->name, "state",
                                                       state_name(feature->state), "works", feature->state == 1,
                                                       "required", feature->required, "follows", feature->follows));
        }
        return array;
}

static void on_warning(void *userdata, const char *file, unsigned line, const char *message) {
        Doctor *doctor = userdata;
        _cleanup_free_ char *text = NULL;
        int n = line ? asprintf(&text, "%s:%u: %s", file, line, message) : asprintf(&text, "%s: %s", file, message);

        if (n < 0)
                text = NULL;
        else
                json_array_append_new(doctor->warnings, json_text(text));
}

/* Who shares a pool: the first section of the domain stands for all. */
static Section *pool_section(const Doctor *doctor, const ConfCgroup *section) {
        for (size_t i = 0; i < doctor->conf->n_cgroups; i++) {
                const ConfCgroup *other = &doctor->conf->cgroups[i];

                if (other->merge == CONF_MERGE_YES && other->route == CONF_ROUTE_REMAP &&
                    strcmp(other->domain, section->domain) == 0)
                        return &doctor->of[i];
        }
        return NULL;
}

static void on_cgroup(void *userdata, const char *path, bool appeared) {
        Doctor *doctor = userdata;
        const ConfCgroup *section = policy_find(doctor->conf, path);
        _cleanup_free_ pid_t *pids = NULL;
        Section *of, *pool;
        size_t n = 0;

        /* tree is not known yet while cgroup_tree_new() reports what exists. */
        if (!section || !doctor->tree)
                return;
        of = &doctor->of[section - doctor->conf->cgroups];
        of->n_cgroups++;
        if (cgroup_processes(doctor->tree, path, &pids, &n) < 0 || n == 0)
                return;
        of->n_processes += n;
        pool = section->merge == CONF_MERGE_YES && section->route == CONF_ROUTE_REMAP && !conf_domain_is_each(section)
                       ? pool_section(doctor, section) : NULL;
        if (pool)
                policy_trust_add(&pool->trust, section, path);
}

/* What becomes of its memory, and why no more: NULL where that is what it asks for. */
typedef struct Verdict {
        const char *what, *why;
} Verdict;

#define ZEROS_ONLY "only its zero pages are given back (route zero)"
#define NO_MOVE "this kernel cannot move pages out of a process (UFFDIO_MOVE, 6.8)"

/* As manager_open_pool() decides it, and pass_judge_trust() for each pass. */
static Verdict remap_verdict(const Doctor *doctor, const ConfCgroup *section) {
        const Section *pool = pool_section(doctor, section);
        const char *doubt = pool ? policy_trust_problem(&pool->trust, doctor->shmem_denied) : NULL;
        const char *no_remap = doctor->no_remap ?: policy_nodes_problem(doctor->conf, doctor->kernel.n_nodes);

        if (no_remap)
                return (Verdict){ "nothing is merged", no_remap };
        if (doubt)
                return (Verdict){ ZEROS_ONLY, doubt };
        return (Verdict){ "merged by route remap, into a pool of its domain", NULL };
}

/* As choose_route() of daemon/roster.c. */
static Verdict section_verdict(const Doctor *doctor, const ConfCgroup *section) {
        bool moves = doctor->kernel.uffd_move;

        if (section->malformed)
                return (Verdict){ "malformed: nothing in it is merged", NULL };
        if (section->merge == CONF_MERGE_NO)
                return (Verdict){ "Merge=no: left alone", NULL };
        if (doctor->of[section - doctor->conf->cgroups].n_cgroups == 0)
                return (Verdict){ "matches no cgroup that exists now", NULL };
        if (section->merge == CONF_MERGE_DRY_RUN)
                return (Verdict){ "read and matched, nothing is merged", NULL };
        if (section->route == CONF_ROUTE_REMAP)
                return remap_verdict(doctor, section);
        if (section->route == CONF_ROUTE_ZERO)
                return moves ? (Verdict){ "its zero pages are given back (route zero)", NULL }
                             : (Verdict){ "nothing is merged", NO_MOVE };
        if (doctor->no_ksm)
                return (Verdict){ section->route == CONF_ROUTE_AUTO && moves ? ZEROS_ONLY : "nothing is merged",
                                  doctor->no_ksm };
        if (section->route == CONF_ROUTE_ADVISE)
                return (Verdict){ "merged by route advise", NULL };
        return (Verdict){ moves ? "merged by route advise; if another domain has that, its zero pages are given back "
                                  "(route zero)"
                                : "merged by route advise; if another domain has that, nothing is merged", NULL };
}

static json_t *section_json(const Doctor *doctor, const ConfCgroup *section) {
        const Section *of = &doctor->of[section - doctor->conf->cgroups];
        Verdict verdict = section_verdict(doctor, section);

        return json_pack("{s:s, s:s, s:i, s:s, s:s, s:s, s:I, s:I, s:o}", "pattern", section->pattern, "file",
                         section->file, "line", (int)section->line, "merge", conf_merge_name(section->merge), "domain",
                         section->domain, "route", conf_route_name(section->route), "cgroups",
                         (json_int_t)of->n_cgroups, "processes", (json_int_t)of->n_processes, "verdict",
                         json_sprintf("%s%s%s", verdict.what, verdict.why ? ": " : "", verdict.why ?: ""));
}

static void check_sections(Doctor *doctor) {
        size_t n = doctor->conf->n_cgroups;

        doctor->of = calloc(n + 1, sizeof *doctor->of);
        if (!doctor->of)
                return;
        if (cgroup_tree_new(NULL, on_cgroup, doctor, &doctor->tree) == 0)
                cgroup_tree_foreach(doctor->tree, on_cgroup, doctor);
        for (size_t i = 0; i < n; i++)
                json_array_append_new(doctor->sections, section_json(doctor, &doctor->conf->cgroups[i]));
}

/* Whose domain KSM is for: as the daemon decides it (daemon/roster.c), who asks for it by name comes before the first that
 * leaves the route open. NULL: nobody's, as far as one section is one domain. */
static const ConfCgroup *ksm_section(const Doctor *doctor) {
        const ConfCgroup *open = NULL;

        for (size_t i = 0; i < doctor->conf->n_cgroups; i++) {
                const ConfCgroup *section = &doctor->conf->cgroups[i];

                if (section->malformed || section->merge != CONF_MERGE_YES)
                        continue;
                if (section->route == CONF_ROUTE_ADVISE)
                        return section;
                if (section->route == CONF_ROUTE_AUTO && !open && doctor->of && doctor->of[i].n_cgroups > 0)
                        open = section;
        }
        return open && !(conf_domain_is_each(open) && doctor->of[open - doctor->conf->cgroups].n_cgroups > 1) ? open : NULL;
}

/* Whether what such a process offers is merged by the domain that KSM is for in any case. */
static bool belongs(const Doctor *doctor, const char *cgroup) {
        const ConfCgroup *section = policy_find(doctor->conf, cgroup), *owner = ksm_section(doctor);

        return section && owner && !section->malformed && section->merge == CONF_MERGE_YES &&
               (section == owner || strcmp(section->domain, owner->domain) == 0);
}

/* A process that offers memory to KSM itself and is not of the domain that is merged there shares KSM's one merge space
 * with it. */
static int check_process(Doctor *doctor, int proc, const char *pid) {
        _cleanup_free_ char *comm = NULL, *cgroup = NULL;
        char path[300];
        KsmProcess ksm;
        int r = ksm_process(proc, pid, &ksm);

        if (r < 0 || !ksm.offers)
                return r;
        if (cgroup_of_process((pid_t)atoi(pid), &cgroup) == 0 && belongs(doctor, cgroup))
                return 0;
        snprintf(path, sizeof path, "%s/comm", pid);
        if (read_file(proc, path, &comm, NULL) == 0)
                comm[strcspn(comm, "\n")] = 0;
        json_array_append_new(doctor->foreign,
                              json_pack("{s:i, s:o, s:o, s:I}", "pid", atoi(pid), "name",
                                        json_text(comm ?: ""), "cgroup", json_text(cgroup ?: ""), "pages_merging",
                                        (json_int_t)ksm.merging_pages));
        return 0;
}

/* false: there may be others. */
static bool check_foreign(Doctor *doctor) {
        _cleanup_closedir_ DIR *proc = NULL;
        bool known;

        if (open_directory(AT_FDCWD, "/proc", &proc) < 0)
                return false;
        known = ksm_tells_offers(dirfd(proc));
        for (const struct dirent *entry; (entry = readdir(proc));)
                if (dirent_pid(entry) > 0)
                        known &= check_process(doctor, dirfd(proc), entry->d_name) == 0;
        return known;
}

/* An opening for writing changes nothing. That an ordinary user may not is no verdict on the daemon. */
static bool ksm_read_only(void) {
        _cleanup_close_ int fd = open("/sys/kernel/mm/ksm/run", O_WRONLY | O_CLOEXEC);

        return fd < 0 && errno == EROFS;
}

static json_t *ksm_json(Doctor *doctor) {
        _cleanup_(ksm_freep) Ksm *ksm = NULL;
        KsmKnobs knobs;
        KsmCounters counters;
        int r = ksm_new(NULL, NULL, &ksm);

        if (r < 0 || ksm_read_only() || ksm_knobs(ksm, &knobs) < 0 || ksm_counters(ksm, &counters) < 0)
                doctor->no_ksm = r == -ENOENT ? "this kernel has no KSM" : "KSM's settings cannot be changed";
        if (doctor->no_ksm)
                return json_pack("{s:b, s:o}", "usable", 0, "verdict",
                                 json_sprintf("%s: route advise is not possible%s", doctor->no_ksm,
                                              doctor->kernel.uffd_move ? "; routes zero and remap do without" : ""));
        return json_pack("{s:b, s:I, s:b, s:I, s:I, s:s}", "usable", 1, "run", (json_int_t)knobs.run, "advisor",
                         knobs.advisor, "pages_shared", (json_int_t)counters.pages_shared, "pages_sharing",
                         (json_int_t)counters.pages_sharing, "verdict",
                         knobs.run == 1
                                 ? "ksmd runs: either the daemon merges at this moment, or the administrator runs it, "
                                   "and then the daemon marks pages and leaves his settings alone"
                                 : "ksmd rests: the daemon runs it in bursts and puts its settings back");
}

/* Where the daemon looks for it: one that it cannot talk to keeps it from merging by route remap. */
static json_t *keeper_json(Doctor *doctor) {
        const char *given = getenv("RUNTIME_DIRECTORY");
        _cleanup_free_ char *verdict = NULL;
        KeeperSeen seen = {};
        int r = keeper_look(given && *given == '/' ? given : "/run/ksmd-user", &seen), n;

        if (r == -ENOENT)
                n = asprintf(&verdict,
                             "none runs, nothing needs one: the daemon starts it for the first section of route remap");
        else if (r == -EACCES || r == -EPERM)
                n = asprintf(&verdict, "only root may ask it");
        else if (r < 0)
                n = asprintf(&verdict, "cannot be reached: %s", strerror(-r));
        else if (seen.protocol != seen.our_protocol)
                n = asprintf(&verdict,
                             "speaks version %u of the protocol, and this ksmd-user version %u: nothing is remapped until "
                             "what it guards has ended", seen.protocol, seen.our_protocol);
        else
                n = asprintf(&verdict, "process %d answers; it holds %u guards and %u pools", seen.pid, seen.guards,
                             seen.pools);
        if (!doctor->no_remap && n >= 0 && r != -ENOENT && r != -EACCES && r != -EPERM &&
            (r < 0 || seen.protocol != seen.our_protocol) && asprintf(&doctor->no_remap, "the keeper %s", verdict) < 0)
                doctor->no_remap = NULL;
        return json_pack("{s:b, s:s}", "reachable", r == 0 && seen.protocol == seen.our_protocol, "verdict",
                         n < 0 ? "out of memory" : verdict);
}

/* A pool is made for a moment: mounted nowhere, seen by nobody. An ordinary user may not, which says nothing of the daemon. */
static json_t *remap_json(Doctor *doctor) {
        _cleanup_(pool_freep) Pool *pool = NULL;
        const char *reason = NULL;
        json_t *verdict, *keeper;
        int n = 0, r = doctor->kernel.uffd_move ? pool_new("doctor", 2, &pool, &reason) : -EOPNOTSUPP;

        doctor->shmem_denied = host_shmem_huge_denied(NULL);
        if (!doctor->kernel.uffd_move)
                n = asprintf(&doctor->no_remap, NO_MOVE);
        else if (r < 0 && r != -EPERM && r != -EACCES)
                n = asprintf(&doctor->no_remap, "no pool can be made: %s: %s", reason ?: "memory", strerror(-r));
        if (n < 0)
                doctor->no_remap = NULL;
        if (doctor->no_remap)
                verdict = json_sprintf("not possible: %s", doctor->no_remap);
        else if (r < 0)
                verdict = json_string("only root can tell whether it is possible");
        else
                verdict = json_sprintf("possible; cgroups of one domain share a pool %s",
                                       doctor->shmem_denied
                                               ? "(shmem_enabled is deny)"
                                               : "only if each says TrustedTogether=yes (shmem_enabled is not deny)");
        keeper = keeper_json(doctor);
        return json_pack("{s:b, s:b, s:o, s:o}", "usable", pool != NULL, "shmem_denied", doctor->shmem_denied, "verdict",
                         verdict, "keeper", keeper);
}

/* Attaches each for a moment, whether a daemon has them attached or not. */
static json_t *probes_json(const HostKernel *kernel, const Conf *conf) {
        const ProbeOptions options = { .off = conf->daemon.probes == CONF_NO, .memory_bytes = kernel->memory_bytes };
        _cleanup_(probes_freep) Probes *probes = NULL;
        VmaReader reader;
        json_t *array = json_array();

        if (probes_new(&options, &probes) < 0)
                return array;
        vma_reader_open(&reader, probes, kernel->pagemap_scan);
        for (unsigned i = 0; i < _PROBE_MAX; i++) {
                ProbeState state = probes_state(probes, (ProbeId)i);
                bool works = state.way != PROBE_WAY_NONE;

                json_array_append_new(array, json_pack("{s:s, s:b, s:s, s:s?, s:s}", "name", probe_name((ProbeId)i),
                                                       "works", works, "way", probe_way_name(state.way), "reason",
                                                       works ? NULL : probe_error_name(state.error), "follows",
                                                       probe_follows((ProbeId)i, works)));
        }
        vma_reader_close(&reader);
        return array;
}

static void print_probes(const json_t *probes) {
        const json_t *one;
        size_t i;

        printf("\nProbes\n");
        json_array_foreach(probes, i, one) {
                bool works = json_is_true(json_object_get(one, "works"));

                printf("  %-8s %s%s%s\n           %s\n", works ? "ok" : "no",
                       json_string_value(json_object_get(one, "name")), works ? " by " : ": ",
                       json_string_value(json_object_get(one, works ? "way" : "reason")),
                       json_string_value(json_object_get(one, "follows")));
        }
}

static void print_text(const json_t *report) {
        const json_t *one;
        size_t i;
        const char *head = "\nConfiguration\n";

        printf("Kernel %s, CPUs: %lld, NUMA nodes: %lld, %lld MiB; a write to a merged page takes %.1f us, "
               "the first to a tracked one %.1f us\n",
               json_string_value(json_object_get(report, "kernel")),
               (long long)json_integer_value(json_object_get(report, "cpus")),
               (long long)json_integer_value(json_object_get(report, "numa_nodes")),
               (long long)json_integer_value(json_object_get(report, "memory_bytes")) >> 20,
               (double)json_integer_value(json_object_get(report, "break_nsec")) / NSEC_PER_USEC,
               (double)json_integer_value(json_object_get(report, "tracked_write_nsec")) / NSEC_PER_USEC);
        json_array_foreach(json_object_get(report, "features"), i, one) {
                bool works = json_is_true(json_object_get(one, "works"));

                printf("  %-8s %s%s%s\n",
                       works ? "ok" : json_is_true(json_object_get(one, "required")) ? "MISSING" : "no",
                       json_string_value(json_object_get(one, "name")), works ? "" : ": ",
                       works ? "" : json_string_value(json_object_get(one, "state")));
                printf("           %s\n", json_string_value(json_object_get(one, "follows")));
        }
        print_probes(json_object_get(report, "probes"));
        printf("\nKSM\n  %s\n", json_string_value(json_object_get(json_object_get(report, "ksm"), "verdict")));
        json_array_foreach(json_object_get(report, "foreign"), i, one)
                format_line(stdout, 1, "", "process %lld (%s, cgroup %s) offers its memory to KSM itself: it shares the merge space",
                            (long long)json_integer_value(json_object_get(one, "pid")),
                            json_string_value(json_object_get(one, "name")),
                            json_string_value(json_object_get(one, "cgroup")));
        if (!json_is_true(json_object_get(report, "foreign_known")))
                printf("  who has offered memory to KSM that ksmd has not come to yet cannot be told (Linux 6.17)\n");
        one = json_object_get(report, "remap");
        printf("\nRoute remap\n  %s\n  keeper: %s\n", json_string_value(json_object_get(one, "verdict")),
               json_string_value(json_object_get(json_object_get(one, "keeper"), "verdict")));
        json_array_foreach(json_object_get(report, "warnings"), i, one) {
                printf("%s  %s\n", head, json_string_value(one));
                head = "";
        }
        json_array_foreach(json_object_get(report, "sections"), i, one) {
                printf("%s  [Cgroup %s] %s (%lld cgroups, %lld processes, domain %s)\n", head,
                       json_string_value(json_object_get(one, "pattern")),
                       json_string_value(json_object_get(one, "verdict")),
                       (long long)json_integer_value(json_object_get(one, "cgroups")),
                       (long long)json_integer_value(json_object_get(one, "processes")),
                       json_string_value(json_object_get(one, "domain")));
                head = "";
        }
        if (*head)
                printf("%s  no cgroup is opted in: nothing is merged\n", head);
}

static json_t *report_json(Doctor *doctor) {
        const HostKernel *kernel = &doctor->kernel;
        json_t *ksm, *remap;
        bool foreign_known;

        host_kernel_probe(&doctor->kernel);
        ksm = ksm_json(doctor);
        remap = remap_json(doctor);
        check_sections(doctor);
        foreign_known = check_foreign(doctor);
        return json_pack("{s:s, s:i, s:i, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:b, s:o, s:o}", "kernel",
                         kernel->release, "cpus", (int)kernel->n_cpus, "numa_nodes", (int)kernel->n_nodes,
                         "memory_bytes", (json_int_t)kernel->memory_bytes, "break_nsec",
                         (json_int_t)kernel->fault_cost.break_nsec, "tracked_write_nsec",
                         (json_int_t)kernel->fault_cost.write_nsec, "features", features_json(kernel), "probes",
                         probes_json(kernel, doctor->conf), "ksm", ksm, "remap", remap, "foreign", doctor->foreign,
                         "foreign_known", foreign_known, "warnings", doctor->warnings, "sections", doctor->sections);
}

int command_doctor(const Ctl *ctl, int argc, char **argv) {
        Doctor doctor = { .warnings = json_array(), .sections = json_array(), .foreign = json_array() };
        bool missing = false;
        json_t *report;
        int r;

        r = conf_load("", ctl->config, on_warning, &doctor, &doctor.conf);
        if (r < 0) {
                const json_t *warning;
                size_t i;

                json_array_foreach(doctor.warnings, i, warning)
                        ctl_fail("%s", json_string_value(warning));
                r = ctl_fail("the configuration cannot be read: %s: %s", ctl->config ?: KSMD_USER_SYSCONFDIR "/ksmd-user.conf",
                             strerror(-r));
                json_decref(doctor.warnings);
                json_decref(doctor.sections);
                json_decref(doctor.foreign);
                return r;
        }
        report = report_json(&doctor);
        r = CTL_DONE;
        if (ctl->json)
                r = ctl_print_json(report);
        else
                print_text(report);
        for (size_t i = 0; i < doctor.kernel.n_features; i++)
                missing |= doctor.kernel.features[i].required && doctor.kernel.features[i].state != 1;
        json_decref(report);
        cgroup_tree_free(doctor.tree);
        free(doctor.of);
        free(doctor.no_remap);
        conf_free(doctor.conf);
        return missing ? CTL_FAILED : r;
}
