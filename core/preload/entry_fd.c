/* SPDX-License-Identifier: Apache-2.0 */
/* Entry points that close and duplicate descriptors. */
#include "preload/entry.h"

#include <linux/close_range.h>
#include <stdlib.h>

#include "event/event.h"
#include "link/link.h"
#include "transport/transport.h"

/*
 * Programs close all that they did not open between vfork and exec, and what the library
 * has hidden is still needed then: a connection that the new program gets may have bytes
 * in a pipe.  It closes on exec by itself; what does not is the child's own by now.
 */
static bool is_kept_for_exec(unsigned fd)
{
	int flags;

	if (fd >= KM_FD_MAX || km_fd_kind(km_fd_peek((int)fd)) != KM_FD_HIDDEN)
		return false;
	flags = km_sys_fcntl((int)fd, F_GETFD, 0);
	return flags >= 0 && (flags & FD_CLOEXEC);
}

int km_entry_close(int fd)
{
	uint64_t entry = km_fd_entry(fd);
	struct km_file *f;
	int err;

	switch (km_fd_kind(entry)) {
	case KM_FD_NONE:
		if (km_unlikely(km_thread.bypass) && is_kept_for_exec((unsigned)fd))
			return (int)km_result(-EBADF);
		return KM_REAL(close)(fd);
	case KM_FD_HIDDEN:
		/* The program did not open it, so for the program it is not open. */
		return (int)km_result(-EBADF);
	case KM_FD_SET:
		km_fd_swap(fd, KM_FD_NONE, NULL);
		km_set_free(km_fd_object(entry));
		return KM_REAL(close)(fd);
	case KM_FD_FILE:
		break;
	}
	f = km_file_close_begin(fd);
	err = KM_REAL(close)(fd);
	km_fd_closed(fd);
	km_file_close_end(f);
	return err;
}

KM_EXPORT int close(int fd)
{
	return km_entry_close(fd);
}

KM_EXPORT_GLIBC int __close(int fd)
{
	return km_entry_close(fd);
}

static bool hidden(unsigned fd)
{
	return fd < KM_FD_MAX && km_fd_kind(km_fd_entry((int)fd)) == KM_FD_HIDDEN;
}

/* In the child of a vfork. */
static int close_range_before_exec(unsigned first, unsigned last, int flags)
{
	int err = 0;

	for (unsigned fd = first; fd <= last && fd < KM_FD_MAX && err == 0; fd++) {
		if (!km_fd_chunks[fd / KM_FD_CHUNK]) {
			fd |= KM_FD_CHUNK - 1;
			continue;
		}
		if (!is_kept_for_exec(fd))
			continue;
		if (fd > first)
			err = (int)KM_SYS(close_range, first, fd - 1, flags, 0, 0, 0);
		first = fd + 1;
	}
	if (err == 0 && first <= last)
		err = (int)KM_SYS(close_range, first, last, flags, 0, 0, 0);
	return err;
}

int km_entry_close_range(unsigned first, unsigned last, int flags)
{
	unsigned from = first;
	int err = 0;

	if (km_unlikely(km_thread.bypass) && first <= last && !flags)
		return close_range_before_exec(first, last, flags);
	if (km_thread.bypass || first > last || km_load_relaxed(&km_proc.files) == 0 ||
	    (flags & CLOSE_RANGE_CLOEXEC))
		if (km_thread.bypass || first > last ||
		    (flags & (CLOSE_RANGE_CLOEXEC | CLOSE_RANGE_UNSHARE)))
			return (int)KM_SYS(close_range, first, last, flags, 0, 0, 0);
	/* Those that the library knows are closed one by one or left alone, and the
	 * kernel closes the stretches between them. */
	for (unsigned fd = first; fd <= last && fd < KM_FD_MAX; fd++) {
		uint64_t entry = km_fd_entry((int)fd);

		if (fd % KM_FD_CHUNK == 0 && !km_fd_chunks[fd / KM_FD_CHUNK]) {
			fd += KM_FD_CHUNK - 1;
			continue;
		}
		if (!entry)
			continue;
		if (fd > from)
			err = (int)KM_SYS(close_range, from, fd - 1, flags, 0, 0, 0);
		if (!hidden(fd))
			km_entry_close((int)fd);
		from = fd + 1;
		if (err < 0)
			return err;
	}
	if (from <= last)
		err = (int)KM_SYS(close_range, from, last, flags, 0, 0, 0);
	return err;
}

KM_EXPORT int close_range(unsigned first, unsigned last, int flags)
{
	return (int)km_result(km_entry_close_range(first, last, flags));
}

KM_EXPORT void closefrom(int first)
{
	unsigned from = (unsigned)KM_MAX(first, 0);

	if (km_entry_close_range(from, ~0u, 0) == -ENOSYS)
		for (int fd = (int)from; fd < (int)sysconf(_SC_OPEN_MAX); fd++)
			km_entry_close(fd);
}

KM_EXPORT int dup(int fd)
{
	int to = KM_REAL(dup)(fd);

	if (km_unlikely(km_thread.bypass) && to >= 0)
		km_file_hand_on(fd, to);
	if (to >= 0) {
		km_fd_forget(to);
		km_fd_dup(fd, to);
	}
	return to;
}

/* Moves one of the library's own descriptors away from a number that the program
 * wants.  Every one of them is named in exactly one place. */
static void make_way(int fd)
{
	km_bell_move(fd);
	km_link_move(fd);
	km_conn_move(fd);
	km_transport_move(fd);
	if (km_proc.log_fd == fd)
		km_proc.log_fd = km_fd_hide_copy(fd);
}

int km_entry_dup2(int from, int to, int flags, bool dup3_)
{
	struct km_file *over = NULL;
	uint64_t entry = km_fd_entry(to);
	int result;

	if (km_unlikely(km_thread.bypass) && from != to)
		km_file_hand_on(from, to);
	if (km_fd_kind(entry) == KM_FD_HIDDEN)
		make_way(to);
	/* Nothing happens to a valid descriptor that is put over itself, or when
	 * the source is not open. */
	if (from == to || (entry && km_sys_fcntl(from, F_GETFD, 0) < 0))
		return dup3_ ? KM_REAL(dup3)(from, to, flags) : KM_REAL(dup2)(from, to);
	if (km_fd_kind(entry) == KM_FD_FILE)
		over = km_file_close_begin(to);
	result = dup3_ ? KM_REAL(dup3)(from, to, flags) : KM_REAL(dup2)(from, to);
	if (over)
		km_file_close_end(over);
	if (result >= 0) {
		km_fd_forget(to);
		km_fd_dup(from, to);
	}
	km_fd_closed(to);
	return result;
}

KM_EXPORT int dup2(int from, int to)
{
	return km_entry_dup2(from, to, 0, false);
}

KM_EXPORT_GLIBC int __dup2(int from, int to)
{
	return km_entry_dup2(from, to, 0, false);
}

KM_EXPORT int dup3(int from, int to, int flags)
{
	return km_entry_dup2(from, to, flags, true);
}
