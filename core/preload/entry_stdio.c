/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Streams on sockets.  A stream reads and writes its descriptor by libc's own paths,
 * which nobody can interpose, so a plain connection that gets one is pinned to the
 * kernel.  One that is on its rings already gets a stream whose reads and writes come
 * back here.
 */
#include "preload/entry.h"

#include <stdio.h>

static int cookie_fd(void *cookie)
{
	return (int)(intptr_t)cookie;
}

static ssize_t cookie_read(void *cookie, char *buf, size_t n)
{
	return read(cookie_fd(cookie), buf, n);
}

/* A stream's write callback says 0 for an error, never -1. */
static ssize_t cookie_write(void *cookie, const char *buf, size_t n)
{
	size_t done = 0;

	while (done < n) {
		ssize_t k = write(cookie_fd(cookie), buf + done, n - done);

		if (k <= 0)
			break;
		done += (size_t)k;
	}
	return (ssize_t)done;
}

static int cookie_close(void *cookie)
{
	return km_entry_close(cookie_fd(cookie));
}

/* What fileno() answers; libc uses it for nothing else on such a stream. */
static void give_number(FILE *stream, int fd)
{
#ifdef KM_MUSL
	/* Where it has been in all versions of musl, on machines of 64 bits; -1 on a
	 * stream without one.  Elsewhere the stream has no number. */
	const size_t place = 120;
	int *number = (int *)(void *)((char *)stream + place);

	if (*number != -1)
		return;
	*number = fd;
	if (fileno_unlocked(stream) != fd)
		*number = -1;
#else
	stream->_fileno = fd;
#endif
}

KM_EXPORT FILE *fdopen(int fd, const char *mode)
{
	static const cookie_io_functions_t functions = {
		.read = cookie_read, .write = cookie_write, .close = cookie_close};
	struct km_file *f = km_file_of(fd);
	FILE *stream;

	if (f)
		km_file_pin(f, KM_REASON_FDOPEN);
	if (km_likely(!f) || km_load_seq(&f->mode) != KM_MODE_CHANNEL)
		return KM_REAL(fdopen)(fd, mode);
	stream = fopencookie((void *)(intptr_t)fd, mode, functions);
	if (stream)
		give_number(stream, fd);
	return stream;
}

KM_EXPORT int fclose(FILE *stream)
{
	int fd = km_load_relaxed(&km_proc.files) ? fileno_unlocked(stream) : -1;
	struct km_file *f = fd >= 0 ? km_file_of(fd) : NULL;
	int err;

	/* A stream of ours closes its descriptor through cookie_close. */
	if (km_likely(!f) || km_load_seq(&f->mode) == KM_MODE_CHANNEL)
		return KM_REAL(fclose)(stream);
	f = km_file_close_begin(fd);
	err = KM_REAL(fclose)(stream);
	km_fd_closed(fd);
	km_file_close_end(f);
	return err;
}
