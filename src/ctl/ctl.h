/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>

/*
 * ksmctl: every command is a function of this shape, named in the table of ksmctl.c. It returns the exit status. argv
 * holds the command's own arguments, argc of them, within the bounds that the table gives.
 */
enum { CTL_DONE = 0, CTL_FAILED = 1, CTL_USAGE = 2, CTL_NO_DAEMON = 3 };

typedef struct Ctl {
        const char *socket;
        const char *config;     /* for the commands that need no daemon; NULL: the default files */
        bool json;              /* print what was received instead of a text for people */
        bool once;              /* top: one frame */
} Ctl;

typedef int (*CtlCommand)(const Ctl *ctl, int argc, char **argv);

/* "ksmctl: …" to standard error; returns CTL_FAILED. */
int ctl_fail(const char *format, ...) _printf_(1, 2);

/* Calls a method of the daemon (its name without the interface). CTL_DONE: *ret is the caller's; otherwise it has been
 * said what went wrong. parameters is taken over, may be NULL. */
int ctl_call(const Ctl *ctl, const char *method, json_t *parameters, bool patient /* wait for ever */, json_t **ret);

/* Prints JSON, then a newline. CTL_FAILED when it could not be written. */
int ctl_print_json(const json_t *value);

int command_status(const Ctl *ctl, int argc, char **argv);
int command_stats(const Ctl *ctl, int argc, char **argv);
int command_targets(const Ctl *ctl, int argc, char **argv);
int command_top(const Ctl *ctl, int argc, char **argv);
int command_metrics(const Ctl *ctl, int argc, char **argv);
int command_why(const Ctl *ctl, int argc, char **argv);
int command_scan(const Ctl *ctl, int argc, char **argv);
int command_pause(const Ctl *ctl, int argc, char **argv);
int command_resume(const Ctl *ctl, int argc, char **argv);
int command_unmerge(const Ctl *ctl, int argc, char **argv);
int command_reload(const Ctl *ctl, int argc, char **argv);
int command_doctor(const Ctl *ctl, int argc, char **argv);
int command_estimate(const Ctl *ctl, int argc, char **argv);
