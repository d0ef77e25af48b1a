/* Log what a process asks of the kernel for files under TRACE_ROOT: a line "OPERATION PATH [TO]" in the file TRACE_LOG.
 * Preloaded: it stands between Python and the C library. Lines are written with one system call each. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static void resolve(int folder, const char *path, char *out) {
  char base[PATH_MAX] = "";
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  char link[64];
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, base, sizeof base - 1);
  base[size < 0 ? 0 : size] = 0;
  snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
}

static void record(const char *operation, const char *path, const char *to) {
  const char *root = getenv("TRACE_ROOT"), *log = getenv("TRACE_LOG");
  if (!root || !log || strncmp(path, root, strlen(root))) return;
  char line[2 * PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\n", (int)getpid(), operation, path, to ? to : "");
  int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
  if (file < 0) return;
  syscall(SYS_write, file, line, size);
  syscall(SYS_close, file);
}

static void record_file(const char *operation, int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return;
  path[size] = 0;
  record(operation, path, NULL);
}

static void record_name(const char *operation, int folder, const char *name) {
  char path[PATH_MAX];
  resolve(folder, name, path);
  record(operation, path, NULL);
}

static void record_rename(int from_folder, const char *from, int to_folder, const char *to) {
  char first[PATH_MAX], second[PATH_MAX];
  resolve(from_folder, from, first);
  resolve(to_folder, to, second);
  record("rename", first, second);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
  record_file("write", file);
  return NEXT(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  record_file("write", file);
  return NEXT(writev)(file, parts, count);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
  record_file("write", file);
  return NEXT(pwrite64)(file, data, size, offset);
}
int ftruncate64(int file, off64_t size) {
  record_file("write", file);
  return NEXT(ftruncate64)(file, size);
}
int fsync(int file) {
  int status = NEXT(fsync)(file);
  record_file("fsync", file);
  return status;
}
int fdatasync(int file) {
  int status = NEXT(fdatasync)(file);
  record_file("fsync", file);
  return status;
}
int rename(const char *from, const char *to) {
  int status = NEXT(rename)(from, to);
  if (!status) record_rename(AT_FDCWD, from, AT_FDCWD, to);
  return status;
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  int status = NEXT(renameat)(from_folder, from, to_folder, to);
  if (!status) record_rename(from_folder, from, to_folder, to);
  return status;
}
int mkdir(const char *path, mode_t mode) {
  int status = NEXT(mkdir)(path, mode);
  if (!status) record_name("mkdir", AT_FDCWD, path);
  return status;
}
int unlink(const char *path) {
  int status = NEXT(unlink)(path);
  if (!status) record_name("remove", AT_FDCWD, path);
  return status;
}
int rmdir(const char *path) {
  int status = NEXT(rmdir)(path);
  if (!status) record_name("remove", AT_FDCWD, path);
  return status;
}
int unlinkat(int folder, const char *path, int flags) {
  char full[PATH_MAX];
  resolve(folder, path, full);
  int status = NEXT(unlinkat)(folder, path, flags);
  if (!status) record("remove", full, NULL);
  return status;
}
