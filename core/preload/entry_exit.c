/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end of a process.  What peers that have gone back to the kernel left unread is
 * sent again.  One that shares connections with others after a fork counts itself out,
 * so that the last of those that go on is known to be the last when it closes.  A
 * process that is killed does neither.
 */
#include "preload/entry.h"

#include <stdlib.h>

static bool shared(int fd, uint64_t entry)
{
	struct km_file *f = km_fd_object(entry);

	(void)fd;
	return km_fd_kind(entry) == KM_FD_FILE && f->conn && !f->left &&
	       km_load_seq(&f->conn->procs) > 1;
}

static void leave_descriptor(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);

	(void)arg;
	if (shared(fd, entry) && f->fd != fd)
		km_sub_seq(&f->conn->refs, 1);
}

static void leave_file(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);

	(void)arg;
	if (km_fd_kind(entry) != KM_FD_FILE || f->fd != fd || f->left)
		return;
	if (shared(fd, entry)) {
		f->left = true;
		km_sub_seq(&f->conn->refs, 1);
		km_sub_seq(&f->conn->procs, 1);
	} else if (!f->conn && f->procs && km_load_seq(f->procs) > 1) {
		f->left = true;
		km_sub_seq(f->procs, 1);
	}
}

static void finish(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);

	(void)arg;
	if (km_fd_kind(entry) == KM_FD_FILE && f->fd == fd && !f->left)
		km_stream_finish(f, fd);
}

static void leave(void)
{
	if (!km_proc.used || km_thread.bypass)
		return;
	if (km_load_relaxed(&km_proc.channels))
		km_fd_each(finish, NULL);
	km_fd_each(leave_descriptor, NULL);
	km_fd_each(leave_file, NULL);
}

/* After the program's own handlers and destructors, which may still use sockets. */
__attribute__((destructor(101))) static void end(void)
{
	leave();
}

KM_EXPORT void _exit(int status)
{
	leave();
	KM_REAL(_exit)(status);
	__builtin_unreachable();
}

KM_EXPORT void _Exit(int status)
{
	_exit(status);
}
