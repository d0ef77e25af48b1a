/* A disk with faults, for the files under DISK_ROOT. Preloaded: it stands between a process and the C library.
 *   FLOCK_ERRNO    flock fails with this error number
 *   FSYNC_ERRNO    fsync of a file or a folder fails with it
 *   RENAME_ERRNO   the first RENAME_COUNT renames of a process fail with it, after they were done if RENAME_DONE is set
 *   FAULTS_WHEN    these faults begin once this file is there
 *   LATE_S         what another process has made less than so many seconds ago is not there yet, for all processes but
 *                  the one of RANK 0: a network disk whose client keeps what it knows of a folder
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long number_of(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

/* Whether faults have begun: the file FAULTS_WHEN is there, or no such file is named. */
static int has_begun(void) {
  const char *path = getenv("FAULTS_WHEN");
  return !path || !syscall(SYS_faccessat, AT_FDCWD, path, F_OK);
}

static int is_below_root(const char *path) {
  const char *root = getenv("DISK_ROOT");
  return root && !strncmp(path, root, strlen(root));
}

static void resolve(int folder, const char *path, char *out) {
  char base[PATH_MAX] = "", link[64];
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, base, sizeof base - 1);
  base[size < 0 ? 0 : size] = 0;
  snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
}

static int is_file_below_root(int file) {
  char path[PATH_MAX];
  resolve(file, ".", path);
  return is_below_root(path);
}

/* What this process has made itself it sees at once. */
#define MOST_OWN 4096
static unsigned long own[MOST_OWN];
static int num_own;

static unsigned long hash_of(const char *path) {
  unsigned long hash = 5381;
  for (; *path; path++) hash = hash * 33 + (unsigned char)*path;
  return hash;
}

/* Folders that it has changed are asked for again. */
static struct {
  unsigned long hash;
  time_t when;
} asked[MOST_OWN];
static int num_asked;

static unsigned long hash_of_parent(const char *path) {
  char parent[PATH_MAX];
  snprintf(parent, sizeof parent, "%s", path);
  char *end = strrchr(parent, '/');
  if (end) *end = 0;
  return hash_of(parent);
}

static void remember(int folder, const char *name) {
  char path[PATH_MAX];
  resolve(folder, name, path);
  if (!is_below_root(path) || num_own == MOST_OWN) return;
  own[num_own++] = hash_of(path);
  asked[num_asked].hash = hash_of_parent(path);
  asked[num_asked++].when = time(NULL);
}

static int is_hidden(int folder, const char *name) {
  long late_s = number_of("LATE_S");
  const char *rank = getenv("RANK");
  if (!late_s || !name || !rank || !strcmp(rank, "0")) return 0;
  char path[PATH_MAX];
  resolve(folder, name, path);
  if (!is_below_root(path)) return 0;
  unsigned long hash = hash_of(path);
  for (int i = 0; i < num_own; i++)
    if (own[i] == hash) return 0;
  struct statx facts;
  if (syscall(SYS_statx, AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &facts)) return 0;
  time_t made = S_ISDIR(facts.stx_mode) ? facts.stx_btime.tv_sec : facts.stx_ctime.tv_sec;
  unsigned long parent = hash_of_parent(path);
  for (int i = 0; i < num_asked; i++)
    if (asked[i].hash == parent && asked[i].when >= made) return 0;
  return time(NULL) - made < late_s;
}

#define ABSENT_IF_HIDDEN(folder, name) \
  if (is_hidden(folder, name)) {       \
    errno = ENOENT;                    \
    return -1;                         \
  }

int flock(int file, int operation) {
  long error = number_of("FLOCK_ERRNO");
  if (error && has_begun() && is_file_below_root(file)) {
    errno = error;
    return -1;
  }
  return NEXT(flock)(file, operation);
}

int fsync(int file) {
  long error = number_of("FSYNC_ERRNO");
  if (error && has_begun() && is_file_below_root(file)) {
    errno = error;
    return -1;
  }
  return NEXT(fsync)(file);
}

int rename(const char *from, const char *to) {
  static int num_failed;
  long error = number_of("RENAME_ERRNO");
  char path[PATH_MAX];
  resolve(AT_FDCWD, to, path);
  if (error && has_begun() && is_below_root(path) && num_failed < number_of("RENAME_COUNT")) {
    num_failed++;
    if (getenv("RENAME_DONE")) NEXT(rename)(from, to);
    errno = error;
    return -1;
  }
  int status = NEXT(rename)(from, to);
  if (!status) remember(AT_FDCWD, to);
  return status;
}

int mkdir(const char *path, mode_t mode) {
  int status = NEXT(mkdir)(path, mode), error = errno;
  if (!status || error == EEXIST) remember(AT_FDCWD, path); /* the server has answered */
  errno = error;
  return status;
}

static int open_as(int folder, const char *path, int flags, mode_t mode) {
  if (!(flags & O_CREAT)) ABSENT_IF_HIDDEN(folder, path)
  int is_new = flags & O_CREAT && syscall(SYS_faccessat, folder, path, F_OK);
  int file = syscall(SYS_openat, folder, path, flags, mode);
  if (file >= 0 && is_new) remember(folder, path);
  return file;
}

#define MODE_OF(flags)          \
  mode_t mode = 0;              \
  if ((flags) & O_CREAT) {      \
    va_list rest;               \
    va_start(rest, flags);      \
    mode = va_arg(rest, mode_t);\
    va_end(rest);               \
  }

int open(const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_as(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_as(AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_as(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE_OF(flags)
  return open_as(folder, path, flags, mode);
}
int stat(const char *path, struct stat *out) {
  ABSENT_IF_HIDDEN(AT_FDCWD, path)
  return NEXT(stat)(path, out);
}
int stat64(const char *path, struct stat64 *out) {
  ABSENT_IF_HIDDEN(AT_FDCWD, path)
  return NEXT(stat64)(path, out);
}
int lstat64(const char *path, struct stat64 *out) {
  ABSENT_IF_HIDDEN(AT_FDCWD, path)
  return NEXT(lstat64)(path, out);
}
int fstatat64(int folder, const char *path, struct stat64 *out, int flags) {
  ABSENT_IF_HIDDEN(folder, path)
  return NEXT(fstatat64)(folder, path, out, flags);
}
int access(const char *path, int mode) {
  ABSENT_IF_HIDDEN(AT_FDCWD, path)
  return NEXT(access)(path, mode);
}
struct dirent64 *readdir64(DIR *folder) {
  struct dirent64 *entry;
  do entry = NEXT(readdir64)(folder);
  while (entry && strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && is_hidden(dirfd(folder), entry->d_name));
  return entry;
}
