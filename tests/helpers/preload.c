// Preloaded into a test's process: makes system calls fail or wait as the environment says, so that the paths for
// other kernels, file systems and failing drives run on this machine. The test sets and clears the variables itself.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int refuse(int number) {
  errno = number;
  return -1;
}

// FAKE_STUCK is a row of letters: what is not answered while the variable holds it: o = making a file, g = growing one,
// t = shortening one, c = closing one, a = asking for access to a directory, v = asking for free space, m = writing a
// mapping out. FAKE_STUCK_UNDER: only under this path.
static int is_stuck(char what, const char* path) {
  const char* row = getenv("FAKE_STUCK");
  const char* under = getenv("FAKE_STUCK_UNDER");
  return row && strchr(row, what) && (!under || !path || strncmp(path, under, strlen(under)) == 0);
}

static void stick(char what, const char* path) {
  while (is_stuck(what, path)) usleep(2000);
}

static void stick_file(char what, int fd) {
  if (!getenv("FAKE_STUCK")) return;
  char link[64], path[PATH_MAX] = "";
  struct stat status;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (fstat(fd, &status) || !S_ISREG(status.st_mode)) return;
  if (status.st_nlink && !getenv("FAKE_STUCK_UNDER")) return;
  if (readlink(link, path, sizeof path - 1) > 0) stick(what, path);
}

static int fake_open(const char* path, int flags, mode_t mode) {
  if ((flags & O_TMPFILE) == O_TMPFILE) stick('o', path);
  if ((flags & O_TMPFILE) == O_TMPFILE && getenv("FAKE_NO_TMPFILE")) return refuse(EOPNOTSUPP);
  if ((flags & O_DIRECT) && getenv("FAKE_NO_DIRECT")) return refuse(EINVAL);
  return openat(AT_FDCWD, path, flags, mode);
}

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  return fake_open(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  return fake_open(path, flags, mode);
}

static int fake_fcntl(int fd, int command, void* argument) {
  int is_direct = command == F_SETFL && ((long)argument & O_DIRECT);
  if (is_direct && getenv("FAKE_NO_DIRECT")) return refuse(EINVAL);
  int (*real)(int, int, ...) = dlsym(RTLD_NEXT, "fcntl");
  return real(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  return fake_fcntl(fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  return fake_fcntl(fd, command, argument);
}

int fallocate(int fd, int mode, off_t offset, off_t nbytes) {
  stick_file('g', fd);
  if (getenv("FAKE_NO_FALLOCATE")) return refuse(EOPNOTSUPP);
  int (*real)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, "fallocate");
  return real(fd, mode, offset, nbytes);
}

int posix_fallocate(int fd, off_t offset, off_t nbytes) {
  stick_file('g', fd);
  int (*real)(int, off_t, off_t) = dlsym(RTLD_NEXT, "posix_fallocate");
  return real(fd, offset, nbytes);
}
int posix_fallocate64(int fd, off_t offset, off_t nbytes) { return posix_fallocate(fd, offset, nbytes); }

static int fake_ftruncate(int fd, off_t nbytes) {
  stick_file('t', fd);
  int (*real)(int, off_t) = dlsym(RTLD_NEXT, "ftruncate");
  return real(fd, nbytes);
}
int ftruncate(int fd, off_t nbytes) { return fake_ftruncate(fd, nbytes); }
int ftruncate64(int fd, off_t nbytes) { return fake_ftruncate(fd, nbytes); }

int close(int fd) {
  stick_file('c', fd);
  int (*real)(int) = dlsym(RTLD_NEXT, "close");
  return real(fd);
}

int access(const char* path, int mode) {
  stick('a', path);
  int (*real)(const char*, int) = dlsym(RTLD_NEXT, "access");
  return real(path, mode);
}

int fstatvfs(int fd, struct statvfs* status) {
  stick_file('v', fd);
  int (*real)(int, struct statvfs*) = dlsym(RTLD_NEXT, "fstatvfs");
  return real(fd, status);
}
int fstatvfs64(int fd, struct statvfs64* status) { return fstatvfs(fd, (struct statvfs*)status); }

int msync(void* address, size_t nbytes, int flags) {
  stick('m', NULL);
  int (*real)(void*, size_t, int) = dlsym(RTLD_NEXT, "msync");
  return real(address, nbytes, flags);
}

long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_io_uring_setup && getenv("FAKE_NO_URING")) return refuse(EPERM);
  if (number == SYS_io_uring_register && getenv("FAKE_NO_REGISTER")) return refuse(ENOMEM);
  long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

// FAKE_READS and FAKE_WRITES are rows of letters, one per call: i = EINTR, a = EAGAIN, e = EIO, n = ENOSPC, s = one page
// only, d = 20 ms late, h = blocks for ever; then all is well. A star repeats the letter before it for ever.
static int num_reads, num_writes;

static char next_step(const char* script, int* count) {
  if (!script) __atomic_store_n(count, 0, __ATOMIC_SEQ_CST);
  if (!script) return 0;
  int at = __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST);
  for (int i = 0; script[i]; ++i) {
    if (i == at || script[i + 1] == '*') return script[i];
  }
  return 0;
}

// Whether the call fails at once; may shorten it.
static int falter(char step, size_t* nbytes) {
  if (step == 'i') return refuse(EINTR);
  if (step == 'a') return refuse(EAGAIN);
  if (step == 'e') return refuse(EIO);
  if (step == 'n') return refuse(ENOSPC);
  if (step == 's' && *nbytes > 4096) *nbytes = 4096;
  if (step == 'd') usleep(20000);
  while (step == 'h') pause();
  return 0;
}

// Waits for one byte from the pipe whose descriptor a variable holds.
static int pass_gate(const char* variable) {
  const char* gate = getenv(variable);
  char byte;
  return gate && read(atoi(gate), &byte, 1) < 0 ? -1 : 0;
}

// Each write passes FAKE_GATE, each read FAKE_READ_GATE.
static ssize_t fake_pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
  if (pass_gate("FAKE_GATE")) return -1;
  if (falter(next_step(getenv("FAKE_WRITES"), &num_writes), &nbytes)) return -1;
  ssize_t (*real)(int, const void*, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
  return real(fd, data, nbytes, offset);
}

ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) { return fake_pwrite(fd, data, nbytes, offset); }
ssize_t pwrite64(int fd, const void* data, size_t nbytes, off_t offset) { return fake_pwrite(fd, data, nbytes, offset); }

static ssize_t fake_pread(int fd, void* data, size_t nbytes, off_t offset) {
  if (pass_gate("FAKE_READ_GATE")) return -1;
  if (falter(next_step(getenv("FAKE_READS"), &num_reads), &nbytes)) return -1;
  ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  return real(fd, data, nbytes, offset);
}

ssize_t pread(int fd, void* data, size_t nbytes, off_t offset) { return fake_pread(fd, data, nbytes, offset); }
ssize_t pread64(int fd, void* data, size_t nbytes, off_t offset) { return fake_pread(fd, data, nbytes, offset); }

// The engine in plain Python reads into one buffer at a time.
ssize_t preadv64v2(int fd, const struct iovec* parts, int num, off_t offset, int flags) {
  return num == 1 && flags == 0 ? fake_pread(fd, parts->iov_base, parts->iov_len, offset) : refuse(EINVAL);
}
ssize_t preadv64(int fd, const struct iovec* parts, int num, off_t offset) {
  return preadv64v2(fd, parts, num, offset, 0);
}
