/* SPDX-License-Identifier: Apache-2.0 */
#include "event/event.h"
#include "fd/file.h"

km_a64 *km_fd_chunks[KM_FD_MAX / KM_FD_CHUNK];

/* A close takes microseconds unless SO_LINGER says otherwise, or its thread has to wait
 * for a processor. */
#define CLOSING_LOOKS 2000

static km_a64 *chunk_for(int fd)
{
	unsigned i = (unsigned)fd / KM_FD_CHUNK;
	km_a64 *chunk, *seen = NULL;

	if ((unsigned)fd >= KM_FD_MAX)
		return NULL;
	chunk = __atomic_load_n(&km_fd_chunks[i], __ATOMIC_ACQUIRE);
	if (km_likely(chunk != NULL))
		return chunk;
	chunk = km_pages(KM_FD_CHUNK * sizeof(*chunk), false);
	if (!chunk)
		return NULL;
	/* A thread that lost the race leaves its pages untouched and unused. */
	if (!__atomic_compare_exchange_n(&km_fd_chunks[i], &seen, chunk, false,
					 __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
		chunk = seen;
	return chunk;
}

uint64_t km_fd_swap(int fd, enum km_fd_kind kind, void *object)
{
	km_a64 *chunk;

	if (kind == KM_FD_NONE && km_fd_entry(fd) == 0)
		return 0;
	chunk = chunk_for(fd);
	if (!chunk)
		return 0;
	return km_swap_seq(&chunk[(unsigned)fd % KM_FD_CHUNK],
			   (uint64_t)(uintptr_t)object | (uint64_t)kind);
}

void km_fd_each(void (*fn)(int fd, uint64_t entry, void *arg), void *arg)
{
	for (unsigned i = 0; i < KM_COUNT(km_fd_chunks); i++) {
		km_a64 *chunk = __atomic_load_n(&km_fd_chunks[i], __ATOMIC_ACQUIRE);

		for (unsigned k = 0; chunk && k < KM_FD_CHUNK; k++) {
			uint64_t entry = km_load_acquire(&chunk[k]);

			if (entry)
				fn((int)(i * KM_FD_CHUNK + k), entry, arg);
		}
	}
}

void km_fd_forget(int fd)
{
	uint64_t entry = km_fd_entry(fd);

	switch (km_fd_kind(entry)) {
	case KM_FD_NONE:
		return;
	case KM_FD_FILE:
		km_file_close_end(km_file_close_begin(fd));
		km_fd_closed(fd);
		return;
	case KM_FD_SET:
		km_fd_swap(fd, KM_FD_NONE, NULL);
		km_set_free(km_fd_object(entry));
		return;
	case KM_FD_HIDDEN:
		km_fd_hidden_gone(fd);
		return;
	}
}

void km_fd_closed(int fd)
{
	uint64_t entry = km_fd_entry(fd);
	km_a64 *chunk = chunk_for(fd);

	/* The number may be somebody else's already. */
	if (chunk && km_fd_closing(entry))
		km_cas_seq(&chunk[(unsigned)fd % KM_FD_CHUNK], &entry, 0);
}

bool km_fd_wait_closed(int fd)
{
	for (int i = 0; i < CLOSING_LOOKS; i++) {
		if (!km_fd_closing(km_fd_entry(fd)))
			return true;
		km_sys_yield();
	}
	return false;
}

void km_fd_dup(int from, int to)
{
	uint64_t entry = km_fd_entry(from);
	enum km_lock_result how;

	switch (km_fd_kind(entry)) {
	case KM_FD_NONE:
	case KM_FD_HIDDEN:
		return;
	case KM_FD_FILE: {
		struct km_file *f = km_fd_object(entry);

		how = km_lock(&km_proc.table_lock);
		f->fds++;
		if (f->conn)
			km_add_seq(&f->conn->refs, 1);
		km_unlock(&km_proc.table_lock, how);
		km_fd_swap(to, KM_FD_FILE, f);
		return;
	}
	case KM_FD_SET: {
		struct km_set *set = km_fd_object(entry);

		how = km_lock(&km_proc.table_lock);
		set->fds++;
		km_unlock(&km_proc.table_lock, how);
		km_fd_swap(to, KM_FD_SET, set);
		return;
	}
	}
}
