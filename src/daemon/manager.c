/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/manager.h"

#include "base/clock.h"
#include "base/log.h"
#include "daemon/notify.h"
#include "daemon/remapping.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#define STATE_DIR "/run/ksmd-user"
#define REFRESH_NSEC NSEC_PER_SEC
#define BUSY_RETRY_NSEC NSEC_PER_SEC
/* What comes and goes in the cgroup tree is followed at once, unless that takes longer than this: then it rests so many
 * times as long. */
#define TREE_NSEC NSEC_PER_MSEC
#define TREE_REST_SHARE 20U
#define TREE_REST_MAX_NSEC NSEC_PER_SEC
/* For the last answers to be sent. */
#define ANSWER_NSEC (10 * NSEC_PER_MSEC)
/* A convergence (--once) ends after so many passes, however much still changes. */
#define ONCE_PASSES 5
#define ONCE_IDLE_PASSES 3U
/* Batches that each thread of the crew has in one round: some milliseconds of work. */
#define ROUND_BATCHES 4U

static void add_warning(void *userdata, const char *file, unsigned line, const char *message) {
        Warnings *warnings = userdata;
        char *text = NULL;

        if ((line ? asprintf(&text, "%s:%u: %s", file, line, message) : asprintf(&text, "%s: %s", file, message)) < 0)
                return;
        log_warning("%s", text);
        if (GROW(warnings->texts, warnings->n, warnings->allocated) < 0)
                free(text);
        else
                warnings->texts[warnings->n++] = text;
}

static void warnings_done(Warnings *warnings) {
        for (size_t i = 0; i < warnings->n; i++)
                free(warnings->texts[i]);
        free(warnings->texts);
        *warnings = (Warnings){};
}

static int open_state_dir(Manager *m) {
        const char *given = getenv("RUNTIME_DIRECTORY");
        char path[256];

        m->state_dir = strdup(given && *given == '/' ? given : STATE_DIR);
        if (!m->state_dir)
                return -ENOMEM;
        if (mkdir(m->state_dir, 0700) < 0 && errno != EEXIST)
                return -errno;
        snprintf(path, sizeof path, "%s/lock", m->state_dir);
        m->lock_fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (m->lock_fd < 0)
                return -errno;
        if (flock(m->lock_fd, LOCK_EX | LOCK_NB) < 0)
                return errno == EWOULDBLOCK ? -EALREADY : -errno;
        return 0;
}

static int open_ksm(Manager *m) {
        _cleanup_free_ char *path = NULL;
        bool left_changed;
        int r;

        if (asprintf(&path, "%s/ksm.found", m->state_dir) < 0)
                return -ENOMEM;
        r = ksm_new(NULL, path, &m->ksm);
        m->ksm_error = r;
        if (r < 0) {
                log_warning("KSM cannot be used: %s", strerror(-r));
                return 0;
        }
        left_changed = ksm_was_left_changed(m->ksm);
        r = ksm_restore(m->ksm);
        if (r == -EBADMSG)
                log_warning("%s is not a file of ours: what it says of KSM's settings is ignored", path);
        else if (r < 0)
                log_warning("KSM's settings of before a crash cannot be put back: %s", strerror(-r));
        else if (left_changed)
                log_info("put KSM's settings back to what they were before a crash");
        return burst_new(m->ksm, &m->burst);
}

static int on_signal(void *userdata, LoopSource *source, int signo, int pid) {
        Manager *m = userdata;

        switch (signo) {
        case SIGCHLD:
                remote_reap(m->remote);
                break;
        case SIGHUP:
                m->reload_wanted = !m->once; /* once: there is nothing to go on with */
                break;
        default:
                m->stopping = true;
        }
        return 0;
}

static void look_at_tree(Manager *m) {
        int r = cgroup_tree_dispatch(m->roster.tree);

        if (r < 0 && r != m->tree_error)
                log_warning("the cgroup tree cannot be read: %s", strerror(-r));
        m->tree_error = r;
}

/* Whoever may make cgroups, anywhere on the host, must not keep us busy. */
static int on_tree(void *userdata, LoopSource *source, int fd, uint32_t revents) {
        Manager *m = userdata;
        uint64_t begun = now_nsec(), took;

        look_at_tree(m);
        took = now_nsec() - begun;
        if (took > TREE_NSEC) {
                int r;

                loop_source_set_events(m->tree_source, 0);
                r = loop_source_set_timer(m->tree_timer, MIN_OF(took * TREE_REST_SHARE, TREE_REST_MAX_NSEC), 0);
                if (r < 0)
                        return r;
        }
        return manager_refresh_soon(m);
}

static int on_tree_rested(void *userdata, LoopSource *source) {
        Manager *m = userdata;

        return loop_source_set_events(m->tree_source, POLLIN);
}

static int on_refresh(void *userdata, LoopSource *source) {
        Manager *m = userdata;

        roster_refresh(&m->roster);
        manager_tend_keeper(m);
        manager_watch(m);
        manager_judge(m);
        if (m->burst)
                burst_restore(m->burst); /* while no pass comes, too */
        return 0;
}

static int on_watchdog(void *userdata, LoopSource *source) {
        notify_watchdog();
        return 0;
}

static void on_recorded(void *userdata, pid_t pid) {
        Manager *m = userdata;
        Member *member = roster_find_member(&m->roster, pid);
        const Slot *slot = member ? member->group->slot : NULL;
        int r = 0;

        if (slot && !slot->idle_reason && slot->route == CONF_ROUTE_ADVISE)
                return;
        if (slot && !slot->idle_reason)
                roster_expel(&m->roster, member);
        else
                r = roster_add_orphan(&m->roster, pid);
        if (r < 0)
                log_warning("process %d was marked by an earlier daemon and cannot be undone before the next start: %s",
                            pid, strerror(-r));
        else if (r == 0)
                log_info("process %d was marked by an earlier daemon and is not merged so any more: undoing it", pid);
}

static int watch_events(Manager *m) {
        static const int signals[] = { SIGCHLD, SIGHUP, SIGTERM, SIGINT };
        uint64_t watchdog = notify_watchdog_nsec();
        int r;

        for (size_t i = 0; i < ELEMENTSOF(signals); i++) {
                r = loop_add_signal(m->loop, signals[i], on_signal, m, &m->signals[i]);
                if (r < 0)
                        return r;
        }
        r = loop_add_io(m->loop, cgroup_tree_fd(m->roster.tree), POLLIN, on_tree, m, &m->tree_source);
        if (r < 0)
                return r;
        r = loop_add_timer(m->loop, UINT64_MAX, 0, on_tree_rested, m, &m->tree_timer);
        if (r < 0)
                return r;
        r = loop_add_timer(m->loop, REFRESH_NSEC, REFRESH_NSEC, on_refresh, m, &m->refresh_timer);
        if (r < 0 || !watchdog)
                return r;
        return loop_add_timer(m->loop, watchdog / 3, watchdog / 3, on_watchdog, m, &m->watchdog_timer);
}

/* The crew, and a round's worth of batches for it. */
static int make_crew(Manager *m) {
        int r = crew_new(m->conf->daemon.scan_threads, &m->crew);

        if (r < 0)
                return r;
        m->n_batches = (size_t)crew_size(m->crew) * ROUND_BATCHES;
        m->batches = calloc(m->n_batches, sizeof *m->batches);
        return m->batches ? 0 : -ENOMEM;
}

int manager_new(const char *config_path, bool once, Manager **ret) {
        _cleanup_(manager_freep) Manager *m = calloc(1, sizeof *m);
        int r;

        if (!m)
                return -ENOMEM;
        *m = (Manager){ .config_path = config_path, .once = once, .lock_fd = -EBADF, .started_nsec = now_nsec(),
                        .next_pass_nsec = now_nsec() };
        r = conf_load("", config_path, add_warning, &m->warnings, &m->conf);
        if (r < 0) {
                log_error("the configuration cannot be read: %s", strerror(-r));
                return r;
        }
        budget_init(&m->budget, m->conf->daemon.cpu_quota, now_nsec());
        manager_look_at_others(m); /* what they leave is known by the time that there is work, or soon after */
        host_kernel_probe(&m->kernel);
        m->judge_budget.break_nsec = m->kernel.fault_cost.break_nsec;
        m->judge_budget.flush_nsec = m->kernel.fault_cost.flush_nsec;
        for (size_t i = 0; i < m->kernel.n_features; i++)
                if (m->kernel.features[i].required && m->kernel.features[i].state != 1) {
                        log_error("%s: %s; see `ksmctl doctor`", m->kernel.features[i].name,
                                  m->kernel.features[i].state < 0 ? strerror(-m->kernel.features[i].state) : "absent");
                        return m->kernel.features[i].state < 0 ? m->kernel.features[i].state : -EOPNOTSUPP;
                }
        r = numa_read(NULL, NULL, &m->numa);
        if (r < 0) {
                log_error("it cannot be told which memory belongs to which NUMA node: %s", strerror(-r));
                return r;
        }
        r = open_state_dir(m);
        if (r < 0) {
                log_error("%s: %s", m->state_dir ?: STATE_DIR,
                          r == -EALREADY ? "another ksmd-user runs on this host" : strerror(-r));
                return r;
        }
        r = loop_new(&m->loop);
        if (r < 0) {
                log_error("io_uring cannot be used: %s (see sysctl kernel.io_uring_disabled)", strerror(-r));
                return r;
        }
        r = remote_new(&m->remote);
        if (r < 0) {
                log_error("processes cannot be called: %s",
                          r == -EOPNOTSUPP ? "not supported on this architecture" : strerror(-r));
                return r;
        }
        r = open_ksm(m);
        if (r < 0)
                return r;
        r = make_crew(m);
        if (r < 0) {
                log_error("%u scan threads: %s", m->conf->daemon.scan_threads, strerror(-r));
                return r;
        }
        r = advise_new(m->remote, m->state_dir, m->kernel.process_madvise_mergeable, &m->advise);
        if (r < 0) {
                log_error("%s: %s", m->state_dir, strerror(-r));
                return r;
        }
        r = zero_new(m->remote, &m->zero);
        if (r < 0)
                log_debug("zero pages cannot be given back: %s", strerror(-r));
        r = roster_init(&m->roster, m->loop, m->conf, NULL, &m->numa, m->ksm != NULL, m->zero != NULL,
                        &m->vma_reader, &(RosterPools){ manager_open_pool, manager_learn_pool, m });
        if (r < 0) {
                log_error("cgroups cannot be watched: %s",
                          r == -ENOENT ? "no cgroup v2 hierarchy is mounted" : strerror(-r));
                return r;
        }
        manager_read_kept(m);
        /* A cgroup opted out while no daemon ran is opted out all the same. */
        r = advise_recorded(m->advise, on_recorded, m);
        if (r < 0)
                log_warning("%s: %s", m->state_dir, strerror(-r));
        manager_find_remapped(m);
        r = manager_open_probes(m);
        if (r < 0)
                return r;
        r = watch_events(m);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(m);
        return 0;
}

Manager *manager_free(Manager *m) {
        if (!m)
                return NULL;
        for (size_t i = 0; i < m->n_requests; i++) {
                service_call_end(m->requests[i].call, SERVICE_E_REFUSED, "the daemon stops", NULL);
                free(m->requests[i].cgroup);
        }
        service_free(m->service);
        for (size_t i = 0; i < ELEMENTSOF(m->signals); i++)
                loop_source_free(m->signals[i]);
        loop_source_free(m->tree_source);
        loop_source_free(m->tree_timer);
        loop_source_free(m->refresh_timer);
        loop_source_free(m->watchdog_timer);
        manager_close_probes(m);
        roster_done(&m->roster);
        manager_close_keeper(m);
        kept_done(&m->kept);
        advise_free(m->advise);
        zero_free(m->zero);
        burst_free(m->burst);
        ksm_free(m->ksm);
        remote_free(m->remote);
        numa_done(&m->numa);
        crew_free(m->crew);
        free(m->batches);
        loop_free(m->loop);
        conf_free(m->new_conf);
        conf_free(m->conf);
        warnings_done(&m->warnings);
        free(m->reload_problem);
        free(m->requests);
        free(m->state_dir);
        safe_close(m->lock_fd);
        free(m);
        return NULL;
}

int manager_listen(Manager *m, int listen_fd) {
        return service_new(m->loop, listen_fd, &manager_ops, m, &m->service);
}

void manager_end_request(Manager *m, size_t i, int result, const char *reason, json_t *parameters) {
        Request request = m->requests[i];

        m->requests[i] = m->requests[--m->n_requests];
        service_call_end(request.call, result, reason, parameters);
        free(request.cgroup);
}

int manager_load_config(Manager *m) {
        _cleanup_(warnings_done) Warnings warnings = {};
        _cleanup_(conf_freep) Conf *conf = NULL;
        int r = conf_load("", m->config_path, add_warning, &warnings, &conf);

        free(TAKE_PTR(m->reload_problem));
        if (r < 0) {
                log_error("the configuration cannot be read, the old one stands: %s", strerror(-r));
                /* Which file it is was said last. */
                if (asprintf(&m->reload_problem, "the configuration cannot be read, the old one stands: %s",
                             warnings.n > 0 ? warnings.texts[warnings.n - 1] : strerror(-r)) < 0)
                        m->reload_problem = NULL;
                return r;
        }
        warnings_done(&m->warnings);
        m->warnings = warnings;
        warnings = (Warnings){};
        conf_free(m->new_conf);
        m->new_conf = TAKE_PTR(conf);
        return 0;
}

static void swap_config(Manager *m) {
        Conf *old = m->conf;

        m->conf = TAKE_PTR(m->new_conf);
        m->nodes_asked = false;
        roster_reconfigure(&m->roster, m->conf);
        manager_limit_pools(m);
        if (old->daemon.probes != m->conf->daemon.probes) {
                manager_close_probes(m);
                if (manager_open_probes(m) < 0)
                        log_error("probes: out of memory");
        }
        if (old->daemon.pay_back_nsec != m->conf->daemon.pay_back_nsec ||
            old->daemon.judgement != m->conf->daemon.judgement)
                manager_forget_judgement(m);
        conf_free(old);
        manager_set_quota(m);
        m->next_pass_nsec = now_nsec();
        log_info("configuration reloaded, warnings: %u", m->conf->n_warnings);
}

static void carry_out_reload(Manager *m) {
        if (!m->reload_wanted && !m->new_conf)
                return;
        notify_reloading();
        if (m->reload_wanted)
                manager_load_config(m);
        m->reload_wanted = false;
        if (m->new_conf)
                swap_config(m);
        notify_ready();
}

/* Somebody asked for that, and it was not begun yet. */
static bool is_new(const Manager *m, RequestKind kind) {
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].kind == kind && !m->requests[i].started)
                        return true;
        return false;
}

/* What was asked for while a pass ran, or since. */
static void carry_out_requests(Manager *m) {
        uint64_t pages = 0;

        carry_out_reload(m);
        if (is_new(m, REQUEST_UNMERGE))
                look_at_tree(m); /* what is to be unmerged may have been made a moment ago */
        manager_begin_unmerges(m);
        manager_undo_leaving(m, &pages);
        manager_end_unmerges(m);
}

static void end_scans(Manager *m) {
        for (size_t i = 0; i < m->n_requests;)
                if (m->requests[i].kind == REQUEST_SCAN && m->requests[i].started)
                        manager_end_request(m, i, 0, NULL, NULL);
                else
                        i++;
}

bool manager_scan_requested(const Manager *m) {
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].kind == REQUEST_SCAN)
                        return true;
        return false;
}

bool manager_scan_waits(const Manager *m) { return is_new(m, REQUEST_SCAN); }

static void start_scans(Manager *m) {
        for (size_t i = 0; i < m->n_requests; i++)
                if (m->requests[i].kind == REQUEST_SCAN)
                        m->requests[i].started = true;
}

static void report_status(Manager *m) {
        PageStats total;

        manager_total(m, &total);
        notify_status("%zu cgroups, %zu processes, %.1f MiB saved%s", m->roster.n_groups,
                      roster_count_members(&m->roster), (double)total.bytes_saved / (1 << 20),
                      m->paused ? ", paused" : "");
}

/* Everybody who left, however long it takes; who cannot be called is waited for while patience lasts. */
static void undo_all(Manager *m, uint64_t patience_nsec) {
        uint64_t pages = 0, moved = now_nsec();

        for (uint64_t before = pages; manager_undo_leaving(m, &pages); before = pages) {
                uint64_t wait = manager_undo_wait_nsec(m);

                if (pages > before || wait == 0)
                        moved = now_nsec();
                else if (now_nsec() >= moved + patience_nsec)
                        break;
                loop_dispatch(m->loop, wait);
        }
        if (pages > 0)
                log_info("%llu pages unmarked", (unsigned long long)pages);
}

/* Who waits for what was done to the end is told so. */
static void answer_last(Manager *m) {
        uint64_t until = now_nsec() + ANSWER_NSEC;

        if (m->n_requests == 0)
                return;
        for (size_t i = 0; i < m->n_requests; i++)
                m->requests[i].tended = UINT64_MAX;
        manager_end_unmerges(m);
        for (uint64_t now; (now = now_nsec()) < until;)
                (void)loop_dispatch(m->loop, until - now);
}

/* Leaves the host as the configuration wants it left: merged, or as it was before us; KSM's knobs as found. */
static void stop(Manager *m) {
        int r;

        /* What was asked for before the end is how it ends; SIGHUP may have come right before SIGTERM. */
        (void)loop_dispatch(m->loop, 0);
        carry_out_reload(m);
        m->state = MANAGER_STOPPING;
        notify_stopping();
        if (m->burst)
                burst_stop(m->burst);
        if (m->conf->daemon.on_stop == CONF_ON_STOP_UNMERGE && !m->once)
                roster_dismiss(&m->roster);
        undo_all(m, UNDO_PATIENCE_NSEC);
        manager_tend_pools(m, UINT64_MAX);
        answer_last(m);
        manager_keep(m);
        for (size_t i = 0; i < m->roster.n_leaving; i++)
                if (!m->roster.leaving[i]->given_up) /* that was said */
                        log_warning("process %d could not be reached for %u s: what was marked for merging stays marked "
                                    "until a daemon is started again",
                                    m->roster.leaving[i]->target->pid, (unsigned)(UNDO_PATIENCE_NSEC / NSEC_PER_SEC));
        r = m->ksm ? ksm_restore(m->ksm) : 0;
        if (r != 0)
                log_warning("KSM's settings could not all be put back: %s",
                            r == KSM_E_BUSY ? "some cannot change while pages are shared" : strerror(-r));
}

int manager_run(Manager *m) {
        int r;

        notify_ready();
        carry_out_requests(m);
        report_status(m);
        while (!m->stopping) {
                uint64_t now = now_nsec();
                uint64_t undo_wait = manager_answer_is_near(m) ? 0 : manager_undo_wait_nsec(m);
                bool may_pass = !m->paused && (!manager_undo_rests(m) || now >= m->next_pass_nsec + UNDO_HOLDS_NSEC);
                bool due = may_pass && undo_wait > 0 && (now >= m->next_pass_nsec || manager_scan_requested(m));

                if (due) {
                        m->next_pass_nsec = now + m->conf->daemon.scan_interval_nsec;
                        start_scans(m);
                        look_at_tree(m); /* whoever asks for a pass means who is there now */
                        roster_refresh(&m->roster);
                        r = manager_pass(m);
                        if (r == 0)
                                end_scans(m);
                        if (r == MANAGER_E_CUT || (r == 0 && m->go_on))
                                m->next_pass_nsec = now;
                        else if (r < 0 && !m->paused)
                                m->next_pass_nsec = now_nsec() + NSEC_PER_SEC;
                        /* Who was too young is old enough then. */
                        if (m->young_waiting)
                                m->next_pass_nsec =
                                        MIN_OF(m->next_pass_nsec, now + m->conf->daemon.minimum_age_nsec);
                        m->next_pass_nsec = MIN_OF(m->next_pass_nsec, m->rests_until_nsec);
                        if (m->busy_waiting)
                                m->next_pass_nsec = MIN_OF(m->next_pass_nsec, now + BUSY_RETRY_NSEC);
                        report_status(m);
                } else {
                        uint64_t wait = MIN_OF(undo_wait, REFRESH_NSEC);

                        if (may_pass)
                                wait = MIN_OF(wait, m->next_pass_nsec > now ? m->next_pass_nsec - now : 0);
                        manager_breathe(m, wait);
                }
                if (!m->stopping)
                        carry_out_requests(m);
        }
        stop(m);
        return 0;
}

/* All there was is done: nothing is still settling, and what was marked is merged but for one in a hundred. */
static bool converged(const Manager *m) {
        uint64_t unmerged = 0, merged = 0, changing = 0;

        for (size_t i = 0; i < m->roster.n_slots; i++) {
                const PageStats *stats = &m->roster.slots[i]->stats;

                unmerged += stats->merge_failures[MERGE_FAILURE_KERNEL];
                changing += stats->pages_volatile;
                merged += stats->pages_sharing + stats->pages_zero;
        }
        return (m->pass_changes == 0 || changing == 0) && unmerged * 100 <= merged;
}

int manager_run_once(Manager *m) {
        unsigned idle_passes = 0; /* in a row: ksmd may have got no CPU, or a process could not be called just then */
        json_t *stats;
        int r = 0;

        for (unsigned i = 0; i < ONCE_PASSES && idle_passes < ONCE_IDLE_PASSES && !m->stopping; i += r == 0) {
                undo_all(m, 0);
                r = manager_pass(m);
                if (r < 0 || (r == 0 && converged(m)))
                        break;
                if (r == 0)
                        idle_passes = m->pass_changes == 0 ? idle_passes + 1 : 0;
        }
        stop(m);
        stats = manager_stats_json(m);
        if (!stats)
                return -ENOMEM;
        json_dumpf(stats, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
        putchar('\n');
        json_decref(stats);
        return r == -ECANCELED || r > 0 ? 0 : r;
}
