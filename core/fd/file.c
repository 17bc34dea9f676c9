/* SPDX-License-Identifier: Apache-2.0 */
#include "fd/file.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/held.h"
#include "link/link.h"
#include "sock/stream.h"
#include "transport/transport.h"

#define SLAB_FILES 64
#define SHARED_COUNTS 1024 /* per page taken for counts shared by fork */

static struct km_file *free_files;

static struct km_file *file_alloc(void)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);
	struct km_file *f = free_files;

	if (!f) {
		f = km_pages(SLAB_FILES * sizeof(*f), false);
		for (int i = 0; f && i < SLAB_FILES - 1; i++)
			f[i].next_free = i + 1 < SLAB_FILES - 1 ? &f[i + 1] : NULL;
		if (f) {
			free_files = f;
			f = &f[SLAB_FILES - 1];
		}
	} else {
		free_files = f->next_free;
	}
	km_unlock(&km_proc.table_lock, how);
	return f;
}

static void file_free(struct km_file *f)
{
	enum km_lock_result how;

	if (f->procs && !f->left)
		km_sub_seq(f->procs, 1);
	f->generation++;
	km_store_seq(&f->mode, KM_MODE_PINNED);
	how = km_lock(&km_proc.table_lock);
	f->next_free = free_files;
	free_files = f;
	km_unlock(&km_proc.table_lock, how);
	km_sub_seq(&km_proc.files, 1);
}

void km_file_new(int fd, enum km_role role)
{
	struct km_file *f;
	uint32_t generation;

	if ((unsigned)fd >= KM_FD_MAX || km_thread.bypass)
		return;
	km_fd_forget(fd);
	if (km_unlikely(km_proc.filtered))
		return;
	f = file_alloc();
	if (!f)
		return;
	generation = f->generation;
	/* Threads may still be in the kernel with what was closed under them: they
	 * count themselves out here. */
	memset((char *)f + sizeof(f->busy), 0, sizeof(*f) - sizeof(f->busy));
	f->generation = generation;
	f->fds = 1;
	f->fd = fd;
	f->role = (uint8_t)role;
	f->link_fd = -1;
	f->keep_fd = -1;
	f->tx_pipe = -1;
	f->rx_pipe = -1;
	/* With the setting 0 the first call already takes a step. */
	f->next_try = km_proc.options.upgrade_after ? 1 : 0;
	f->reason = KM_REASON_NOT_HOT;
	km_store_seq(&f->mode, KM_MODE_PLAIN);
	km_proc.used = true;
	km_add_seq(&km_proc.files, 1);
	km_fd_swap(fd, KM_FD_FILE, f);
}

void km_file_pin(struct km_file *f, enum km_reason reason)
{
	uint32_t plain = KM_MODE_PLAIN;
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	km_link_cancel(f);
	if (km_cas_seq(&f->mode, &plain, KM_MODE_PINNED)) {
		f->reason = (uint8_t)reason;
		if (km_proc.reasons)
			km_add_relaxed(&km_proc.reasons[reason], 1);
	}
	km_unlock(&km_proc.link_lock, how);
}

void km_file_hold(struct km_file *f)
{
	km_add_seq(&f->users, 1);
}

void km_file_release(struct km_file *f)
{
	if (km_sub_seq(&f->users, 1) == 1 && f->closing) {
		enum km_lock_result how = km_lock(&km_proc.link_lock);
		bool last = f->closing && km_load_seq(&f->users) == 0;

		f->closing = last ? false : f->closing;
		km_unlock(&km_proc.link_lock, how);
		if (last)
			km_file_close_end(f);
	}
}

/*
 * Whoever is in a call with f now has either left it, or counted itself as a user, when
 * this returns; nobody comes in any more, as the entry is out.
 */
static void let_callers_out(const struct km_file *f)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result how = km_lock(&conn->rx_lock);

	km_unlock(&conn->rx_lock, how);
	how = km_conn_lock_tx(conn);
	km_unlock(&conn->tx_lock, how);
}

struct km_file *km_file_close_begin(int fd)
{
	struct km_file *f = km_file_of(fd);
	enum km_lock_result how;
	uint64_t entry;
	uint32_t left;

	if (!f)
		return NULL;
	entry = km_fd_swap(fd, KM_FD_NONE, f);
	if (km_fd_kind(entry) != KM_FD_FILE) {
		/* Two threads close one descriptor. */
		km_fd_closed(fd);
		return NULL;
	}
	f = km_fd_object(entry);
	how = km_lock(&km_proc.table_lock);
	left = --f->fds;
	km_unlock(&km_proc.table_lock, how);
	if (left) {
		if (f->conn && !f->left)
			km_sub_seq(&f->conn->refs, 1);
		if (f->fd == fd)
			f->fd = km_link_other_fd(f);
		return NULL;
	}
	how = km_lock(&km_proc.link_lock);
	km_link_cancel(f);
	if (f->conn && km_load_seq(&f->mode) == KM_MODE_CHANNEL) {
		bool last = !f->left && km_sub_seq(&f->conn->refs, 1) == 1;

		let_callers_out(f);
		if (km_load_seq(&f->users)) {
			/* Like the kernel's own sleepers, they keep the socket
			 * open until they return. */
			f->keep_fd = km_fd_hide_copy(fd);
			f->closing = true;
			if (km_load_seq(&f->users)) {
				km_unlock(&km_proc.link_lock, how);
				return NULL;
			}
			f->closing = false;
		}
		KM_FAULT(CLOSE_BEGIN);
		if (last)
			km_stream_closing(f, fd);
	}
	km_unlock(&km_proc.link_lock, how);
	return f;
}

void km_file_close_end(struct km_file *f)
{
	enum km_lock_result how;

	if (!f)
		return;
	KM_FAULT(CLOSE_KERNEL);
	how = km_lock(&km_proc.link_lock);
	if (f->keep_fd >= 0) {
		if (f->conn && km_load_seq(&f->conn->refs) == 0)
			km_stream_closing(f, f->keep_fd);
		km_fd_unhide(f->keep_fd);
		f->keep_fd = -1;
	}
	km_event_detach(f);
	km_held_drop(f);
	km_stay_forget(f);
	if (f->conn)
		km_file_detach(f);
	km_unlock(&km_proc.link_lock, how);
	file_free(f);
	KM_FAULT(CLOSE_DONE);
}

void km_file_detach(struct km_file *f)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result rx = km_lock(&conn->rx_lock);
	enum km_lock_result tx = km_conn_lock_tx(conn);

	/* After this, whoever holds a stale pointer finds the mode changed under
	 * the lock and looks the descriptor up again. */
	km_store_seq(&f->mode, KM_MODE_PINNED);
	f->conn = NULL;
	km_stream_goodbye(f, conn);
	km_sub_seq(&km_proc.memory, f->seg.size);
	km_segment_unmap(&f->seg);
	km_unlock(&conn->tx_lock, tx);
	km_unlock(&conn->rx_lock, rx);
	km_transport_drop(f);
	km_bell_drop(f);
	km_peer_bell_drop(f);
	km_sub_seq(&km_proc.channels, 1);
	if (!f->left && km_sub_seq(&conn->procs, 1) == 1)
		km_conn_free(conn);
}

/* -- fork ------------------------------------------------------------------ */

static km_a32 *shared_counts;
static unsigned shared_counts_used;
static enum km_lock_result fork_link, fork_table, fork_limit;

static km_a32 *shared_count(void)
{
	if (!shared_counts || shared_counts_used == SHARED_COUNTS) {
		shared_counts = km_pages(SHARED_COUNTS * sizeof(km_a32), true);
		shared_counts_used = 0;
	}
	return shared_counts ? &shared_counts[shared_counts_used++] : NULL;
}

/* Each descriptor is about to have a twin in the child. */
static void share(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	int sign = *(int *)arg;

	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	if (f->conn) {
		km_add_seq(&f->conn->refs, (uint32_t)sign);
		if (f->fd == fd) {
			km_add_seq(&f->conn->procs, (uint32_t)sign);
			f->scan = true;
		}
	} else if (f->fd == fd && km_load_seq(&f->mode) == KM_MODE_PLAIN) {
		if (!f->procs) {
			f->procs = shared_count();
			if (f->procs)
				km_store_seq(f->procs, 1);
		}
		if (f->procs)
			km_add_seq(f->procs, (uint32_t)sign);
		else
			km_store_seq(&f->mode, KM_MODE_PINNED);
	}
}

static void settle(int fd, uint64_t entry, void *arg)
{
	(void)fd;
	(void)arg;
	if (km_fd_kind(entry) == KM_FD_FILE)
		km_link_settle(km_fd_object(entry));
}

void km_file_fork_prepare(void)
{
	int one = 1;

	fork_link = km_lock(&km_proc.link_lock);
	/* No upgrade may be half done: the two processes could not agree on it. */
	km_fd_each(settle, NULL);
	fork_table = km_lock(&km_proc.table_lock);
	km_fd_each(share, &one);
	/* The child gets the limits as they are. */
	fork_limit = km_lock(&km_proc.limit_lock);
}

void km_file_fork_parent(void)
{
	km_unlock(&km_proc.limit_lock, fork_limit);
	km_unlock(&km_proc.table_lock, fork_table);
	km_unlock(&km_proc.link_lock, fork_link);
}

void km_file_fork_failed(void)
{
	int minus = -1;

	km_fd_each(share, &minus);
}

/* The child has one thread, and that one is in fork. */
static void alone(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);

	(void)arg;
	/* The close was another thread's, which is not here; the descriptor still is. */
	if (km_fd_closing(entry))
		km_fd_swap(fd, KM_FD_NONE, NULL);
	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	km_store_seq(&f->busy, 0);
	km_store_seq(&f->users, 0);
	/* The row is the parent's. */
	f->note = NULL;
}

void km_file_fork_child(void)
{
	km_fd_each(alone, NULL);
	for (struct km_file *f = free_files; f; f = f->next_free)
		km_store_seq(&f->busy, 0);
	km_store_seq(&km_proc.limit_lock, 0);
	km_store_seq(&km_proc.table_lock, 0);
	km_store_seq(&km_proc.link_lock, 0);
}
