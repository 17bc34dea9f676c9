/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connection rows live in the statistics memfd, which exists from the first
 * upgrade on.  A forked child keeps the parent's rows for the connections they
 * share, and makes a table of its own for new ones.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "base/fault.h"
#include "base/fault_point.h"
#include "fd/file.h"

#define ROWS 65536u
#define TABLE_SIZE (KM_STATS_HEADER + (size_t)ROWS * KM_STATS_ROW)

static struct km_stats_header *table;
static int table_fd = -1;
static uint32_t notes;	   /* rows written into it before it could be mapped */
static uint32_t free_rows; /* index + 1 of the first, chained by next_free */

_Static_assert(KM_COUNTERS <= 64, "counters do not fit their place");

static struct km_conn *row_at(struct km_stats_header *t, uint32_t index)
{
	return (struct km_conn *)((char *)t + KM_STATS_HEADER +
				  (size_t)index * KM_STATS_ROW);
}

/*
 * The table has the connections' cursors and locks, and other processes of the user can
 * open it through /proc.  What is mapped stays writable, here and in forked children.
 */
static void seal(int fd)
{
	int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

	/* Linux before 5.1 has no F_SEAL_FUTURE_WRITE. */
	if (km_sys_fcntl(fd, F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE) < 0)
		km_sys_fcntl(fd, F_ADD_SEALS, seals);
}

/* Where memfd_create is refused, an unnamed file tells tools at least why. */
static int table_file(void)
{
	int fd = km_sys_memfd_create("kmap-stats", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		fd = km_sys_openat("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	return fd;
}

static void fill_header(struct km_stats_header *t)
{
	t->version = KM_STATS_VERSION;
	t->header_size = KM_STATS_HEADER;
	t->row_size = KM_STATS_ROW;
	t->row_count = ROWS;
	t->pid = (uint32_t)km_sys_getpid();
	KM_SYS(prctl, PR_GET_NAME, t->comm, 0, 0, 0, 0);
	__atomic_store_n(&t->magic, KM_STATS_MAGIC, __ATOMIC_RELEASE);
}

static enum km_reason make_table(void)
{
	struct km_stats_header *t;
	int err;

	if (table_fd < 0)
		table_fd = km_fd_hide_new(table_file);
	if (table_fd < 0)
		return table_fd == -EMFILE || table_fd == -ENFILE ? KM_REASON_BUDGET_FD
		       : table_fd == -ENOMEM ? KM_REASON_BUDGET_MEMORY
					     : KM_REASON_SYSCALL;
	if (km_sys_ftruncate(table_fd, TABLE_SIZE) < 0)
		return KM_REASON_SYSCALL;
	t = km_sys_mmap(TABLE_SIZE, MAP_NORESERVE, table_fd, &err);
	if (!t)
		return err == -ENOMEM ? KM_REASON_BUDGET_MEMORY : KM_REASON_SYSCALL;
	seal(table_fd);
	fill_header(t);
	km_proc.counters = (km_a64 *)((char *)t + KM_STATS_COUNTERS_OFFSET);
	km_proc.reasons = (km_a64 *)((char *)t + KM_STATS_REASONS_OFFSET);
	table = t;
	km_fault_arm();
	return KM_REASON_NONE;
}

/* The rows that are written without a mapping are few, and the oldest gives way. */
#define NOTES 1024u

static void note_in_file(const struct km_stats_row *row)
{
	struct km_stats_header head = {.used_rows = KM_MIN(notes + 1, NOTES)};
	uint64_t at = KM_STATS_HEADER + (uint64_t)(notes % NOTES) * KM_STATS_ROW;
	char padded[KM_STATS_ROW] = {0};

	if (table_fd < 0)
		return;
	fill_header(&head);
	memcpy(padded, row, sizeof(*row));
	KM_SYS(pwrite64, table_fd, padded, sizeof(padded), at, 0, 0);
	KM_SYS(pwrite64, table_fd, &head, sizeof(head), 0, 0, 0);
	notes++;
}

/* Rows that a forked child freed never reached the free list. */
static struct km_conn *find_freed(void)
{
	for (uint32_t i = 0; i < ROWS; i++) {
		struct km_conn *conn = row_at(table, i);

		if (conn->row.state == KM_ROW_FREE)
			return conn;
	}
	return NULL;
}

struct km_conn *km_conn_new(enum km_reason *reason)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);
	struct km_conn *conn = NULL;
	uint32_t generation, index;

	*reason = table ? KM_REASON_NONE : make_table();
	if (*reason == KM_REASON_NONE) {
		if (free_rows) {
			conn = row_at(table, free_rows - 1);
			free_rows = conn->next_free;
		} else if (table->used_rows < ROWS) {
			conn = row_at(table, table->used_rows);
			conn->index = table->used_rows++;
		} else {
			conn = find_freed();
		}
		if (!conn)
			*reason = KM_REASON_BUDGET_CONNECTIONS;
	}
	if (conn) {
		generation = conn->row.generation;
		index = conn->index;
		memset((char *)conn + sizeof(uint32_t), 0,
		       sizeof(*conn) - sizeof(uint32_t));
		conn->row.generation = generation + 1;
		conn->index = index;
		conn->row.state = KM_ROW_PENDING;
	}
	km_unlock(&km_proc.table_lock, how);
	return conn;
}

void km_conn_free(struct km_conn *conn)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);
	/* In a forked child the row may be the parent's, who takes it when it is free. */
	const struct km_stats_row last = conn->row;

	if (table && conn == row_at(table, conn->index)) {
		conn->next_free = free_rows;
		free_rows = conn->index + 1;
	}
	conn->row.state = KM_ROW_FREE;
	/* Who reads the counters first, and then the rows, finds no byte in both. */
	km_fence_seq();
	KM_FAULT(CLOSE_FREED);
	km_add_relaxed(&km_proc.counters[KM_COUNT_RING_RX_BYTES], last.ring_rx_bytes);
	km_add_relaxed(&km_proc.counters[KM_COUNT_RING_TX_BYTES], last.ring_tx_bytes);
	km_add_relaxed(&km_proc.counters[KM_COUNT_KERNEL_RX_BYTES],
		       last.kernel_rx_bytes);
	km_add_relaxed(&km_proc.counters[KM_COUNT_KERNEL_TX_BYTES],
		       last.kernel_tx_bytes);
	km_unlock(&km_proc.table_lock, how);
}

struct km_conn *km_conn_note(const struct km_stats_row *row)
{
	enum km_reason none;
	struct km_conn *conn = km_conn_new(&none);
	enum km_lock_result how;

	if (conn) {
		uint32_t generation = conn->row.generation;

		conn->row = *row;
		conn->row.generation = generation;
		return conn;
	}
	how = km_lock(&km_proc.table_lock);
	if (!table)
		note_in_file(row);
	km_unlock(&km_proc.table_lock, how);
	return NULL;
}

void km_conn_move(int fd)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);

	if (table_fd == fd)
		table_fd = km_fd_hide_copy(fd);
	km_unlock(&km_proc.table_lock, how);
}

/* The child's new connections get a table of their own; the parent's stays
 * mapped for those that they share, and its counters until there is another. */
void km_conn_fork_child(void)
{
	table = NULL;
	free_rows = 0;
	notes = 0;
	table_fd = -1;
}
