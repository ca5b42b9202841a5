/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The Varlink server in a child of its own, spoken to by our client, by hand-written bytes and by hostile peers. */

#include "control/varlink-client.h"
#include "control/varlink.h"

#include "test.h"

#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cmocka.h>

#define IFACE "org.example.Test"

/* ---- the server */

typedef struct Fixture {
        char directory[64], path[80];
        pid_t pid;
} Fixture;

typedef struct Host {
        Loop *loop;
        VarlinkServer *server;
        VarlinkCall *held;      /* answered by Release */
        VarlinkCall *streaming;
        LoopSource *ticker;
        unsigned closed;        /* held or streaming calls whose peer went away */
} Host;

static void on_echo(void *userdata, VarlinkCall *call, const json_t *params) {
        varlink_call_reply(call, json_deep_copy(params));
}

static void on_big(void *userdata, VarlinkCall *call, const json_t *params) {
        size_t size = (size_t)json_integer_value(json_object_get(params, "size"));
        _cleanup_free_ char *text = malloc(size + 1);

        memset(text, 'x', size);
        text[size] = 0;
        varlink_call_reply(call, json_pack("{ss}", "text", text));
}

static void on_held_close(void *userdata, VarlinkCall *call) {
        Host *host = userdata;

        host->closed++;
        host->held = NULL;
}

static void on_hold(void *userdata, VarlinkCall *call, const json_t *params) {
        Host *host = userdata;

        host->held = call;
        if (json_is_true(json_object_get(params, "tell")))
                varlink_call_on_close(call, on_held_close, host);
}

static void on_release(void *userdata, VarlinkCall *call, const json_t *params) {
        Host *host = userdata;
        bool held = host->held;

        if (held)
                varlink_call_reply(TAKE_PTR(host->held), json_pack("{sb}", "released", true));
        varlink_call_reply(call, json_pack("{sb}", "held", held));
}

static void on_stream_close(void *userdata, VarlinkCall *call) {
        Host *host = userdata;

        host->closed++;
        host->streaming = NULL;
        host->ticker = loop_source_free(host->ticker);
}

static int on_tick(void *userdata, LoopSource *source) {
        Host *host = userdata;
        _cleanup_free_ char *text = malloc(100001);

        memset(text, 'y', 100000);
        text[100000] = 0;
        varlink_call_continues(host->streaming, json_pack("{ss}", "text", text));
        return 0;
}

static void on_stream(void *userdata, VarlinkCall *call, const json_t *params) {
        Host *host = userdata;

        if (!varlink_call_wants_more(call)) {
                varlink_call_error(call, "org.varlink.service.ExpectedMore", NULL);
                return;
        }
        host->streaming = call;
        varlink_call_on_close(call, on_stream_close, host);
        loop_add_timer(host->loop, 0, NSEC_PER_MSEC, on_tick, host, &host->ticker);
}

static void on_count(void *userdata, VarlinkCall *call, const json_t *params) {
        json_int_t n = json_integer_value(json_object_get(params, "n"));

        for (json_int_t i = 1; i < n; i++)
                varlink_call_continues(call, json_pack("{sI}", "i", i));
        varlink_call_reply(call, json_pack("{sI}", "i", n));
}

static void on_stats(void *userdata, VarlinkCall *call, const json_t *params) {
        Host *host = userdata;
        VarlinkServerStats stats;

        varlink_server_stats(host->server, &stats);
        varlink_call_reply(call, json_pack("{sI sI sI sI sI sI si}", "refused", (json_int_t)stats.refused,
                                           "calls", (json_int_t)stats.calls, "errors", (json_int_t)stats.errors,
                                           "slow", (json_int_t)stats.dropped_slow,
                                           "oversized", (json_int_t)stats.dropped_oversized,
                                           "malformed", (json_int_t)stats.dropped_malformed, "closed", host->closed));
}

static void on_quit(void *userdata, VarlinkCall *call, const json_t *params) {
        Host *host = userdata;

        varlink_call_reply(call, NULL);
        loop_exit(host->loop, 0);
}

static const VarlinkMethod methods[] = {
        {IFACE ".Echo", .handler = on_echo},
        {IFACE ".Big", .handler = on_big},
        {IFACE ".Hold", .handler = on_hold},
        {IFACE ".Release", .handler = on_release},
        {IFACE ".Stream", .more = true, .handler = on_stream},
        {IFACE ".Count", .more = true, .handler = on_count},
        {IFACE ".Stats", .handler = on_stats},
        {IFACE ".Quit", .handler = on_quit},
        {IFACE ".Privileged", .privileged = true, .handler = on_echo},
};
static const VarlinkInterface interfaces[] = {{IFACE, "interface org.example.Test\n"}};

static int serve(const char *path, uint64_t patience_nsec, rlim_t descriptors, int ready) {
        struct rlimit limit;
        Host host = {};
        int fd, r;

        r = loop_new(&host.loop);
        if (r == -ENOSYS || r == -EPERM)
                return 77;
        CHECK(r == 0, "loop_new");
        CHECK(varlink_listen(path, &fd) == 0, "varlink_listen");
        CHECK(chmod(path, 0666) == 0, "chmod"); /* for the unprivileged client */
        CHECK(varlink_server_new(host.loop, fd, methods, ELEMENTSOF(methods), interfaces, ELEMENTSOF(interfaces), &host,
                                 &host.server) == 0, "varlink_server_new");
        if (patience_nsec)
                varlink_server_set_patience(host.server, patience_nsec);
        if (descriptors) {
                int next = dup(ready);

                close(next);
                limit.rlim_cur = limit.rlim_max = (rlim_t)next + descriptors;
                CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
        }
        CHECK(write(ready, "", 1) == 1, "ready");
        CHECK(loop_run(host.loop) == 0, "loop_run");
        varlink_server_free(host.server);
        if (host.held) /* its connection went with the server: the answer goes nowhere */
                varlink_call_reply(host.held, NULL);
        loop_free(host.loop);
        return 0;
}

static int start(void **state, uint64_t patience_nsec, rlim_t descriptors) {
        Fixture *fixture = calloc(1, sizeof *fixture);
        int ready[2];
        char c;

        if (!fixture)
                return -1;
        strcpy(fixture->directory, "/tmp/test-varlink.XXXXXX");
        assert_non_null(mkdtemp(fixture->directory));
        snprintf(fixture->path, sizeof fixture->path, "%s/sub/socket", fixture->directory);
        chmod(fixture->directory, 0755);
        assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
        fixture->pid = fork();
        if (fixture->pid == 0)
                exit(serve(fixture->path, patience_nsec, descriptors, ready[1]));
        close(ready[1]);
        if (read(ready[0], &c, 1) != 1)
                TEST_SKIP("io_uring is refused here");
        close(ready[0]);
        *state = fixture;
        return 0;
}

static int start_patient(void **state) { return start(state, 0, 0); }
static int start_impatient(void **state) { return start(state, NSEC_PER_SEC, 0); }
static int start_poor(void **state) { return start(state, 0, 10); } /* this many descriptors more */

static int stop(void **state) {
        Fixture *fixture = *state;
        char *error = NULL, parent[96];
        json_t *reply = NULL;
        int fd, status;

        assert_int_equal(varlink_connect(fixture->path, &fd), 0);
        assert_int_equal(varlink_call(fd, IFACE ".Quit", NULL, 0, &reply, &error), 0);
        json_decref(reply);
        close(fd);
        assert_int_equal(waitpid(fixture->pid, &status, 0), fixture->pid);
        assert_int_equal(status, 0); /* a sanitizer's complaint would show here */
        snprintf(parent, sizeof parent, "%s/sub", fixture->directory);
        unlink(fixture->path);
        rmdir(parent);
        rmdir(fixture->directory);
        free(fixture);
        return 0;
}

/* ---- clients */

static int dial(void **state) {
        Fixture *fixture = *state;
        int fd;

        assert_int_equal(varlink_connect(fixture->path, &fd), 0);
        return fd;
}

static json_t *call_ok(int fd, const char *method, json_t *params) {
        json_t *reply = NULL;
        char *error = NULL;
        int r = varlink_call(fd, method, params, 0, &reply, &error);

        if (r != 0)
                print_error("%s: %d %s\n", method, r, error);
        assert_int_equal(r, 0);
        return reply;
}

static void call_fails(int fd, const char *method, json_t *params, const char *error_wanted, const char *key,
                       const char *value) {
        json_t *reply = NULL;
        char *error = NULL;

        assert_int_equal(varlink_call(fd, method, params, 0, &reply, &error), VARLINK_E_ERROR);
        assert_string_equal(error, error_wanted);
        if (key)
                assert_string_equal(json_string_value(json_object_get(reply, key)), value);
        json_decref(reply);
        free(error);
}

static json_int_t counter(void **state, const char *name) {
        int fd = dial(state);
        json_t *reply = call_ok(fd, IFACE ".Stats", NULL);
        json_int_t n = json_integer_value(json_object_get(reply, name));

        json_decref(reply);
        close(fd);
        return n;
}

static void send_bytes(int fd, const void *bytes, size_t size) {
        const char *p = bytes;

        while (size > 0) {
                ssize_t n = send(fd, p, size, MSG_NOSIGNAL);

                if (n < 0) /* the server dropped us half-way */
                        return;
                p += n;
                size -= (size_t)n;
        }
}
#define SEND(fd, text) send_bytes(fd, text, sizeof(text)) /* with its NUL */

/* Reads up to and with one NUL; false when the connection ends first. */
static bool read_text(int fd, char *text, size_t size) {
        for (size_t i = 0; i < size; i++) {
                if (recv(fd, text + i, 1, 0) != 1)
                        return false;
                if (text[i] == 0)
                        return true;
        }
        return false;
}

static bool dropped(int fd) {
        char c[4096];
        ssize_t n;

        while ((n = recv(fd, c, sizeof c, 0)) > 0)
                ;
        return n == 0 || errno == ECONNRESET;
}

/* ---- tests */

static void test_calls(void **state) {
        int fd = dial(state);
        json_t *reply;

        reply = call_ok(fd, IFACE ".Echo", json_pack("{ss si}", "a", "ä\n\"", "n", 7));
        assert_string_equal(json_string_value(json_object_get(reply, "a")), "ä\n\"");
        assert_int_equal(json_integer_value(json_object_get(reply, "n")), 7);
        json_decref(reply);
        reply = call_ok(fd, IFACE ".Echo", NULL);
        assert_int_equal(json_object_size(reply), 0);
        json_decref(reply);
        reply = call_ok(fd, "org.varlink.service.GetInfo", NULL);
        assert_string_equal(json_string_value(json_object_get(reply, "product")), "ksmd-user");
        assert_int_equal(json_array_size(json_object_get(reply, "interfaces")), 2);
        json_decref(reply);
        reply = call_ok(fd, "org.varlink.service.GetInterfaceDescription", json_pack("{ss}", "interface", IFACE));
        assert_string_equal(json_string_value(json_object_get(reply, "description")), interfaces[0].description);
        json_decref(reply);
        reply = call_ok(fd, "org.varlink.service.GetInterfaceDescription",
                        json_pack("{ss}", "interface", "org.varlink.service"));
        assert_non_null(strstr(json_string_value(json_object_get(reply, "description")), "error ExpectedMore"));
        json_decref(reply);
        reply = call_ok(fd, IFACE ".Big", json_pack("{si}", "size", 3000000)); /* more than any socket buffer */
        assert_int_equal(json_string_length(json_object_get(reply, "text")), 3000000);
        json_decref(reply);
        close(fd);
}

static void test_errors(void **state) {
        int fd = dial(state);

        call_fails(fd, IFACE ".Nope", NULL, "org.varlink.service.MethodNotFound", "method", IFACE ".Nope");
        call_fails(fd, "org.varlink.service.Nope", NULL, "org.varlink.service.MethodNotFound", "method",
                   "org.varlink.service.Nope");
        call_fails(fd, "com.example.Nope", NULL, "org.varlink.service.InterfaceNotFound", "interface", "com.example");
        call_fails(fd, "nonsense", NULL, "org.varlink.service.InterfaceNotFound", "interface", "nonsense");
        call_fails(fd, "", NULL, "org.varlink.service.InterfaceNotFound", "interface", "");
        call_fails(fd, "org.varlink.service.GetInterfaceDescription", json_pack("{ss}", "interface", "x.y"),
                   "org.varlink.service.InterfaceNotFound", "interface", "x.y");
        call_fails(fd, "org.varlink.service.GetInterfaceDescription", json_pack("{si}", "interface", 1),
                   "org.varlink.service.InvalidParameter", "parameter", "interface");
        call_fails(fd, IFACE ".Stream", NULL, "org.varlink.service.ExpectedMore", NULL, NULL);
        close(fd);
        assert_int_equal(counter(state, "errors"), 8);
}

static void test_framing(void **state) {
        static const char two[] = "{\"method\":\"" IFACE ".Echo\",\"parameters\":{\"i\":1}}\0"
                                  "{\"method\":\"" IFACE ".Echo\",\"parameters\":{\"i\":2}}";
        int fd = dial(state);
        char text[256];

        for (size_t i = 0; i < sizeof two; i++)
                send_bytes(fd, two + i, 1);
        assert_true(read_text(fd, text, sizeof text));
        assert_string_equal(text, "{\"parameters\":{\"i\":1}}");
        assert_true(read_text(fd, text, sizeof text));
        assert_string_equal(text, "{\"parameters\":{\"i\":2}}");
        /* Who has said all it has to say is still answered. */
        SEND(fd, two);
        shutdown(fd, SHUT_WR);
        assert_true(read_text(fd, text, sizeof text));
        assert_true(read_text(fd, text, sizeof text));
        assert_string_equal(text, "{\"parameters\":{\"i\":2}}");
        assert_true(dropped(fd));
        close(fd);
}

static void test_pipelining(void **state) {
        int fd = dial(state), other = dial(state);
        char text[256];
        json_t *reply;

        SEND(fd, "{\"method\":\"" IFACE ".Hold\"}\0"
                 "{\"method\":\"" IFACE ".Echo\",\"oneway\":true,\"parameters\":{\"i\":1}}\0"
                 "{\"method\":\"" IFACE ".Echo\",\"parameters\":{\"i\":2}}");
        /* The first is not answered yet: nothing may overtake it. */
        do {
                reply = call_ok(other, IFACE ".Stats", NULL);
                json_decref(reply);
                assert_int_equal(recv(fd, text, 1, MSG_DONTWAIT), -1);
                reply = call_ok(other, IFACE ".Release", NULL);
                if (!json_is_true(json_object_get(reply, "held"))) {
                        json_decref(reply);
                        continue;
                }
                json_decref(reply);
                break;
        } while (true);
        assert_true(read_text(fd, text, sizeof text));
        assert_string_equal(text, "{\"parameters\":{\"released\":true}}");
        assert_true(read_text(fd, text, sizeof text)); /* the oneway call has no answer */
        assert_string_equal(text, "{\"parameters\":{\"i\":2}}");
        close(fd);
        close(other);
}

static bool count_reply(void *userdata, json_t *parameters) {
        json_int_t *n = userdata;

        assert_int_equal(json_integer_value(json_object_get(parameters, "i")), ++*n);
        return true;
}

static void test_more(void **state) {
        int fd = dial(state);
        char *error = NULL, text[256];
        json_int_t n = 0;
        json_t *reply;

        assert_int_equal(varlink_call_more(fd, IFACE ".Count", json_pack("{si}", "n", 1000), count_reply, &n, &error),
                         0);
        assert_int_equal(n, 1000);
        /* Asked without "more" there is one answer. */
        reply = call_ok(fd, IFACE ".Count", json_pack("{si}", "n", 3));
        assert_int_equal(json_integer_value(json_object_get(reply, "i")), 3);
        json_decref(reply);
        assert_int_equal(varlink_call_more(fd, IFACE ".Nope", NULL, count_reply, &n, &error), VARLINK_E_ERROR);
        free(error);
        SEND(fd, "{\"method\":\"" IFACE ".Echo\",\"upgrade\":true}");
        assert_true(read_text(fd, text, sizeof text));
        assert_non_null(strstr(text, "InvalidParameter"));
        close(fd);
}

static void test_malformed(void **state) {
        static const char *bad[] = {
                "", " ", "x", "[]", "1", "null", "\"a\"", "{", "{}", "{}{}", "{\"method\":1}", "{\"method\":null}",
                "{\"method\":\"a.b\"} x", "{\"method\":\"a.b\",\"parameters\":[]}", "{\"method\":\"a.b\",\"parameters\":1}",
                "{\"method\":\"a.b\",\"parameters\":null}", "{\"method\":\"a.b\",\"more\":1}",
                "{\"method\":\"a.b\",\"oneway\":\"yes\"}", "{\"method\":\"a.b\",\"more\":true,\"oneway\":true}",
                "{\"method\":\"a.b\",\"method\":\"a.b\"}", "{\"method\":\"a\\u0000b\"}", "{\"method\":\"\xff\xfe\"}",
                "{\"method\":\"a.b\",\"parameters\":{\"n\":99999999999999999999999}}",
                "{\"method\":\"a.b\",\"parameters\":{\"n\":1e999}}",
                "{\"method\":\"a.b\",\"parameters\":{\"d\":[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]}}",
                "GET / HTTP/1.1\r\n\r\n", "\xef\xbb\xbf{}",
        };
        json_int_t calls = counter(state, "calls");

        for (size_t i = 0; i < ELEMENTSOF(bad); i++) {
                int fd = dial(state);

                send_bytes(fd, bad[i], strlen(bad[i]) + 1);
                if (!dropped(fd))
                        fail_msg("not dropped: %s", bad[i]);
                close(fd);
        }
        assert_int_equal(counter(state, "malformed"), ELEMENTSOF(bad));
        assert_int_equal(counter(state, "calls"), calls + 2); /* nothing of it became a call */
}

static void test_oversized(void **state) {
        static char text[(64 << 10) + 2];
        int fd = dial(state);
        char reply[256];
        size_t n;

        /* As long as it may be. */
        n = (size_t)snprintf(text, sizeof text, "{\"method\":\"%s.Echo\",\"parameters\":{}}", IFACE);
        memset(text + n, ' ', (64 << 10) - n);
        text[64 << 10] = 0;
        send_bytes(fd, text, (64 << 10) + 1);
        assert_true(read_text(fd, reply, sizeof reply));
        assert_string_equal(reply, "{\"parameters\":{}}");
        assert_int_equal(counter(state, "oversized"), 0);
        /* One more. */
        text[64 << 10] = ' ';
        text[(64 << 10) + 1] = 0;
        send_bytes(fd, text, sizeof text);
        assert_true(dropped(fd));
        close(fd);
        fd = dial(state);
        for (unsigned i = 0; i < 100; i++)
                send_bytes(fd, text, 64 << 10); /* and never a NUL */
        assert_true(dropped(fd));
        close(fd);
        assert_int_equal(counter(state, "oversized"), 2);
}

static void test_too_many(void **state) {
        int fds[32], fd;
        char *error = NULL;
        json_t *reply = NULL;

        if (geteuid() != 0)
                skip();
        for (unsigned i = 0; i < ELEMENTSOF(fds); i++) {
                fds[i] = dial(state);
                json_decref(call_ok(fds[i], IFACE ".Echo", NULL));
        }
        fd = dial(state);
        assert_int_equal(varlink_call(fd, IFACE ".Echo", NULL, 0, &reply, &error), -ECONNRESET);
        close(fd);
        json_decref(call_ok(fds[31], IFACE ".Echo", NULL)); /* the others did not notice */
        close(fds[0]);
        json_decref(call_ok(fds[31], IFACE ".Echo", NULL));
        assert_int_equal(counter(state, "refused"), 1);
        for (unsigned i = 1; i < ELEMENTSOF(fds); i++)
                close(fds[i]);
}

/* As many connections of somebody who is not root as he gets, which then do nothing; ready: a byte when he has them. */
static void hold_connections(const char *path, int ready) {
        json_t *reply = NULL;
        char *error = NULL;
        unsigned n = 0;
        int fd;

        CHECK(setresuid(65534, 65534, 65534) == 0, "setresuid");
        while (varlink_connect(path, &fd) == 0 && varlink_call(fd, IFACE ".Echo", NULL, 0, &reply, &error) == 0) {
                json_decref(reply);
                n++;
        }
        CHECK(n == 24, "%u connections", n);
        CHECK(write(ready, "", 1) == 1, "write");
        for (;;)
                pause();
}

static void test_root_gets_in(void **state) {
        Fixture *fixture = *state;
        int fds[8], ready[2];
        char byte;
        pid_t pid;

        if (geteuid() != 0)
                skip();
        assert_int_equal(pipe(ready), 0);
        pid = fork();
        if (pid == 0)
                hold_connections(fixture->path, ready[1]);
        close(ready[1]);
        assert_int_equal(read(ready[0], &byte, 1), 1);
        close(ready[0]);
        for (unsigned i = 0; i < ELEMENTSOF(fds); i++) {
                fds[i] = dial(state);
                json_decref(call_ok(fds[i], IFACE ".Privileged", NULL));
        }
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        for (unsigned i = 0; i < ELEMENTSOF(fds); i++)
                close(fds[i]);
}

/* Out of descriptors: who is in is served, who waits gets in when others have left. */
static void test_no_descriptors(void **state) {
        int fds[24];

        for (unsigned i = 0; i < ELEMENTSOF(fds); i++) {
                fds[i] = dial(state);
                SEND(fds[i], "{\"method\":\"" IFACE ".Echo\"}");
        }
        for (unsigned i = 0; i < ELEMENTSOF(fds); i++) {
                char text[64];

                assert_true(read_text(fds[i], text, sizeof text));
                if (i == 0) /* the last is not in yet */
                        assert_int_equal(recv(fds[ELEMENTSOF(fds) - 1], text, 1, MSG_DONTWAIT), -1);
                close(fds[i]);
        }
        assert_int_equal(counter(state, "refused"), 0);
}

static void test_peer_gone(void **state) {
        static const char *hold[] = {"{\"method\":\"" IFACE ".Hold\",\"parameters\":{\"tell\":true}}",
                                     "{\"method\":\"" IFACE ".Hold\"}"};
        json_t *reply;
        int fd, other = dial(state);
        bool held;

        fd = dial(state);
        send_bytes(fd, hold[0], strlen(hold[0]) + 1);
        close(fd);
        do { /* told of it */
                reply = call_ok(other, IFACE ".Stats", NULL);
                held = json_integer_value(json_object_get(reply, "closed")) == 0;
                json_decref(reply);
        } while (held);
        /* Not told: answers into the void. */
        fd = dial(state);
        send_bytes(fd, hold[1], strlen(hold[1]) + 1);
        close(fd);
        do {
                reply = call_ok(other, IFACE ".Release", NULL);
                held = json_is_true(json_object_get(reply, "held"));
                json_decref(reply);
        } while (!held);
        /* Left for the server's end. */
        fd = dial(state);
        send_bytes(fd, hold[1], strlen(hold[1]) + 1);
        close(fd);
        close(other);
}

static void test_privileged(void **state) {
        Fixture *fixture = *state;
        int fd = dial(state), status;
        pid_t pid;

        if (geteuid() != 0) {
                call_fails(fd, IFACE ".Privileged", NULL, "org.varlink.service.PermissionDenied", NULL, NULL);
                close(fd);
                return;
        }
        json_decref(call_ok(fd, IFACE ".Privileged", NULL));
        close(fd);
        pid = fork();
        if (pid == 0) {
                json_t *reply = NULL;
                char *error = NULL;

                CHECK(setresuid(65534, 65534, 65534) == 0, "setresuid");
                CHECK(varlink_connect(fixture->path, &fd) == 0, "connect");
                CHECK(varlink_call(fd, IFACE ".Privileged", NULL, 0, &reply, &error) == VARLINK_E_ERROR, "refused");
                CHECK(strcmp(error, "org.varlink.service.PermissionDenied") == 0, "%s", error);
                json_decref(reply);
                free(error);
                CHECK(varlink_call(fd, IFACE ".Echo", NULL, 0, &reply, &error) == 0, "echo");
                json_decref(reply);
                _exit(0);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
}

/* A byte now and then: each arrives well before the deadline, the message as a whole does not. */
static void test_slow_writer(void **state) {
        static const char text[] = "{\"method\":\"" IFACE ".Echo\"}";
        int fd = dial(state), idle = dial(state), good = dial(state);
        unsigned sent = 0;
        char c;

        json_decref(call_ok(good, IFACE ".Echo", NULL));
        while (sent < sizeof text - 1 && recv(fd, &c, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN) {
                send_bytes(fd, text + sent++, 1);
                usleep(200000);
                json_decref(call_ok(good, IFACE ".Echo", NULL));
        }
        assert_true(sent < sizeof text - 1);
        assert_true(dropped(fd));
        assert_true(dropped(idle)); /* never said anything */
        json_decref(call_ok(good, IFACE ".Echo", NULL)); /* older than the deadline, owes nothing */
        assert_int_equal(counter(state, "slow"), 2);
        close(fd);
        close(idle);
        close(good);
}

static void test_slow_reader(void **state) {
        int one = dial(state), pipelined = dial(state), stream = dial(state), good = dial(state);

        SEND(one, "{\"method\":\"" IFACE ".Big\",\"parameters\":{\"size\":5000000}}");
        for (unsigned i = 0; i < 20; i++)
                SEND(pipelined, "{\"method\":\"" IFACE ".Big\",\"parameters\":{\"size\":1000000}}");
        SEND(stream, "{\"method\":\"" IFACE ".Stream\",\"more\":true}");
        while (counter(state, "slow") < 3) {
                json_decref(call_ok(good, IFACE ".Echo", NULL));
                usleep(20000);
        }
        assert_int_equal(counter(state, "closed"), 1);
        assert_true(dropped(one));
        assert_true(dropped(pipelined));
        assert_true(dropped(stream));
        close(one);
        close(pipelined);
        close(stream);
        close(good);
}

static void test_listen(void **state) {
        char directory[] = "/tmp/test-varlink.XXXXXX", path[64], long_path[256];
        struct stat st;
        int fd, other;

        assert_non_null(mkdtemp(directory));
        snprintf(path, sizeof path, "%s/a/b/socket", directory);
        umask(0);
        assert_int_equal(varlink_listen(path, &fd), 0);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode, S_IFSOCK | 0600);
        assert_int_equal(varlink_listen(path, &other), -EADDRINUSE);
        close(fd); /* as a crash leaves it */
        assert_int_equal(varlink_connect(path, &fd), -ECONNREFUSED);
        assert_int_equal(varlink_listen(path, &fd), 0);
        close(fd);
        unlink(path);
        assert_int_equal(varlink_connect(path, &fd), -ENOENT);
        fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        assert_int_equal(varlink_listen(path, &other), -EEXIST);
        close(fd);
        unlink(path);
        assert_int_equal(varlink_listen("relative", &fd), -EINVAL);
        memset(long_path, 'x', sizeof long_path - 1);
        long_path[0] = '/';
        long_path[sizeof long_path - 1] = 0;
        assert_int_equal(varlink_listen(long_path, &fd), -ENAMETOOLONG);
        *strrchr(path, '/') = 0;
        rmdir(path);
        *strrchr(path, '/') = 0;
        rmdir(path);
        rmdir(directory);
}

/* The kernel holds a killed server's socket a little longer than the process: its successor must not mind. */
static void test_listen_after_kill(void **state) {
        Fixture *fixture;
        char parent[96];
        int fd, status;

        assert_int_equal(start((void **)&fixture, 0, 0), 0);
        kill(fixture->pid, SIGKILL);
        assert_int_equal(waitpid(fixture->pid, &status, 0), fixture->pid);
        assert_int_equal(varlink_listen(fixture->path, &fd), 0);
        close(fd);
        unlink(fixture->path);
        snprintf(parent, sizeof parent, "%s/sub", fixture->directory);
        rmdir(parent);
        rmdir(fixture->directory);
        free(fixture);
}

#define WITH(f, setup) cmocka_unit_test_setup_teardown(f, setup, stop)

int main(void) {
        const struct CMUnitTest tests[] = {
                WITH(test_calls, start_patient),
                WITH(test_errors, start_patient),
                WITH(test_framing, start_patient),
                WITH(test_pipelining, start_patient),
                WITH(test_more, start_patient),
                WITH(test_malformed, start_patient),
                WITH(test_oversized, start_patient),
                WITH(test_too_many, start_patient),
                WITH(test_root_gets_in, start_patient),
                WITH(test_no_descriptors, start_poor),
                WITH(test_peer_gone, start_patient),
                WITH(test_privileged, start_patient),
                WITH(test_slow_writer, start_impatient),
                WITH(test_slow_reader, start_impatient),
                cmocka_unit_test(test_listen),
                cmocka_unit_test(test_listen_after_kill),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
