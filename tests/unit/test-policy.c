/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cgroup/policy.h"

#include "test.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

/* Pattern, path, whether they match. */
static void test_patterns(void **state) {
        static const struct {
                const char *pattern, *path;
                bool match;
        } cases[] = {
                { "", "", true },                       { "", "a", false },
                { "/", "", true },                      { "a", "", false },
                { "a/b", "a/b", true },                 { "/a/b", "a/b", true },
                { "a/b", "a/bc", false },               { "a/b", "a", false },
                { "a/bc", "a/b", false },               { "a", "a/b", false },
                { "*", "", true },                      { "*", "abc", true },
                { "*", "a/b", false },                  { "a/*", "a/b", true },
                { "a/*", "a/", true },                  { "a/*", "a/b/c", false },
                { "a/*", "a", false },                  { "*/*", "a/b", true },
                { "a*c", "ac", true },                  { "a*c", "abbc", true },
                { "a*c", "ab/c", false },               { "a*b*c", "a1b2b3c", true },
                { "a*b*c", "a1c2b", false },            { "**", "", true },
                { "**", "a/b/c", true },                { "a/**", "a/b/c", true },
                { "a/**", "a", false },                 { "a**", "a", true },
                { "**/c", "a/b/c", true },              { "**/c", "c", false },
                { "a/**/c", "a/b/b/c", true },          { "a/**/c", "a/c", false },
                { "**b/*c", "x/ab/xc", true },          { "**b/*c", "x/ab/x/c", false },
                { "***", "a/b", true },                 { "a***c", "a/b/c", true },
                { "?", "a", true },                     { "?", "", false },
                { "?", "/", false },                    { "a?c", "a/c", false },
                { "??", "ab", true },                   { "\\*", "*", true },
                { "\\*", "a", false },                  { "a\\?", "a?", true },
                { "a\\?", "ab", false },                { "a\\\\x2db", "a\\x2db", true },
                { "a\\\\x2db", "a-b", false },          { "a\\", "a", false },
                { "a\\", "a\\", false },                { "[a]", "a", false },
                { "\\**", "*x/y", false },              { "\\**", "*x", true },
                { "system.slice/docker-*.scope", "system.slice/docker-0af.scope", true },
                { "system.slice/docker-*.scope", "system.slice/docker-0af.scope/init", false },
                { "machine.slice/libpod-*.scope/**", "machine.slice/libpod-1.scope/container", true },
                { "kubepods.slice/**", "kubepods.slice/kubepods-pod1.slice/cri-2.scope", true },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++)
                if (cgroup_pattern_match(cases[i].pattern, cases[i].path) != cases[i].match)
                        fail_msg("pattern \"%s\", path \"%s\": %s", cases[i].pattern, cases[i].path,
                                 cases[i].match ? "must match" : "must not match");
}

/* What a pattern means, said as plainly as possible; takes exponential time. */
static bool naive_match(const char *p, const char *s) {
        if (!*p)
                return !*s;
        if (*p == '*') {
                bool two = p[1] == '*';
                if (naive_match(p + 1 + two, s))
                        return true;
                return *s && (two || *s != '/') && naive_match(p, s + 1);
        }
        if (*p == '\\')
                return p[1] && p[1] == *s && naive_match(p + 2, s + 1);
        return *s && (*p == '?' ? *s != '/' : *p == *s) && naive_match(p + 1, s + 1);
}

static void random_text(char *text, size_t max, const char *alphabet, uint64_t *random) {
        size_t size = (size_t)(*random >> 33) % (max + 1);

        for (size_t i = 0; i < size; i++) {
                *random = *random * 6364136223846793005U + 1442695040888963407U;
                text[i] = alphabet[(*random >> 33) % strlen(alphabet)];
        }
        text[size] = 0;
        *random = *random * 6364136223846793005U + 1442695040888963407U;
}

static void test_against_naive(void **state) {
        uint64_t random = 1;
        unsigned matches = 0;

        for (unsigned i = 0; i < 300000; i++) {
                char pattern[10], path[9];

                random_text(pattern, sizeof pattern - 1, "aab/**?\\", &random);
                random_text(path, sizeof path - 1, "aab/", &random);
                if (*pattern == '/')
                        continue;
                if (cgroup_pattern_match(pattern, path) != naive_match(pattern, path))
                        fail_msg("pattern \"%s\", path \"%s\"", pattern, path);
                matches += naive_match(pattern, path);
        }
        assert_true(matches > 5000);
}

/* Backtracking would not end before the test's time limit does. */
static void test_hostile_pattern(void **state) {
        static char pattern[2049], path[4096];

        for (size_t i = 0; i + 2 < sizeof pattern; i += 2)
                memcpy(pattern + i, "*a", 2);
        memset(path, 'a', sizeof path - 2);
        path[sizeof path - 2] = 'b';
        assert_false(cgroup_pattern_match(pattern, path));
        path[sizeof path - 2] = 'a';
        assert_true(cgroup_pattern_match(pattern, path));

        for (size_t i = 0; i + 4 < sizeof pattern; i += 4)
                memcpy(pattern + i, "**a*", 4);
        path[sizeof path - 2] = 'b';
        pattern[sizeof pattern - 5] = 'c';
        assert_false(cgroup_pattern_match(pattern, path));
}

static void test_long_pattern(void **state) {
        static char pattern[CONF_PATTERN_BYTES_MAX + 2], path[CONF_PATTERN_BYTES_MAX + 2];

        memset(pattern, '*', CONF_PATTERN_BYTES_MAX);
        memset(path, 'a', CONF_PATTERN_BYTES_MAX + 1);
        assert_true(cgroup_pattern_match(pattern, path));
        pattern[CONF_PATTERN_BYTES_MAX] = '*';
        assert_false(cgroup_pattern_match(pattern, path));
}

static void test_find(void **state) {
        char *exclude[] = { (char *)"m/secret*", (char *)"m/x", NULL };
        ConfCgroup sections[] = {
                { .pattern = (char *)"m/*", .exclude = exclude },
                { .pattern = (char *)"m/secret", .malformed = true },
                { .pattern = (char *)"**" },
        };
        Conf conf = { .cgroups = sections, .n_cgroups = 2 };

        assert_ptr_equal(policy_find(&conf, "m/a"), &sections[0]);
        assert_ptr_equal(policy_find(&conf, "m/secret"), &sections[1]); /* a malformed one matches all the same */
        assert_null(policy_find(&conf, "m/x"));
        assert_null(policy_find(&conf, "m/a/b"));
        assert_null(policy_find(&conf, ""));
        conf.n_cgroups = 3;
        assert_ptr_equal(policy_find(&conf, "m/x"), &sections[2]);
        assert_ptr_equal(policy_find(&conf, ""), &sections[2]);
}

static void test_domain(void **state) {
        static const struct {
                const char *domain, *path, *result;
        } cases[] = {
                { "web", "a/b", "web" },                { "%c", "a/b", "a/b" },
                { "t-%c-%c", "a", "t-a-a" },            { "100%%", "a", "100%" },
                { "%%c", "a", "%c" },                   { "%c", "", "/" },
                { "%c", "a%c", "a%c" },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                _cleanup_free_ char *name = NULL;
                ConfCgroup section = { .domain = (char *)cases[i].domain };

                assert_int_equal(policy_domain(&section, cases[i].path, &name), 0);
                assert_string_equal(name, cases[i].result);
        }
}

/* Each step: a cgroup joins the domain; then whether it may be remapped, and whether without huge pages of tmpfs. */
static void test_trust(void **state) {
        static const ConfCgroup trusting = { .trusted_together = true }, doubting = {};
        PolicyTrust trust = {}, all = {}, late = {};

        assert_null(policy_trust_problem(&trust, false));
        policy_trust_add(&trust, &doubting, "a");
        assert_null(policy_trust_problem(&trust, false));       /* it trusts itself */
        policy_trust_add(&trust, &doubting, "a");
        assert_null(policy_trust_problem(&trust, false));
        policy_trust_add(&trust, &trusting, "a/b");             /* one that does not is enough */
        assert_non_null(policy_trust_problem(&trust, false));
        assert_null(policy_trust_problem(&trust, true));

        policy_trust_add(&all, &trusting, "a");
        policy_trust_add(&all, &trusting, "b");
        assert_null(policy_trust_problem(&all, false));
        policy_trust_add(&all, &doubting, "b");
        assert_non_null(strstr(policy_trust_problem(&all, false), "TrustedTogether=yes"));

        policy_trust_add(&late, &trusting, "");
        policy_trust_add(&late, &doubting, "b");
        assert_non_null(policy_trust_problem(&late, false));
}

int main(void) {
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_patterns),        cmocka_unit_test(test_against_naive),
                cmocka_unit_test(test_hostile_pattern), cmocka_unit_test(test_long_pattern),
                cmocka_unit_test(test_find),            cmocka_unit_test(test_domain),
                cmocka_unit_test(test_trust),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
