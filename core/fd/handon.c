/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Descriptors that another program gets: by exec, by posix_spawn, by SCM_RIGHTS.  That
 * program may be one that the library cannot get into, so whatever it gets is served
 * by the kernel before it has it.
 */
#include <errno.h>

#include "fd/file.h"
#include "link/held.h"
#include "link/inherit.h"
#include "link/link.h"
#include "sock/stream.h"

int km_file_to_kernel(struct km_file *f, int fd, enum km_reason reason, bool take)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);
	uint32_t plain = KM_MODE_PLAIN;
	int err = 0;

	if (how == KM_LOCK_NESTED)
		return -EAGAIN;
	if (f->conn && km_load_seq(&f->mode) == KM_MODE_CHANNEL) {
		if (reason == KM_REASON_HANDED_ON)
			km_or_seq(&f->conn->flags, KM_CONN_GIVEN | KM_CONN_FOREIGN);
		km_link_withdraw(f);
		err = km_stream_retreat(f, fd, reason, take);
	} else if (!km_thread.bypass) {
		km_file_pin(f, reason);
	} else if (km_cas_seq(&f->mode, &plain, KM_MODE_PINNED)) {
		/* What the upgrade had opened is the parent's to close. */
		f->reason = (uint8_t)reason;
	}
	/* Forked siblings of this process cannot know who has it now. */
	if (reason == KM_REASON_HANDED_ON && f->procs)
		km_add_seq(f->procs, 1);
	km_unlock(&km_proc.link_lock, how);
	return err;
}

static void leave(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	enum km_reason reason = *(enum km_reason *)arg;
	enum km_lock_result how;

	if (km_fd_kind(entry) != KM_FD_FILE || f->fd != fd)
		return;
	/* The filter may forbid what takes bytes out of a pipe: the peer sends them again. */
	km_file_to_kernel(f, fd, reason, f->tx_pipe < 0);
	how = km_lock(&km_proc.link_lock);
	if (how != KM_LOCK_NESTED && !f->conn)
		km_stay(f, reason);
	km_unlock(&km_proc.link_lock, how);
}

void km_file_all_to_kernel(enum km_reason reason)
{
	km_proc.filtered = true;
	km_fd_each(leave, &reason);
}

/* The child of a vfork has descriptors of its own, and no say in the table. */
static bool is_still(int fd, const struct km_file *f)
{
	struct stat st;

	if (!km_thread.bypass)
		return true;
	if (km_sys_fstat(fd, &st) < 0 || !S_ISSOCK(st.st_mode))
		return false;
	return !f->conn || st.st_ino == f->conn->row.inode;
}

void km_file_flags_unseen(int fd)
{
	uint64_t entry = km_fd_peek(fd);
	struct km_file *f = km_fd_object(entry);

	if (km_fd_kind(entry) == KM_FD_FILE && f->conn)
		km_or_seq(&f->conn->flags, KM_CONN_FOREIGN);
}

/* Whoever gets the connection would take the end of the stream for all there was.  An
 * error is the honest answer. */
static void reset(struct km_file *f, int fd)
{
	struct sockaddr nobody = {.sa_family = AF_UNSPEC};

	km_sys_connect(fd, &nobody, sizeof(nobody));
	if (f->conn)
		km_or_seq(&f->conn->flags, KM_CONN_RESET);
}

struct exec {
	int *memfd;
	bool becomes;
};

/* fd, number to in the new image, is not closed by the exec. */
static void hand_on(struct km_file *f, int fd, int to, const struct exec *exec)
{
	/* Nobody else will read what is unread. */
	bool only = exec->becomes && !km_thread.bypass && f->conn &&
		    km_load_seq(&f->conn->procs) == 1;
	int *memfd = exec->memfd;
	int err = km_file_to_kernel(f, fd, KM_REASON_HANDED_ON, only && memfd);
	uint64_t before;

	/* The child of a vfork has lost the pipe with what was to be sent before. */
	if (err == -EBADF)
		reset(f, fd);
	if (!f->conn || (err < 0 && err != -EBUSY) ||
	    (err == 0 && !km_stream_unread(f->conn, &before)))
		return;
	if (memfd)
		err = km_inherit_add(f, to, memfd);
	if (memfd && err == 0)
		return;
	if (only || err == -EBADF)
		reset(f, fd);
}

static void survivor(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	int flags;

	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	flags = km_sys_fcntl(fd, F_GETFD, 0);
	if (flags >= 0 && !(flags & FD_CLOEXEC) && is_still(fd, f))
		hand_on(f, fd, fd, arg);
	if (f->given && f->fd == fd) {
		hand_on(f, fd, f->given - 1, arg);
		f->given = 0;
	}
}

void km_file_hand_on_survivors(int *memfd, bool becomes)
{
	struct exec exec = {memfd, becomes};

	if (km_load_relaxed(&km_proc.files))
		km_fd_each(survivor, &exec);
}

void km_file_hand_on(int fd, int to)
{
	uint64_t entry = km_fd_peek(fd);
	struct km_file *f = km_fd_object(entry);
	enum km_lock_result how;
	bool alone;
	int err;

	if (km_fd_kind(entry) != KM_FD_FILE || !is_still(fd, f))
		return;
	alone = !f->procs || km_load_seq(f->procs) == 1;
	err = km_file_to_kernel(f, fd, KM_REASON_HANDED_ON, false);
	if (to != KM_BY_MESSAGE) {
		if (err == -EBUSY)
			f->given = to + 1;
	} else if (err == -EBUSY) {
		reset(f, fd);
	} else if (err == 0 && alone && !f->conn && f->reason == KM_REASON_HANDED_ON) {
		/* Whoever receives it may upgrade it once it is closed here. */
		how = km_lock(&km_proc.link_lock);
		km_held_take(f, fd);
		km_unlock(&km_proc.link_lock, how);
	}
}
