/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include <linux/futex.h>
#include <liburing.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* The calls that a thread sleeps in: none may return EINTR (no handler is installed), no timeout may come early. */
#define TIMEOUT_MSEC 3
static const struct timespec timeout = {.tv_nsec = TIMEOUT_MSEC * 1000000};

static int epfd, pipe_fds[2], fed_fds[2], sockets[2], semid;
static struct io_uring ring;
static sigset_t usr1;

static int sleep_epoll(void) {
        struct epoll_event event;
        return epoll_wait(epfd, &event, 1, TIMEOUT_MSEC);
}
static int sleep_epoll_p(void) {
        struct epoll_event event;
        sigset_t none;
        sigemptyset(&none);
        return epoll_pwait(epfd, &event, 1, TIMEOUT_MSEC, &none);
}
static int sleep_nano(void) { return nanosleep(&timeout, NULL); }
static int sleep_futex(void) {
        static uint32_t word;
        int r = (int)syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &timeout, NULL, 0);
        return r < 0 && errno == ETIMEDOUT ? 0 : r;
}
static int sleep_poll(void) {
        struct pollfd fd = {.fd = pipe_fds[0], .events = POLLIN};
        return poll(&fd, 1, TIMEOUT_MSEC);
}
static int sleep_ppoll(void) {
        struct pollfd fd = {.fd = pipe_fds[0], .events = POLLIN};
        return ppoll(&fd, 1, &timeout, NULL);
}
static int sleep_select(void) {
        fd_set set;
        FD_ZERO(&set);
        FD_SET(pipe_fds[0], &set);
        struct timeval tv = {.tv_usec = TIMEOUT_MSEC * 1000};
        return select(pipe_fds[0] + 1, &set, NULL, NULL, &tv);
}
/* The kernel cannot write back what is left of these. */
static int sleep_ppoll_constant(void) {
        return (int)syscall(SYS_ppoll, NULL, 0, &timeout, NULL, 0);
}
static int sleep_pselect_constant(void) {
        return (int)syscall(SYS_pselect6, 0, NULL, NULL, NULL, &timeout, NULL);
}
static int sleep_sigtimedwait(void) {
        int r = sigtimedwait(&usr1, NULL, &timeout);
        return r < 0 && errno == EAGAIN ? 0 : r;
}
static int sleep_semop(void) {
        struct sembuf op = {.sem_num = 0, .sem_op = -1};
        int r = semtimedop(semid, &op, 1, &timeout);
        return r < 0 && errno == EAGAIN ? 0 : r;
}
static int sleep_recv(void) {
        char byte;
        int r = (int)recv(sockets[0], &byte, 1, 0);
        return r < 0 && errno == EAGAIN ? 0 : r;
}
static int sleep_read_socket(void) {
        char byte;
        int r = (int)read(sockets[0], &byte, 1);
        return r < 0 && errno == EAGAIN ? 0 : r;
}
static int sleep_uring(void) {
        struct __kernel_timespec ts = {.tv_nsec = TIMEOUT_MSEC * 1000000};
        struct io_uring_cqe *cqe;
        int r = io_uring_wait_cqe_timeout(&ring, &cqe, &ts);
        errno = -r;
        return r == -ETIME ? 0 : -1;
}
static int sleep_read(void) {
        char byte;
        return read(fed_fds[0], &byte, 1) == 1 ? 0 : -1;
}

typedef struct Sleep {
        const char *name;
        int (*call)(void);
        bool timed;
        uint64_t eintrs;
} Sleep;
static Sleep sleeps[] = {
        {"epoll_wait", sleep_epoll, true, 0}, {"epoll_pwait", sleep_epoll_p, true, 0}, {"nanosleep", sleep_nano, true, 0},
        {"futex", sleep_futex, true, 0},      {"poll", sleep_poll, true, 0},           {"ppoll", sleep_ppoll, true, 0},
        {"ppoll of a constant", sleep_ppoll_constant, true, 0}, {"pselect6 of a constant", sleep_pselect_constant, true, 0},
        {"select", sleep_select, true, 0},    {"sigtimedwait", sleep_sigtimedwait, true, 0},
        {"semtimedop", sleep_semop, true, 0}, {"recv", sleep_recv, true, 0},           {"io_uring", sleep_uring, true, 0},
        {"read", sleep_read, false, 0},       {"read of a socket", sleep_read_socket, true, 0},
};

void victim_eintr(void) {
        CHECK((epfd = epoll_create1(EPOLL_CLOEXEC)) >= 0);
        CHECK(pipe2(pipe_fds, O_CLOEXEC) == 0 && pipe2(fed_fds, O_CLOEXEC) == 0);
        struct epoll_event event = {.events = EPOLLIN};
        CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, pipe_fds[0], &event) == 0);
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
        struct timeval tv = {.tv_usec = TIMEOUT_MSEC * 1000};
        CHECK(setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv) == 0);
        CHECK((semid = semget(IPC_PRIVATE, 1, 0600)) >= 0);
        CHECK(io_uring_queue_init(8, &ring, 0) == 0);
        sigemptyset(&usr1);
        sigaddset(&usr1, SIGUSR1);
        CHECK(sigprocmask(SIG_BLOCK, &usr1, NULL) == 0);
        pid_t feeder = fork();
        CHECK(feeder >= 0);
        if (feeder == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (;;) {
                        nanosleep(&timeout, NULL);
                        if (write(fed_fds[1], "x", 1) != 1)
                                _exit(0);
                }
        }
        victim_ready();
        for (size_t i = 0; victim_goes_on(); i = (i + 1) % ELEMENTSOF(sleeps)) {
                uint64_t began = now_nsec();
                int r = sleeps[i].call();
                if (r < 0 && errno == EINTR && victim_tolerates_eintr) {
                        victim_eintrs++;
                        sleeps[i].eintrs++;
                        continue;
                }
                CHECK(r == 0, "%s returned %d", sleeps[i].name, r);
                uint64_t slept = now_nsec() - began;
                CHECK(!sleeps[i].timed || slept + NSEC_PER_MSEC / 10 >= TIMEOUT_MSEC * NSEC_PER_MSEC, "%s after %lu ns",
                      sleeps[i].name, slept);
        }
        for (size_t i = 0; i < ELEMENTSOF(sleeps); i++)
                if (sleeps[i].eintrs)
                        printf("%s: %lu eintr\n", sleeps[i].name, sleeps[i].eintrs);
        kill(feeder, SIGKILL);
        CHECK(waitpid(feeder, NULL, 0) == feeder);
        CHECK(semctl(semid, 0, IPC_RMID) == 0);
}
