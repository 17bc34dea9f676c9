/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ThreadSanitizer knows memory by its address, and the two ends of a connection map the
 * same segment twice.  In its build a test has one mapping of each shared file: the
 * linker sends mmap and munmap here (--wrap).
 */
#ifdef __SANITIZE_THREAD__
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

void *__real_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t n);
void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t n);

static struct {
	ino_t inode;
	void *at;
	size_t size;
	unsigned users;
} mapped[4096];

/* The threads under test must not be ordered by a lock that only this file has:
 * the sanitizer is told to look away. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
void AnnotateIgnoreSyncBegin(const char *file, int line);
void AnnotateIgnoreSyncEnd(const char *file, int line);

static void begin(void)
{
	AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
	pthread_mutex_lock(&lock);
}

static void end(void)
{
	pthread_mutex_unlock(&lock);
	AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}

__attribute__((no_sanitize("thread"))) void *
__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	struct stat st;
	void *found = NULL;
	size_t empty = 0;

	if (fd < 0 || !(flags & MAP_SHARED) || at || offset || fstat(fd, &st) < 0)
		return __real_mmap(at, n, prot, flags, fd, offset);
	begin();
	for (size_t i = 0; i < sizeof(mapped) / sizeof(mapped[0]) && !found; i++) {
		if (!mapped[i].users)
			empty = i;
		else if (mapped[i].inode == st.st_ino && mapped[i].size == n) {
			mapped[i].users++;
			found = mapped[i].at;
		}
	}
	if (!found) {
		found = __real_mmap(at, n, prot, flags, fd, offset);
		if (found != MAP_FAILED) {
			mapped[empty].inode = st.st_ino;
			mapped[empty].at = found;
			mapped[empty].size = n;
			mapped[empty].users = 1;
		}
	}
	end();
	return found;
}

__attribute__((no_sanitize("thread"))) int __wrap_munmap(void *at, size_t n)
{
	int keep = 0;

	begin();
	for (size_t i = 0; i < sizeof(mapped) / sizeof(mapped[0]); i++)
		if (mapped[i].users && mapped[i].at == at) {
			keep = --mapped[i].users > 0;
			break;
		}
	end();
	return keep ? 0 : __real_munmap(at, n);
}
#else
typedef int unit_one_mapping_is_for_tsan;
#endif
