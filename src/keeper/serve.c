/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "keeper/serve.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

/*
 * Every fault on guarded memory means that the page was discarded: it is filled with zeros. Whatever the kernel says to
 * that, the thread is woken: the page is there by now (EEXIST), the mapping or the address space is gone (ENOENT,
 * ESRCH), or something changes the mappings just then and its event has to be read first (EAGAIN). It faults again if
 * need be; trying again here instead would never read the event.
 *
 * What is told to be there may not be: where an absent page was write-protected (nobody means to, see remap_guard_page())
 * the kernel keeps a mark that nothing can be filled into, and that lifting the protection removes. Where the page is there
 * that changes nothing.
 */
#ifdef KEEPER_TEST
unsigned serve_left_out;
#endif

static void wake(Hold *hold, int fd, uint64_t address) {
        struct uffdio_range range = { address, PAGE_BYTES };

        hold->stats->wakes++;
        (void)ioctl(fd, UFFDIO_WAKE, &range);
}

static int lift_protection(int fd, uint64_t address) {
        struct uffdio_writeprotect allow = { .range = { address, PAGE_BYTES } };

        return ioctl(fd, UFFDIO_WRITEPROTECT, &allow);
}

static void fill(Hold *hold, int fd, uint64_t address) {
        struct uffdio_zeropage zero = { .range = { address, PAGE_BYTES } };

        if (ioctl(fd, UFFDIO_ZEROPAGE, &zero) == 0) {
                hold->stats->zeros++;
                return;
        }
        if (errno == EEXIST)
                (void)lift_protection(fd, address);
        wake(hold, fd, address);
}

static void answer_fault(Hold *hold, int fd, const struct uffd_msg *msg) {
        uint64_t address = msg->arg.pagefault.address & ~(PAGE_BYTES - 1);

        hold->stats->faults++;
        if (hold->entries[fd].item.kind == GUARD_MUTE && !(serve_left_out & SERVE_LEAVE_OUT_MUTE))
                return; /* who registered it fills it, or un-registers it, which wakes */
        if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
                /* For an instant, to see whose guard it is (remap_guard_watches()). */
                if (lift_protection(fd, address) < 0)
                        wake(hold, fd, address);
                return;
        }
        if (serve_left_out & SERVE_LEAVE_OUT_HASTE) {
                static uint64_t last;
                if (address == last)
                        usleep(5000);
                last = address;
        }
        if (serve_left_out & SERVE_LEAVE_OUT_ZERO) {
                struct uffdio_continue stale = { .range = { address, PAGE_BYTES } };
                if (ioctl(fd, UFFDIO_CONTINUE, &stale) == 0)
                        return;
        }
        fill(hold, fd, address);
}

static void answer_fork(Hold *hold, int fd, int child, ServeForked forked, void *userdata) {
        const KeeperItem *parent = &hold->entries[fd].item;
        KeeperItem item = { .parent = parent->id, .owner = parent->owner };

        hold->stats->forks++;
        item.owner.pid = 0;
        if ((serve_left_out & SERVE_LEAVE_OUT_FORK) || hold_add(hold, child, &item) < 0)
                safe_close(child);
        else
                forked(userdata, child);
}

bool serve_read(Hold *hold, int fd, unsigned n_max, ServeForked forked, void *userdata) {
        while (n_max > 0) {
                struct uffd_msg msgs[16];
                ssize_t n = read(fd, msgs, MIN_OF((size_t)n_max, ELEMENTSOF(msgs)) * sizeof *msgs);

                if (n <= 0) {
                        /* A fork whose descriptor has no room here: it waits, and is told again. */
                        hold->stats->starved += n < 0 && (errno == EMFILE || errno == ENFILE);
                        return n < 0 && errno == EINTR;
                }
                for (size_t i = 0; i < (size_t)n / sizeof *msgs; i++, n_max--)
                        switch (msgs[i].event) {
                        case UFFD_EVENT_PAGEFAULT:
                                answer_fault(hold, fd, &msgs[i]);
                                break;
                        case UFFD_EVENT_FORK:
                                answer_fork(hold, fd, (int)msgs[i].arg.fork.ufd, forked, userdata);
                                break;
                        case UFFD_EVENT_REMAP:
                                /* The registration went along: what is new there faults, and reads zeros. */
                                hold->stats->remaps++;
                                break;
                        }
        }
        return true;
}
