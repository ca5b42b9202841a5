/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static LogLevel current_level = LOG_LEVEL_INFO;

void log_set_level(LogLevel level) { current_level = level; }

LogLevel log_level(void) { return current_level; }

void log_message(LogLevel level, const char *format, ...) {
        char line[1024];
        va_list ap;
        int saved = errno;

        if (level > current_level)
                return;
        va_start(ap, format);
        vsnprintf(line, sizeof line, format, ap);
        va_end(ap);
        /* One write a message, so that lines of several threads do not mix. */
        if (getenv("JOURNAL_STREAM"))
                dprintf(STDERR_FILENO, "<%d>%s\n", level, line);
        else
                dprintf(STDERR_FILENO, "ksmd-user: %s\n", line);
        errno = saved;
}
