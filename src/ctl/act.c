/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* The commands that have the daemon do something. */

#include "ctl/ctl.h"
#include "ctl/format.h"

#include <inttypes.h>
#include <stdio.h>

/* Silent when done, unless what was received is asked for. */
static int act(const Ctl *ctl, const char *method, bool patient) {
        json_t *reply;
        int r = ctl_call(ctl, method, NULL, patient, &reply);

        if (r != CTL_DONE)
                return r;
        if (ctl->json)
                r = ctl_print_json(reply);
        json_decref(reply);
        return r;
}

int command_scan(const Ctl *ctl, int argc, char **argv) { return act(ctl, "ScanNow", true); }
int command_pause(const Ctl *ctl, int argc, char **argv) { return act(ctl, "Pause", false); }
int command_resume(const Ctl *ctl, int argc, char **argv) { return act(ctl, "Resume", false); }

int command_unmerge(const Ctl *ctl, int argc, char **argv) {
        json_t *reply, *parameters = json_pack("{ss}", "cgroup", argv[0]);
        int r;

        if (!parameters)
                return ctl_fail("%s: not a name in UTF-8", argv[0]);
        r = ctl_call(ctl, "Unmerge", parameters, true, &reply);
        if (r != CTL_DONE)
                return r;
        if (ctl->json)
                r = ctl_print_json(reply);
        else {
                int64_t pages = json_integer_value(json_object_get(reply, "pages"));

                printf("%" PRId64 " pages (%s) taken apart\n", pages, format_bytes(pages * (int64_t)PAGE_BYTES).text);
        }
        json_decref(reply);
        return r;
}

int command_reload(const Ctl *ctl, int argc, char **argv) {
        json_t *reply, *warning;
        size_t i;
        int r = ctl_call(ctl, "Reload", NULL, false, &reply);

        if (r != CTL_DONE)
                return r;
        if (ctl->json)
                r = ctl_print_json(reply);
        else
                json_array_foreach(json_object_get(reply, "warnings"), i, warning)
                        ctl_fail("%s", json_string_value(warning));
        json_decref(reply);
        return r;
}
