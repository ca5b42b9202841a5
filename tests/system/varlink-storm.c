/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A thousand hostile clients against a Varlink server: garbage, messages without end, one byte now and then, answers
 * that nobody reads, silence, connections closed in mid-call. Meanwhile a good client that was there before is answered
 * each time, and new good ones get in; afterwards the server has nothing left of it all and is at rest.
 *
 * With --no-deadline, the negative control, slow peers may keep what they hold for ever: that must fail.
 */

#include "base/io.h"
#include "control/varlink-client.h"
#include "control/varlink.h"

#include "test.h"

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define IFACE "org.example.Storm"
#define STORMERS 20U
#define CLIENTS_EACH 50U
#define ANSWER_LIMIT_NSEC (5 * NSEC_PER_SEC)    /* each call of the good client */
#define ADMISSION_LIMIT_NSEC (20 * NSEC_PER_SEC) /* a new good client, with retries */
#define RESIDENT_GROWTH_MAX_KB (96L << 10)      /* 32 connections with one big answer each, and the allocator's slack */

/* A sanitizer keeps freed memory: what is resident then says nothing. */
#if defined __has_feature
#if __has_feature(address_sanitizer)
#define SANITIZED true
#endif
#elif defined __SANITIZE_ADDRESS__
#define SANITIZED true
#endif
#ifndef SANITIZED
#define SANITIZED false
#endif

static char directory[] = "/tmp/varlink-storm.XXXXXX", path[64];
static VarlinkServer *server;
static pid_t server_pid;

static void on_ping(void *userdata, VarlinkCall *call, const json_t *params) { varlink_call_reply(call, NULL); }

static void on_big(void *userdata, VarlinkCall *call, const json_t *params) {
        static char text[2 << 20];

        memset(text, 'x', sizeof text - 1);
        varlink_call_reply(call, json_pack("{ss}", "text", text));
}

static void on_stats(void *userdata, VarlinkCall *call, const json_t *params) {
        VarlinkServerStats s;

        varlink_server_stats(server, &s);
        varlink_call_reply(call, json_pack("{sI sI sI sI sI}", "connections", (json_int_t)s.connections, "refused",
                                           (json_int_t)s.refused, "slow", (json_int_t)s.dropped_slow, "oversized",
                                           (json_int_t)s.dropped_oversized, "malformed", (json_int_t)s.dropped_malformed));
}

static const VarlinkMethod methods[] = {
        {.name = IFACE ".Ping", .handler = on_ping},
        {.name = IFACE ".Big", .handler = on_big},
        {.name = IFACE ".Stats", .handler = on_stats},
};
static const VarlinkInterface interfaces[] = {{IFACE, "interface " IFACE "\n"}};

static void serve(int fd, uint64_t patience_nsec) {
        Loop *loop;
        int r = loop_new(&loop);

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (r == -ENOSYS || r == -EPERM)
                _exit(77);
        CHECK(r == 0, "loop");
        CHECK(varlink_server_new(loop, fd, methods, ELEMENTSOF(methods), interfaces, ELEMENTSOF(interfaces), NULL,
                                 &server) == 0, "server");
        varlink_server_set_patience(server, patience_nsec);
        CHECK(loop_run(loop) == 0, "loop_run");
}

/* One hostile client: keeps its descriptor until told to end. */
static void attack(unsigned kind, int fd) {
        static char block[80 << 10];

        memset(block, 'a', sizeof block);
        switch (kind % 6) {
        case 0: /* garbage */
                send(fd, "GET / HTTP/1.1\r\n\r\n", 19, MSG_NOSIGNAL | MSG_DONTWAIT);
                break;
        case 1: /* no end */
                send(fd, block, sizeof block, MSG_NOSIGNAL | MSG_DONTWAIT);
                break;
        case 2: /* a byte now and then: each time it is called */
                send(fd, "{", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
                break;
        case 3: /* asks, and does not read */
                for (unsigned i = 0; i < 10; i++)
                        send(fd, "{\"method\":\"" IFACE ".Big\"}", sizeof "{\"method\":\"" IFACE ".Big\"}",
                             MSG_NOSIGNAL | MSG_DONTWAIT);
                break;
        case 4: /* silence */
                break;
        default: /* asks much and goes */
                for (unsigned i = 0; i < 100; i++)
                        send(fd, "{\"method\":\"" IFACE ".Ping\"}", sizeof "{\"method\":\"" IFACE ".Ping\"}",
                             MSG_NOSIGNAL | MSG_DONTWAIT);
                shutdown(fd, SHUT_RDWR);
        }
}

/* CLIENTS_EACH clients at a time; who was dropped comes again as another kind. */
static void storm(unsigned seed) {
        int fds[CLIENTS_EACH];
        unsigned kinds[CLIENTS_EACH];

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (unsigned i = 0; i < CLIENTS_EACH; i++)
                fds[i] = -EBADF;
        for (unsigned round = 0;; round++) {
                for (unsigned i = 0; i < CLIENTS_EACH; i++) {
                        struct pollfd pollfd = {.fd = fds[i]};

                        if (fds[i] >= 0 && poll(&pollfd, 1, 0) == 1 && pollfd.revents & (POLLHUP | POLLERR))
                                fds[i] = safe_close(fds[i]);
                        if (fds[i] < 0 && varlink_connect(path, &fds[i]) == 0)
                                attack(kinds[i] = seed + i + round, fds[i]);
                        else if (fds[i] >= 0 && kinds[i] % 6 == 2)
                                attack(kinds[i], fds[i]);
                }
                usleep(100000);
        }
}

static bool call_once(int fd, const char *method, json_t **ret) {
        json_t *reply = NULL;
        char *error = NULL;
        int r = varlink_call(fd, method, NULL, ANSWER_LIMIT_NSEC, &reply, &error);

        free(error);
        if (r != 0)
                json_decref(reply);
        else if (ret)
                *ret = reply;
        else
                json_decref(reply);
        return r == 0;
}

static bool no_deadline;

/* A new client that gets in as soon as one of 32 places is free. */
static uint64_t admit(void) {
        uint64_t begin = now_nsec();

        while (now_nsec() - begin < ADMISSION_LIMIT_NSEC) {
                int fd;
                bool done;

                CHECK(varlink_connect(path, &fd) == 0, "connect");
                done = call_once(fd, IFACE ".Ping", NULL);
                close(fd);
                if (done)
                        return now_nsec() - begin;
                usleep(2000);
        }
        CHECK_AS(no_deadline ? TEST_NOTICED : TEST_FAILED, false, "a new client was not admitted within 20 s");
        return 0;
}

static long status_kb(const char *field) {
        char name[64];
        _cleanup_free_ char *text = NULL;

        snprintf(name, sizeof name, "/proc/%d/status", server_pid);
        CHECK(read_file(AT_FDCWD, name, &text, NULL) == 0, "status");
        CHECK(strstr(text, field), "%s", field);
        return atol(strstr(text, field) + strlen(field));
}

static unsigned descriptors(void) {
        char name[64];
        unsigned n = 0;
        DIR *d;

        snprintf(name, sizeof name, "/proc/%d/fd", server_pid);
        d = opendir(name);
        CHECK(d, "fd");
        while (readdir(d))
                n++;
        closedir(d);
        return n;
}

static uint64_t server_cpu_nsec(void) {
        char name[64];
        _cleanup_free_ char *text = NULL;

        snprintf(name, sizeof name, "/proc/%d/schedstat", server_pid);
        CHECK(read_file(AT_FDCWD, name, &text, NULL) == 0, "schedstat");
        return strtoull(text, NULL, 10);
}

static void cleanup(void) {
        unlink(path);
        rmdir(directory);
}

static json_int_t get(const json_t *stats, const char *name) { return json_integer_value(json_object_get(stats, name)); }

int main(int argc, char **argv) {
        pid_t stormers[STORMERS];
        uint64_t begin, longest = 0, longest_admission = 0, cpu;
        unsigned fds_before, calls = 0, admitted = 0;
        json_t *stats;
        long rss_before;
        int fd, good, status;

        no_deadline = argc > 1 && strcmp(argv[1], "--no-deadline") == 0;
        CHECK(mkdtemp(directory), "mkdtemp");
        snprintf(path, sizeof path, "%s/socket", directory);
        CHECK(varlink_listen(path, &fd) == 0, "listen");
        server_pid = fork();
        if (server_pid == 0)
                serve(fd, no_deadline ? 3600 * NSEC_PER_SEC : NSEC_PER_SEC);
        atexit(cleanup);
        close(fd);
        CHECK(varlink_connect(path, &good) == 0, "connect");
        if (!call_once(good, IFACE ".Ping", NULL)) {
                CHECK(waitpid(server_pid, &status, 0) == server_pid && WEXITSTATUS(status) == 77, "the server ended");
                TEST_SKIP("io_uring is refused here");
        }
        fds_before = descriptors();
        rss_before = status_kb("VmRSS:");

        for (unsigned i = 0; i < STORMERS; i++) {
                stormers[i] = fork();
                if (stormers[i] == 0)
                        storm(i * 7);
        }
        usleep(500000); /* let every place be taken */
        for (begin = now_nsec(); now_nsec() - begin < 8 * NSEC_PER_SEC; calls++) {
                uint64_t t = now_nsec();

                CHECK(call_once(good, IFACE ".Ping", NULL), "the good client was not answered");
                longest = MAX_OF(longest, now_nsec() - t);
                if (calls % 20 == 0) {
                        longest_admission = MAX_OF(longest_admission, admit());
                        admitted++;
                }
                usleep(10000);
        }
        for (unsigned i = 0; i < STORMERS; i++) {
                kill(stormers[i], SIGKILL);
                waitpid(stormers[i], NULL, 0);
        }
        CHECK(call_once(good, IFACE ".Stats", &stats), "stats");
        printf("%u calls, longest %.1f ms; %u admitted, longest %.1f ms\n", calls, (double)longest / 1e6, admitted,
               (double)longest_admission / 1e6);
        printf("%lld connections, %lld refused; dropped: %lld slow, %lld oversized, %lld malformed\n",
               get(stats, "connections"), get(stats, "refused"), get(stats, "slow"), get(stats, "oversized"),
               get(stats, "malformed"));
        CHECK(get(stats, "refused") > 0 && get(stats, "slow") > 0 && get(stats, "oversized") > 0 &&
              get(stats, "malformed") > 0, "every kind was met");
        json_decref(stats);

        for (unsigned i = 0; descriptors() > fds_before && i < 300; i++)
                usleep(10000);
        CHECK(descriptors() == fds_before, "%u descriptors, %u before", descriptors(), fds_before);
        printf("resident: %ld kB before, %ld kB after, %ld kB at most\n", rss_before, status_kb("VmRSS:"),
               status_kb("VmHWM:"));
        CHECK(SANITIZED || status_kb("VmHWM:") - rss_before < RESIDENT_GROWTH_MAX_KB, "memory");
        cpu = server_cpu_nsec();
        usleep(1000000);
        cpu = server_cpu_nsec() - cpu;
        printf("at rest: %.2f ms of CPU in 1 s\n", (double)cpu / 1e6);
        CHECK(cpu < 20 * NSEC_PER_MSEC, "the server spins");
        kill(server_pid, SIGKILL);
        waitpid(server_pid, &status, 0);
        return 0;
}
