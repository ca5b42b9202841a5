/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The program ksmctl against a service with canned answers: what it prints, and its exit status for every outcome.
 * Usage: ksmctl-test PATH-OF-KSMCTL.
 */

#include "control/service.h"
#include "control/stats.h"
#include "control/varlink.h"

#include "test.h"

#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

static const char *ksmctl;
static char directory[] = "/tmp/ksmctl-test.XXXXXX", path[64];

static json_t *get_status(void *userdata) {
        return json_pack("{ss si ss sI si si si si so sI sI sI sf sf sb s[s]}", "version", "9.9", "pid", 77, "state",
                         "idle", "uptime_nsec", (json_int_t)(3700 * NSEC_PER_SEC), "domains", 1, "cgroups", 2,
                         "processes", 4, "full_scans", 12, "last_pass_nsec", json_null(), "next_pass_nsec",
                         (json_int_t)(7300 * NSEC_PER_MSEC), "bytes_saved", (json_int_t)(171 << 20) + (205 << 10),
                         "metadata_bytes", (json_int_t)4096, "cpu_quota", 0.1, "cpu_used", 0.0994,
                         "throttled", 1, "warnings", "evil \x1b[2J name");
}

static json_t *get_stats(void *userdata) {
        DaemonStats daemon = {
                .pages = { .pages_sharing = 512, .merge_failures = { [MERGE_FAILURE_HUGE] = 7, [MERGE_FAILURE_BUSY] = 2 } },
                .stops = 3,
        };
        json_t *cgroup = page_stats_json(&daemon.pages), *domain = page_stats_json(&daemon.pages);

        json_object_update_new(cgroup, json_pack("{ss ss ss si}", "path", "a.slice/a-\"rather\\long\nname.scope",
                                                 "domain", "tenant", "route", "advise", "processes", 2));
        json_object_set_new(domain, "domain", json_string("tenant"));
        json_object_set_new(domain, "merge", json_string("yes"));
        json_object_set_new(domain, "own", json_false());
        return json_pack("{so s[o] s[o]}", "daemon", daemon_stats_json(&daemon), "domains", domain, "cgroups", cgroup);
}

static json_t *list_targets(void *userdata) {
        return json_pack("[{si ss ss ss ss ss ss so si si}]", "pid", 4711, "name", "x\x1b]0;\x07y", "cgroup",
                         "a.slice", "domain", "tenant", "route", "advise", "merge", "yes", "state", "managed", "reason",
                         json_null(), "pages", 2560, "pages_merged", 256);
}

static int explain(void *userdata, pid_t pid, json_t **ret, const char **ret_reason) {
        if (pid != 4711) {
                *ret_reason = "no such process";
                return SERVICE_E_NOT_FOUND;
        }
        *ret = json_pack("{si ss ss so ss so so ss ss si si si si si s{si si} s{}}", "pid", pid, "name", "redis", "cgroup",
                         "a.slice", "section", json_null(), "merge", "no", "domain", json_null(), "route", json_null(),
                         "state", "skipped", "reason", "young", "pages", 100, "pages_merged", 1, "pages_zero", 2,
                         "pages_unshared", 3, "pages_volatile", 4, "pages_skipped", "locked", 90, "dontdump", 0,
                         "merge_failures");
        return 0;
}

static int scan_now(void *userdata, ServiceCall *call, const char **ret_reason) {
        service_call_end(call, 0, NULL, NULL);
        return 0;
}

static int do_pause(void *userdata, const char **ret_reason) { return SERVICE_E_REFUSED; }
static int do_resume(void *userdata, const char **ret_reason) { return 0; }

static int unmerge(void *userdata, const char *cgroup, ServiceCall *call, const char **ret_reason) {
        service_call_end(call, 0, NULL, json_pack("{si}", "pages", 1024));
        return 0;
}

static int reload(void *userdata, json_t **ret_warnings, const char **ret_reason) {
        *ret_warnings = json_pack("[s]", "/etc/ksmd-user.conf:3: unknown key");
        return 0;
}

static const ServiceOps ops = {
        .get_status = get_status,
        .get_stats = get_stats,
        .list_targets = list_targets,
        .explain = explain,
        .scan_now = scan_now,
        .pause = do_pause,
        .resume = do_resume,
        .unmerge = unmerge,
        .reload = reload,
};

static pid_t serve(int fd) {
        pid_t pid = fork();
        Loop *loop;
        Service *service;
        int r;

        if (pid != 0)
                return pid;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        r = loop_new(&loop);
        if (r == -ENOSYS || r == -EPERM)
                _exit(77);
        CHECK(r == 0, "loop_new");
        CHECK(service_new(loop, fd, &ops, NULL, &service) == 0, "service_new");
        CHECK(loop_run(loop) == 0, "loop_run");
        _exit(0);
}

/* Runs ksmctl; what it wrote, errors included, is in output. */
static char output[65536];

static int run(const char *arguments) {
        char command[512];
        FILE *f;
        size_t n;
        int status;

        snprintf(command, sizeof command, "%s --socket %s %s 2>&1", ksmctl, path, arguments);
        f = popen(command, "re");
        CHECK(f, "popen");
        n = fread(output, 1, sizeof output - 1, f);
        output[n] = 0;
        status = pclose(f);
        CHECK(WIFEXITED(status), "%s: %s", arguments, output);
        return WEXITSTATUS(status);
}

static void expect(const char *arguments, int status, const char *text) {
        int r = run(arguments);

        CHECK(r == status, "ksmctl %s: %d, not %d: %s", arguments, r, status, output);
        CHECK(strstr(output, text), "ksmctl %s says not \"%s\" but:\n%s", arguments, text, output);
}

/* Where in its line the last occurrence of text stands. */
static size_t column_of(const char *text) {
        const char *found = NULL, *line;

        for (const char *p = output; (p = strstr(p, text)); p++)
                found = p;
        CHECK(found, "no \"%s\" in:\n%s", text, output);
        for (line = found; line > output && line[-1] != '\n'; line--)
                ;
        return (size_t)(found - line);
}

static void expect_aligned(const char *arguments, const char *head, const char *cell) {
        CHECK(run(arguments) == 0, "%s", output);
        CHECK(column_of(head) == column_of(cell), "not aligned:\n%s", output);
}

static void cleanup(void) {
        unlink(path);
        rmdir(directory);
}

static void test_usage(void) {
        expect("", 2, "no command");
        expect("nonsense", 2, "no such command");
        expect("status x", 2, "too many");
        expect("why", 2, "too few");
        expect("why 12x", 2, "not a process id");
        expect("why 0", 2, "not a process id");
        expect("unmerge", 2, "too few");
        expect("--nonsense", 2, "nonsense");
        expect("--help", 0, "Exit status");
        expect("--version", 0, KSMD_USER_VERSION);
}

static void test_output(void) {
        json_error_t error;
        json_t *json;

        expect("status", 0, "idle, next pass in 7.3 s");
        expect("status", 0, "9.9, pid 77, up 1 h 1 min");
        expect("status", 0, "4 processes in 2 cgroups of 1 domain\n");
        expect("status", 0, "171.2 MiB");
        expect("status", 0, "9.9 % of one over 60 s, quota 10 %, throttled\n");
        expect("status", 0, "evil ?[2J name");
        expect("stats", 0, "7 huge");
        expect_aligned("stats", "NOT MERGED\n", "7 huge\n");
        expect("targets", 0, "x?]0;?y ");
        expect_aligned("targets", "CGROUP\n", "a.slice\n");
        expect("why 4711", 0, "skipped: young");
        expect("why 4711", 0, "90 locked\n");
        expect("unmerge a.slice", 0, "1024 pages (4.0 MiB)");
        expect("scan", 0, "");
        CHECK(!*output, "silence");
        expect("resume", 0, "");
        expect("reload", 0, "/etc/ksmd-user.conf:3: unknown key");

        CHECK(run("stats --json") == 0, "%s", output);
        json = json_loads(output, 0, &error);
        CHECK(json_integer_value(json_object_get(json_object_get(json_object_get(json, "daemon"), "merge_failures"),
                                                 "huge")) == 7, "%s", output);
        json_decref(json);
        CHECK(run("--json why 4711") == 0, "%s", output);
        json = json_loads(output, 0, &error);
        CHECK(json_is_null(json_object_get(json, "section")), "%s", output);
        json_decref(json);
        CHECK(run("status > /dev/full") == 1, "%s", output);
}

/* Every line is one of the format's, samples follow the head of their family, and what is named is escaped. */
static void test_metrics(void) {
        static const char *const wanted[] = {
                "# TYPE ksmd_user_saved_bytes gauge\n# UNIT ksmd_user_saved_bytes bytes\n",
                "\nksmd_user_pages_sharing 512\n",
                "\nksmd_user_version{version=\"9.9\"} 1\n",
                "\nksmd_user_cpu_quota_ratio 0.1\n",
                "\nksmd_user_uptime_seconds 3700\n",
                "\nksmd_user_stops_total 3\n",
                "\nksmd_user_warnings 1\n",
                "\nksmd_user_is_throttled 1\n",
                "\nksmd_user_not_merged{reason=\"huge\"} 7\n",
                "\nksmd_user_failures_total{reason=\"busy\"} 2\n",
                "\nksmd_user_domain_not_merged{domain=\"tenant\",merge=\"yes\",own=\"false\",reason=\"huge\"} 7\n",
                "\nksmd_user_cgroup_pages_zero{cgroup=\"a.slice/a-\\\"rather\\\\long\\nname.scope\",domain=\"tenant\"} 0\n",
                "\nksmd_user_cgroup_processes{cgroup=",
        };
        char family[128] = "", *rest = output;

        CHECK(run("metrics") == 0, "%s", output);
        for (size_t i = 0; i < ELEMENTSOF(wanted); i++)
                CHECK(strstr(output, wanted[i]), "no \"%s\" in:\n%s", wanted[i], output);
        CHECK(!strstr(output, "not_merged{reason=\"busy\"}"), "an event is told as pages:\n%s", output);
        CHECK(strlen(output) > 6 && strcmp(output + strlen(output) - 6, "# EOF\n") == 0, "no end:\n%s", output);
        for (char *text; (text = strsep(&rest, "\n")) && *text;) {
                size_t size = strlen(family);

                if (sscanf(text, "# TYPE %127s", family) == 1 || strcmp(text, "# EOF") == 0)
                        continue;
                if (strncmp(text, "# ", 2) == 0)
                        text = strchr(text + 2, ' ') + 1;
                CHECK(size > 0 && strncmp(text, family, size) == 0 && strchr(" _{", text[size]), "%s is not of %s",
                      text, family);
        }
}

/* What a terminal shows of ksmctl top: everything it writes until it has been quiet for a while. */
static void read_screen(int terminal) {
        size_t n = 0;
        struct pollfd pollfd = { .fd = terminal, .events = POLLIN };

        while (n < sizeof output - 1 && poll(&pollfd, 1, n > 0 ? 300 : 10000) > 0) {
                ssize_t got = read(terminal, output + n, sizeof output - 1 - n);
                if (got <= 0)
                        break;
                n += (size_t)got;
        }
        output[n] = 0;
}

/* How many lines the last frame has, without the terminal's own words; how wide the longest is in *ret_width. */
static unsigned frame_lines(size_t *ret_width) {
        unsigned lines = 1;
        size_t width = 0;
        const char *frame = NULL;

        for (const char *p = output; (p = strstr(p, "\033[H")); p++)
                frame = p;
        CHECK(frame, "no frame in:\n%s", output);
        *ret_width = 0;
        for (const char *p = frame; *p && strncmp(p, "\033[J", 3) != 0; p++)
                if (*p == '\033')
                        p += strcspn(p, "HJKm");
                else if (*p == '\n') {
                        lines++;
                        width = 0;
                } else if (*p != '\r' && ++width > *ret_width)
                        *ret_width = width;
        return lines;
}

static pid_t start_top(unsigned short columns, unsigned short rows, int *ret_terminal) {
        struct winsize size = { .ws_col = columns, .ws_row = rows };
        pid_t pid = forkpty(ret_terminal, NULL, NULL, &size);

        CHECK(pid >= 0, "forkpty");
        if (pid == 0) {
                execl(ksmctl, "ksmctl", "--socket", path, "top", "86400", NULL);
                _exit(127);
        }
        read_screen(*ret_terminal);
        return pid;
}

static void end_top(pid_t pid, int terminal, const char *how) {
        int status;

        read_screen(terminal);
        CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: %x", how, status);
        CHECK(strstr(output, "\033[?25h\033[?1049l"), "%s leaves the screen as it is:\n%s", how, output);
        close(terminal);
}

static void test_top(void) {
        struct winsize size = { .ws_col = 100, .ws_row = 30 };
        struct termios before, during;
        int terminal;
        size_t width;
        pid_t pid;

        expect("top --once", 0, "idle, next pass in 7.3 s");
        expect("top --once", 0, "9.9 % over 60 s, quota 10 %, throttled\n");
        expect("top", 0, "evil ?[2J name"); /* no terminal: one frame */
        CHECK(!strchr(output, '\033'), "%s", output);
        expect_aligned("top", "ROUTE\n", "advise\n");
        expect("top 0", 2, "not a number of seconds");
        expect("top x", 2, "not a number of seconds");

        pid = start_top(40, 8, &terminal);
        CHECK(frame_lines(&width) == 8 && width == 40, "%u lines, %zu columns:\n%s", frame_lines(&width), width,
              output);
        CHECK(ioctl(terminal, TIOCSWINSZ, &size) == 0, "TIOCSWINSZ");
        read_screen(terminal);
        CHECK(frame_lines(&width) == 10 && width > 40 && width <= 100, "%u lines, %zu columns:\n%s",
              frame_lines(&width), width, output);
        CHECK(write(terminal, " ", 1) == 1, "write"); /* any key: the next frame at once */
        read_screen(terminal);
        CHECK(strstr(output, "daemon 0.0 %"), "no rates:\n%s", output);
        CHECK(tcgetattr(terminal, &during) == 0 && !(during.c_lflag & ECHO), "keys are echoed");
        CHECK(write(terminal, "q", 1) == 1, "write");
        end_top(pid, terminal, "q");

        pid = start_top(80, 24, &terminal);
        CHECK(write(terminal, "\003", 1) == 1, "write"); /* ctrl-c */
        end_top(pid, terminal, "ctrl-c");
        pid = start_top(80, 24, &terminal);
        CHECK(tcgetattr(terminal, &during) == 0 && kill(pid, SIGTERM) == 0, "SIGTERM");
        for (unsigned i = 0; i < 1000 && tcgetattr(terminal, &before) == 0 && !(before.c_lflag & ECHO); i++)
                usleep(10000);
        CHECK(before.c_lflag & ECHO, "the terminal is left as it was changed");
        end_top(pid, terminal, "SIGTERM");
}

static void test_refusals(void) {
        char command[256];

        expect("why 4712", 1, "NotFound: no such process");
        expect("pause", 1, "Refused");
        if (geteuid() != 0)
                return;
        CHECK(chmod(path, 0666) == 0 && chmod(directory, 0755) == 0, "chmod");
        /* Where it was built may be out of others' reach: it is copied. */
        snprintf(command, sizeof command, "cp %s %s/ksmctl", ksmctl, directory);
        CHECK(system(command) == 0, "%s", command);
        snprintf(command, sizeof command, "setpriv --reuid 65534 --clear-groups %s/ksmctl", directory);
        ksmctl = command;
        expect("resume", 1, "only root");
        expect("status", 0, "idle");
        CHECK(chmod(path, 0600) == 0, "chmod");
        expect("status", 1, "Permission denied");
        snprintf(output, sizeof output, "%s/ksmctl", directory);
        unlink(output);
}

int main(int argc, char **argv) {
        pid_t pid;
        int fd, status;

        CHECK(argc == 2, "the path of ksmctl");
        ksmctl = argv[1];
        CHECK(mkdtemp(directory), "mkdtemp");
        snprintf(path, sizeof path, "%s/socket", directory);
        atexit(cleanup);
        expect("status", 3, "no daemon");
        CHECK(varlink_listen(path, &fd) == 0, "listen");
        pid = serve(fd);
        close(fd);
        if (run("status") == 3) {
                CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 77, "the service ended");
                TEST_SKIP("io_uring is refused here");
        }
        test_usage();
        test_output();
        test_metrics();
        test_top();
        test_refusals();
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        ksmctl = argv[1];
        /* The kernel takes a killed process's ring down, and the socket with it, a little later. */
        for (unsigned i = 0; run("status") != 3 && i < 500; i++)
                usleep(10000);
        expect("status", 3, "no daemon");
        return 0;
}
