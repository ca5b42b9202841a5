/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* ksmd-user(8): arguments only; everything else is the manager's. */
#include "base/clock.h"
#include "base/log.h"
#include "control/varlink.h"
#include "daemon/manager.h"
#include "daemon/notify.h"

#include <getopt.h>
#include <linux/capability.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/resource.h>

#define SOCKET_TRIES 10U

static int usage(FILE *out, int result) {
        fprintf(out,
                "Usage: ksmd-user [OPTION]...\n"
                "Merges identical anonymous pages of the processes whose cgroups the configuration opts in.\n"
                "\n"
                "      --config FILE    read FILE (and FILE.d/*.conf) instead of " KSMD_USER_SYSCONFDIR
                "/ksmd-user.conf\n"
                "      --check-config   read the configuration, say what is wrong with it, exit 1 if anything is\n"
                "      --once           converge once over what is opted in, print the statistics, leave it merged\n"
                "      --version        print the version\n"
                "  -h, --help           print this\n");
        return result;
}

static void print_warning(void *userdata, const char *file, unsigned line, const char *message) {
        if (line)
                fprintf(stderr, "%s:%u: %s\n", file, line, message);
        else
                fprintf(stderr, "%s: %s\n", file, message);
}

static int check_config(const char *path) {
        _cleanup_(conf_freep) Conf *conf = NULL;
        size_t opted_in = 0;
        int r = conf_load("", path, print_warning, NULL, &conf);

        if (r < 0) {
                fprintf(stderr, "the configuration cannot be read: %s\n", strerror(-r));
                return 1;
        }
        for (size_t i = 0; i < conf->n_cgroups; i++)
                opted_in += conf->cgroups[i].merge != CONF_MERGE_NO;
        printf("%zu [Cgroup] sections, %zu of them opt cgroups in; warnings: %u\n", conf->n_cgroups, opted_in,
               conf->n_warnings);
        return conf->n_warnings ? 1 : 0;
}

/* Every target takes up to five descriptors: as many as we may have. The usual soft limit of 1,024 is for programs that
 * use select(2); nothing here does. */
static void raise_open_files(void) {
        struct rlimit limit;

        if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= limit.rlim_max)
                return;
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
                log_warning("the limit of open files cannot be raised: %s", strerror(errno));
}

static int serve(Manager *manager) {
        int fd = notify_listen_fd(), r;

        if (fd < 0) {
                /* The kernel closes what a daemon's ring held a moment after that daemon was killed and collected. */
                for (unsigned try = 0; (r = varlink_listen(manager->conf->daemon.socket, &fd)) == -EAGAIN &&
                                       try < SOCKET_TRIES; try++)
                        (void)manager_breathe(manager, NSEC_PER_SEC / 10);
                if (r < 0) {
                        log_error("%s: %s", manager->conf->daemon.socket,
                                  r == -EADDRINUSE ? "another daemon listens there"
                                  : r == -EAGAIN   ? "somebody holds a lock on its directory, or a killed daemon's socket"
                                                   : strerror(-r));
                        return r;
                }
        }
        r = manager_listen(manager, fd);
        if (r < 0) {
                log_error("the control socket cannot be served: %s", strerror(-r));
                return r;
        }
        return manager_run(manager);
}

/* Root alone is not enough where capabilities were taken away (a container): without these two nothing would be merged,
 * process by process. */
static bool capable(void) {
        static const struct {
                unsigned number;
                const char *name, *why;
        } needed[] = {
                { CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "to read processes and mark their memory" },
                { CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "to see which page is on which frame" },
        };
        struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
        struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = { 0 };
        bool all = true;

        if (syscall(SYS_capget, &header, data) < 0)
                return true; /* whatever is missing will show */
        for (size_t i = 0; i < ELEMENTSOF(needed); i++)
                if (!(data[CAP_TO_INDEX(needed[i].number)].effective & CAP_TO_MASK(needed[i].number))) {
                        log_error("%s is missing: it is needed %s", needed[i].name, needed[i].why);
                        all = false;
                }
        return all;
}

int main(int argc, char **argv) {
        enum { CONFIG = 256, CHECK, ONCE, VERSION };
        static const struct option options[] = {
                { "config", required_argument, NULL, CONFIG }, { "check-config", no_argument, NULL, CHECK },
                { "once", no_argument, NULL, ONCE },           { "version", no_argument, NULL, VERSION },
                { "help", no_argument, NULL, 'h' },            { 0 },
        };
        _cleanup_(manager_freep) Manager *manager = NULL;
        const char *config = NULL, *debug = getenv("KSMD_USER_DEBUG");
        bool check = false, once = false;
        int c, r;

        while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1)
                switch (c) {
                case CONFIG:
                        config = optarg;
                        break;
                case CHECK:
                        check = true;
                        break;
                case ONCE:
                        once = true;
                        break;
                case VERSION:
                        puts("ksmd-user " KSMD_USER_VERSION);
                        return 0;
                case 'h':
                        return usage(stdout, 0);
                default:
                        return usage(stderr, 2);
                }
        if (optind < argc) {
                fprintf(stderr, "ksmd-user: unexpected argument '%s'\n", argv[optind]);
                return usage(stderr, 2);
        }
        if (check && once) {
                fputs("ksmd-user: --check-config and --once exclude each other\n", stderr);
                return usage(stderr, 2);
        }
        if (check)
                return check_config(config);
        if (debug && *debug && strcmp(debug, "0") != 0)
                log_set_level(LOG_LEVEL_DEBUG);
        if (geteuid() != 0) {
                log_error("must be run as root: it reads and changes other users' processes");
                return 1;
        }
        raise_open_files();
        if (!capable())
                return 1;
        r = manager_new(config, once, &manager);
        if (r < 0)
                return 1;
        r = once ? manager_run_once(manager) : serve(manager);
        return r < 0 ? 1 : 0;
}
