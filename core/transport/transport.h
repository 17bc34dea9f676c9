/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transports: what carries the bytes of an upgraded connection.
 *
 * The segment is the control page of all of them: positions, flags, cut-over, wait words
 * and bells are the same, so that readiness, waking, closing and the way back to the
 * kernel know nothing of transports.  A transport moves bytes, and each of its calls then
 * publishes the position as a ring does: published bytes are there to be taken, and a
 * consumer takes at most what is published.
 *
 * transports.def lists them; shm's own calls are made directly, all others through the
 * table of operations.
 */
#ifndef KM_TRANSPORT_H
#define KM_TRANSPORT_H

#include "fd/file.h"

/* Descriptors that a hello carries for its transport, at most. */
#define KM_TRANSPORT_FDS 2

struct km_transport {
	const char *name;
	/* The segment has no data areas; each ring is a pipe, which both ends hold by one
	 * hidden descriptor.  The rest is for these. */
	bool bare;
	int fds; /* that the hello carries */

	/* Of the configured transport, once, when the library starts. */
	void (*start)(void);
	/*
	 * The acceptor makes the pipes of ring 0 and ring 1, under the token of the
	 * segment: pipes[] are its hidden descriptors, sent[] what the hello carries, of
	 * open file descriptions that are not its own, the caller's to close.  *ring_size,
	 * as wished, is what the pipes always take afterwards, KM_RING_SIZE_MIN at least.
	 * 0; -EMFILE, -ENFILE or -ENOMEM for what ran out; other errors: they cannot be
	 * made here, with a line in the log.  After an error pipes[] are the caller's all
	 * the same, and sent[] are closed.
	 */
	int (*create)(const uint8_t token[16], uint32_t *ring_size, int pipes[2],
		      int *sent);
	/* The connector: sent are those of the hello, which stay the caller's.  -EPROTO:
	 * they are not what they should be; other errors as above. */
	int (*attach)(const uint8_t token[16], uint32_t ring_size, const int *sent,
		      int pipes[2]);
	/* The acceptor's handshake is over, however it went: takes away its names. */
	void (*settled)(const uint8_t token[16]);

	/*
	 * Direction lock held; none blocks.  As km_ring_write and km_ring_read, but that an
	 * error of the kernel (-ENOMEM) is possible, and that of a buffer with a bad part
	 * the good beginning may go.  -EPROTO: the pipe has not the bytes, or the room,
	 * that the positions promise.
	 */
	ssize_t (*put)(struct km_producer *p, int pipe, const struct iovec *iov,
		       int iovcnt, size_t most);
	ssize_t (*get)(struct km_consumer *c, int pipe, const struct iovec *iov,
		       int iovcnt, unsigned how);
	/* As km_ring_replay, into buf; nothing is taken.  -EAGAIN in a signal handler that
	 * interrupted such a call; -EBADF in the child of a vfork that has put something
	 * else in the place of what is hidden. */
	ssize_t (*replay)(const struct km_producer *p, int pipe, uint64_t at, void *buf,
			  size_t room);
};

#define X(id, name, meaning) extern const struct km_transport km_transport_##name;
#include "base/transports.def"
#undef X

extern const struct km_transport *const km_transports[KM_TRANSPORTS];

/* The configured one is about to be used. */
void km_transport_start(void);
/* Closes f's pipes.  link_lock held; not in the child of a vfork. */
void km_transport_drop(struct km_file *f);
/* Gives a hidden descriptor of f's, or of the transports' own, another number. */
void km_transport_move_pipes(struct km_file *f, int fd);
void km_transport_move(int fd);

/* Of fd, or 0. */
uint64_t km_transport_inode(int fd);
/* Is fd still what it was?  The child of a vfork may have put something else there, or
 * closed it, and any other process not. */
bool km_transport_is(int fd, uint64_t inode);

/* -- moving bytes, direction lock held ------------------------------------------------ */

KM_INLINE const struct km_transport *km_transport_of(const struct km_conn *conn)
{
	return km_transports[conn->row.transport];
}

KM_INLINE ssize_t km_put(const struct km_file *f, struct km_conn *conn,
			 const struct iovec *iov, int iovcnt, size_t most)
{
	if (km_likely(conn->tx.data != NULL))
		return km_ring_write(&conn->tx, iov, iovcnt, most);
	return km_transport_of(conn)->put(&conn->tx, f->tx_pipe, iov, iovcnt, most);
}

KM_INLINE ssize_t km_get(const struct km_file *f, struct km_conn *conn,
			 const struct iovec *iov, int iovcnt, unsigned how)
{
	if (km_likely(conn->rx.data != NULL))
		return km_ring_read(&conn->rx, iov, iovcnt, how);
	if (!km_transport_is(f->rx_pipe, f->rx_inode))
		return -EBADF;
	return km_transport_of(conn)->get(&conn->rx, f->rx_pipe, iov, iovcnt, how);
}

/* The next piece of what this end published, from position at on: in the ring, or copied
 * into buf. */
KM_INLINE ssize_t km_replay(const struct km_file *f, const struct km_conn *conn,
			    uint64_t at, void *buf, size_t room, const uint8_t **from)
{
	if (km_likely(conn->tx.data != NULL))
		return km_ring_replay(&conn->tx, at, from);
	*from = buf;
	if (!km_transport_is(f->tx_pipe, f->tx_inode))
		return -EBADF;
	return km_transport_of(conn)->replay(&conn->tx, f->tx_pipe, at, buf, room);
}

#endif
