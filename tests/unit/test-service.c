/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* org.ksmduser.Daemon over a manager that only notes what it was asked: parameters, outcomes, late answers, Monitor. */

#include "control/service.h"
#include "control/varlink-client.h"
#include "control/varlink.h"

#include "test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cmocka.h>

#define IFACE "org.ksmduser.Daemon"

static char directory[64], path[96];
static pid_t server_pid;

/* ---- the manager: refuses what its names say */

static ServiceCall *owed;
static Loop *loop;
static Service *service;
static bool paused;
static char note[128] = "nothing";

static json_t *get_status(void *userdata) { return json_pack("{sb ss}", "owed", owed != NULL, "note", note); }
static json_t *get_stats(void *userdata) { return json_pack("{s{} s[] s[]}", "daemon", "domains", "cgroups"); }
static json_t *list_targets(void *userdata) { return json_pack("[{si}]", "pid", 1); }

static int explain(void *userdata, pid_t pid, json_t **ret, const char **ret_reason) {
        if (pid == 1)
                return SERVICE_E_NOT_FOUND;
        if (pid == 2)
                return -EACCES;
        if (pid == 3) {
                *ret_reason = "three";
                return SERVICE_E_REFUSED;
        }
        *ret = json_pack("{si}", "pid", pid);
        return 0;
}

static int scan_now(void *userdata, ServiceCall *call, const char **ret_reason) {
        if (paused) {
                *ret_reason = "paused";
                return SERVICE_E_REFUSED;
        }
        if (owed)
                return SERVICE_E_BUSY;
        owed = call;
        return 0;
}

static int pause_(void *userdata, const char **ret_reason) {
        paused = true;
        if (owed) {
                service_call_end(owed, SERVICE_E_REFUSED, "paused meanwhile", NULL);
                owed = NULL;
        }
        return 0;
}

static int resume(void *userdata, const char **ret_reason) {
        paused = false;
        return 0;
}

static int unmerge(void *userdata, const char *cgroup, ServiceCall *call, const char **ret_reason) {
        snprintf(note, sizeof note, "unmerge %s", cgroup);
        if (strcmp(cgroup, "none") == 0)
                return SERVICE_E_NOT_FOUND;
        service_call_end(call, 0, NULL, json_pack("{si}", "pages", 42));
        return 0;
}

static int reload(void *userdata, json_t **ret_warnings, const char **ret_reason) {
        *ret_warnings = json_pack("[s]", "file:1: bad");
        if (strcmp(note, "unmerge quit") == 0)
                loop_exit(loop, 0);
        return 0;
}

static const ServiceOps ops = {
        .get_status = get_status,
        .get_stats = get_stats,
        .list_targets = list_targets,
        .explain = explain,
        .scan_now = scan_now,
        .pause = pause_,
        .resume = resume,
        .unmerge = unmerge,
        .reload = reload,
};

static int serve(int fd) {
        CHECK(service_new(loop, fd, &ops, NULL, &service) == 0, "service_new");
        CHECK(loop_run(loop) == 0, "loop_run");
        service_free(service);
        if (owed) /* the service has gone, the answer is still owed */
                service_call_end(owed, 0, NULL, NULL);
        loop_free(loop);
        return 0;
}

static int start(void **state) {
        int fd;

        strcpy(directory, "/tmp/test-service.XXXXXX");
        assert_non_null(mkdtemp(directory));
        snprintf(path, sizeof path, "%s/socket", directory);
        assert_int_equal(varlink_listen(path, &fd), 0);
        owed = NULL;
        server_pid = fork();
        if (server_pid == 0) {
                int r = loop_new(&loop);

                exit(r == -ENOSYS || r == -EPERM ? 77 : serve(fd));
        }
        close(fd);
        return 0;
}

/* ---- clients */

static int dial(void) {
        int fd;

        if (varlink_connect(path, &fd) < 0)
                TEST_SKIP("io_uring is refused here");
        return fd;
}

/* The error's name, or "" when it went well; *ret is the reply or the error's parameters. */
static char *call(int fd, const char *method, json_t *params, json_t **ret) {
        char *error = NULL;
        int r = varlink_call(fd, method, params, 0, ret, &error);

        assert_true(r >= 0);
        return error ?: strdup("");
}

static void check(int fd, const char *method, json_t *params, const char *error_wanted, const char *key,
                  const char *value) {
        json_t *reply;
        _cleanup_free_ char *error = call(fd, method, params, &reply);

        assert_string_equal(error, error_wanted);
        if (key)
                assert_string_equal(json_string_value(json_object_get(reply, key)), value);
        json_decref(reply);
}

static int stop(void **state) {
        int fd = dial(), status;

        check(fd, IFACE ".Unmerge", json_pack("{ss}", "cgroup", "quit"), "", NULL, NULL);
        check(fd, IFACE ".Reload", NULL, "", NULL, NULL);
        close(fd);
        assert_int_equal(waitpid(server_pid, &status, 0), server_pid);
        assert_int_equal(status, 0);
        unlink(path);
        rmdir(directory);
        return 0;
}

static void test_results(void **state) {
        int fd = dial();
        json_t *reply;

        free(call(fd, IFACE ".GetStats", NULL, &reply));
        assert_int_equal(json_object_size(reply), 3);
        json_decref(reply);
        free(call(fd, IFACE ".ListTargets", json_object(), &reply));
        assert_int_equal(json_array_size(json_object_get(reply, "targets")), 1);
        json_decref(reply);
        free(call(fd, IFACE ".Explain", json_pack("{si}", "pid", 4711), &reply));
        assert_int_equal(json_integer_value(json_object_get(reply, "pid")), 4711);
        json_decref(reply);
        free(call(fd, IFACE ".Unmerge", json_pack("{ss}", "cgroup", "//a/b"), &reply));
        assert_int_equal(json_integer_value(json_object_get(reply, "pages")), 42);
        json_decref(reply);
        check(fd, IFACE ".GetStatus", NULL, "", "note", "unmerge a/b");
        free(call(fd, IFACE ".Reload", NULL, &reply));
        assert_string_equal(json_string_value(json_array_get(json_object_get(reply, "warnings"), 0)), "file:1: bad");
        json_decref(reply);
        free(call(fd, "org.varlink.service.GetInterfaceDescription", json_pack("{ss}", "interface", IFACE), &reply));
        assert_string_equal(json_string_value(json_object_get(reply, "description")), service_interface_description);
        json_decref(reply);
        close(fd);
}

static void test_errors(void **state) {
        int fd = dial();

        check(fd, IFACE ".Explain", json_pack("{si}", "pid", 1), IFACE ".NotFound", NULL, NULL);
        check(fd, IFACE ".Explain", json_pack("{si}", "pid", 2), IFACE ".Failed", "reason", "Permission denied");
        check(fd, IFACE ".Explain", json_pack("{si}", "pid", 3), IFACE ".Refused", "reason", "three");
        check(fd, IFACE ".Unmerge", json_pack("{ss}", "cgroup", "none"), IFACE ".NotFound", NULL, NULL);
        close(fd);
}

static void test_parameters(void **state) {
        static const struct {
                const char *method, *params, *wrong;
        } bad[] = {
                {"GetStatus", "{\"x\":1}", "x"},
                {"GetStats", "{\"daemon\":null}", "daemon"},
                {"ListTargets", "{\"pid\":1}", "pid"},
                {"Explain", "{}", "pid"},
                {"Explain", "{\"pid\":0}", "pid"},
                {"Explain", "{\"pid\":-1}", "pid"},
                {"Explain", "{\"pid\":2147483648}", "pid"},
                {"Explain", "{\"pid\":\"1\"}", "pid"},
                {"Explain", "{\"pid\":1.0}", "pid"},
                {"Explain", "{\"pid\":4,\"verbose\":true}", "verbose"},
                {"ScanNow", "{\"cgroup\":\"a\"}", "cgroup"},
                {"Pause", "{\"x\":1}", "x"},
                {"Resume", "{\"x\":1}", "x"},
                {"Unmerge", "{}", "cgroup"},
                {"Unmerge", "{\"cgroup\":1}", "cgroup"},
                {"Unmerge", "{\"cgroup\":\"a\",\"force\":true}", "force"},
                {"Reload", "{\"x\":1}", "x"},
                {"Monitor", "{}", "interval"},
                {"Monitor", "{\"interval\":0}", "interval"},
                {"Monitor", "{\"interval\":86400001}", "interval"},
                {"Monitor", "{\"interval\":\"1s\"}", "interval"},
        };
        int fd = dial();

        for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
                char method[64];

                snprintf(method, sizeof method, "%s.%s", IFACE, bad[i].method);
                check(fd, method, json_loads(bad[i].params, 0, NULL), "org.varlink.service.InvalidParameter",
                      "parameter", bad[i].wrong);
        }
        check(fd, IFACE ".Monitor", json_pack("{si}", "interval", 1000), "org.varlink.service.ExpectedMore", NULL, NULL);
        check(fd, IFACE ".GetStatus", NULL, "", "note", "nothing");
        close(fd);
}

/* A connection that waits for the end of a pass. */
static int dial_and_scan(void) {
        static const char text[] = "{\"method\":\"" IFACE ".ScanNow\"}";
        int fd = dial();

        assert_int_equal(write(fd, text, sizeof text), sizeof text);
        return fd;
}

static void test_late_answers(void **state) {
        int scan = dial_and_scan(), fd = dial();
        char text[256] = {};
        json_t *reply;
        bool arrived;

        do { /* the call may arrive while it is paused, or before, or after */
                check(fd, IFACE ".Resume", NULL, "", NULL, NULL);
                check(fd, IFACE ".Pause", NULL, "", NULL, NULL);
        } while (recv(scan, text, sizeof text - 1, MSG_DONTWAIT) <= 0);
        assert_non_null(strstr(text, IFACE ".Refused"));
        assert_non_null(strstr(text, "paused"));
        check(fd, IFACE ".ScanNow", NULL, IFACE ".Refused", "reason", "paused");
        check(fd, IFACE ".Resume", NULL, "", NULL, NULL);
        close(scan);
        /* Its peer gone, and then the service, before it is answered. */
        scan = dial_and_scan();
        do {
                free(call(fd, IFACE ".GetStatus", NULL, &reply));
                arrived = json_is_true(json_object_get(reply, "owed"));
                json_decref(reply);
        } while (!arrived);
        check(fd, IFACE ".ScanNow", NULL, IFACE ".Busy", "reason", "busy");
        close(scan);
        close(fd);
}

static bool on_stats(void *userdata, json_t *parameters) {
        unsigned *n = userdata;

        assert_int_equal(json_object_size(parameters), 3);
        return ++*n < 4;
}

static void test_monitor(void **state) {
        char *error = NULL;
        int fd = dial();
        unsigned n = 0;
        uint64_t begin = now_nsec();

        /* At once and then three times; 1 ms counts as 100. */
        assert_int_equal(varlink_call_more(fd, IFACE ".Monitor", json_pack("{si}", "interval", 1), on_stats, &n, &error), 0);
        assert_int_equal(n, 4);
        assert_true(now_nsec() - begin >= 300 * NSEC_PER_MSEC);
        close(fd);
}

#define WITH(f) cmocka_unit_test_setup_teardown(f, start, stop)

int main(void) {
        const struct CMUnitTest tests[] = {
                WITH(test_results),
                WITH(test_errors),
                WITH(test_parameters),
                WITH(test_late_answers),
                WITH(test_monitor),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
