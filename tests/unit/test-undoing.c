/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Whose record may go when he is undone, and who is told: with a roster of the test's, and processes that are names in a directory. */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/undoing.c"
#include "tests/test.h"

#include <stdlib.h>
#include <sys/stat.h>

#define PARENT 100
#define CHILD 200

int __wrap_open_directory(int at, const char *path, DIR **ret);
int __wrap_target_origin_of(pid_t pid, TargetOrigin *ret);
void __wrap_advise_forget(Advise *advise, Target *target, Marks *marks);

/* What each of them says, and what became of it. */
static struct {
        int open, origin, add, load, undo;
        unsigned forgotten, dropped;
} calls;

static char proc[] = "/tmp/test-undoing.XXXXXX";

static struct {
        Manager manager;
        Member parent, child;
        Target parent_target, child_target;
        Member *leaving[2];
        Request requests[3];
} world;

static const TargetOrigin layout = { .start_ticks = 1, .start_code = 1, .start_stack = 2, .start_brk = 3 };

int __wrap_open_directory(int at, const char *path, DIR **ret) {
        if (calls.open < 0)
                return calls.open;
        *ret = opendir(proc);
        return *ret ? 0 : -errno;
}

int __wrap_target_origin_of(pid_t pid, TargetOrigin *ret) {
        *ret = layout;
        return pid == CHILD ? calls.origin : 0;
}

void __wrap_advise_forget(Advise *advise, Target *target, Marks *marks) { calls.forgotten++; }
bool manager_attend(Manager *m) { return false; }
void manager_look_how_it_runs(Member *member, uint64_t after_nsec) { }
int manager_load_marks(Manager *m, Member *member) { return member->target->pid == CHILD ? calls.load : 0; }
void manager_census(Manager *m) { }
void manager_tend_pools(Manager *m, uint64_t pages) { }
uint64_t manager_pool_pages(const Manager *m) { return 0; }
void manager_end_request(Manager *m, size_t i, int result, const char *reason, json_t *parameters) { }
void roster_refresh(Roster *roster) { }
void roster_prune_slots(Roster *roster) { }
int roster_block(Roster *roster, const char *path, uint64_t unmerge) { return 0; }
Member *roster_find_member(const Roster *roster, pid_t pid) { return NULL; }

int manager_undo(Manager *m, Member *member, UndoSlice *slice) {
        slice->pages += 7;
        return calls.undo;
}

Member *roster_find_leaving(const Roster *roster, pid_t pid) {
        for (size_t i = 0; i < roster->n_leaving; i++)
                if (roster->leaving[i]->target->pid == pid)
                        return roster->leaving[i];
        return NULL;
}

int roster_add_orphan(Roster *roster, pid_t pid) {
        if (calls.add != 0)
                return calls.add;
        assert_int_equal(pid, CHILD);
        roster->leaving[roster->n_leaving++] = &world.child;
        return 0;
}

void roster_drop(Roster *roster, Member *member) {
        calls.dropped++;
        for (size_t i = 0; i < roster->n_leaving; i++)
                if (roster->leaving[i] == member)
                        roster->leaving[i] = roster->leaving[--roster->n_leaving];
}

/* The parent leaves for the requests of number 5, and a child of it is in no list. */
static Manager *world_new(void) {
        Manager *m = &world.manager;

        memset(&world, 0, sizeof world);
        memset(&calls, 0, sizeof calls);
        world.parent_target.pid = PARENT;
        world.child_target.pid = CHILD;
        world.parent = (Member){ .target = &world.parent_target, .unmerge = 5, .leaving = true,
                                 .marks = { .recorded = true, .origin = layout } };
        world.child = (Member){ .target = &world.child_target, .leaving = true };
        world.leaving[0] = &world.parent;
        m->roster.leaving = world.leaving;
        m->roster.n_leaving = 1;
        m->requests = world.requests;
        return m;
}

static bool undo(Manager *m) {
        uint64_t pages = 0;

        return manager_undo_leaving(m, &pages);
}

static void test_newborn(void **unused) {
        Manager *m = world_new();

        assert_true(undo(m));
        assert_true(calls.forgotten == 1 && calls.dropped == 1 && m->roster.n_leaving == 1);
        assert_true(world.leaving[0] == &world.child && world.child.unmerge == 5 && m->undo_at_nsec == 0);
}

/* While it is so the parent's record stays; then it goes. */
static void not_told(Manager *m, int *call, int error) {
        *call = error;
        for (unsigned i = 0; i < 2; i++) {
                assert_true(undo(m));
                assert_true(calls.forgotten == 0 && roster_find_leaving(&m->roster, PARENT));
                assert_true(world.parent.undo_at_nsec > now_nsec());
                world.parent.undo_at_nsec = 0;
        }
        *call = 0;
        undo(m);
        assert_true(calls.forgotten == 1 && !roster_find_leaving(&m->roster, PARENT));
}

static void test_cannot_be_told(void **unused) {
        not_told(world_new(), &calls.open, -EMFILE);
        not_told(world_new(), &calls.origin, -ENOMEM);
        not_told(world_new(), &calls.add, -EMFILE);
}

/* It leaves, but would take what it was born with for its own. */
static void test_marks_cannot_be_told(void **unused) {
        Manager *m = world_new();

        calls.load = -ENOMEM;
        calls.undo = REMOTE_E_BUSY;
        world.parent.undone = true;
        world.parent.undo_at_nsec = UINT64_MAX;
        for (unsigned i = 0; i < 2; i++) {
                assert_true(undo(m));
                assert_true(calls.forgotten == 0 && roster_find_leaving(&m->roster, CHILD));
        }
        calls.load = 0;
        undo(m);
        assert_int_equal(calls.forgotten, 1);
}

static void told(int *call, int error) {
        Manager *m = world_new();

        *call = error;
        undo(m);
        assert_true(calls.forgotten == 1 && !roster_find_leaving(&m->roster, PARENT));
}

static void test_gone(void **unused) {
        told(&calls.origin, -ENOENT);
        told(&calls.origin, -ESRCH);
        told(&calls.add, TARGET_E_GONE);
        told(&calls.load, REMOTE_E_GONE);
}

/* Who asks for the same once more, after a reload, is told with the first. */
static void test_requests(void **unused) {
        char name[] = "one", other[] = "two";
        Manager *m = world_new();

        m->n_requests = 3;
        m->request_ids = 5;
        world.requests[0] = (Request){ .kind = REQUEST_UNMERGE, .cgroup = name, .started = true, .id = 5 };
        world.requests[1] = (Request){ .kind = REQUEST_UNMERGE, .cgroup = name };
        world.requests[2] = (Request){ .kind = REQUEST_UNMERGE, .cgroup = other };
        manager_begin_unmerges(m);
        assert_true(world.requests[1].id == 5 && world.requests[2].id == 6);
        undo(m);
        assert_true(world.requests[0].pages == 7 && world.requests[1].pages == 7 && world.requests[2].pages == 0);
        world.parent.undone = false;
        world.parent.undo_at_nsec = 0;
        world.parent.unmerge = 5;
        world.leaving[0] = &world.parent;
        m->roster.n_leaving = 1;
        calls.undo = REMOTE_E_DENIED;
        undo(m);
        assert_true(world.requests[0].failed == 1 && world.requests[1].failed == 1 && world.requests[2].failed == 0);
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_newborn), cmocka_unit_test(test_cannot_be_told),
                cmocka_unit_test(test_marks_cannot_be_told), cmocka_unit_test(test_gone), cmocka_unit_test(test_requests),
        };
        static const char *const names[] = { "100", "200", "self" };
        char path[64];
        int r;

        if (!mkdtemp(proc))
                return 1;
        for (size_t i = 0; i < ELEMENTSOF(names); i++) {
                snprintf(path, sizeof path, "%s/%s", proc, names[i]);
                if (mkdir(path, 0700) < 0)
                        return 1;
        }
        r = cmocka_run_group_tests(tests, NULL, NULL);
        for (size_t i = 0; i < ELEMENTSOF(names); i++) {
                snprintf(path, sizeof path, "%s/%s", proc, names[i]);
                (void)rmdir(path);
        }
        (void)rmdir(proc);
        return r;
}
