/* A disk that fails by plan: preloaded, it counts what a process does to files below a folder, and
 * at the n-th such operation kills the process, or lets the operation fail.
 *
 * The plan comes from the environment (FAULTS_ROOT, FAULTS_MODE, FAULTS_AT, FAULTS_ERRNO,
 * FAULTS_LOG) or, after a fork, by a call of faults_arm.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, LOG, KILL_BEFORE, KILL_AFTER, TORN, FAIL_ONCE, FAIL_ON, FULL };

static char root[4096];
static size_t root_length;
static int mode, planned_errno, log_file = -1;
static long planned, counted;

void faults_arm(const char *folder, int how, long at, int error, const char *log)
{
	counted = 0;
	planned = at;
	planned_errno = error;
	strncpy(root, folder, sizeof root - 1);
	root_length = strlen(root);
	if (log && *log)
		log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	mode = how;
}

__attribute__((constructor)) static void begin(void)
{
	const char *folder = getenv("FAULTS_ROOT"), *how = getenv("FAULTS_MODE");
	const char *at = getenv("FAULTS_AT"), *error = getenv("FAULTS_ERRNO");
	if (folder && how)
		faults_arm(folder, atoi(how), at ? atol(at) : 0, error ? atoi(error) : 0,
			   getenv("FAULTS_LOG"));
}

static int below(const char *path)
{
	return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_descriptor(int file, char *path, size_t size)
{
	char name[64];
	ssize_t length;
	snprintf(name, sizeof name, "/proc/self/fd/%d", file);
	length = syscall(SYS_readlinkat, AT_FDCWD, name, path, size - 1);
	path[length > 0 ? length : 0] = 0;
	return length > 0 && below(path);
}

static int of_path(int folder, const char *path, char *whole, size_t size)
{
	char base[4096];
	if (!path)
		return 0;
	if (path[0] == '/') {
		snprintf(whole, size, "%s", path);
	} else {
		if (folder == AT_FDCWD) {
			if (!getcwd(base, sizeof base))
				return 0;
		} else {
			of_descriptor(folder, base, sizeof base);
		}
		snprintf(whole, size, "%s/%s", base, path);
	}
	return below(whole);
}

static void die(void)
{
	syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
	for (;;)
		pause();
}

/* 0: go on; 1: fail with errno set; 2: go on, then die; 3: do half of it, then die. */
static int happens(const char *kind, const char *path, int takes_room)
{
	char line[4500];
	long number;
	if (mode == FULL && !takes_room)
		return 0;
	number = __sync_add_and_fetch(&counted, 1);
	if (log_file >= 0) {
		int length = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path);
		syscall(SYS_write, log_file, line, (size_t)length);
	}
	if (mode == KILL_BEFORE && number == planned)
		die();
	if (mode == KILL_AFTER && number == planned)
		return 2;
	if (mode == TORN && number == planned)
		return 3;
	if ((mode == FAIL_ONCE && number == planned) ||
	    ((mode == FAIL_ON || mode == FULL) && number >= planned)) {
		errno = planned_errno;
		return 1;
	}
	return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define RUN(type, failure, is_counted, kind, room, call)                                           \
	do {                                                                                       \
		char where[8192];                                                                  \
		int fate = mode && (is_counted) ? happens(kind, where, room) : 0;                  \
		type result;                                                                       \
		if (fate == 1)                                                                     \
			return failure;                                                            \
		result = call;                                                                     \
		if (fate > 1)                                                                      \
			die();                                                                     \
		return result;                                                                     \
	} while (0)

#define WRITES(flags) (((flags) & (O_WRONLY | O_RDWR | O_CREAT)) != 0)
#define OPEN(name, folder, ...)                                                                    \
	va_list rest;                                                                              \
	mode_t bits = 0;                                                                           \
	va_start(rest, flags);                                                                     \
	if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)))                                        \
		bits = va_arg(rest, mode_t);                                                       \
	va_end(rest);                                                                              \
	RUN(int, -1,                                                                               \
	    of_path(folder, path, where, sizeof where) && (WRITES(flags) || mode == FAIL_ON),      \
	    WRITES(flags) ? "open" : "read", WRITES(flags), REAL(name)(__VA_ARGS__, bits))

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path, flags); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path, flags); }
int openat(int folder, const char *path, int flags, ...) { OPEN(openat, folder, folder, path, flags); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(openat64, folder, folder, path, flags); }

#define ON_FILE(type, failure, kind, room, call)                                                   \
	RUN(type, failure, of_descriptor(file, where, sizeof where), kind, room, call)

static ssize_t half(int fate, ssize_t result) { if (fate) die(); return result; }

#define WRITE(name, ...)                                                                           \
	char where[8192];                                                                          \
	int fate = mode && of_descriptor(file, where, sizeof where)                                \
			? happens("write", where, 1) : 0;                                          \
	if (fate == 1)                                                                             \
		return -1;                                                                         \
	if (fate == 3)                                                                             \
		size /= 2;                                                                         \
	return half(fate, REAL(name)(__VA_ARGS__))

ssize_t write(int file, const void *data, size_t size) { WRITE(write, file, data, size); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { WRITE(pwrite, file, data, size, at); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { WRITE(pwrite64, file, data, size, at); }
ssize_t writev(int file, const struct iovec *parts, int count)
{
	ON_FILE(ssize_t, -1, "write", 1, REAL(writev)(file, parts, count));
}

int fsync(int file) { ON_FILE(int, -1, "fsync", 0, REAL(fsync)(file)); }
int fdatasync(int file) { ON_FILE(int, -1, "fsync", 0, REAL(fdatasync)(file)); }
int ftruncate(int file, off_t size) { ON_FILE(int, -1, "truncate", 1, REAL(ftruncate)(file, size)); }
int ftruncate64(int file, off64_t size) { ON_FILE(int, -1, "truncate", 1, REAL(ftruncate64)(file, size)); }
int posix_fallocate(int file, off_t at, off_t size)
{
	ON_FILE(int, planned_errno, "allocate", 1, REAL(posix_fallocate)(file, at, size));
}
int posix_fallocate64(int file, off64_t at, off64_t size)
{
	ON_FILE(int, planned_errno, "allocate", 1, REAL(posix_fallocate64)(file, at, size));
}

#define ON_PATH(kind, folder, room, call)                                                          \
	RUN(int, -1, of_path(folder, path, where, sizeof where), kind, room, call)

int truncate(const char *path, off_t size) { ON_PATH("truncate", AT_FDCWD, 1, REAL(truncate)(path, size)); }
int truncate64(const char *path, off64_t size) { ON_PATH("truncate", AT_FDCWD, 1, REAL(truncate64)(path, size)); }
int mkdir(const char *path, mode_t bits) { ON_PATH("mkdir", AT_FDCWD, 1, REAL(mkdir)(path, bits)); }
int mkdirat(int folder, const char *path, mode_t bits) { ON_PATH("mkdir", folder, 1, REAL(mkdirat)(folder, path, bits)); }
int unlink(const char *path) { ON_PATH("unlink", AT_FDCWD, 0, REAL(unlink)(path)); }
int unlinkat(int folder, const char *path, int flags) { ON_PATH("unlink", folder, 0, REAL(unlinkat)(folder, path, flags)); }
int rmdir(const char *path) { ON_PATH("rmdir", AT_FDCWD, 0, REAL(rmdir)(path)); }
int rename(const char *path, const char *name) { ON_PATH("rename", AT_FDCWD, 0, REAL(rename)(path, name)); }
int renameat(int folder, const char *path, int other, const char *name)
{
	ON_PATH("rename", folder, 0, REAL(renameat)(folder, path, other, name));
}
