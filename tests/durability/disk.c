/* A disk on which flushing a folder fails with the error number FOLDER_FSYNC_ERRNO. Preloaded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int fsync(int file) {
  struct stat facts;
  const char *number = getenv("FOLDER_FSYNC_ERRNO");
  if (number && !fstat(file, &facts) && S_ISDIR(facts.st_mode)) {
    errno = atoi(number);
    return -1;
  }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
