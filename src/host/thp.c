/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "host/thp.h"

#include "base/io.h"

#include <fcntl.h>
#include <string.h>

/* Since 6.8 each size has a setting of its own, which may be "inherit". */
HostThp host_thp(const char *sysfs) {
        _cleanup_close_ int fd = open(sysfs ?: "/sys/kernel/mm/transparent_hugepage", O_PATH | O_DIRECTORY | O_CLOEXEC);
        static const char *const files[] = { "hugepages-2048kB/enabled", "enabled" };

        for (unsigned i = 0; fd >= 0 && i < ELEMENTSOF(files); i++) {
                _cleanup_free_ char *text = NULL;

                if (read_file(fd, files[i], &text, NULL) < 0 || strstr(text, "[inherit]"))
                        continue;
                return strstr(text, "[always]") ? HOST_THP_ALWAYS
                     : strstr(text, "[madvise]") ? HOST_THP_ADVISED : HOST_THP_NEVER;
        }
        return HOST_THP_NEVER;
}

bool host_shmem_huge_denied(const char *sysfs) {
        _cleanup_close_ int fd = open(sysfs ?: "/sys/kernel/mm", O_PATH | O_DIRECTORY | O_CLOEXEC);
        _cleanup_free_ char *text = NULL;

        if (fd < 0)
                return false;
        if (read_file(fd, "transparent_hugepage/shmem_enabled", &text, NULL) == 0)
                return strstr(text, "[deny]") != NULL;
        return faccessat(fd, "transparent_hugepage", F_OK, 0) < 0 && errno == ENOENT;
}
