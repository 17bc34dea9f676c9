/* SPDX-License-Identifier: Apache-2.0 */
/* What the entry points share: see entry_io.c for how they are built. */
#ifndef KM_ENTRY_H
#define KM_ENTRY_H

#include <errno.h>

#include "base/fault.h"
#include "fd/file.h"
#include "sock/stream.h"

/* A negative result becomes errno and -1; a success leaves errno alone. */
KM_INLINE ssize_t km_result(ssize_t n)
{
	if (km_likely(n >= 0))
		return n;
	errno = (int)-n;
	return -1;
}

/*
 * A call that carries bytes: real is the kernel's call, ring the library's.  Not
 * ours, or plain: the kernel's call with its arguments and errno untouched.
 */
#define KM_DATA_CALL(fd, direction, real, ring)                                        \
	do {                                                                           \
		uint64_t entry = km_fd_entry(fd);                                      \
		struct km_file *f;                                                     \
		struct km_plain plain;                                                 \
		ssize_t n;                                                             \
		/* Most descriptors are none of ours. */                               \
		if (km_likely(entry == 0))                                             \
			return real;                                                   \
		for (;; entry = km_fd_entry(fd)) {                                     \
			if (km_unlikely(km_fd_kind(entry) != KM_FD_FILE)) {            \
				if (!km_fd_closing(entry))                             \
					return real;                                   \
				if (!km_fd_wait_closed(fd))                            \
					return km_result(-EBADF);                      \
				continue;                                              \
			}                                                              \
			f = km_fd_object(entry);                                       \
			if (km_load_acquire(&f->mode) != KM_MODE_CHANNEL &&            \
			    km_plain_begin(f, fd, &plain)) {                           \
				n = real;                                              \
				km_plain_end(&plain, direction, n);                    \
				return n;                                              \
			}                                                              \
			if (km_unlikely(km_stream_ended(f))) {                         \
				n = real;                                              \
				if (direction == KM_IN && km_stream_rest(f, fd, n))    \
					continue;                                      \
				return n;                                              \
			}                                                              \
			n = ring;                                                      \
			if (km_likely(n != KM_RETRY))                                  \
				return km_result(n);                                   \
		}                                                                      \
	} while (0)

int km_entry_close(int fd);
int km_entry_dup2(int from, int to, int flags, bool dup3);
int km_entry_fcntl(int fd, int cmd, void *arg);
int km_entry_ioctl(int fd, unsigned long request, void *arg);
int km_entry_close_range(unsigned first, unsigned last, int flags);

#endif
