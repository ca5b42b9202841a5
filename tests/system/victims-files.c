/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "victims.h"

#include <dirent.h>
#include <pthread.h>

/* Descriptors: of each number the process knows whether it is open, and who opened it. */
#define NUMBERS 1024    /* that may be open from the start */
#define USED 40         /* of them used here */

static bool is_open[NUMBERS], is_mine[NUMBERS];

static void look_at_all(void) {
        DIR *dir = opendir("/proc/self/fd");
        bool seen[NUMBERS] = {};
        CHECK(dir);
        for (const struct dirent *entry; (entry = readdir(dir));) {
                int fd = atoi(entry->d_name);
                if (entry->d_name[0] == '.' || fd == dirfd(dir))
                        continue;
                CHECK(fd < NUMBERS && is_open[fd], "descriptor %d is a stranger", fd);
                seen[fd] = true;
        }
        for (int fd = 0; fd < NUMBERS; fd++)
                CHECK(seen[fd] == is_open[fd], "descriptor %d was closed by somebody", fd);
        closedir(dir);
}

static void learn(void) {
        for (int fd = 0; fd < NUMBERS; fd++)
                is_open[fd] = fcntl(fd, F_GETFD) >= 0;
}

static void close_mine(int fd) {
        CHECK(close(fd) == 0, "descriptor %d", fd);
        is_open[fd] = is_mine[fd] = false;
}

/* One thread, so this holds exactly: each number given out is the lowest that is free, and no stranger is ever seen. */
void victim_files(void) {
        uint64_t seed = 1;
        learn();
        victim_ready();
        while (victim_goes_on()) {
                int lowest = 0, number;
                seed = seed * 6364136223846793005 + 1442695040888963407;
                number = (int)((seed >> 33) % USED);
                while (is_open[lowest])
                        lowest++;
                if (is_mine[number])
                        close_mine(number);
                else if (lowest < USED) {
                        int fd = seed >> 63 ? open("/dev/null", O_RDONLY | O_CLOEXEC) : fcntl(0, F_DUPFD_CLOEXEC, 0);
                        CHECK(fd == lowest, "got %d, where %d was the lowest free", fd, lowest);
                        is_open[fd] = is_mine[fd] = true;
                }
                if (victim_rounds % 16 == 0)
                        look_at_all();
                if (victim_rounds % 4 == 0)
                        usleep(200);
        }
        for (int fd = 0; fd < NUMBERS; fd++)
                if (is_mine[fd])
                        close_mine(fd);
}

/* What no sane process does: one thread closes every descriptor that is not known, and opens its own in that place at
 * once. What it opened must stay, but for the moment between a look at a number and the close of it. */
static uint64_t taken_over, lost;

static void *take_over(void *unused) {
        uint64_t until[USED] = {}; /* look then whether it is still there; 0: not ours */
        for (uint64_t now; (now = now_nsec()) < victim_end_nsec;)
                for (int number = 0; number < USED; number++)
                        if (until[number] == 0 && !is_open[number] && number < USED / 4 && close(number) == 0) {
                                int fd = fcntl(0, F_DUPFD_CLOEXEC, 0);
                                CHECK(fd >= 0 && fd < USED);
                                taken_over++;
                                until[fd] = now + 5 * NSEC_PER_MSEC;
                        } else if (until[number] && now > until[number]) {
                                lost += close(number) < 0;
                                until[number] = 0;
                        }
        for (int number = 0; number < USED; number++)
                if (until[number])
                        close(number);
        return NULL;
}

void victim_closer(void) {
        pthread_t thread;
        learn();
        victim_ready();
        CHECK(pthread_create(&thread, NULL, take_over, NULL) == 0);
        while (victim_goes_on())
                usleep(300);
        pthread_join(thread, NULL);
        printf("%lu descriptors taken over, %lu of them closed\n", taken_over, lost);
        CHECK_AS(TEST_FAILED, taken_over >= 4);
        CHECK(lost * 20 <= taken_over);
}
