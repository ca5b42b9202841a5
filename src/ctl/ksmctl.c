/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* ksmctl: the command line of ksmd-user (ksmctl(1)). Options and the table of commands; each lives in a file of its
 * kind. */

#include "ctl/ctl.h"

#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#define DEFAULT_SOCKET "/run/ksmd-user/org.ksmduser.Daemon"

static const struct {
        const char *name, *arguments, *help;
        int min, max; /* number of arguments */
        CtlCommand run;
        bool has_json;
} commands[] = {
        { "status", "", "what the daemon is doing and what it saves", 0, 0, command_status, true },
        { "stats", "", "all counters: the daemon, each domain, each cgroup", 0, 0, command_stats, true },
        { "targets", "", "the processes of the cgroups that are opted in", 0, 0, command_targets, true },
        { "top", "[SECONDS]", "status and cgroups, shown anew every 2 seconds until q", 0, 1, command_top, false },
        { "metrics", "", "all counters as OpenMetrics text", 0, 0, command_metrics, false },
        { "estimate", "[PID|CGROUP...]", "what merging would save (needs no daemon)", 0, INT_MAX, command_estimate, true },
        { "why", "PID", "why the pages of a process are merged or not", 1, 1, command_why, true },
        { "scan", "", "begin a pass now and wait for its end", 0, 0, command_scan, true },
        { "pause", "", "begin no more passes; what is merged stays merged", 0, 0, command_pause, true },
        { "resume", "", "go on after pause", 0, 0, command_resume, true },
        { "unmerge", "CGROUP", "take apart what was merged in a cgroup, and leave it alone until a reload", 1, 1, command_unmerge, true },
        { "reload", "", "read the configuration again", 0, 0, command_reload, true },
        { "doctor", "", "what works on this host and what does not (needs no daemon)", 0, 0, command_doctor, true },
};

static void print_help(FILE *f) {
        fprintf(f, "ksmctl [--socket PATH] [--config FILE] [--json] COMMAND\n\n");
        for (size_t i = 0; i < ELEMENTSOF(commands); i++)
                fprintf(f, "  %-10s %-16s %s\n", commands[i].name, commands[i].arguments, commands[i].help);
        fprintf(f, "\n"
                   "  --socket PATH   the daemon's socket (default: " DEFAULT_SOCKET ")\n"
                   "  --config FILE   the configuration that doctor and estimate go by (default: the daemon's)\n"
                   "  --json          print JSON\n"
                   "  --once          top: show it once\n"
                   "  --help, --version\n\n"
                   "Exit status: 0 done, 1 failed, 2 wrong usage, 3 no daemon.\n");
}

static int usage(const char *what, const char *of) {
        fprintf(stderr, "ksmctl: %s%s%s; see ksmctl --help\n", of ?: "", of ? ": " : "", what);
        return CTL_USAGE;
}

static int run_command(const Ctl *ctl, int argc, char **argv) {
        if (argc == 0)
                return usage("no command given", NULL);
        for (size_t i = 0; i < ELEMENTSOF(commands); i++) {
                if (strcmp(argv[0], commands[i].name) != 0)
                        continue;
                if (argc - 1 < commands[i].min)
                        return usage("too few arguments", argv[0]);
                if (argc - 1 > commands[i].max)
                        return usage("too many arguments", argv[0]);
                if (ctl->json && !commands[i].has_json)
                        return usage("has no JSON (status and stats have)", argv[0]);
                return commands[i].run(ctl, argc - 1, argv + 1);
        }
        return usage("no such command", argv[0]);
}

int main(int argc, char **argv) {
        static const struct option options[] = {
                { "socket", required_argument, NULL, 's' },
                { "config", required_argument, NULL, 'c' },
                { "json", no_argument, NULL, 'j' },
                { "once", no_argument, NULL, 'o' },
                { "help", no_argument, NULL, 'h' },
                { "version", no_argument, NULL, 'v' },
                {},
        };
        static char name[] = "ksmctl";
        Ctl ctl = { .socket = DEFAULT_SOCKET };
        int c, r;

        if (argc > 0)
                argv[0] = name; /* by which getopt_long(3) speaks */
        while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0)
                switch (c) {
                case 's':
                        ctl.socket = optarg;
                        break;
                case 'c':
                        ctl.config = optarg;
                        break;
                case 'j':
                        ctl.json = true;
                        break;
                case 'o':
                        ctl.once = true;
                        break;
                case 'h':
                        print_help(stdout);
                        return CTL_DONE;
                case 'v':
                        printf("ksmctl %s\n", KSMD_USER_VERSION);
                        return CTL_DONE;
                default: /* it has been said */
                        fputs("ksmctl: see ksmctl --help\n", stderr);
                        return CTL_USAGE;
                }
        r = run_command(&ctl, argc - optind, argv + optind);
        if (fflush(stdout) == EOF || ferror(stdout))
                return ctl_fail("the output could not be written");
        return r;
}
