/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * Messages for the operator, to standard error; under systemd (JOURNAL_STREAM) each line carries the "<N>" priority
 * prefix of sd-daemon(3). Modules below daemon/ and ctl/ log at debug only: they return what happened instead.
 */
typedef enum LogLevel {
        LOG_LEVEL_ERROR = 3, /* syslog's numbers */
        LOG_LEVEL_WARNING = 4,
        LOG_LEVEL_INFO = 6,
        LOG_LEVEL_DEBUG = 7,
} LogLevel;

void log_set_level(LogLevel level);
LogLevel log_level(void);
void log_message(LogLevel level, const char *format, ...) _printf_(2, 3);

#define log_error(...) log_message(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warning(...) log_message(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_info(...) log_message(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...)                                            \
        do {                                                      \
                if (log_level() >= LOG_LEVEL_DEBUG)               \
                        log_message(LOG_LEVEL_DEBUG, __VA_ARGS__); \
        } while (0)
