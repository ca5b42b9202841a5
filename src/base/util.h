/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Ownership and arithmetic helpers that every layer uses.
 *
 * Conventions of the whole tree: a function that returns int returns 0 when it did its work, a negative errno
 * when it failed, and a positive MODULE_E_REASON for an outcome its caller must expect (the world moved). Outputs
 * are named ret_ and left alone unless the function returned 0. Every descriptor is close-on-exec from birth.
 */

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define _cleanup_(f) __attribute__((cleanup(f)))
#define _printf_(a, b) __attribute__((format(printf, a, b)))

#define ELEMENTSOF(x) (sizeof(x) / sizeof((x)[0]))
#define MIN_OF(a, b) ({ __typeof__(a) _a = (a); __typeof__(b) _b = (b); _a < _b ? _a : _b; })
#define MAX_OF(a, b) ({ __typeof__(a) _a = (a); __typeof__(b) _b = (b); _a > _b ? _a : _b; })
#define DIV_ROUND_UP(n, d) (((n) + (d) - 1) / (d))
#define ROUND_UP(n, d) (DIV_ROUND_UP(n, d) * (d))

/* The daemon supports 4 KiB base pages only and refuses to start elsewhere (host/kernel). */
#define PAGE_SHIFT 12
#define PAGE_BYTES ((uint64_t)1 << PAGE_SHIFT)
/* A block is what one huge page covers (2 MiB): the unit of scan state, batches and huge-page decisions. */
#define BLOCK_PAGES 512U
#define BLOCK_BYTES (BLOCK_PAGES * PAGE_BYTES)

#define NSEC_PER_USEC ((uint64_t)1000)
#define NSEC_PER_MSEC ((uint64_t)1000000)
#define NSEC_PER_SEC ((uint64_t)1000000000)

#define TAKE_PTR(p) ({ __typeof__(p) _taken = (p); (p) = NULL; _taken; })
#define TAKE_FD(fd) ({ int _taken = (fd); (fd) = -EBADF; _taken; })

static inline void freep(void *p) { free(*(void **)p); }

/* Closes fd if it is one, keeps errno, returns -EBADF to store back. */
static inline int safe_close(int fd) {
        if (fd >= 0) {
                int saved = errno;
                close(fd);
                errno = saved;
        }
        return -EBADF;
}

static inline void closep(int *fd) { safe_close(*fd); }

#define _cleanup_free_ _cleanup_(freep)
#define _cleanup_close_ _cleanup_(closep)

/* The index of the first of n items, disjoint and in order, that ends behind a place; n: none does. They have a member
 * end. */
#define FIRST_BEHIND(items, n, place)                                                          \
        ({                                                                                     \
                size_t _low = 0, _high = (n);                                                  \
                while (_low < _high) {                                                         \
                        size_t _middle = _low + (_high - _low) / 2;                            \
                        if ((items)[_middle].end <= (place))                                   \
                                _low = _middle + 1;                                            \
                        else                                                                   \
                                _high = _middle;                                               \
                }                                                                              \
                _low;                                                                          \
        })

/* Declares typep(T **p) for _cleanup_ from a destructor `T *f(T *)`. */
#define DEFINE_CLEANUP(type, f) \
        static inline void f##p(type **p) { if (*p) f(*p); }

/* Makes room for one more element in a growing array; 0 or -ENOMEM. */
#define GROW(array, n, allocated)                                                              \
        ({                                                                                     \
                int _r = 0;                                                                    \
                if ((n) >= (allocated)) {                                                      \
                        size_t _want = (allocated) ? (size_t)(allocated) * 2 : 16;             \
                        void *_p = reallocarray((array), _want, sizeof *(array));              \
                        if (_p) {                                                              \
                                (array) = _p;                                                  \
                                (allocated) = _want;                                           \
                        } else                                                                 \
                                _r = -ENOMEM;                                                  \
                }                                                                              \
                _r;                                                                            \
        })
