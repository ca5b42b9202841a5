/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "base/util.h"

/*
 * A crew of threads that share out the items of one job at a time. Between jobs they sleep.
 */
typedef struct Crew Crew;

/* n_threads: at least 1, the caller's included; 1: no thread is made, everything runs in the caller. -ENOMEM, -EAGAIN
 * (pthread_create(3): a limit on threads). */
int crew_new(unsigned n_threads, Crew **ret);
Crew *crew_free(Crew *crew);
DEFINE_CLEANUP(Crew, crew_free)

/* thread: 0 (the caller) … n_threads - 1. No two items are worked on at once under the same number. */
typedef void (*CrewWork)(void *userdata, unsigned thread, size_t item);

/* Calls work for each item once, in no particular order, and returns when every item is done: what the items wrote the
 * caller sees. Neither from inside work, nor by two threads at once. */
void crew_run(Crew *crew, size_t n_items, CrewWork work, void *userdata);
unsigned crew_size(const Crew *crew);
