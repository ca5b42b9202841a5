/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * ksmctl top: a frame (top-frame.c) every few seconds on the terminal's other screen, as wide and as high as it is,
 * until q or ctrl-c. Without a terminal, or with --once, one frame.
 *
 * It asks anew for each frame rather than to be told (Monitor): the wait between is the terminal's, for keys and for
 * its size to change, and GetStatus is wanted, too.
 */

#include "ctl/top.h"

#include "base/clock.h"
#include "ctl/ctl.h"

#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>

#define INTERVAL_SEC_MIN 0.1
#define INTERVAL_SEC_MAX 86400.0
#define INTERVAL_SEC 2.0
#define OTHER_SCREEN "\033[?1049h\033[?25l"   /* and no cursor */
#define FIRST_SCREEN "\033[?25h\033[?1049l"

static volatile sig_atomic_t ended;

static void on_end(int signo) { ended = 1; }
static void on_resize(int signo) {} /* ends the wait */

typedef struct Screen {
        struct termios found;
        sigset_t signals;               /* those that are blocked but while waiting, as they were */
} Screen;

static int screen_enter(Screen *screen) {
        struct sigaction end = { .sa_handler = on_end }, resize = { .sa_handler = on_resize };
        struct termios ours;
        sigset_t set;

        if (tcgetattr(STDIN_FILENO, &screen->found) < 0)
                return -errno;
        sigemptyset(&set);
        sigaddset(&set, SIGINT);
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGHUP);
        sigaddset(&set, SIGWINCH);
        if (sigprocmask(SIG_BLOCK, &set, &screen->signals) < 0 || sigaction(SIGINT, &end, NULL) < 0 ||
            sigaction(SIGTERM, &end, NULL) < 0 || sigaction(SIGHUP, &end, NULL) < 0 ||
            sigaction(SIGWINCH, &resize, NULL) < 0)
                return -errno;
        ours = screen->found;
        ours.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        ours.c_cc[VMIN] = 0;
        ours.c_cc[VTIME] = 0;
        ours.c_cc[VSUSP] = _POSIX_VDISABLE; /* stopped, it would leave the terminal to others as it is */
        if (tcsetattr(STDIN_FILENO, TCSAFLUSH, &ours) < 0)
                return -errno;
        fputs(OTHER_SCREEN, stdout);
        return 0;
}

static void screen_leave(const Screen *screen) {
        fputs(FIRST_SCREEN, stdout);
        fflush(stdout);
        (void)tcsetattr(STDIN_FILENO, TCSAFLUSH, &screen->found);
}

/* Where a line of UTF-8 is cut to fill so many columns, each character taken for one wide. */
static size_t cut(const char *line, size_t size, unsigned columns) {
        size_t i = 0;

        for (unsigned n = 0; i < size; i++) {
                bool starts = ((unsigned char)line[i] & 0xc0) != 0x80;
                if (starts && n++ == columns)
                        break;
        }
        return i;
}

static void screen_show(const char *frame, unsigned head) {
        struct winsize window;
        unsigned columns = 80, rows = 24, row = 0;

        if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0 && window.ws_row > 0) {
                columns = window.ws_col;
                rows = window.ws_row;
        }
        fputs("\033[H", stdout);
        for (const char *line = frame; *line && row < rows; row++) {
                size_t size = strcspn(line, "\n");

                /* Before the line, not behind the last but one: the bottom line ended would scroll. */
                printf("%s%s%.*s\033[0m\033[K", row > 0 ? "\r\n" : "", row == head ? "\033[1m" : "",
                       (int)cut(line, size, columns), line);
                line += size + (line[size] == '\n');
        }
        fputs("\033[J", stdout);
        fflush(stdout);
}

/* Until the next frame is due, a key is pressed, or a signal came. false: the end. */
static bool screen_wait(const Screen *screen, uint64_t nsec) {
        struct timespec ts = { .tv_sec = (time_t)(nsec / NSEC_PER_SEC), .tv_nsec = (long)(nsec % NSEC_PER_SEC) };
        struct pollfd keys = { .fd = STDIN_FILENO, .events = POLLIN };
        char pressed[64];
        ssize_t n;

        if (ppoll(&keys, 1, &ts, &screen->signals) <= 0)
                return !ended;
        n = read(STDIN_FILENO, pressed, sizeof pressed);
        if (n <= 0) /* the terminal is gone */
                return false;
        return !memchr(pressed, 'q', (size_t)n) && !memchr(pressed, 'Q', (size_t)n);
}

static void sample_done(TopSample *sample) {
        json_decref(sample->status);
        json_decref(sample->stats);
        *sample = (TopSample){ 0 };
}

static int sample_take(const Ctl *ctl, TopSample *ret) {
        TopSample sample = { 0 };
        int r;

        r = ctl_call(ctl, "GetStatus", NULL, false, &sample.status);
        if (r == CTL_DONE)
                r = ctl_call(ctl, "GetStats", NULL, false, &sample.stats);
        if (r != CTL_DONE) {
                sample_done(&sample);
                return r;
        }
        sample.nsec = now_nsec();
        *ret = sample;
        return CTL_DONE;
}

static int show_live(const Ctl *ctl, TopSample *first, uint64_t interval_nsec) {
        TopSample before = { 0 }, now = *first;
        Screen screen;
        int r;

        *first = (TopSample){ 0 };
        r = screen_enter(&screen);
        if (r < 0) {
                sample_done(&now);
                return ctl_fail("the terminal: %s", strerror(-r));
        }
        for (;;) {
                _cleanup_free_ char *frame = NULL;
                TopSample next = { 0 };
                unsigned head = 0;
                size_t size;
                FILE *f = open_memstream(&frame, &size);

                if (f) {
                        head = top_write_frame(f, &now, &before);
                        fclose(f);
                }
                if (frame)
                        screen_show(frame, head);
                if (!screen_wait(&screen, interval_nsec))
                        break;
                r = sample_take(ctl, &next);
                if (r != CTL_DONE)
                        break;
                sample_done(&before);
                before = now;
                now = next;
        }
        screen_leave(&screen);
        if (r != CTL_DONE) /* what was said of it went with the other screen */
                ctl_fail("the daemon does not answer any more");
        sample_done(&before);
        sample_done(&now);
        return r;
}

int command_top(const Ctl *ctl, int argc, char **argv) {
        double seconds = INTERVAL_SEC;
        TopSample none = { 0 }, first;
        int r;

        if (argc > 0) {
                char *end;

                seconds = strtod(argv[0], &end);
                if (end == argv[0] || *end || !(seconds >= INTERVAL_SEC_MIN && seconds <= INTERVAL_SEC_MAX)) {
                        ctl_fail("%s: not a number of seconds from 0.1 to 86400", argv[0]);
                        return CTL_USAGE;
                }
        }
        r = sample_take(ctl, &first);
        if (r != CTL_DONE)
                return r;
        if (!ctl->once && isatty(STDIN_FILENO) && isatty(STDOUT_FILENO))
                r = show_live(ctl, &first, (uint64_t)(seconds * 1e9));
        else
                top_write_frame(stdout, &first, &none);
        sample_done(&first);
        return r;
}
