/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Every allocation on the way from text to configuration fails once: that must end in -ENOMEM with the result left
 * alone, never in a configuration that lacks something, such as an Exclude= (nor, under the sanitizer, in a leak).
 */

#include "cgroup/policy.h"
#include "conf/conf-internal.h"
#include "test.h"

long allocations_left = -1;

static const char text[] =
        "[Daemon]\nSocket=/s\nMetadataMax=64M\n"
        "[Cgroup a/*]\nMerge=yes\nDomain=%c\nExclude=a/b a/c\nExclude=a/d\n"
        "[Cgroup b]\nExclude=x\\\n  y\n"
        "[Cgroup a/*]\nTrack=no\n";

static int build(Conf **ret) {
        _cleanup_(conf_builder_freep) ConfBuilder *builder = NULL;
        int r = conf_builder_new(NULL, NULL, &builder);

        if (r == 0)
                r = conf_builder_add(builder, "text", text, sizeof text - 1);
        return r ? r : conf_builder_finish(builder, false, ret);
}

int main(void) {
        unsigned failures = 0;

        for (long n = 0;; n++) {
                Conf untouched, *conf = &untouched;
                char *domain = NULL;
                int r;

                allocations_left = n;
                r = build(&conf);
                if (r < 0) {
                        CHECK(r == -ENOMEM, "allocation %ld: %d", n, r);
                        CHECK(conf == &untouched, "allocation %ld", n);
                        failures++;
                        continue;
                }
                CHECK(conf->n_cgroups == 2, "allocation %ld", n);
                CHECK(!policy_find(conf, "a/b") && !policy_find(conf, "a/c") && !policy_find(conf, "a/d"),
                      "allocation %ld", n);
                CHECK(policy_find(conf, "a/x") == conf->cgroups, "allocation %ld", n);
                r = policy_domain(conf->cgroups, "a/x", &domain);
                CHECK(r == 0 ? strcmp(domain, "a/x") == 0 : r == -ENOMEM && !domain, "allocation %ld", n);
                free(domain);
                conf_free(conf);
                if (allocations_left >= 0)
                        break;
        }
        CHECK(failures > 30, "%u", failures);
        printf("%u allocations failed one by one\n", failures);
        return 0;
}
