/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shared mappings with nothing around them, so that an access outside of one is found:
 * the sanitizers know the heap and the stack only.  Linked with --wrap=mmap and
 * --wrap=munmap.
 */
#include <errno.h>
#include <sys/mman.h>

#include "fuzz.h"

#define GUARD ((size_t)1 << 20)
#define MAPPINGS 4096

void *__real_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t n);
void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t n);

static void *guarded[MAPPINGS];

void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
	uint8_t *room, *inside;

	if (at || !(flags & MAP_SHARED) || fd < 0)
		return __real_mmap(at, n, prot, flags, fd, offset);
	room = __real_mmap(NULL, n + 2 * GUARD, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		return MAP_FAILED;
	inside = __real_mmap(room + GUARD, n, prot, flags | MAP_FIXED, fd, offset);
	if (inside == MAP_FAILED) {
		int saved = errno;

		__real_munmap(room, n + 2 * GUARD);
		errno = saved;
		return MAP_FAILED;
	}
	for (int i = 0; i < MAPPINGS; i++) {
		void *nothing = NULL;

		if (__atomic_compare_exchange_n(&guarded[i], &nothing, inside, 0,
						__ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			return inside;
	}
	/* Mappings that nobody undoes. */
	abort();
}

int __wrap_munmap(void *at, size_t n)
{
	size_t pages = (n + 4095) & ~(size_t)4095;

	for (int i = 0; i < MAPPINGS; i++)
		if (guarded[i] == at) {
			__atomic_store_n(&guarded[i], NULL, __ATOMIC_SEQ_CST);
			return __real_munmap((uint8_t *)at - GUARD, pages + 2 * GUARD);
		}
	return __real_munmap(at, n);
}
