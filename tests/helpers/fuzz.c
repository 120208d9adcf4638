// Preloaded by fuzz.py: reads, writes and reservations of spill files fail at random, repeatably, when told to.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static uint64_t seed, num_calls, num_faults;
static uint32_t per_thousand;

void fuzz_start(uint64_t new_seed, uint32_t rate_per_thousand) {
  __atomic_store_n(&num_calls, 0, __ATOMIC_SEQ_CST);
  seed = new_seed;
  __atomic_store_n(&per_thousand, rate_per_thousand, __ATOMIC_SEQ_CST);
}

uint64_t fuzz_num_faults(void) { return __atomic_load_n(&num_faults, __ATOMIC_SEQ_CST); }

static uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Only files without a name are ours.
static int is_spill_file(int fd) {
  struct stat status;
  return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_nlink == 0;
}

enum { kNone, kInterrupt, kAgain, kError, kShort, kNothing, kLate, kNoSpace, kNumKinds };

static int draw(int fd) {
  uint32_t rate = __atomic_load_n(&per_thousand, __ATOMIC_SEQ_CST);
  if (rate == 0 || !is_spill_file(fd)) return kNone;
  uint64_t number = mix(seed ^ mix(__atomic_fetch_add(&num_calls, 1, __ATOMIC_SEQ_CST)));
  if (number % 1000 >= rate) return kNone;
  __atomic_fetch_add(&num_faults, 1, __ATOMIC_SEQ_CST);
  return 1 + (number >> 32) % (kNumKinds - 1);
}

// Whether the call ends here, with *result; may shorten it.
static int falter(int kind, size_t* nbytes, int is_write, ssize_t* result) {
  static const int errnos[] = {[kInterrupt] = EINTR, [kAgain] = EAGAIN, [kError] = EIO, [kNoSpace] = ENOSPC};
  *result = -1;
  if (kind == kNoSpace && !is_write) kind = kError;
  if (kind == kInterrupt || kind == kAgain || kind == kError || kind == kNoSpace) {
    errno = errnos[kind];
    return 1;
  }
  if (kind == kShort && *nbytes > 4096) *nbytes = (*nbytes / 2) & ~(size_t)4095;
  if (kind == kLate) usleep(2000);
  *result = 0;
  return kind == kNothing;
}

ssize_t pwrite64(int fd, const void* data, size_t nbytes, off_t offset) {
  ssize_t (*real)(int, const void*, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite64");
  ssize_t result;
  if (falter(draw(fd), &nbytes, 1, &result)) return result;
  return real(fd, data, nbytes, offset);
}
ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) { return pwrite64(fd, data, nbytes, offset); }

ssize_t pread64(int fd, void* data, size_t nbytes, off_t offset) {
  ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread64");
  ssize_t result;
  if (falter(draw(fd), &nbytes, 0, &result)) return result;
  return real(fd, data, nbytes, offset);
}
ssize_t pread(int fd, void* data, size_t nbytes, off_t offset) { return pread64(fd, data, nbytes, offset); }

// The engine in plain Python reads into one buffer at a time.
ssize_t preadv64v2(int fd, const struct iovec* parts, int num, off_t offset, int flags) {
  if (num != 1 || flags != 0) {
    errno = EINVAL;
    return -1;
  }
  return pread64(fd, parts->iov_base, parts->iov_len, offset);
}
ssize_t preadv64(int fd, const struct iovec* parts, int num, off_t offset) {
  return preadv64v2(fd, parts, num, offset, 0);
}

int fallocate64(int fd, int mode, off_t offset, off_t nbytes) {
  int (*real)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, "fallocate64");
  if (draw(fd) == kNoSpace) {
    errno = ENOSPC;
    return -1;
  }
  return real(fd, mode, offset, nbytes);
}
int fallocate(int fd, int mode, off_t offset, off_t nbytes) { return fallocate64(fd, mode, offset, nbytes); }
