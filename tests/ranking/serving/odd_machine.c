/* Preloaded into a server, this makes its machine odd while it runs. The file ODD_MACHINE holds two 64-bit numbers: by how many
   seconds the calendar's clock is off, and how many microseconds each read, write and sync of a file below ODD_FOLDER takes more.
   Steady clocks, sockets, mapped pages and files elsewhere stay what they are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SLICE_US 20000
#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

struct odd {
  volatile int64_t seconds, micros;
};
static struct odd none;
static struct odd *odd = &none;
static const char *folder;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("ODD_MACHINE");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *found = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, fd, 0);
  if (found == MAP_FAILED) {
    fputs("odd_machine: no ODD_MACHINE\n", stderr);
    _exit(99);
  }
  folder = getenv("ODD_FOLDER");
  odd = found;
}

int clock_gettime(clockid_t which, struct timespec *at) {
  REAL(clock_gettime);
  int failed = real(which, at);
  if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) at->tv_sec += odd->seconds;
  return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  REAL(gettimeofday);
  int failed = real(at, zone);
  if (!failed) at->tv_sec += odd->seconds;
  return failed;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}

/* gRPC asks for the time and waits for locks past libc; a moment to wait for is by the odd clock, and the kernel has the true one. */
long syscall(long number, ...) {
  REAL(syscall);
  long a[6];
  va_list rest;
  va_start(rest, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_clock_gettime) return clock_gettime((clockid_t)a[0], (struct timespec *)a[1]);
  if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
    struct timespec until = *(struct timespec *)a[3];
    until.tv_sec -= odd->seconds;
    return real(number, a[0], a[1], a[2], &until, a[4], a[5]);
  }
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void slow(int fd) {
  char link[64], path[4096];
  if (!odd->micros || !folder) return;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return;
  for (int64_t gone = 0; gone < odd->micros; gone += SLICE_US) usleep(SLICE_US);
}

#define SLOW(type, name, parameters, ...) \
  type name parameters { \
    REAL(name); \
    slow(fd); \
    return real(__VA_ARGS__); \
  }

SLOW(ssize_t, read, (int fd, void *to, size_t size), fd, to, size)
SLOW(ssize_t, pread, (int fd, void *to, size_t size, off_t at), fd, to, size, at)
SLOW(ssize_t, pread64, (int fd, void *to, size_t size, off64_t at), fd, to, size, at)
SLOW(ssize_t, write, (int fd, const void *from, size_t size), fd, from, size)
SLOW(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), fd, from, size, at)
SLOW(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), fd, from, size, at)
SLOW(int, fsync, (int fd), fd)
SLOW(int, fdatasync, (int fd), fd)
