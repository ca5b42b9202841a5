/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The guard server of the remap hammer: answers faults of the zero guard with zeros, takes in the guards of children,
 * reads the events of the mute guard and answers none of its faults.
 */
#include "remap-hammer.h"
#include "tests/test.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#define GUARDS_MAX 4096U

static int orders[2];

typedef struct Guards {
        struct pollfd polls[GUARDS_MAX]; /* [0]: orders */
        bool mute[GUARDS_MAX];
        unsigned n;
} Guards;

static void add(Guards *guards, int uffd, bool mute) {
        CHECK(guards->n < GUARDS_MAX, "too many guards");
        guards->polls[guards->n] = (struct pollfd){ .fd = uffd, .events = POLLIN };
        guards->mute[guards->n++] = mute;
}

static void drop(Guards *guards, unsigned i) {
        close(guards->polls[i].fd);
        guards->polls[i] = guards->polls[--guards->n];
        guards->mute[i] = guards->mute[guards->n];
}

static bool is_dead(int uffd) {
        struct uffdio_zeropage zero = { .range = { PAGE_BYTES, PAGE_BYTES } };

        return ioctl(uffd, UFFDIO_ZEROPAGE, &zero) < 0 && errno == ESRCH;
}

static void fill(int uffd, uint64_t address) {
        struct uffdio_zeropage zero = { .range = { address & ~(PAGE_BYTES - 1), PAGE_BYTES } };

        hammer->faults++;
        if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0)
                hammer->zeros++;
        else /* an event has to be read first, or somebody was faster: it faults again */
                (void)ioctl(uffd, UFFDIO_WAKE, &zero.range);
}

/* True: there was something. */
static bool serve(Guards *guards, unsigned i) {
        struct uffd_msg message;

        if (read(guards->polls[i].fd, &message, sizeof message) != sizeof message)
                return false;
        switch (message.event) {
        case UFFD_EVENT_PAGEFAULT:
                if (!guards->mute[i] && !(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP))
                        fill(guards->polls[i].fd, message.arg.pagefault.address);
                break;
        case UFFD_EVENT_FORK:
                hammer->guard_forks++;
                add(guards, (int)message.arg.fork.ufd, false);
                break;
        case UFFD_EVENT_REMAP:
                hammer->guard_remaps++;
                break;
        }
        return true;
}

static void obey(Guards *guards) {
        char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
        uint64_t order[2];
        struct iovec vector = { order, sizeof order };
        struct msghdr header = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
                                 .msg_controllen = sizeof control };
        struct cmsghdr *cmsg;
        int uffd;

        if (recvmsg(orders[1], &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) != sizeof order)
                return;
        cmsg = CMSG_FIRSTHDR(&header);
        if (cmsg) {
                memcpy(&uffd, CMSG_DATA(cmsg), sizeof uffd);
                add(guards, uffd, order[0]);
        }
        for (unsigned i = 1; i < guards->n; i++)
                while (serve(guards, i))
                        ;
        CHECK(send(orders[1], order, sizeof order, 0) == sizeof order, "answer");
        hammer->syncs++;
}

static void run(void) {
        static Guards guards;
        uint64_t swept = now_nsec();

        add(&guards, orders[1], false);
        for (;;) {
                if (poll(guards.polls, guards.n, 20) > 0)
                        for (unsigned i = guards.n; i-- > 0;) {
                                if (i == 0 && guards.polls[0].revents & POLLIN)
                                        obey(&guards);
                                else if (guards.polls[i].revents & POLLIN)
                                        (void)serve(&guards, i);
                        }
                if (guards.n > 64 || now_nsec() - swept > NSEC_PER_SEC) {
                        for (unsigned i = 1; i < guards.n;)
                                if (is_dead(guards.polls[i].fd))
                                        drop(&guards, i);
                                else
                                        i++;
                        swept = now_nsec();
                }
        }
}

pid_t hammer_guard_start(void) {
        CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, orders) == 0, "socketpair");
        pid_t pid = fork();
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                run();
        }
        return pid;
}

/* One order at a time; answers to those who died meanwhile are passed over. */
static int order(uint64_t what, int uffd) {
        static uint64_t number;
        uint64_t message[2] = { what, (uint64_t)getpid() << 32 | ++number }, answer[2];
        char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {};
        struct iovec vector = { message, sizeof message };
        struct msghdr header = { .msg_iov = &vector, .msg_iovlen = 1 };

        if (uffd >= 0) {
                header.msg_control = control;
                header.msg_controllen = sizeof control;
                struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
                cmsg->cmsg_level = SOL_SOCKET;
                cmsg->cmsg_type = SCM_RIGHTS;
                cmsg->cmsg_len = CMSG_LEN(sizeof uffd);
                memcpy(CMSG_DATA(cmsg), &uffd, sizeof uffd);
        }
        if (sendmsg(orders[0], &header, 0) != sizeof message)
                return -errno;
        do
                if (recv(orders[0], answer, sizeof answer, 0) != sizeof answer)
                        return -EIO;
        while (answer[1] != message[1]);
        return 0;
}

void hammer_guard_add(int uffd, bool mute) { CHECK(order(mute, uffd) == 0, "the guard server"); }

int hammer_guard_sync(void *unused) { return order(0, -1); }
