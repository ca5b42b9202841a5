/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Items are handed out one by one, from a counter: batches of pages take very different times, and whoever is done
 * takes the next. The threads live as long as the crew, because a pass has many jobs; a job is announced by its number,
 * so that a thread which wakes late (or for nothing) never works on one twice. The lock orders what the caller prepared
 * before the work, and the work before what the caller does next; the counter needs no order of its own.
 *
 * The threads take no signals: those are the event loop's.
 */
#include "base/crew.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>

typedef struct Hand {
        Crew *crew;
        pthread_t id;
        unsigned number;
} Hand;

struct Crew {
        pthread_mutex_t lock;
        pthread_cond_t begin;   /* a new job, or stop */
        pthread_cond_t end;     /* working has become 0 */
        uint64_t job;           /* its number; 0: none yet */
        unsigned working;       /* hands that have not finished it */
        bool stop;
        CrewWork work;
        void *userdata;
        size_t n_items;
        atomic_size_t next;     /* item */
        unsigned n_hands;
        Hand hands[];           /* all but the caller */
};

static void work_off(Crew *crew, unsigned thread) {
        size_t item;

        while ((item = atomic_fetch_add_explicit(&crew->next, 1, memory_order_relaxed)) < crew->n_items)
                crew->work(crew->userdata, thread, item);
}

static void *hand_main(void *arg) {
        const Hand *hand = arg;
        Crew *crew = hand->crew;
        uint64_t done = 0;

        pthread_mutex_lock(&crew->lock);
        for (;;) {
                while (crew->job == done && !crew->stop)
                        pthread_cond_wait(&crew->begin, &crew->lock);
                if (crew->stop)
                        break;
                done = crew->job;
                pthread_mutex_unlock(&crew->lock);
                work_off(crew, hand->number);
                pthread_mutex_lock(&crew->lock);
                if (--crew->working == 0)
                        pthread_cond_signal(&crew->end);
        }
        pthread_mutex_unlock(&crew->lock);
        return NULL;
}

static int hand_start(Crew *crew, Hand *hand, unsigned number) {
        char name[16];
        int r;

        *hand = (Hand) { .crew = crew, .number = number };
        r = pthread_create(&hand->id, NULL, hand_main, hand);
        if (r != 0)
                return -r;
        snprintf(name, sizeof name, "crew-%u", number);
        (void)pthread_setname_np(hand->id, name);
        return 0;
}

int crew_new(unsigned n_threads, Crew **ret) {
        _cleanup_(crew_freep) Crew *crew = calloc(1, sizeof *crew + (n_threads - 1) * sizeof *crew->hands);
        sigset_t all, before;
        int r = 0;

        if (!crew)
                return -ENOMEM;
        pthread_mutex_init(&crew->lock, NULL);
        pthread_cond_init(&crew->begin, NULL);
        pthread_cond_init(&crew->end, NULL);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited */
        while (r == 0 && crew->n_hands < n_threads - 1) {
                r = hand_start(crew, &crew->hands[crew->n_hands], crew->n_hands + 1);
                crew->n_hands += r == 0;
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(crew);
        return 0;
}

Crew *crew_free(Crew *crew) {
        if (!crew)
                return NULL;
        pthread_mutex_lock(&crew->lock);
        crew->stop = true;
        pthread_cond_broadcast(&crew->begin);
        pthread_mutex_unlock(&crew->lock);
        for (unsigned i = 0; i < crew->n_hands; i++)
                pthread_join(crew->hands[i].id, NULL);
        pthread_cond_destroy(&crew->end);
        pthread_cond_destroy(&crew->begin);
        pthread_mutex_destroy(&crew->lock);
        free(crew);
        return NULL;
}

void crew_run(Crew *crew, size_t n_items, CrewWork work, void *userdata) {
        bool alone = crew->n_hands == 0 || n_items <= 1; /* waking the others would cost more than it brings */

        pthread_mutex_lock(&crew->lock);
        crew->work = work;
        crew->userdata = userdata;
        crew->n_items = n_items;
        atomic_store_explicit(&crew->next, 0, memory_order_relaxed);
        if (!alone) {
                crew->working = crew->n_hands;
                crew->job++;
                pthread_cond_broadcast(&crew->begin);
        }
        pthread_mutex_unlock(&crew->lock);
        work_off(crew, 0);
        pthread_mutex_lock(&crew->lock);
        while (crew->working > 0)
                pthread_cond_wait(&crew->end, &crew->lock);
        pthread_mutex_unlock(&crew->lock);
}

unsigned crew_size(const Crew *crew) { return crew->n_hands + 1; }
