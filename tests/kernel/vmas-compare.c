/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "vmas-compare.h"

const char *vmas_differ(const VmaList *list, const VmaList *smaps, const Vma **ret_vma) {
        *ret_vma = smaps->vmas;
        if (!list->uncounted || smaps->uncounted)
                return "which list is counted";
        if (list->n != smaps->n)
                return "number of mappings";
        for (size_t i = 0; i < list->n; i++) {
                const Vma *a = &list->vmas[i], *b = &smaps->vmas[i];

                *ret_vma = b;
                if (a->start != b->start || a->end != b->end)
                        return "place";
                if (a->offset != b->offset || a->inode != b->inode || a->dev != b->dev || a->file != b->file)
                        return "file";
                if (a->write != b->write || a->exec != b->exec)
                        return "permissions";
                if (a->advice != b->advice || a->huge_advised != b->huge_advised)
                        return "advice";
                if (a->skip != b->skip || a->skip_if_ours != b->skip_if_ours || a->tracked != b->tracked)
                        return "skip";
                if (a->mergeable != b->mergeable)
                        return "mergeable";
                if (a->growsdown != b->growsdown || a->sealed != b->sealed || a->keyed != b->keyed || a->named != b->named ||
                    a->policy != b->policy)
                        return "kind";
                if (a->anonymous_bytes < b->anonymous_bytes || (a->anonymous_bytes != 0 && a->anonymous_bytes != a->end - a->start))
                        return "anonymous bytes";
                if (a->huge_bytes != 0 || a->rss_bytes != 0 || a->referenced_bytes != 0)
                        return "sums";
        }
        return NULL;
}
