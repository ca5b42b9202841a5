/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "conf/conf.h"

/*
 * Builds one Conf out of any number of texts, later ones on top of earlier ones. For conf-files.c, the tests and the
 * fuzzer, which have texts without files.
 */
typedef struct ConfBuilder ConfBuilder;

int conf_builder_new(ConfReport report, void *userdata, ConfBuilder **ret);
ConfBuilder *conf_builder_free(ConfBuilder *builder);
DEFINE_CLEANUP(ConfBuilder, conf_builder_free)

/* Takes in one text; file is what reports call it. -ENOMEM only. */
int conf_builder_add(ConfBuilder *builder, const char *file, const char *text, size_t size);
/* Reports what is wrong with a file as a whole. */
void conf_builder_report(ConfBuilder *builder, const char *file, const char *message);
/* Checks the sections against each other and hands the result over; the builder can only be freed afterwards.
 * shmem_denied: host_shmem_huge_denied(). */
int conf_builder_finish(ConfBuilder *builder, bool shmem_denied, Conf **ret);
