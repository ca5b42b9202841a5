/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The cgroups that exist, kept up to date by inotify.
 *
 * Every cgroup's directory is watched for directories made and removed in it. That this works on cgroupfs, where files
 * come and go without mkdir(2), is because cgroups themselves come and go by mkdir(2) and rmdir(2) only, which notify
 * as on any file system (tests/kernel/cgroup-watch). They are never renamed.
 *
 * What must hold: once the queue is drained, the tree is what is there. A directory is watched first and read then, so
 * that a child made in between is found twice rather than never. A child that is made, removed and made again while
 * its events wait is found at the first event, given up at the second and found again at the third. After an overflow,
 * or when a watch could not be had, everything is read again and compared.
 *
 * Removing a cgroup is told by its parent's directory alone: the inode, and with it the watch, outlives the directory.
 */

#include "cgroup/tree.h"

#include "base/clock.h"
#include "base/log.h"

#include <dirent.h>
#include <limits.h>
#include <search.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>

#define DISPATCH_NSEC (5 * NSEC_PER_MSEC)
#define DROPS_MAX 1024U /* a full queue takes some 250 */
#define WATCHED (IN_CREATE | IN_DELETE | IN_ONLYDIR | IN_DONT_FOLLOW)

typedef struct Node {
        int wd;
        unsigned generation;    /* of the last reading of the whole tree that found it */
        size_t n_children;
        struct Node *parent;    /* NULL: the root cgroup */
        char path[];
} Node;

struct CgroupTree {
        char *root;
        int inotify;
        void *by_path, *by_wd;  /* tsearch(3) trees of Node */
        unsigned generation;
        bool incomplete;        /* something may be missing: read everything again */
        CgroupHandler handler;
        void *userdata;
};

/* The search key is a Node too; only the field compared need be filled in. */
static int compare_wd(const void *a, const void *b) {
        const Node *x = a, *y = b;
        return (x->wd > y->wd) - (x->wd < y->wd);
}

/* '/' sorts before every other byte, so that a cgroup's descendants follow it directly and walks are in tree order. */
static int compare_path(const void *a, const void *b) {
        const unsigned char *x = (const unsigned char *)((const Node *)a)->path;
        const unsigned char *y = (const unsigned char *)((const Node *)b)->path;

        while (*x && *x == *y)
                x++, y++;
        if (*x == *y)
                return 0;
        if (!*x || !*y)
                return *x ? 1 : -1;
        if (*x == '/' || *y == '/')
                return *x == '/' ? -1 : 1;
        return *x < *y ? -1 : 1;
}

static Node *node_new(const char *parent, const char *name) {
        size_t size = strlen(parent) + 1 + strlen(name) + 1;
        Node *node = calloc(1, sizeof *node + size);

        if (node)
                snprintf(node->path, size, "%s%s%s", parent, *parent && *name ? "/" : "", name);
        return node;
}

static Node *node_find(const CgroupTree *tree, const char *parent, const char *name) {
        _cleanup_free_ Node *key = node_new(parent, name);
        Node *const *found = key ? tfind(key, &tree->by_path, compare_path) : NULL;

        return found ? *found : NULL;
}

static Node *node_find_wd(const CgroupTree *tree, int wd) {
        const Node key = { .wd = wd };
        Node *const *found = tfind(&key, &tree->by_wd, compare_wd);

        return found ? *found : NULL;
}

static int watch(const CgroupTree *tree, const char *path) {
        char full[PATH_MAX];
        int wd;

        if ((size_t)snprintf(full, sizeof full, "%s/%s", tree->root, path) >= sizeof full)
                return -ENAMETOOLONG;
        wd = inotify_add_watch(tree->inotify, full, WATCHED);
        return wd < 0 ? -errno : wd;
}

/* The names of the directories in a cgroup's directory, as NUL-terminated strings one after the other. */
static int read_children(const CgroupTree *tree, const char *path, char **ret, size_t *ret_size) {
        _cleanup_free_ char *names = NULL;
        size_t size = 0, allocated = 0;
        char full[PATH_MAX];
        DIR *directory;
        int r = 0;

        if ((size_t)snprintf(full, sizeof full, "%s/%s", tree->root, path) >= sizeof full)
                return -ENAMETOOLONG;
        directory = opendir(full);
        if (!directory)
                return -errno;
        for (;;) {
                const struct dirent *entry;
                size_t n;

                errno = 0;
                entry = readdir(directory);
                if (!entry) {
                        r = -errno;
                        break;
                }
                if (entry->d_type != DT_DIR || strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
                        continue;
                n = strlen(entry->d_name) + 1;
                if (allocated - size < n) {
                        size_t want = MAX_OF(allocated * 2, size + n + 512);
                        char *p = realloc(names, want);
                        if (!p) {
                                r = -ENOMEM;
                                break;
                        }
                        names = p;
                        allocated = want;
                }
                memcpy(names + size, entry->d_name, n);
                size += n;
        }
        closedir(directory);
        if (r < 0)
                return r;
        *ret = TAKE_PTR(names);
        *ret_size = size;
        return 0;
}

typedef struct NodeList {
        Node **nodes;
        size_t n, allocated;
} NodeList;

static void node_list_done(NodeList *list) { free(list->nodes); }

static int node_list_add(NodeList *list, Node *node) {
        int r = GROW(list->nodes, list->n, list->allocated);
        if (r < 0)
                return r;
        list->nodes[list->n++] = node;
        return 0;
}

static void node_remove(CgroupTree *tree, Node *node) {
        tdelete(node, &tree->by_path, compare_path);
        if (node->wd >= 0) {
                tdelete(node, &tree->by_wd, compare_wd);
                (void)inotify_rm_watch(tree->inotify, node->wd); /* fails when the directory took it along */
        }
        if (node->parent)
                node->parent->n_children--;
        tree->handler(tree->userdata, node->path, false);
        free(node);
}

typedef struct Collect {
        NodeList list;
        const Node *below;      /* this one and its descendants; NULL: all */
        unsigned generation;    /* those not of this generation; 0: of any */
        int result;
} Collect;

static void collect(const void *where, VISIT visit, void *closure) {
        Collect *c = closure;
        Node *node = *(Node *const *)where;

        if ((visit != postorder && visit != leaf) || c->result < 0)
                return;
        if (c->generation && node->generation == c->generation)
                return;
        if (c->below && node != c->below) {
                size_t n = strlen(c->below->path);
                if (n > 0 && (strncmp(node->path, c->below->path, n) != 0 || node->path[n] != '/'))
                        return;
        }
        c->result = node_list_add(&c->list, node);
}

/* Children after their parents: the walk is in the order of paths. */
static int nodes_collect(const CgroupTree *tree, const Node *below, unsigned generation, NodeList *ret) {
        Collect c = { .below = below, .generation = generation };

        twalk_r(tree->by_path, collect, &c);
        if (c.result < 0) {
                node_list_done(&c.list);
                return c.result;
        }
        *ret = c.list;
        return 0;
}

/* A cgroup is gone, and whatever was below it. */
static int node_gone(CgroupTree *tree, Node *node) {
        _cleanup_(node_list_done) NodeList list = {};
        int r;

        if (node->n_children == 0) { /* the usual case: no walk over the tree */
                node_remove(tree, node);
                return 0;
        }
        r = nodes_collect(tree, node, 0, &list);
        if (r < 0)
                return r;
        while (list.n > 0)
                node_remove(tree, list.nodes[--list.n]);
        return 0;
}

/* An error that concerns one cgroup alone, which is then left alone: it is gone again, or we may not see it. */
static bool left_alone(int r) {
        return r == -ENOENT || r == -ENODEV || r == -ENOTDIR || r == -ELOOP || r == -ENAMETOOLONG || r == -EACCES;
}

/* Gives up a node that was found earlier, perhaps in this very reading of a directory that changes meanwhile. */
static int node_replaced(CgroupTree *tree, Node *old, NodeList *todo) {
        for (size_t i = 0; i < todo->n; i++)
                if (todo->nodes[i] == old)
                        todo->nodes[i] = NULL;
        return node_gone(tree, old);
}

/* Finds a cgroup that may be new and puts it on the list of those to read; -errno: it could not be watched. */
static int node_found(CgroupTree *tree, Node *parent, const char *name, NodeList *todo) {
        const char *parent_path = parent ? parent->path : "";
        Node *old = node_find(tree, parent_path, name);
        _cleanup_free_ Node *node = NULL;
        int r, wd;

        node = node_new(parent_path, name);
        if (!node)
                return -ENOMEM;
        wd = watch(tree, node->path);
        if (old && old->wd == wd) {
                old->generation = tree->generation;
                return node_list_add(todo, old);
        }
        if (old) { /* gone, or removed and made again */
                r = node_replaced(tree, old, todo);
                if (r < 0)
                        return r;
        }
        if (wd < 0) {
                log_debug("cgroup %s cannot be watched: %s", node->path, strerror(-wd));
                return left_alone(wd) ? 0 : wd;
        }
        if (node_find_wd(tree, wd)) /* a bind mount shows a cgroup at a second place: it is known by the first */
                return 0;
        node->generation = tree->generation;
        node->wd = wd;
        node->parent = parent;
        r = node_list_add(todo, node);
        if (r < 0)
                return r;
        if (!tsearch(node, &tree->by_path, compare_path)) {
                todo->n--;
                return -ENOMEM;
        }
        if (!tsearch(node, &tree->by_wd, compare_wd)) {
                tdelete(node, &tree->by_path, compare_path);
                todo->n--;
                return -ENOMEM;
        }
        if (parent)
                parent->n_children++;
        tree->handler(tree->userdata, TAKE_PTR(node)->path, true);
        return 0;
}

/* Finds a cgroup and everything below it. A loop with a list of its own, not a recursion: trees may be deep. */
static int subtree_found(CgroupTree *tree, Node *parent, const char *name) {
        _cleanup_(node_list_done) NodeList todo = {};
        int r, error;

        error = node_found(tree, parent, name, &todo);
        while (todo.n > 0) {
                Node *node = todo.nodes[--todo.n];
                _cleanup_free_ char *names = NULL;
                size_t size = 0;

                if (!node)
                        continue;
                r = read_children(tree, node->path, &names, &size);
                if (r < 0 && !left_alone(r)) /* when it is gone again, the parent's event will say so */
                        error = error ?: r;
                for (const char *p = names; p < names + size; p += strlen(p) + 1) {
                        r = node_found(tree, node, p, &todo);
                        if (r < 0)
                                error = error ?: r;
                }
        }
        return error;
}

static int read_everything(CgroupTree *tree) {
        _cleanup_(node_list_done) NodeList gone = {};
        int error;

        tree->incomplete = false;
        tree->generation++;
        error = subtree_found(tree, NULL, "");
        if (error == 0) { /* else what was not found may only not have been read */
                error = nodes_collect(tree, NULL, tree->generation, &gone);
                while (gone.n > 0)
                        node_remove(tree, gone.nodes[--gone.n]);
        }
        if (!tree->by_path)
                error = error ?: -ENODEV; /* not even the root */
        tree->incomplete = error < 0;
        return error;
}

int cgroup_tree_new(const char *root, CgroupHandler handler, void *userdata, CgroupTree **ret) {
        _cleanup_(cgroup_tree_freep) CgroupTree *tree = calloc(1, sizeof *tree);
        int r;

        if (!tree)
                return -ENOMEM;
        tree->handler = handler;
        tree->userdata = userdata;
        tree->inotify = -EBADF;
        if (root) {
                tree->root = strdup(root);
                if (!tree->root)
                        return -ENOMEM;
        } else {
                r = cgroup_find_root(&tree->root);
                if (r < 0)
                        return r;
        }
        tree->inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
        if (tree->inotify < 0)
                return -errno;
        r = read_everything(tree);
        if (r < 0)
                return r == -ENODEV ? -ENOENT : r;
        *ret = TAKE_PTR(tree);
        return 0;
}

static void keep_node(void *node) {}

CgroupTree *cgroup_tree_free(CgroupTree *tree) {
        if (!tree)
                return NULL;
        tdestroy(tree->by_wd, keep_node);
        tdestroy(tree->by_path, free);
        safe_close(tree->inotify);
        free(tree->root);
        free(tree);
        return NULL;
}

const char *cgroup_tree_root(const CgroupTree *tree) { return tree->root; }

int cgroup_tree_fd(const CgroupTree *tree) { return tree->inotify; }

static int event_handle(CgroupTree *tree, const struct inotify_event *event) {
        Node *parent, *child;

        if (event->mask & IN_Q_OVERFLOW) {
                tree->incomplete = true;
                return 0;
        }
        parent = node_find_wd(tree, event->wd);
        if (!parent) /* of a watch that was given up */
                return 0;
        if (event->mask & IN_UNMOUNT)
                return -ENODEV;
        if (!(event->mask & IN_ISDIR) || event->len == 0)
                return 0;
        if (event->mask & IN_CREATE)
                return subtree_found(tree, parent, event->name);
        child = node_find(tree, parent->path, event->name);
        return child ? node_gone(tree, child) : 0;
}

/* What is queued is older than what is read behind this. Whoever goes on filling the queue is not waited for. */
static void drop_events(CgroupTree *tree) {
        _Alignas(struct inotify_event) char buffer[4096];

        for (unsigned i = 0; i < DROPS_MAX && read(tree->inotify, buffer, sizeof buffer) > 0; i++)
                ;
}

int cgroup_tree_dispatch(CgroupTree *tree) {
        _Alignas(struct inotify_event) char buffer[4096];
        uint64_t until = now_nsec() + DISPATCH_NSEC;
        int r, error = 0;
        ssize_t n = 0;

        while (n >= 0 && !tree->incomplete && now_nsec() < until) {
                n = read(tree->inotify, buffer, sizeof buffer);
                if (n < 0 && errno != EAGAIN)
                        error = error ?: -errno;
                for (const char *p = buffer; p < buffer + n;) {
                        const struct inotify_event *event = (const struct inotify_event *)(const void *)p;

                        p += sizeof *event + event->len;
                        r = event_handle(tree, event);
                        if (r < 0) {
                                error = error ?: r;
                                tree->incomplete |= r != -ENODEV;
                        }
                }
        }
        if (tree->incomplete && error != -ENODEV) {
                drop_events(tree);
                error = read_everything(tree);
        }
        return error;
}

typedef struct Foreach {
        CgroupHandler handler;
        void *userdata;
} Foreach;

static void tell(const void *where, VISIT visit, void *closure) {
        const Foreach *f = closure;

        if (visit == postorder || visit == leaf)
                f->handler(f->userdata, (*(Node *const *)where)->path, true);
}

void cgroup_tree_foreach(CgroupTree *tree, CgroupHandler handler, void *userdata) {
        Foreach f = { handler, userdata };

        twalk_r(tree->by_path, tell, &f);
}
