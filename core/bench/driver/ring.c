/* SPDX-License-Identifier: Apache-2.0 */
/* libkmap is loaded and not linked, so that the other transports run without it. */
#include "ring.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>

#include "kmap.h"

/* As large as the rings of the preload library grow by default. */
#define RING_SIZE 262144

static kmap_channel *made;
static struct {
	__typeof__(kmap_channel_create) *create;
	__typeof__(kmap_channel_fds) *fds;
	__typeof__(kmap_channel_attach) *attach;
	__typeof__(kmap_channel_read) *read;
	__typeof__(kmap_channel_write) *write;
	__typeof__(kmap_channel_close) *close;
} kmap;

static void *symbol(void *library, const char *name)
{
	void *found = dlsym(library, name);

	if (!found) {
		fprintf(stderr, "kmap-bench: %s\n", dlerror());
		exit(1);
	}
	return found;
}

void ring_prepare(void)
{
	void *library;
	int err;

	if (!options.library) {
		fprintf(stderr, "kmap-bench: the transport ring needs --library\n");
		exit(2);
	}
	library = dlopen(options.library, RTLD_NOW | RTLD_LOCAL);
	if (!library) {
		fprintf(stderr, "kmap-bench: %s\n", dlerror());
		exit(1);
	}
	*(void **)&kmap.create = symbol(library, "kmap_channel_create");
	*(void **)&kmap.fds = symbol(library, "kmap_channel_fds");
	*(void **)&kmap.attach = symbol(library, "kmap_channel_attach");
	*(void **)&kmap.read = symbol(library, "kmap_channel_read");
	*(void **)&kmap.write = symbol(library, "kmap_channel_write");
	*(void **)&kmap.close = symbol(library, "kmap_channel_close");
	err = kmap.create(RING_SIZE, &made);
	if (err < 0) {
		errno = -err;
		fail("kmap_channel_create");
	}
}

/* The server has the channel that was made before it was forked.  The client's copy
 * of that is left alone: closing it would end the server's stream. */
void *ring_open(enum side side)
{
	int fds[KMAP_CHANNEL_FDS], err;
	kmap_channel *attached;

	if (side == SERVER)
		return made;
	kmap.fds(made, fds);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		CHECK((fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 0)) >= 0);
	err = kmap.attach(fds, &attached);
	if (err < 0) {
		errno = -err;
		fail("kmap_channel_attach");
	}
	return attached;
}

void ring_close(void *channel)
{
	kmap.close(channel);
}

static ssize_t answer(ssize_t n, const char *what)
{
	if (n >= 0)
		return n;
	if (n != -EAGAIN && n != -EINTR) {
		errno = (int)-n;
		fail(what);
	}
	return -1;
}

ssize_t ring_read(void *channel, void *buf, size_t len)
{
	int timeout = options.mode == BUSY ? 0 : -1;

	return answer(kmap.read(channel, buf, len, timeout), "kmap_channel_read");
}

ssize_t ring_write(void *channel, const void *buf, size_t len)
{
	int timeout = options.mode == BUSY ? 0 : -1;

	return answer(kmap.write(channel, buf, len, timeout), "kmap_channel_write");
}
