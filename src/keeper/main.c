/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/log.h"
#include "base/util.h"
#include "keeper/privileges.h"
#include "keeper/serve.h"
#include "keeper/server.h"
#include "keeper/store.h"

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/*
 * ksmd-user-keeper: answers the faults of remapped memory, and outlives the daemon.
 *
 * It is two processes that share one table of descriptors (CLONE_FILES) and, but for that, nothing but the notes in
 * hold.h: one serves, the other waits for it to end and starts it again. The kernel un-registers a userfaultfd's memory
 * when its last descriptor is closed, and what was guarded then shows stale bytes; and when a target forks, the kernel
 * puts the child's userfaultfd straight into the table of whoever reads the event. With a table of its own, a server
 * killed in the very moment after that would take the child's guard along; this way there is no such moment: whoever is
 * killed, the table lives on in the other. A server whose keeper was killed becomes the keeper.
 *
 * A service manager knows one main process. When that is killed it starts another one, although the server has become
 * the keeper and lives: two keepers would answer the same userfaultfds, and keeper_sync() would speak for one of them
 * only. So a keeper has a record lock on the listening socket. Such locks belong to the table of descriptors: this one
 * lasts until the last process of the two is gone. Who does not get it waits for that, holding nothing, and then ends,
 * to be started with what the store has by then.
 */
#define LISTEN_FDS_START 3 /* sd_listen_fds(3) */
#define HURRIED_RESTARTS 10U
#define HURRY_NSEC NSEC_PER_SEC
#define DESCRIPTORS_MAX 524288U /* held: 0.1 KiB each, where used */
#define STORE_TRIES 100U
#define STORE_RETRY_USEC 10000U

static int usage(FILE *out, int result) {
        fprintf(out,
                "Usage: ksmd-user-keeper [--listen FD]\n"
                "Answers the faults of memory that ksmd-user remapped. Started by it, or by its socket unit.\n");
        return result;
}

static bool is_listening(int fd) {
        int on = 0;
        socklen_t size = sizeof on;

        return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) == 0 && on;
}

/* sd_listen_fds_with_names(3) without its library, which would be locked into memory. The names serve to remove what is
 * stored (store.h), what a descriptor is we ask the kernel. Returns the end of the descriptors. */
static int passed_end(void) {
        const char *pid = getenv("LISTEN_PID"), *n_fds = getenv("LISTEN_FDS");
        int end = LISTEN_FDS_START;

        if (!pid || atoi(pid) != getpid() || !n_fds)
                return end;
        end += MAX_OF(atoi(n_fds), 0);
        for (int fd = LISTEN_FDS_START; fd < end; fd++)
                (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
        return end;
}

static int find_socket(int argc, char **argv, int end) {
        if (argc >= 3 && strcmp(argv[1], "--listen") == 0)
                return is_listening(atoi(argv[2])) ? atoi(argv[2]) : -EBADF;
        for (int fd = LISTEN_FDS_START; fd < end; fd++)
                if (is_listening(fd))
                        return fd;
        return -EBADF;
}

/* Returns when there is no other keeper; 1: there was one until now. */
static int become_the_only_one(int listen_fd) {
        struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

        if (fcntl(listen_fd, F_SETLK, &lock) == 0)
                return 0;
        if (errno != EAGAIN && errno != EACCES)
                return -errno;
        (void)close_range(0, (unsigned)listen_fd - 1, 0);
        (void)close_range((unsigned)listen_fd + 1, UINT_MAX, 0);
        (void)prctl(PR_SET_NAME, "ksmd-keeper-3");
        while (fcntl(listen_fd, F_SETLKW, &lock) < 0)
                if (errno != EINTR)
                        return -errno;
        return 1;
}

/* Our own table into the store, those of keepers before us read, and out of it. What is not told in time stays there,
 * and is read by whoever comes next. */
static void take_over(Hold *hold, int notify_fd, int table_fd, int end) {
        for (int fd = LISTEN_FDS_START; fd < end; fd++)
                (void)hold_adopt(hold, fd, LISTEN_FDS_START, end);
        for (unsigned i = 0; !store_add(notify_fd, table_fd, guard_id(table_fd)); i++) {
                if (i == STORE_TRIES)
                        return;
                usleep(STORE_RETRY_USEC);
        }
        for (int fd = LISTEN_FDS_START; fd < end; fd++)
                if (hold_is_table(fd))
                        (void)store_remove(notify_fd, guard_id(fd));
}

static void ignore_signals(void) {
        /* It ends when it holds nothing and not before: whoever asks it to would have targets read wrong bytes. */
        static const int signals[] = { SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGUSR1, SIGUSR2, SIGALRM };

        for (size_t i = 0; i < ELEMENTSOF(signals); i++)
                (void)signal(signals[i], SIG_IGN);
}

/* A child of the caller's that shares its descriptors. */
static pid_t fork_sharing_files(void) { return (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0); }

/* SERVER_E_ALONE: this process has to be the keeper now. */
static int serve(Hold *hold, ServerOptions *options, pid_t keeper) {
        int r;

        (void)prctl(PR_SET_NAME, "ksmd-keeper");
        privileges_lock_memory();
        options->keeper_pidfd = (int)syscall(SYS_pidfd_open, keeper, 0);
        if (getppid() != keeper)
                return SERVER_E_ALONE;
        if (options->keeper_pidfd < 0)
                return -errno;
        r = server_run(hold, options);
        if (r < 0)
                log_error("keeper: %s", strerror(-r));
        return r;
}

static int keep(Hold *hold, ServerOptions *options) {
        unsigned hurried = 0;

        for (;;) {
                pid_t keeper = (pid_t)syscall(SYS_getpid), server = fork_sharing_files();
                int status = 0;

                if (server == 0) {
                        int r = serve(hold, options, keeper);
                        if (r != SERVER_E_ALONE)
                                _exit(r == SERVER_E_DONE ? 0 : 1);
                        hold->stats->restarts++;
                        continue; /* start another server, and look after it */
                }
                (void)prctl(PR_SET_NAME, "ksmd-keeper-2");
                if (server > 0) {
                        while (waitpid(server, &status, 0) < 0 && errno == EINTR)
                                ;
                        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
                                return 0;
                }
                hold->stats->restarts++;
                if (++hurried > HURRIED_RESTARTS)
                        usleep(HURRY_NSEC / NSEC_PER_USEC / HURRIED_RESTARTS);
        }
}

int main(int argc, char **argv) {
        ServerOptions options = { .notify_fd = -EBADF, .keeper_pidfd = -EBADF };
        _cleanup_close_ int table_fd = -EBADF;
        int end = passed_end(), r;
        struct rlimit limit;
        Hold hold;

        if (argc == 2 && strcmp(argv[1], "--version") == 0) {
                puts("ksmd-user-keeper " KSMD_USER_VERSION);
                return 0;
        }
        if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0))
                return usage(stdout, 0);
#ifdef KEEPER_TEST
        serve_left_out = (unsigned)strtoul(strrchr(argv[0], '-') + 1, NULL, 10); /* called by a name that ends in it */
#endif
        options.listen_fd = find_socket(argc, argv, end);
        if (options.listen_fd < 0)
                return usage(stderr, 2);
        if (fcntl(options.listen_fd, F_SETFL, O_NONBLOCK) < 0)
                return 1;
        ignore_signals();
        r = become_the_only_one(options.listen_fd);
        if (r != 0)
                return 1;
        options.notify_fd = store_open();
        privileges_prepare();
        r = getrlimit(RLIMIT_NOFILE, &limit) < 0 ? -errno
                : hold_init(&hold, (int)MIN_OF((uint64_t)limit.rlim_cur, (uint64_t)DESCRIPTORS_MAX), &table_fd);
        if (r == 0) {
                take_over(&hold, options.notify_fd, table_fd, end);
                table_fd = safe_close(table_fd);
                r = privileges_drop();
        }
        if (r < 0) {
                log_error("keeper: %s", strerror(-r));
                return 1;
        }
        return keep(&hold, &options);
}
