/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "control/json-text.h"

#include <stdio.h>

json_t *json_text(const char *text) {
        json_t *string = json_string(text);
        char escaped[4 * 256 + 1];
        size_t n = 0;

        if (string || !text)
                return string ?: json_null();
        for (const unsigned char *p = (const unsigned char *)text; *p && n + 4 < sizeof escaped; p++)
                if (*p < 0x80)
                        escaped[n++] = (char)*p;
                else
                        n += (size_t)sprintf(escaped + n, "\\x%02x", *p);
        escaped[n] = 0;
        return json_string(escaped);
}
