/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the library knows about descriptors.
 *
 * A table maps each descriptor to a km_file (a TCP socket's open file
 * description in this process), a km_set (an epoll set) or marks it as hidden
 * (the library's own).  Everything else has no entry and is the kernel's.
 *
 * A km_file is private to the process; after fork each process has its own.  A
 * km_conn is one end of an upgraded connection: it is also the connection's row
 * in the statistics memfd, and is shared with forked children, which go on
 * using the connection together.  Objects are recycled but their memory is
 * never unmapped, so that a racing lookup reads stale data at worst and finds
 * out under the lock.
 */
#ifndef KM_FILE_H
#define KM_FILE_H

#include "base/proc.h"
#include "shm/segment.h"

struct km_set;
struct km_bell;
struct km_peer_bell;
struct km_reg;

#define KM_FD_MAX (1u << 20)
#define KM_FD_CHUNK 1024u

enum km_fd_kind { KM_FD_NONE, KM_FD_FILE, KM_FD_SET, KM_FD_HIDDEN };

/* What carries a file's bytes. */
enum km_mode {
	KM_MODE_PLAIN,	   /* the kernel; may be upgraded */
	KM_MODE_SWITCHING, /* being upgraded: wait for the result */
	KM_MODE_CHANNEL,   /* see the directions' phases in its km_conn */
	KM_MODE_PINNED,	   /* the kernel, for good */
};

/* Phases of one direction of an upgraded connection, always in this order. */
enum km_phase {
	KM_PHASE_KERNEL, /* not cut over yet */
	/* reading: rx_left bytes are still in the kernel; writing: what the consumer
	 * left in the ring has to go by the kernel first */
	KM_PHASE_DRAIN,
	KM_PHASE_RING,
	KM_PHASE_ENDED, /* the kernel again, for good */
};

/* km_conn.flags */
#define KM_CONN_NONBLOCK 1u /* O_NONBLOCK as this library last saw it set */
#define KM_CONN_RD_SHUT 2u  /* SHUT_RD here */
#define KM_CONN_RESET 4u    /* the peer broke the protocol: ECONNRESET */
#define KM_CONN_DIED 16u    /* the reset of a peer that died has been told */
#define KM_CONN_TIMEOUTS 8u /* SO_RCVTIMEO or SO_SNDTIMEO may be set */
#define KM_CONN_GIVEN 32u   /* another program may have it: a close here ends nothing */
#define KM_CONN_URGENT 512u /* urgent data was unread at the peer's cut-over */
#define KM_CONN_NOSPACE 256u /* the kernel's send buffer was seen full */
/* TCP_CORK is off in the kernel, and kept here while the stream goes by the ring. */
#define KM_CONN_CORK_KEPT 1024u
#define KM_CONN_CORK 2048u /* it is on, for the program */
/* A process that the library is not in may change O_NONBLOCK. */
#define KM_CONN_FOREIGN 128u

struct km_conn {
	struct km_stats_row row;
	_Alignas(64) km_a32 rx_lock; /* the direction locks, see km_lock */
	km_a32 tx_lock;
	km_a32 refs;  /* descriptors in all processes */
	km_a32 procs; /* processes */
	km_a32 flags;
	/* poll bits of the kernel socket that stay once seen: EOF, error, hang-up */
	km_a32 kernel_bits;
	uint32_t rx_phase, tx_phase; /* enum km_phase, under the direction lock */
	uint64_t rx_left;
	bool rx_begun;	    /* the consumer has said so in left */
	uint64_t rx_end;    /* 1 + position where this end stopped reading, 0: not */
	uint64_t tx_resend; /* 1 + position of the next byte that the consumer left */
	struct km_producer tx;
	struct km_consumer rx;
	uint32_t idle_reads; /* empty reads in a row; KM_ASK_NOW: the kernel has news */
	int64_t asked_at;    /* when the kernel was last asked because of them */
	uint32_t stale_writes; /* writes since the consumer was last seen to move */
	uint64_t stale_at;     /* where it stood then */
	int32_t lowat;	       /* SO_RCVLOWAT */
	struct km_spin spin_in, spin_out; /* of blocking calls */
	uint32_t index;			  /* of the row */
	uint32_t next_free;
};

_Static_assert(sizeof(struct km_conn) <= KM_STATS_ROW, "row too small");
_Static_assert(offsetof(struct km_conn, tx_lock) == KM_STATS_TX_LOCK, "kmap/tap");

/* Takes conn's tx_lock.  What an owner that has died was copying is nobody's any more. */
KM_INLINE enum km_lock_result km_conn_lock_tx(struct km_conn *conn)
{
	enum km_lock_result how = km_lock(&conn->tx_lock);

	if (km_unlikely(how == KM_LOCK_STOLEN && conn->tx.wire))
		km_ring_torn(&conn->tx, conn->row.ring_size);
	return how;
}

/* km_conn.idle_reads: the kernel is to be asked whatever the time. */
#define KM_ASK_NOW (UINT32_MAX / 2)

/* Where a file is on its way to an upgrade. */
enum km_link_state {
	KM_LINK_NONE,
	KM_LINK_OFFERED,  /* connector: link_fd listens */
	KM_LINK_ACCEPTED, /* connector: link_fd is the acceptor's connection */
	KM_LINK_HELLO,	  /* acceptor: hello sent on link_fd, mode is CHANNEL */
	KM_LINK_DONE,
};

struct km_file {
	km_a32 busy;  /* threads inside the kernel with this object in mode PLAIN */
	km_a32 mode;  /* enum km_mode */
	km_a32 users; /* threads asleep with it in mode CHANNEL */
	uint32_t fds; /* descriptors in this process, under table_lock */
	uint32_t generation;
	int fd;	       /* one of them */
	int given;     /* 1 + the number that a program gets it as, 0: none known */
	int keep_fd;   /* a duplicate, while the last was closed under a sleeper */
	uint8_t role;  /* enum km_role */
	uint8_t last;  /* direction of the last data call: 1 in, 2 out */
	uint8_t turns; /* times the direction changed, up to a few */
	uint8_t tries;
	uint8_t reason; /* enum km_reason */
	uint8_t link_state;
	bool scan;    /* other processes may take its news: look at it always */
	bool passed;  /* came in a message: others may have it */
	bool closing; /* no descriptor left, a sleeper still has it */
	bool left;    /* the process ends, and is counted out already */
	uint32_t calls, next_try;
	int link_fd;
	int held_fd;		     /* bound to the name of a passed socket; 0: none */
	int tx_pipe, rx_pipe;	     /* hidden; -1 with transport shm */
	uint64_t tx_inode, rx_inode; /* of the pipes */
	km_a32 *procs; /* processes that hold the socket, when forked before */
	struct km_conn *conn;
	struct km_conn *note; /* a row without a channel: why there is none */
	struct km_segment seg;
	struct km_bell *bell; /* where its news arrives */
	uint32_t slot;
	km_a32 asked;	  /* to be told of space, and not told yet */
	uint64_t news_at; /* the peer's position when the bell was last drained */
	struct km_peer_bell *peer; /* how its peer is woken */
	uint32_t peer_slot;
	struct km_reg *regs; /* its registrations, never unlinked while it lives */
	struct km_file *next_free;
};

extern km_a64 *km_fd_chunks[KM_FD_MAX / KM_FD_CHUNK];

KM_INLINE uint64_t km_fd_entry(int fd)
{
	km_a64 *chunk;

	if (km_unlikely((unsigned)fd >= KM_FD_MAX || km_thread.bypass))
		return 0;
	chunk = __atomic_load_n(&km_fd_chunks[(unsigned)fd / KM_FD_CHUNK],
				__ATOMIC_ACQUIRE);
	if (!chunk)
		return 0;
	return km_load_acquire(&chunk[(unsigned)fd % KM_FD_CHUNK]);
}

KM_INLINE enum km_fd_kind km_fd_kind(uint64_t entry)
{
	return (enum km_fd_kind)(entry & 3);
}

KM_INLINE void *km_fd_object(uint64_t entry)
{
	return (void *)(uintptr_t)(entry & ~(uint64_t)3);
}

/*
 * Is fd about to be closed, or to become something else?  Its entry has kind NONE then,
 * and what it was as its object: a call that went to the kernel now might meet the old
 * socket there, and wait for bytes that come by its ring.
 */
KM_INLINE bool km_fd_closing(uint64_t entry)
{
	return entry != 0 && km_fd_kind(entry) == KM_FD_NONE;
}

/* What stands in the table, for the child of a vfork too. */
KM_INLINE uint64_t km_fd_peek(int fd)
{
	km_a64 *chunk;

	if ((unsigned)fd >= KM_FD_MAX)
		return 0;
	chunk = __atomic_load_n(&km_fd_chunks[(unsigned)fd / KM_FD_CHUNK],
				__ATOMIC_ACQUIRE);
	return chunk ? km_load_acquire(&chunk[(unsigned)fd % KM_FD_CHUNK]) : 0;
}

/* The tracked TCP socket that fd is, or NULL. */
KM_INLINE struct km_file *km_file_of(int fd)
{
	uint64_t entry = km_fd_entry(fd);

	return km_fd_kind(entry) == KM_FD_FILE ? km_fd_object(entry) : NULL;
}

KM_INLINE struct km_set *km_set_of(int fd)
{
	uint64_t entry = km_fd_entry(fd);

	return km_fd_kind(entry) == KM_FD_SET ? km_fd_object(entry) : NULL;
}

/* Sets fd's entry and returns the old one; 0 also when fd is out of range. */
uint64_t km_fd_swap(int fd, enum km_fd_kind kind, void *object);

/* -- hidden.c: the library's own descriptors.  Any thread; never while the caller holds
 * limit_lock. ----------------------------------------------------------------------- */

/* Moves one of them out of the program's way: to a number that the program cannot reach,
 * close-on-exec, marked hidden.  Takes over fd; the new number, or a negative errno value
 * (fd is closed then): -EMFILE where there is no place for it. */
int km_fd_hide(int fd);
/* A hidden duplicate of fd, which stays as it is; it has no low number even for an
 * instant. */
int km_fd_hide_copy(int fd);
/* Hides what make opens, close-on-exec.  It works also when the program has no number
 * left, and takes none from it meanwhile. */
int km_fd_hide_new(int (*make)(void));
/* Marks it where it is. */
void km_fd_hide_here(int fd);
/* Closes a hidden descriptor. */
void km_fd_unhide(int fd);
/* It was closed by other means. */
void km_fd_hidden_gone(int fd);
/* Has the program so many numbers left that the library may open something? */
bool km_fd_spare(void);

/* Starts tracking fd as a TCP socket; forgets what stood there.  Quietly does
 * nothing when memory is short. */
void km_file_new(int fd, enum km_role role);
/* A second descriptor for what from is (socket or epoll set). */
void km_fd_dup(int from, int to);
/* What stands at fd is gone, though no close was seen. */
void km_fd_forget(int fd);
/* The kernel's close, which km_file_close_begin announced, is done. */
void km_fd_closed(int fd);
/* Waits until fd is not closing any more.  False: it takes long, or is this thread's own
 * close, which a signal handler has interrupted; for the kernel fd is closed then. */
bool km_fd_wait_closed(int fd);

/* Pins a plain file to the kernel. */
void km_file_pin(struct km_file *f, enum km_reason reason);

/*
 * Plain or upgraded, f goes on by the kernel for good, and for this reason.  0, -EAGAIN
 * (in a signal handler that interrupted an upgrade), or the error of
 * km_stream_retreat.  May be called by the child of a vfork, as may the next ones.
 * take: see there.
 */
int km_file_to_kernel(struct km_file *f, int fd, enum km_reason reason, bool take);
/* The same for all of them, and what is made afterwards is not tracked. */
void km_file_all_to_kernel(enum km_reason reason);
/* The child of a vfork has changed O_NONBLOCK of fd. */
void km_file_flags_unseen(int fd);
/* Another program is about to get fd: by exec as number to, or in a message (to is
 * KM_BY_MESSAGE).  When unread bytes would be lost in a message the connection is reset;
 * those for an exec are taken care of by the next. */
#define KM_BY_MESSAGE (-1)
void km_file_hand_on(int fd, int to);
/*
 * The same for every descriptor that is not closed by an exec.  Unread bytes that no
 * other process has, or that the peer cannot send again, are put into *memfd (made if
 * need be) for the new image if it takes them; memfd is NULL when it does not.  becomes:
 * this process is the one that execs.
 */
void km_file_hand_on_survivors(int *memfd, bool becomes);

/*
 * Closing takes two steps around the kernel's own close (or dup2): begin, with
 * the descriptor still open, marks the entry as closing (km_fd_closed takes it out after
 * the kernel's call); end says the rest to the peer and frees.  NULL from begin: nothing
 * to end.
 */
struct km_file *km_file_close_begin(int fd);
void km_file_close_end(struct km_file *f);

/* A thread that goes to sleep with f in mode CHANNEL, and one that returned. */
void km_file_hold(struct km_file *f);
void km_file_release(struct km_file *f);

/* A connection row, or NULL when there is no memory or no descriptor for the
 * table; *reason says which. */
struct km_conn *km_conn_new(enum km_reason *reason);
void km_conn_free(struct km_conn *conn);
/* A row without a channel, which says what *row says.  NULL when it cannot be freed:
 * there is no memory for the table, and the row was written into its file, or there is
 * no descriptor for that either. */
struct km_conn *km_conn_note(const struct km_stats_row *row);
/* Gives the table's hidden descriptor another number, if it is fd. */
void km_conn_move(int fd);

/* What the kernel was found to have for O_NONBLOCK. */
KM_INLINE void km_conn_nonblock(struct km_conn *conn, bool on)
{
	bool known = km_load_relaxed(&conn->flags) & KM_CONN_NONBLOCK;

	if (km_likely(known == on))
		return;
	/* Somebody changed it unseen, and may do it again. */
	if (on)
		km_or_seq(&conn->flags, KM_CONN_NONBLOCK);
	else
		km_and_seq(&conn->flags, ~KM_CONN_NONBLOCK);
	km_or_seq(&conn->flags, KM_CONN_FOREIGN);
}

/* Ends f's channel in this process (close, or an upgrade that failed). */
void km_file_detach(struct km_file *f);

/* Called around fork. */
void km_file_fork_prepare(void);
void km_file_fork_parent(void);
void km_file_fork_child(void);
/* There is no child after all. */
void km_file_fork_failed(void);

/* Forgets the table of the parent. */
void km_conn_fork_child(void);

/* Calls fn for every descriptor that has an entry. */
void km_fd_each(void (*fn)(int fd, uint64_t entry, void *arg), void *arg);

#endif
