/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

#include <jansson.h>
#include <string.h>

/* Fields of what the daemon answered. One that is missing (another version of the daemon) is 0 or "-". */

static inline int64_t number(const json_t *object, const char *name) {
        return json_integer_value(json_object_get(object, name));
}

static inline double share(const json_t *object, const char *name) {
        return json_number_value(json_object_get(object, name));
}

static inline const char *text(const json_t *object, const char *name) {
        const char *value = json_string_value(json_object_get(object, name));

        return value && *value ? value : "-";
}

/* What to say after a quota of CPU time. */
static inline const char *quota_remarks(const json_t *status) {
        bool throttled = json_is_true(json_object_get(status, "throttled"));

        if (json_is_true(json_object_get(status, "host_busy")))
                return throttled ? " (the host is busy), throttled" : " (the host is busy)";
        return throttled ? ", throttled" : "";
}

/* Of merge_failures: what the daemon counts how often it happened; the others are pages of which it is so now. */
static inline bool reason_is_event(const char *reason) {
        static const char *const events[] = { "changed", "gone", "busy", "denied" };

        for (size_t i = 0; i < ELEMENTSOF(events); i++)
                if (strcmp(reason, events[i]) == 0)
                        return true;
        return false;
}

static inline bool reason_is_state(const char *reason) { return !reason_is_event(reason); }

/* The root cgroup has no name of its own. */
static inline const char *cgroup(const json_t *object, const char *name) {
        const char *value = json_string_value(json_object_get(object, name));

        return !value ? "-" : *value ? value : "/";
}

/* What is in an array, borrowed; the list of it is the caller's to free. NULL: out of memory. */
static inline json_t **elements(const json_t *array, size_t *ret_n) {
        size_t n = json_array_size(array);
        json_t **list = calloc(n + 1, sizeof *list);

        for (size_t i = 0; list && i < n; i++)
                list[i] = json_array_get(array, i);
        *ret_n = n;
        return list;
}
