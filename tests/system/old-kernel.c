/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preloaded into daemon and ksmctl: the ioctls of a kernel before 6.7 (Debian 12 has 6.1). What came later is refused as it
 * refuses it, so that the way without it can be tested on any kernel.
 */
#include <dlfcn.h>
#include <errno.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stddef.h>

#define NR(request) ((request)&0xff)
#define TYPE(request) ((request) >> 8 & 0xff)
#define FEATURES_OF_6_1 ((1ULL << 13) - 1)      /* up to UFFD_FEATURE_WP_HUGETLBFS_SHMEM */

int ioctl(int fd, unsigned long request, ...);

int ioctl(int fd, unsigned long request, ...) {
        static int (*next)(int, unsigned long, ...);
        void *argument;
        va_list ap;

        va_start(ap, request);
        argument = va_arg(ap, void *);
        va_end(ap);
        if (TYPE(request) == 'f' && NR(request) == 16) { /* PAGEMAP_SCAN */
                errno = ENOTTY;
                return -1;
        }
        if (request == UFFDIO_API && ((struct uffdio_api *)argument)->features & ~FEATURES_OF_6_1) {
                errno = EINVAL;
                return -1;
        }
        if (TYPE(request) == UFFDIO && NR(request) > 7 && NR(request) < 0x3f) { /* UFFDIO_POISON (6.6), UFFDIO_MOVE (6.8) */
                errno = EINVAL;
                return -1;
        }
        if (!next)
                *(void **)&next = dlsym(RTLD_NEXT, "ioctl");
        return next(fd, request, argument);
}
