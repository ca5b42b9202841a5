/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Promises: what /proc says of processes of every kind that is to be left alone, and VmFlags of mappings of every kind
 * (Documentation/filesystems/proc.rst; the owner of /proc/PID: fs/proc/base.c, task_dump_owner()). Each kind is a real
 * process, beside one that is like it but for that one trait.
 *
 * The processes run a copy of this program, since its own file is what tells our relatives.
 */
#include "../test.h"

#include "vmas-compare.h"

#include "base/io.h"
#include "target/target.h"

#include <elf.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define NOBODY 65534
#define HOUR ((uint64_t)3600 * NSEC_PER_SEC)

static int skipped;

static void skip_kind(const char *kind, const char *why) {
        printf("not tried: %s: %s\n", kind, why);
        skipped++;
}

/* --- the victim's side --- */

static void *sleep_thread(void *unused) {
        for (;;)
                pause();
        return NULL;
}

static int victim(const char *kind) {
        pthread_t thread;

        if (strstr(kind, "nobody"))
                CHECK(setresgid(NOBODY, NOBODY, NOBODY) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0);
        /* Changing user has made it non-dumpable. */
        CHECK(prctl(PR_SET_DUMPABLE, strstr(kind, "secretive") == NULL) == 0);
        if (strstr(kind, "userns"))
                CHECK(unshare(CLONE_NEWUSER) == 0);
        if (strstr(kind, "hostile-name"))
                CHECK(prctl(PR_SET_NAME, "x) Z 2 (y\n0 Z") == 0);
        if (strstr(kind, "ksmctl-name"))
                CHECK(prctl(PR_SET_NAME, "ksmctl") == 0);
        if (strstr(kind, "threads"))
                CHECK(pthread_create(&thread, NULL, sleep_thread, NULL) == 0);
        CHECK(write(STDOUT_FILENO, "x", 1) == 1);
        if (strstr(kind, "headless"))
                syscall(SYS_exit, 0);
        for (;;)
                pause();
        return 0;
}

/* --- ours --- */

static int copy_of(const char *path, const void *text, size_t size) {
        _cleanup_free_ char *own = NULL;
        int fd = path ? open(path, O_RDWR | O_CREAT | O_TRUNC, 0755) : memfd_create("victim", 0);

        CHECK(fd >= 0);
        if (!text) {
                CHECK(read_file(AT_FDCWD, "/proc/self/exe", &own, &size) == 0);
                text = own;
        }
        CHECK(write(fd, text, size) == (ssize_t)size);
        return fd;
}

/* Runs the program in fd and waits until it says that it is what it should be. -ENOEXEC. */
static pid_t spawn_program(int fd, const char *kind, bool speaks) {
        int said[2], failed[2], r = 0;
        pid_t pid;
        char c;

        CHECK(pipe2(said, O_CLOEXEC) == 0 && pipe2(failed, O_CLOEXEC) == 0);
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
                char *const argv[] = { (char *)"victim", (char *)kind, NULL };
                char path[32];

                prctl(PR_SET_PDEATHSIG, SIGKILL);
                dup2(said[1], STDOUT_FILENO);
                snprintf(path, sizeof path, "/proc/self/fd/%d", fd); /* not fexecve: it needs the file open for good */
                fcntl(fd, F_SETFD, FD_CLOEXEC);
                execv(path, argv);
                r = -errno;
                CHECK(write(failed[1], &r, sizeof r) == sizeof r);
                _exit(1);
        }
        close(said[1]);
        close(failed[1]);
        if (read(failed[0], &r, sizeof r) == sizeof r)
                CHECK(waitpid(pid, NULL, 0) == pid);
        else if (speaks)
                CHECK(read(said[0], &c, 1) == 1, "%s", kind);
        close(said[0]);
        close(failed[0]);
        return r < 0 ? r : pid;
}

static pid_t spawn(const char *kind) {
        int fd = copy_of(NULL, NULL, 0), reading;
        char path[32];
        pid_t pid;

        /* What is open for writing cannot be run. */
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        reading = open(path, O_RDONLY);
        CHECK(reading >= 0);
        close(fd);
        pid = spawn_program(reading, kind, true);
        close(reading);
        CHECK(pid > 0, "%s", kind);
        return pid;
}

static void end(pid_t pid) {
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, NULL, 0) == pid);
}

static void expect_aged(pid_t pid, const char *kind, uint64_t minimum_age, TargetSkip want, bool want_ask) {
        _cleanup_(target_freep) Target *target = NULL;
        TargetSkip skip = _TARGET_SKIP_MAX;
        uint64_t start;
        bool ask = false;
        int r;

        CHECK(target_new(pid, &target) == 0, "%s", kind);
        start = now_nsec();
        r = target_inspect(target, minimum_age, &skip, &ask);
        printf("%-28s %-14s ask %d  %.1f us\n", kind, target_skip_name(skip), ask, (double)(now_nsec() - start) / 1e3);
        CHECK(r == 0 && skip == want && ask == want_ask, "%s: %d, wanted %s, %d", kind, r, target_skip_name(want),
              want_ask);
}

static void expect(pid_t pid, const char *kind, TargetSkip want, bool want_ask) {
        expect_aged(pid, kind, 0, want, want_ask);
}

static void expect_victim(const char *kind, TargetSkip want, bool want_ask) {
        pid_t pid = spawn(kind);

        expect(pid, kind, want, want_ask);
        end(pid);
}

static void wait_state(pid_t pid, char want) {
        char path[32];

        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        for (int i = 0; i < 5000; i++) {
                _cleanup_free_ char *text = NULL;

                CHECK(read_file(AT_FDCWD, path, &text, NULL) == 0);
                if (strrchr(text, ')')[2] == want)
                        return;
                usleep(1000);
        }
        CHECK(false, "state %c did not come", want);
}

static void test_plain(void) {
        pid_t pid = spawn("root");

        expect(pid, "root", TARGET_OK, true);
        expect_aged(pid, "root, young", HOUR, TARGET_SKIP_YOUNG, true);
        usleep(50000);
        expect_aged(pid, "root, old enough", 20 * NSEC_PER_MSEC, TARGET_OK, true);
        end(pid);
        expect_victim("nobody", TARGET_OK, false);
        expect_victim("hostile-name", TARGET_OK, true);
        expect_victim("ksmctl-name", TARGET_OK, true);
        expect_victim("nobody secretive", TARGET_SKIP_NOT_DUMPABLE, false);
        expect_victim("root secretive", TARGET_OK, true); /* remote_adopt() finds it out */
        expect_victim("nobody userns", TARGET_OK, true);
        expect_victim("nobody threads", TARGET_OK, false);
        pid = spawn("headless threads");
        wait_state(pid, 'Z');
        expect(pid, "headless threads", TARGET_SKIP_ZOMBIE, false);
        end(pid);
}

static void test_relatives(void) {
        char directory[] = "/tmp/ksmd-user-test-XXXXXX", path[64];
        pid_t pid;
        int fd;

        expect(getpid(), "self", TARGET_SKIP_SELF, false);
        pid = fork();
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                for (;;)
                        pause();
        }
        expect(pid, "child without exec", TARGET_SKIP_SELF, false);
        end(pid);

        CHECK(mkdtemp(directory));
        snprintf(path, sizeof path, "%s/ksmctl", directory);
        close(copy_of(path, NULL, 0));
        fd = open(path, O_RDONLY);
        CHECK(fd >= 0);
        pid = spawn_program(fd, "ksmctl-name", true);
        expect(pid, "ksmctl, another file", TARGET_SKIP_SELF, false);
        unlink(path);
        expect(pid, "ksmctl, deleted", TARGET_SKIP_SELF, false);
        end(pid);
        close(fd);
        rmdir(directory);
}

static void test_states(void) {
        siginfo_t info;
        pid_t pid;

        pid = spawn("root");
        CHECK(kill(pid, SIGSTOP) == 0 && waitpid(pid, NULL, WUNTRACED) == pid);
        expect(pid, "stopped", TARGET_SKIP_STOPPED, true);
        CHECK(kill(pid, SIGCONT) == 0);
        wait_state(pid, 'S');
        expect(pid, "continued", TARGET_OK, true);
        CHECK(ptrace(PTRACE_SEIZE, pid, NULL, NULL) == 0);
        expect(pid, "traced, running", TARGET_SKIP_TRACED, true);
        CHECK(ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) == 0 && waitpid(pid, NULL, __WALL) == pid);
        expect(pid, "traced, stopped", TARGET_SKIP_TRACED, true);
        CHECK(ptrace(PTRACE_DETACH, pid, NULL, NULL) == 0);
        expect(pid, "traced no more", TARGET_OK, true);
        CHECK(kill(pid, SIGKILL) == 0 && waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) == 0);
        expect(pid, "zombie", TARGET_SKIP_ZOMBIE, false);
        end(pid);
}

static void test_kernel_thread(void) {
        _cleanup_free_ char *comm = NULL;

        if (read_file(AT_FDCWD, "/proc/2/comm", &comm, NULL) < 0 || strcmp(comm, "kthreadd\n") != 0)
                return skip_kind("kernel thread", "none in this pid namespace");
        expect(2, "kernel thread", TARGET_SKIP_KERNEL_THREAD, false);
}

/* Without a 32-bit C library: a header, one segment, and `for (;;) pause();`. */
static void test_compat32(void) {
#if defined(__x86_64__)
        static const unsigned char code[] = { 0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7 };
        struct {
                Elf32_Ehdr header;
                Elf32_Phdr segment;
                unsigned char code[sizeof code];
        } elf = {
                .header = { .e_ident = { ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS32, ELFDATA2LSB, EV_CURRENT },
                            .e_type = ET_EXEC, .e_machine = EM_386, .e_version = EV_CURRENT,
                            .e_entry = 0x10000 + sizeof(Elf32_Ehdr) + sizeof(Elf32_Phdr),
                            .e_phoff = sizeof(Elf32_Ehdr), .e_ehsize = sizeof(Elf32_Ehdr),
                            .e_phentsize = sizeof(Elf32_Phdr), .e_phnum = 1 },
                .segment = { .p_type = PT_LOAD, .p_vaddr = 0x10000, .p_filesz = sizeof elf, .p_memsz = sizeof elf,
                             .p_flags = PF_R | PF_X, .p_align = 0x1000 },
        };
        char path[] = "/tmp/ksmd-user-test32-XXXXXX";
        int fd = mkstemp(path);
        pid_t pid;

        memcpy(elf.code, code, sizeof code);
        CHECK(fd >= 0 && write(fd, &elf, sizeof elf) == sizeof elf && fchmod(fd, 0755) == 0);
        close(fd);
        fd = open(path, O_RDONLY);
        unlink(path);
        pid = spawn_program(fd, "", false);
        close(fd);
        if (pid < 0)
                return skip_kind("32-bit", "the kernel does not run it");
        wait_state(pid, 'S');
        expect(pid, "32-bit", TARGET_SKIP_COMPAT32, false);
        end(pid);
#else
        skip_kind("32-bit", "only made for x86_64");
#endif
}

static void test_freezer_v1(void) {
        static const char directory[] = "/sys/fs/cgroup/freezer/ksmd-user-test-kinds";
        char path[128], text[16];
        pid_t pid;
        int r;

        if (mkdir(directory, 0755) < 0 && errno != EEXIST)
                return skip_kind("freezer of cgroup v1", "not mounted");
        pid = spawn("root");
        snprintf(path, sizeof path, "%s/cgroup.procs", directory);
        snprintf(text, sizeof text, "%d", pid);
        r = write_text(AT_FDCWD, path, text);
        snprintf(path, sizeof path, "%s/freezer.state", directory);
        if (r == 0 && write_text(AT_FDCWD, path, "FROZEN") == 0) {
                wait_state(pid, 'D');
                expect(pid, "frozen (v1)", TARGET_SKIP_FROZEN, true);
                CHECK(write_text(AT_FDCWD, path, "THAWED") == 0);
                wait_state(pid, 'S');
                expect(pid, "thawed (v1)", TARGET_OK, true);
        } else
                skip_kind("freezer of cgroup v1", "refused");
        end(pid);
        rmdir(directory);
}

/* Who may not look at a process is told so. */
static void test_denied(void) {
        pid_t pid = spawn("root"), watcher;
        int status;

        watcher = fork();
        if (watcher == 0) {
                _cleanup_(target_freep) Target *target = NULL;
                VmaList vmas;

                CHECK(setresuid(NOBODY, NOBODY, NOBODY) == 0);
                expect(pid, "denied", TARGET_SKIP_DENIED, false);
                CHECK(target_new(pid, &target) == 0);
                CHECK(target_alive(target));
                CHECK(target_open_memory(target) == TARGET_E_DENIED);
                CHECK(target_read_vmas(target, false, &vmas) == TARGET_E_DENIED);
                fflush(stdout);
                _exit(0);
        }
        CHECK(waitpid(watcher, &status, 0) == watcher && status == 0);
        end(pid);
}

static void *new_in_thread(void *ret) {
        Target *target = NULL;

        *(int *)ret = target_new((pid_t)syscall(SYS_gettid), &target);
        return NULL;
}

static void test_thread_id(void) {
        pthread_t thread;
        int r = 0;

        CHECK(pthread_create(&thread, NULL, new_in_thread, &r) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(r == TARGET_E_GONE, "%d", r);
}

/* --- mappings: our own, seen through a Target --- */

static Target *ourselves;
static VmaReader reader;           /* of no use where there is no probe */

/* The same again, whatever the mapping; some of what is made here nobody learns from. */
static void look_without_smaps(bool include_dontdump, const VmaList *smaps) {
        _cleanup_(vma_list_done) VmaList list = {};
        const char *difference;
        const Vma *vma;

        if (!reader.probes || vma_reader_read(&reader, ourselves, include_dontdump, &list) != 0)
                return;
        difference = vmas_differ(&list, smaps, &vma);
        CHECK(!difference, "%s of %llx", difference, (unsigned long long)vma->start);
}

static Vma look(const void *address, bool include_dontdump) {
        VmaList vmas;
        const Vma *vma;
        Vma copy;

        CHECK(target_read_vmas(ourselves, include_dontdump, &vmas) == 0);
        look_without_smaps(include_dontdump, &vmas);
        vma = vma_list_find(&vmas, (uintptr_t)address);
        CHECK(vma);
        copy = *vma;
        vma_list_done(&vmas);
        return copy;
}

static void expect_vma(void *p, const char *kind, VmaSkip want) {
        Vma vma = look(p, false);

        printf("%-28s %s\n", kind, vma_skip_name(vma.skip));
        CHECK(vma.skip == want, "%s, wanted %s", kind, vma_skip_name(want));
}

static char *map(int protection, int flags, int fd) {
        /* Between two gaps, so that neighbours do not merge. */
        char *p = mmap(NULL, 6 * BLOCK_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        CHECK(p != MAP_FAILED);
        p = (char *)(((uintptr_t)p + 2 * BLOCK_BYTES - 1) & ~(BLOCK_BYTES - 1));
        return mmap(p, BLOCK_BYTES, protection, flags | MAP_FIXED, fd, 0);
}

static char *plain(void) {
        char *p = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

        CHECK(p != MAP_FAILED);
        p[0] = 1;
        return p;
}

static void test_advised(void) {
        static const struct {
                const char *kind;
                int advice;
                VmaSkip skip;
        } cases[] = {
                { "DONTDUMP", MADV_DONTDUMP, VMA_SKIP_DONTDUMP },
                { "WIPEONFORK", MADV_WIPEONFORK, VMA_SKIP_SPECIAL },
                { "DONTFORK", MADV_DONTFORK, VMA_OK },
                { "HUGEPAGE", MADV_HUGEPAGE, VMA_OK },
        };

        for (size_t i = 0; i < ELEMENTSOF(cases); i++) {
                char *p = plain();
                Vma vma;

                expect_vma(p, "plain", VMA_OK);
                vma = look(p, false);
                CHECK(!vma.file && vma.write && !vma.exec && !vma.mergeable && !vma.huge_advised);
                CHECK(vma.anonymous_bytes == PAGE_BYTES && vma.end - vma.start == BLOCK_BYTES);
                if (madvise(p, BLOCK_BYTES, cases[i].advice) < 0) {
                        skip_kind(cases[i].kind, strerror(errno));
                        continue;
                }
                expect_vma(p, cases[i].kind, cases[i].skip);
                vma = look(p, true);
                CHECK(vma.skip == (cases[i].skip == VMA_SKIP_DONTDUMP ? VMA_OK : cases[i].skip));
                CHECK(vma.huge_advised == (cases[i].advice == MADV_HUGEPAGE));
                munmap(p, BLOCK_BYTES);
        }
}

static void test_files(void) {
        /* A name that ends one line and imitates the next two. */
        static const char name[] = "/tmp/ksmd-user-test\nVmFlags: rd wr mr mw me ac \n7f0000000000-7f0000001000 rw-p "
                                   "00000000 00:00 0 ";
        int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        char *p;
        Vma vma;

        if (fd < 0) {
                CHECK(errno == EACCES || errno == ENOENT || errno == EINVAL);
                fd = memfd_create(name, MFD_CLOEXEC);
        }
        CHECK(fd >= 0 && ftruncate(fd, BLOCK_BYTES) == 0);
        p = map(PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
        p[0] = 1;
        expect_vma(p, "private file", VMA_OK);
        vma = look(p, false);
        CHECK(vma.file && vma.anonymous_bytes == PAGE_BYTES);
        CHECK(madvise(p, BLOCK_BYTES, MADV_DONTDUMP) == 0);
        expect_vma(p, "hostile file name, DONTDUMP", VMA_SKIP_DONTDUMP);
        unlink(name);
        expect_vma(p, "the same, deleted", VMA_SKIP_DONTDUMP);
        p = map(PROT_READ, MAP_SHARED, fd);
        expect_vma(p, "shared file", VMA_SKIP_SHARED);
        close(fd);
        p = map(PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
        expect_vma(p, "shared", VMA_SKIP_SHARED);
        fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
        CHECK(fd >= 0);
        expect_vma(map(PROT_READ | PROT_WRITE, MAP_PRIVATE, fd), "/dev/zero, private", VMA_OK);
        close(fd);
}

static void test_permissions(void) {
        char *p = plain();

        CHECK(mprotect(p, BLOCK_BYTES, PROT_READ) == 0);
        expect_vma(p, "read-only", VMA_OK);
        CHECK(mprotect(p, BLOCK_BYTES, PROT_WRITE) == 0);
        expect_vma(p, "write-only", VMA_SKIP_UNREADABLE);
        CHECK(mprotect(p, BLOCK_BYTES, PROT_NONE) == 0);
        expect_vma(p, "PROT_NONE", VMA_SKIP_UNREADABLE);
        expect_vma((char *)__builtin_frame_address(0), "stack", VMA_OK);
}

static void test_locked(void) {
        char *p = plain();

        CHECK(syscall(SYS_mlock, p, BLOCK_BYTES) == 0); /* the library's does nothing under the address sanitizer */
        expect_vma(p, "mlock", VMA_SKIP_LOCKED);
        CHECK(syscall(SYS_munlock, p, BLOCK_BYTES) == 0);
        expect_vma(p, "munlock", VMA_OK);
        CHECK(syscall(SYS_mlock2, p, BLOCK_BYTES, 1 /* MLOCK_ONFAULT */) == 0);
        expect_vma(p, "mlock2, on fault", VMA_SKIP_LOCKED);
}

static void test_special(void) {
        struct uffdio_api api = { .api = UFFD_API };
        struct io_uring_params ring = {};
        char *p = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1);
        FILE *maps;
        char line[4096];
        int fd;

        if (p != MAP_FAILED)
                expect_vma(p, "hugetlb, private", VMA_SKIP_HUGETLB);
        else
                skip_kind("hugetlb", strerror(errno));

        p = map(PROT_READ | PROT_WRITE, 0x08 /* MAP_DROPPABLE, 6.11 */ | MAP_ANONYMOUS, -1);
        if (p != MAP_FAILED)
                expect_vma(p, "droppable", VMA_SKIP_SPECIAL);
        else
                skip_kind("droppable", strerror(errno));

        fd = (int)syscall(447 /* memfd_secret */, O_CLOEXEC);
        if (fd >= 0 && ftruncate(fd, BLOCK_BYTES) == 0 &&
            (p = map(PROT_READ | PROT_WRITE, MAP_SHARED, fd)) != MAP_FAILED)
                expect_vma(p, "memfd_secret", VMA_SKIP_SECRET);
        else
                skip_kind("memfd_secret", strerror(errno));
        safe_close(fd);

        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
        p = plain();
        if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0) {
                struct uffdio_register reg = { .range = { (uintptr_t)p, BLOCK_BYTES },
                                               .mode = UFFDIO_REGISTER_MODE_MISSING };

                CHECK(ioctl(fd, UFFDIO_REGISTER, &reg) == 0);
                expect_vma(p, "userfaultfd", VMA_SKIP_UFFD);
                CHECK(ioctl(fd, UFFDIO_UNREGISTER, &reg.range) == 0);
                expect_vma(p, "userfaultfd no more", VMA_OK);
        } else
                skip_kind("userfaultfd", strerror(errno));
        safe_close(fd);

        fd = (int)syscall(SYS_io_uring_setup, 4, &ring);
        p = fd >= 0 ? mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES) : MAP_FAILED;
        if (p != MAP_FAILED)
                expect_vma(p, "io_uring", VMA_SKIP_DEVICE);
        else
                skip_kind("io_uring", strerror(errno));
        safe_close(fd);

        fd = open("/dev/mem", O_RDONLY | O_CLOEXEC);
        p = fd >= 0 ? mmap(NULL, PAGE_BYTES, PROT_READ, MAP_PRIVATE, fd, 0xf0000) : MAP_FAILED;
        if (p != MAP_FAILED)
                expect_vma(p, "/dev/mem", VMA_SKIP_DEVICE);
        else
                skip_kind("/dev/mem", strerror(errno));
        safe_close(fd);

        maps = fopen("/proc/self/maps", "re");
        CHECK(maps);
        while (fgets(line, sizeof line, maps))
                if (strstr(line, " [v")) {
                        unsigned long start;

                        CHECK(sscanf(line, "%lx", &start) == 1);
                        line[strcspn(line, "\n")] = 0;
                        expect_vma((void *)start, strstr(line, "[v"), VMA_SKIP_SPECIAL);
                }
        fclose(maps);
}

int main(int argc, char **argv) {
        const ProbeOptions options = { .typed_only = true, .memory_bytes = (uint64_t)1 << 30 };
        Probes *probes;

        if (argc > 1)
                return victim(argv[1]);
        test_need_root();
        setvbuf(stdout, NULL, _IOLBF, 0);
        test_plain();
        test_relatives();
        test_states();
        test_kernel_thread();
        test_compat32();
        test_freezer_v1();
        test_denied();
        test_thread_id();

        CHECK(target_new(getpid(), &ourselves) == 0);
        CHECK(probes_new(&options, &probes) == 0);
        vma_reader_open(&reader, probes, true);
        test_advised();
        test_files();
        test_permissions();
        test_locked();
        test_special();
        printf("read without smaps as well %llu times, unsure %llu, changed %llu\n", (unsigned long long)reader.n_read,
               (unsigned long long)reader.n_unsure, (unsigned long long)reader.n_changed);
        CHECK(!reader.probes || reader.n_read > 0);
        vma_reader_close(&reader);
        probes_free(probes);
        target_free(ourselves);
        printf("%d kinds not tried\n", skipped);
        return 0;
}
