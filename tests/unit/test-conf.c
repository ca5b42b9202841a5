/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf/conf-internal.h"
#include "conf/conf-parse.h"
#include "conf/conf-table.h"
#include "conf/conf-value.h"

#include "base/io.h"
#include "test.h"

#include <locale.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

/* What was reported: "file:line;" for each, and the last message. */
typedef struct Reports {
        char places[512];
        char message[1024];
} Reports;

static void note(void *userdata, const char *file, unsigned line, const char *message) {
        Reports *reports = userdata;
        size_t used = strlen(reports->places);

        snprintf(reports->places + used, sizeof reports->places - used, "%s:%u;", file, line);
        snprintf(reports->message, sizeof reports->message, "%s", message);
}

static bool shmem_denied;       /* on the machine that the texts are for */

/* Texts "a", "b" (b may be NULL), one on top of the other. */
static Conf *load_two(const char *a, size_t size, const char *b, Reports *reports) {
        _cleanup_(conf_builder_freep) ConfBuilder *builder = NULL;
        Conf *conf = NULL;

        *reports = (Reports){};
        assert_int_equal(conf_builder_new(note, reports, &builder), 0);
        assert_int_equal(conf_builder_add(builder, "a", a, size), 0);
        if (b)
                assert_int_equal(conf_builder_add(builder, "b", b, strlen(b)), 0);
        assert_int_equal(conf_builder_finish(builder, shmem_denied, &conf), 0);
        return conf;
}

static Conf *load(const char *a, Reports *reports) { return load_two(a, strlen(a), NULL, reports); }

static void assert_same(const Conf *a, const Conf *b) {
        assert_string_equal(a->daemon.socket, b->daemon.socket);
        assert_int_equal(a->daemon.scan_interval_nsec, b->daemon.scan_interval_nsec);
        assert_int_equal(a->daemon.cpu_quota, b->daemon.cpu_quota);
        assert_int_equal(a->daemon.cpu_quota_busy, b->daemon.cpu_quota_busy);
        assert_int_equal(a->daemon.scan_threads, b->daemon.scan_threads);
        assert_int_equal(a->daemon.max_page_sharing, b->daemon.max_page_sharing);
        assert_int_equal(a->daemon.merge_across_nodes, b->daemon.merge_across_nodes);
        assert_int_equal(a->daemon.minimum_age_nsec, b->daemon.minimum_age_nsec);
        assert_int_equal(a->daemon.metadata_max, b->daemon.metadata_max);
        assert_int_equal(a->daemon.metadata_max_bytes, b->daemon.metadata_max_bytes);
        assert_int_equal(a->daemon.probes, b->daemon.probes);
        assert_int_equal(a->daemon.on_stop, b->daemon.on_stop);
}

static void test_defaults(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load("[Cgroup a/*]", &reports);

        assert_string_equal(reports.places, "");
        assert_string_equal(conf->daemon.socket, "/run/ksmd-user/org.ksmduser.Daemon");
        assert_int_equal(conf->daemon.scan_interval_nsec, 10 * NSEC_PER_SEC);
        assert_int_equal(conf->daemon.cpu_quota, 1000);
        assert_int_equal(conf->daemon.cpu_quota_busy, 0);
        assert_int_equal(conf->daemon.stop_quota, 50);
        assert_int_equal(conf->daemon.scan_threads, 1);
        assert_int_equal(conf->daemon.max_page_sharing, 256);
        assert_true(conf->daemon.merge_across_nodes);
        assert_int_equal(conf->daemon.minimum_age_nsec, 5 * NSEC_PER_SEC);
        assert_int_equal(conf->daemon.metadata_max, 100);
        assert_int_equal(conf->daemon.metadata_max_bytes, 0);
        assert_int_equal(conf->daemon.probes, CONF_AUTO);
        assert_int_equal(conf->daemon.on_stop, CONF_ON_STOP_KEEP);
        assert_int_equal(conf->n_cgroups, 1);
        assert_string_equal(conf->cgroups[0].pattern, "a/*");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        assert_string_equal(conf->cgroups[0].domain, "a/*");
        assert_int_equal(conf->cgroups[0].route, CONF_ROUTE_AUTO);
        assert_false(conf->cgroups[0].trusted_together);
        assert_int_equal(conf->cgroups[0].track, CONF_AUTO);
        assert_int_equal(conf->cgroups[0].minimum_run_pages, 1);
        assert_int_equal(conf->cgroups[0].huge_page_split, 2500);
        assert_false(conf->cgroups[0].include_dontdump);
        assert_null(conf->cgroups[0].exclude);
        assert_false(conf->cgroups[0].malformed);
        assert_string_equal(conf->cgroups[0].file, "a");
        assert_int_equal(conf->cgroups[0].line, 1);
}

static void test_all_keys(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load(
                "[Daemon]\nSocket=/x\nScanInterval=1min 30s\nCPUQuota=150%\nCPUQuotaBusy=50.5%\nScanThreads=4\n"
                "MaxPageSharing=auto\nMaxRmapWalk=200us\n"
                "MergeAcrossNodes=off\nMinimumAge=0\nMetadataMax=64M\nProbes=no\nOnStop=unmerge\n"
                "[Cgroup /m/*]\nMerge=yes\nDomain=t%c\nRoute=remap\nTrustedTogether=yes\nTrack=yes\nMinimumRun=16\nHugePageSplit=2.5%\n"
                "IncludeDontDump=1\nExclude=m/a m/b\\ c\nExclude=/m/d\n"
                "[Cgroup n]\nMerge=dry-run\n", &reports);
        const ConfCgroup *c = conf->cgroups;

        assert_string_equal(reports.places, "");
        assert_string_equal(conf->daemon.socket, "/x");
        assert_int_equal(conf->daemon.scan_interval_nsec, 90 * NSEC_PER_SEC);
        assert_int_equal(conf->daemon.cpu_quota, 15000);
        assert_int_equal(conf->daemon.cpu_quota_busy, 5050);
        assert_int_equal(conf->daemon.scan_threads, 4);
        assert_int_equal(conf->daemon.max_page_sharing, 0);
        assert_false(conf->daemon.merge_across_nodes);
        assert_int_equal(conf->daemon.minimum_age_nsec, 0);
        assert_int_equal(conf->daemon.metadata_max_bytes, 64 << 20);
        assert_int_equal(conf->daemon.probes, CONF_NO);
        assert_int_equal(conf->daemon.on_stop, CONF_ON_STOP_UNMERGE);
        assert_int_equal(conf->n_cgroups, 2);
        assert_string_equal(c->pattern, "m/*");
        assert_int_equal(c->merge, CONF_MERGE_YES);
        assert_string_equal(c->domain, "t%c");
        assert_int_equal(c->route, CONF_ROUTE_REMAP);
        assert_true(c->trusted_together);
        assert_int_equal(c->track, CONF_YES);
        assert_int_equal(c->minimum_run_pages, 16);
        assert_int_equal(c->huge_page_split, 250);
        assert_true(c->include_dontdump);
        assert_string_equal(c->exclude[0], "m/a");
        assert_string_equal(c->exclude[1], "m/b\\ c");
        assert_string_equal(c->exclude[2], "m/d");
        assert_null(c->exclude[3]);
        assert_int_equal(c[1].merge, CONF_MERGE_DRY_RUN);
}

static void test_syntax(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load(
                "\xef\xbb\xbf# comment\r\n; another\r\n\r\n\\\n  [Daemon]  \r\n\t ScanThreads \t= 3 \r\n"
                "Socket=/a\\\r\n# in between\n   b\r\n[  Cgroup   a ]\nExclude=x \\\n  y \\\n\nMerge=yes\n"
                "Domain=f\xc3\xbcr\nExclude=z\\", &reports);

        assert_string_equal(reports.places, "");
        assert_int_equal(conf->daemon.scan_threads, 3);
        assert_string_equal(conf->daemon.socket, "/a b");
        assert_string_equal(conf->cgroups[0].pattern, "a");
        assert_string_equal(conf->cgroups[0].exclude[0], "x");
        assert_string_equal(conf->cgroups[0].exclude[1], "y");
        assert_string_equal(conf->cgroups[0].exclude[2], "z");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
        assert_string_equal(conf->cgroups[0].domain, "f\xc3\xbcr");
}

/* An even number of backslashes does not continue the line. */
static void test_backslashes(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load("[Cgroup a]\nExclude=b\\\\\nMerge=yes\n", &reports);

        assert_string_equal(reports.places, "");
        assert_string_equal(conf->cgroups[0].exclude[0], "b\\\\");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
}

static void test_later_wins_and_empty_resets(void **state) {
        Reports reports;
        static const char a[] = "[Daemon]\nScanThreads=2\nScanThreads=3\nCPUQuota=50%\nMetadataMax=64M\n"
                                "[Cgroup x]\nDomain=d\nExclude=p\nMerge=yes\n[Cgroup y]\nMerge=yes\n";
        _cleanup_(conf_freep) Conf *conf = load_two(a, sizeof a - 1,
                "[Daemon]\nCPUQuota=\nMetadataMax=\n[Cgroup y]\nMerge=\n[Cgroup x]\nDomain=\nExclude=\nExclude=q\n",
                &reports);

        assert_string_equal(reports.places, "");
        assert_int_equal(conf->daemon.scan_threads, 3);
        assert_int_equal(conf->daemon.cpu_quota, 1000);
        assert_int_equal(conf->daemon.metadata_max, 100);
        assert_int_equal(conf->daemon.metadata_max_bytes, 0);
        assert_int_equal(conf->n_cgroups, 2);
        assert_string_equal(conf->cgroups[0].pattern, "x");
        assert_string_equal(conf->cgroups[0].domain, "x");
        assert_string_equal(conf->cgroups[0].exclude[0], "q");
        assert_null(conf->cgroups[0].exclude[1]);
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_NO);
}

#define TEN "0123456789"

/* A mistake in [Daemon]: reported, the value before it stands, and no cgroup pays for it. */
static void test_daemon_mistakes(void **state) {
        static const char *const lines[] = {
                "ScanInterval=10 parsecs", "ScanInterval=-1s", "ScanInterval=1ms", "ScanInterval=2w", "CPUQuota=10",
                "CPUQuota=0%", "CPUQuota=0.001%", "CPUQuota=500000%0",
                "CPUQuotaBusy=0%", "CPUQuotaBusy=101%", "ScanThreads=0", "ScanThreads=1.5",
                "ScanThreads=0x2", "ScanThreads=99999999999999999999", "MaxPageSharing=1", "MaxPageSharing=2147483648",
                "MaxRmapWalk=0", "MaxRmapWalk=2s",
                "MergeAcrossNodes=maybe", "MinimumAge=infinity", "MetadataMax=0%", "MetadataMax=101%",
                "MetadataMax=1K", "Probes=perhaps", "OnStop=panic", "Socket=relative", "scaninterval=5s",
                "Merge=yes", "nonsense", "=x",
                "Socket=/" TEN TEN TEN TEN TEN TEN TEN TEN TEN TEN "1234567",
        };

        for (size_t i = 0; i < ELEMENTSOF(lines); i++) {
                static const char before[] =
                        "[Cgroup x]\nMerge=yes\n[Daemon]\nScanInterval=7s\nCPUQuota=70%\nScanThreads=7\nMaxPageSharing=70\n"
                        "MinimumAge=7s\nMetadataMax=7%\nProbes=yes\nOnStop=unmerge\nSocket=/s\n";
                Reports reports;
                _cleanup_(conf_freep) Conf *good = load(before, &reports);
                _cleanup_(conf_freep) Conf *conf = NULL;
                char text[1024];

                snprintf(text, sizeof text, "%s%s\n", before, lines[i]);
                conf = load(text, &reports);
                if (strcmp(reports.places, "a:13;") != 0)
                        fail_msg("%s: reported at \"%s\"", lines[i], reports.places);
                assert_non_null(strstr(reports.message, "; ignored"));
                assert_int_equal(conf->n_warnings, 1);
                assert_same(conf, good);
                assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
        }
}

/* Whatever is wrong in a [Cgroup] section: that section merges nothing, its neighbours do. */
static void test_cgroup_fails_closed(void **state) {
        static const char *const lines[] = {
                "Merge=maybe", "Merge=YES!", "Domain=a b", "Domain=%d", "Domain=100%", "Route=fastest", "TrustedTogether=maybe", "Track=perhaps",
                "MinimumRun=0", "MinimumRun=-1", "HugePageSplit=101%", "HugePageSplit=25", "IncludeDontDump=x",
                "Exclude=a//b", "Exclude=a/", "Exclude=//a", "Exclude=[ab]", "Exclude={a,b}", "Exclude=a\\x2db",
                "exclude=a", "ScanThreads=1", "Unknown=1", "nonsense", "=x", "Merge\x01=yes", "Domain=\xff",
                "Domain=\xc0\x80", "Domain=\xed\xa0\x80", "Domain=\xf4\x90\x80\x80", "Domain=\xe2\x82",
                "Route=advise\nDomain=%c", "Domain=%c\nRoute=advise", "Route=advise\nDomain=a%%%c",
        };

        for (size_t i = 0; i < ELEMENTSOF(lines); i++) {
                Reports reports;
                char text[512];
                _cleanup_(conf_freep) Conf *conf = NULL;
                bool two = strchr(lines[i], '\n');

                snprintf(text, sizeof text, "[Cgroup a]\nMerge=yes\n[Cgroup b]\nMerge=yes\n%s\nMerge=yes\n[Cgroup c]\nMerge=yes\n",
                         lines[i]);
                conf = load(text, &reports);
                if (strcmp(reports.places, two ? "a:6;" : "a:5;") != 0)
                        fail_msg("%s: reported at \"%s\"", lines[i], reports.places);
                assert_non_null(strstr(reports.message, "; nothing in [Cgroup b] is merged"));
                assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
                assert_false(conf->cgroups[0].malformed);
                assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_NO);
                assert_true(conf->cgroups[1].malformed);
                assert_int_equal(conf->cgroups[2].merge, CONF_MERGE_YES);
        }
}

/* A drop-in cannot mend a section, and can break it. */
static void test_malformed_across_files(void **state) {
        static const char good[] = "[Cgroup a]\nMerge=yes\n", bad[] = "[Cgroup a]\nTrack=?\n";
        Reports reports;
        Conf *conf = load_two(bad, sizeof bad - 1, good, &reports);

        assert_string_equal(reports.places, "a:2;");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        conf_free(conf);
        conf = load_two(good, sizeof good - 1, bad, &reports);
        assert_string_equal(reports.places, "b:2;");
        assert_int_equal(conf->n_cgroups, 1);
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        conf_free(conf);
}

/* Lines whose section cannot be told: they go nowhere, and nothing is merged. */
static void test_lost_lines(void **state) {
        static const char *const headers[] = {
                "[Cgroup b", "[Cgroup]", "[Cgroup ]", "[]", "[", "Cgroup b]", "{Cgroup b}", "[Cgroup b] # why", "[Cgroup b//c]",
                "[Cgroup b/]", "[Cgroup [b]]", "[Cgroup b c]", "[Cgroup b\\]", "[Cgruop b]", "[cgroup b]", "[cgroup]", "[Cgroup=b]", "[a/*]",
                "[Cgroup b]\\\n", "[Cgroup\\\n b]\n",
                "[Cgroup \xff]", "\x01[Cgroup b]", "[Daemon b]", "Merge=no \\\n [Cgroup b]", "Cgroup a=b]",
        };

        for (size_t i = 0; i < ELEMENTSOF(headers); i++) {
                Reports reports;
                char text[512];
                _cleanup_(conf_freep) Conf *conf = NULL;

                snprintf(text, sizeof text, "[Daemon]\nScanThreads=2\n[Cgroup a]\nMerge=yes\n%s\n\nScanThreads=3\nExclude=z\n"
                         "[Cgroup c]\nMerge=yes\n", headers[i]);
                conf = load(text, &reports);
                if (strcmp(reports.places, "a:5;") != 0)
                        fail_msg("%s: reported at \"%s\"", headers[i], reports.places);
                assert_non_null(strstr(reports.message, "no cgroup is merged"));
                assert_int_equal(conf->daemon.scan_threads, 2);
                assert_int_equal(conf->n_cgroups, 2);
                assert_null(conf->cgroups[0].exclude);
                for (size_t j = 0; j < 2; j++) {
                        assert_int_equal(conf->cgroups[j].merge, CONF_MERGE_NO);
                        assert_true(conf->cgroups[j].malformed);
                }
        }
}

static void test_line_before_section(void **state) {
        static const char good[] = "[Cgroup a]\nMerge=yes\n";
        Reports reports;
        Conf *conf = load_two(good, sizeof good - 1, "\nExclude=x\nTrack=no\n", &reports);

        assert_string_equal(reports.places, "b:2;");
        assert_null(conf->cgroups[0].exclude);
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        conf_free(conf);
}

/* A section of another name says nothing about cgroups: it is skipped, once. */
static void test_unknown_section(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load("[Cgroup a]\nMerge=yes\n[Keeper]\nMerge=no\nnonsense\n", &reports);

        assert_string_equal(reports.places, "a:3;");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
}

static void test_nul_and_length(void **state) {
        static const char nul[] = "[Cgroup a]\nMerge=yes\nExclude=b\0c\n[Cgroup d]\nMerge=yes\n";
        static const char nul_header[] = "[Cgroup d]\nMerge=yes\n[Cgroup a\0]\nMerge=yes\n";
        _cleanup_free_ char *text = malloc(CONF_LINE_BYTES_MAX * 2 + 100);
        Reports reports;
        Conf *conf = load_two(nul, sizeof nul - 1, NULL, &reports);
        size_t n;

        assert_non_null(text);
        assert_string_equal(reports.places, "a:3;");
        assert_non_null(strstr(reports.message, "NUL byte"));
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_YES);
        conf_free(conf);

        conf = load_two(nul_header, sizeof nul_header - 1, NULL, &reports);
        assert_string_equal(reports.places, "a:3;");
        assert_int_equal(conf->n_cgroups, 1);
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        conf_free(conf);

        for (int too_long = 0; too_long < 2; too_long++) {
                n = (size_t)sprintf(text, "[Cgroup a]\nMerge=yes\nExclude=b");
                memset(text + n, ' ', CONF_LINE_BYTES_MAX - 9 + (size_t)too_long);
                n += CONF_LINE_BYTES_MAX - 9 + (size_t)too_long;
                n += (size_t)sprintf(text + n, "\nTrack=no\n");
                conf = load_two(text, n, NULL, &reports);
                assert_string_equal(reports.places, too_long ? "a:3;" : "");
                assert_int_equal(conf->cgroups[0].merge, too_long ? CONF_MERGE_NO : CONF_MERGE_YES);
                assert_int_equal(conf->cgroups[0].track, CONF_NO);
                conf_free(conf);
        }

        /* Too long only once its parts are joined; the parts do not become lines of their own. */
        n = (size_t)sprintf(text, "[Cgroup a]\nMerge=yes\nExclude=b");
        for (unsigned i = 0; i < 2 * CONF_LINE_BYTES_MAX / 64; i++)
                n += (size_t)sprintf(text + n, "%-62s\\\n", "Merge=yes Track=yes");
        n += (size_t)sprintf(text + n, "\nTrack=no\n");
        conf = load_two(text, n, NULL, &reports);
        assert_string_equal(reports.places, "a:3;");
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        assert_int_equal(conf->cgroups[0].track, CONF_NO);
        conf_free(conf);
}

static void test_one_advise_domain(void **state) {
        static const char two[] = "[Cgroup a]\nMerge=yes\nRoute=advise\n[Cgroup b]\nMerge=yes\nRoute=advise\n"
                                  "[Cgroup c]\nMerge=yes\n";
        Reports reports;
        Conf *conf = load_two(two, sizeof two - 1, NULL, &reports);

        assert_string_equal(reports.places, "a:6;");
        assert_non_null(strstr(reports.message, "nothing in [Cgroup b]"));
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_NO);
        assert_true(conf->cgroups[1].malformed);
        assert_int_equal(conf->cgroups[2].merge, CONF_MERGE_YES);
        conf_free(conf);

        /* The same domain twice is one domain; so is what a drop-in made of it. */
        conf = load_two(two, sizeof two - 1, "[Cgroup b]\nDomain=a\n", &reports);
        assert_string_equal(reports.places, "");
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_YES);
        conf_free(conf);
        conf = load_two(two, sizeof two - 1, "[Cgroup b]\nDomain=c\n", &reports);
        assert_string_equal(reports.places, "b:2;");
        assert_int_equal(conf->cgroups[1].merge, CONF_MERGE_NO);
        conf_free(conf);
}

/* A domain has one route: lines 1 to 8, and whether the second section (its Domain= in line 8) may join. */
static void test_one_route_a_domain(void **state) {
        static const struct {
                const char *first, *second, *places;
                ConfRoute routes[2];
        } cases[] = {
                { "auto", "auto", "", { CONF_ROUTE_AUTO, CONF_ROUTE_AUTO } },
                { "auto", "zero", "a:8;", { CONF_ROUTE_AUTO, CONF_ROUTE_ZERO } },
                { "zero", "auto", "a:8;", { CONF_ROUTE_ZERO, CONF_ROUTE_AUTO } },
                { "advise", "remap", "a:8;", { CONF_ROUTE_ADVISE, CONF_ROUTE_REMAP } },
                { "remap", "advise", "a:8;", { CONF_ROUTE_REMAP, CONF_ROUTE_ADVISE } },
                { "auto", "advise", "", { CONF_ROUTE_ADVISE, CONF_ROUTE_ADVISE } },
                { "advise", "auto", "", { CONF_ROUTE_ADVISE, CONF_ROUTE_ADVISE } },
        };
        Reports reports;

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                char text[256];
                Conf *conf;

                snprintf(text, sizeof text, "[Cgroup a]\nMerge=yes\nRoute=%s\nDomain=d\n[Cgroup b]\nMerge=yes\nRoute=%s\nDomain=d\n",
                         cases[i].first, cases[i].second);
                conf = load(text, &reports);
                assert_string_equal(reports.places, cases[i].places);
                assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_YES);
                assert_int_equal(conf->cgroups[1].merge, *cases[i].places ? CONF_MERGE_NO : CONF_MERGE_YES);
                for (size_t k = 0; k < 2; k++)
                        assert_int_equal(conf->cgroups[k].route, cases[i].routes[k]);
                conf_free(conf);
        }
        /* Who is not merged says nothing of the others. */
        conf_free(load("[Cgroup a]\nMerge=no\nRoute=zero\nDomain=d\n[Cgroup b]\nMerge=yes\nDomain=d\n", &reports));
        assert_string_equal(reports.places, "");
}

/* What is shown of a name in a message is whole characters: the message goes into JSON. */
static void test_names_are_cut_between_characters(void **state) {
        static const char *const around[][2] = {
                { "[Cgroup a]\nMerge=", "\n" }, { "[Cgroup a]\n", "=1\n" }, { "[Cgroup ", "]\nMerge=x\n" },
        };
        char name[256], text[512];
        Reports reports;

        assert_non_null(setlocale(LC_CTYPE, "C.UTF-8"));
        for (size_t i = 0; i < ELEMENTSOF(around); i++)
                for (size_t shift = 0; shift < 3; shift++) {
                        memset(name, 'x', shift);
                        for (size_t k = shift; k + 3 < sizeof name; k += 3)
                                memcpy(name + k, "\xe2\x82\xac", 4); /* the euro sign */
                        snprintf(text, sizeof text, "%s%s%s", around[i][0], name, around[i][1]);
                        conf_free(load(text, &reports));
                        assert_int_not_equal(mbstowcs(NULL, reports.message, 0), (size_t)-1);
                }
}

/* Two sections of one domain, in lines 1 to 8, and what a drop-in adds: where it is refused, and which of them merge. */
static void test_remap_needs_trust(void **state) {
        static const char two[] = "[Cgroup a]\nMerge=yes\nRoute=remap\nDomain=d\n[Cgroup b]\nMerge=yes\nRoute=remap\nDomain=d\n";
        static const struct {
                const char *more, *places;
                bool denied, a_merges, b_merges;
        } cases[] = {
                { "", "a:8;", false, true, false },
                { "", "", true, true, true },
                { "[Cgroup a]\nTrustedTogether=yes\n[Cgroup b]\nTrustedTogether=yes\n", "", false, true, true },
                { "[Cgroup a]\nTrustedTogether=yes\n", "a:8;", false, true, false },
                { "[Cgroup b]\nTrustedTogether=yes\n", "a:4;", false, false, true },
                { "[Cgroup b]\nTrustedTogether=yes\nTrustedTogether=\n", "a:8;", false, true, false },
                { "[Cgroup b]\nDomain=e\n", "", false, true, true },
                { "[Cgroup a]\nDomain=d%c\n[Cgroup b]\nDomain=d%c\n", "", false, true, true },
                { "[Cgroup b]\nDomain=d\n", "b:2;", false, true, false },
                { "[Cgroup a]\nMerge=no\n", "", false, false, true },
                { "[Cgroup b]\nTrack=perhaps\n", "b:2;", false, true, false },
                { "[Cgroup c]\nMerge=yes\nRoute=remap\nDomain=d\n", "b:4;a:8;", false, true, false },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                Reports reports;
                Conf *conf;

                shmem_denied = cases[i].denied;
                conf = load_two(two, sizeof two - 1, cases[i].more, &reports);
                shmem_denied = false;
                if (strcmp(reports.places, cases[i].places) != 0 ||
                    (conf->cgroups[0].merge == CONF_MERGE_YES) != cases[i].a_merges ||
                    (conf->cgroups[1].merge == CONF_MERGE_YES) != cases[i].b_merges)
                        fail_msg("%s: %s (%s)", cases[i].more, reports.places, reports.message);
                if (!cases[i].b_merges && !strstr(cases[i].more, "Track"))
                        assert_non_null(strstr(reports.message, "both need TrustedTogether=yes"));
                conf_free(conf);
        }
}

static void test_default_domain(void **state) {
        Reports reports;
        _cleanup_(conf_freep) Conf *conf = load("[Cgroup /]\nRoute=advise\n[Cgroup a%c]\n", &reports);

        assert_string_equal(reports.places, "");
        assert_string_equal(conf->cgroups[0].pattern, "");
        assert_string_equal(conf->cgroups[0].domain, "/");
        assert_string_equal(conf->cgroups[1].domain, "a%%c");
}

static void test_many_sections(void **state) {
        _cleanup_free_ char *text = malloc(5000 * 32);
        size_t n = 0;
        Reports reports;
        Conf *conf;

        assert_non_null(text);
        for (unsigned i = 0; i < 4097; i++)
                n += (size_t)sprintf(text + n, "[Cgroup %u]\nMerge=yes\n", i);
        conf = load(text, &reports);
        assert_string_equal(reports.places, "a:8193;");
        assert_int_equal(conf->n_cgroups, 4096);
        assert_int_equal(conf->cgroups[0].merge, CONF_MERGE_NO);
        conf_free(conf);
}

static void test_values(void **state) {
        static const struct {
                const char *text;
                int result;
                uint64_t value;
        } times[] = {
                { "0", 0, 0 }, { "10s", 0, 10000000000 }, { "500ms", 0, 500000000 }, { "5min", 0, 300000000000 },
                { "1h", 0, 3600000000000 }, { "1h 30min", 0, 5400000000000 }, { "1h30m", 0, 5400000000000 },
                { "1.5s", 0, 1500000000 }, { "2 us", 0, 2000 }, { "\xc2\xb5s", -EINVAL, 0 }, { "3\xc2\xb5s", 0, 3000 },
                { "", -EINVAL, 0 }, { "s", -EINVAL, 0 }, { "-1s", -EINVAL, 0 }, { "+1s", -EINVAL, 0 },
                { "1.s", -EINVAL, 0 }, { ".5s", -EINVAL, 0 }, { "1e3", -EINVAL, 0 }, { "1 2 parsec", -EINVAL, 0 },
                { "18446744074s", -ERANGE, 0 }, { "18446744073s 999999999ns", -ERANGE, 0 },
                { "99999999999999999999", -ERANGE, 0 }, { "0.0000000001s", -EINVAL, 0 },
        }, sizes[] = {
                { "0", 0, 0 }, { "64M", 0, 64 << 20 }, { "1.5G", 0, 1610612736 }, { "4096", 0, 4096 }, { "7B", 0, 7 },
                { "2 K", 0, 2048 }, { "16E", -ERANGE, 0 }, { "15E", 0, 15ULL << 60 }, { "1M 1K", -EINVAL, 0 },
                { "64m", -EINVAL, 0 }, { "64MB", -EINVAL, 0 }, { "", -EINVAL, 0 },
        }, shares[] = {
                { "5%", 0, 500 }, { "2.5%", 0, 250 }, { "0.01%", 0, 1 }, { "0.001%", -EINVAL, 0 }, { "250 %", 0, 25000 },
                { "5", -EINVAL, 0 }, { "%", -EINVAL, 0 }, { "5%%", -EINVAL, 0 }, { "99999999%", -ERANGE, 0 },
        };
        static const char *const yes[] = { "1", "yes", "Y", "TRUE", "t", "On" };
        static const char *const no[] = { "0", "no", "N", "False", "f", "OFF" };
        uint64_t value;
        uint32_t share;
        bool b;

        for (size_t i = 0; i < ELEMENTSOF(times); i++) {
                value = 0;
                if (conf_value_time(times[i].text, &value) != times[i].result || value != times[i].value)
                        fail_msg("time \"%s\" gave %lu", times[i].text, value);
        }
        for (size_t i = 0; i < ELEMENTSOF(sizes); i++) {
                value = 0;
                if (conf_value_size(sizes[i].text, &value) != sizes[i].result || value != sizes[i].value)
                        fail_msg("size \"%s\" gave %lu", sizes[i].text, value);
        }
        for (size_t i = 0; i < ELEMENTSOF(shares); i++) {
                share = 0;
                if (conf_value_share(shares[i].text, &share) != shares[i].result || share != shares[i].value)
                        fail_msg("share \"%s\" gave %u", shares[i].text, share);
        }
        for (size_t i = 0; i < ELEMENTSOF(yes); i++) {
                assert_int_equal(conf_value_boolean(yes[i], &b), 0);
                assert_true(b);
                assert_int_equal(conf_value_boolean(no[i], &b), 0);
                assert_false(b);
        }
        assert_int_equal(conf_value_boolean("", &b), -EINVAL);
        assert_int_equal(conf_value_boolean("2", &b), -EINVAL);
}

/* The shipped file names every key with its default, commented out; as shipped it changes nothing. */
static void test_shipped_file(void **state) {
        _cleanup_free_ char *text = NULL;
        _cleanup_(conf_freep) Conf *shipped = NULL, *uncommented = NULL, *empty = NULL;
        size_t size, n;
        const ConfKey *keys = conf_keys(&n);
        Reports reports;
        const ConfCgroup *c;

        assert_int_equal(read_file(AT_FDCWD, TEST_SOURCE_DIR "/../../ksmd-user.conf", &text, &size), 0);
        empty = load("", &reports);
        shipped = load(text, &reports);
        assert_string_equal(reports.places, "");
        assert_int_equal(shipped->n_cgroups, 0);
        assert_same(shipped, empty);

        /* "#Key=" and "#[" are what an administrator would uncomment; "# " is prose. */
        for (size_t i = 0; i < n; i++) {
                char line[256];
                snprintf(line, sizeof line, "\n#%s=%s\n", keys[i].name, keys[i].initial ? keys[i].initial : "");
                if (!strstr(text, line))
                        fail_msg("not in the shipped file:%s", line);
        }
        for (char *p = text; p; p = strchr(p, '\n')) {
                p += *p == '\n';
                if (p[0] == '#' && p[1] != ' ' && p[1] != '\n')
                        p[0] = ' ';
        }
        uncommented = load(text, &reports);
        assert_string_equal(reports.places, "");
        assert_same(uncommented, empty);
        assert_int_equal(uncommented->n_cgroups, 1);
        c = uncommented->cgroups;
        assert_int_equal(c->merge, CONF_MERGE_NO);
        assert_string_equal(c->domain, c->pattern);
        assert_int_equal(c->route, CONF_ROUTE_AUTO);
        assert_int_equal(c->track, CONF_AUTO);
        assert_int_equal(c->minimum_run_pages, 1);
        assert_int_equal(c->huge_page_split, 2500);
        assert_false(c->include_dontdump);
        assert_null(c->exclude);
}

/* The manual explains every key, with its default in the same words as the table. */
static void test_manual(void **state) {
        _cleanup_free_ char *text = NULL;
        size_t n;
        const ConfKey *keys = conf_keys(&n);

        assert_int_equal(read_file(AT_FDCWD, TEST_SOURCE_DIR "/../../man/ksmd-user.conf.5", &text, NULL), 0);
        for (size_t i = 0; i < n; i++) {
                char head[64], tail[128];
                const char *line, *end;

                snprintf(head, sizeof head, "\n.It Cm %s= Ns Ar ", keys[i].name);
                snprintf(tail, sizeof tail, " Pq default: %s\n", keys[i].initial ? keys[i].initial : "");
                line = strstr(text, head);
                if (!line)
                        fail_msg("not in the manual: %s", keys[i].name);
                end = strchr(line + 1, '\n') + 1;
                if (keys[i].initial && ((size_t)(end - line) < strlen(tail) ||
                                        strncmp(end - strlen(tail), tail, strlen(tail)) != 0))
                        fail_msg("the manual does not give %s as default of %s", keys[i].initial, keys[i].name);
        }
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_defaults),
                cmocka_unit_test(test_all_keys),
                cmocka_unit_test(test_syntax),
                cmocka_unit_test(test_backslashes),
                cmocka_unit_test(test_later_wins_and_empty_resets),
                cmocka_unit_test(test_daemon_mistakes),
                cmocka_unit_test(test_cgroup_fails_closed),
                cmocka_unit_test(test_malformed_across_files),
                cmocka_unit_test(test_lost_lines),
                cmocka_unit_test(test_line_before_section),
                cmocka_unit_test(test_unknown_section),
                cmocka_unit_test(test_nul_and_length),
                cmocka_unit_test(test_one_advise_domain),
                cmocka_unit_test(test_one_route_a_domain),
                cmocka_unit_test(test_names_are_cut_between_characters),
                cmocka_unit_test(test_remap_needs_trust),
                cmocka_unit_test(test_default_domain),
                cmocka_unit_test(test_many_sections),
                cmocka_unit_test(test_values),
                cmocka_unit_test(test_shipped_file),
                cmocka_unit_test(test_manual),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
