/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread makes a segment and another attaches it.  The descriptor goes by a pipe and
 * by system calls of the library's own, which ThreadSanitizer does not take for an
 * order: what is in the header is ordered by the segment's state alone.
 */
#include <pthread.h>

#include "base/sys.h"
#include "shm/segment.h"
#include "unit.h"

#define SIZE 65536u
#define ROUNDS 20

static int there[2], back[2];

static void *create(void *arg)
{
	(void)arg;
	for (int i = 0; i < ROUNDS; i++) {
		struct km_segment seg = {0};
		char answer;
		int fd;

		CHECK_IS(km_segment_create(&seg, SIZE, false, &fd), 0);
		CHECK_IS(km_sys_write(there[1], &fd, sizeof(fd)), sizeof(fd));
		CHECK_IS(km_sys_read(back[0], &answer, 1), 1);
		km_segment_unmap(&seg);
		CHECK_IS(km_sys_close(fd), 0);
	}
	return NULL;
}

static void *attach(void *arg)
{
	(void)arg;
	for (int i = 0; i < ROUNDS; i++) {
		struct km_segment seg = {0};
		int fd;

		CHECK_IS(km_sys_read(there[0], &fd, sizeof(fd)), sizeof(fd));
		CHECK_IS(km_segment_attach(&seg, false, fd), 0);
		CHECK_IS(seg.ring_size, SIZE);
		km_segment_unmap(&seg);
		CHECK_IS(km_sys_write(back[1], "", 1), 1);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[2];

	unit_watchdog();
	CHECK_IS(pipe(there), 0);
	CHECK_IS(pipe(back), 0);
	CHECK_IS(pthread_create(&threads[0], NULL, create, NULL), 0);
	CHECK_IS(pthread_create(&threads[1], NULL, attach, NULL), 0);
	for (int i = 0; i < 2; i++)
		CHECK_IS(pthread_join(threads[i], NULL), 0);
	return 0;
}
