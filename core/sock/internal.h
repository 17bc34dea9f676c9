/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of sock/ share.  Functions named once take the direction's lock as
 * held unless they say otherwise; results are counts or negative errno values.
 */
#ifndef KM_SOCK_INTERNAL_H
#define KM_SOCK_INTERNAL_H

#include <errno.h>

#include "base/iov.h"
#include "sock/stream.h"

/* Empty reads after which, and time since it was last done, that the kernel is asked
 * whether the peer still lives; writes that the consumer did not follow. */
#define KM_IDLE_READS 32
#define KM_ASK_AGAIN_NS 1000000
#define KM_STALE_WRITES 64
#define KM_GONE_BITS (POLLRDHUP | POLLHUP | POLLERR)

/* A message flag of the library's own: the call has moved bytes already, and an error
 * or end that it meets is left for the next one to tell. */
#define KM_MSG_MOVED 0x1000000

/* -- kernel.c: the kernel's side of an upgraded socket; none of these blocks.  With
 * KM_MSG_MOVED, recv is 0 for an end or error that is there, and send an error. ------- */

/* The descriptor to use: after a close under a sleeper the number is not ours. */
KM_INLINE int km_kernel_fd(const struct km_file *f, int fd)
{
	return km_unlikely(f->keep_fd >= 0) ? f->keep_fd : fd;
}
ssize_t km_kernel_recv(int fd, const struct iovec *iov, int iovcnt, int flags);
ssize_t km_kernel_send(int fd, const struct iovec *iov, int iovcnt, int flags);
/* revents, 0 when nothing is ready. */
uint32_t km_kernel_poll(int fd, short events);
/* Is it not known how many of the ring's bytes came by the kernel behind cut, or did all
 * of them?  So on a socket that is closed both ways, where a FIN, which counts as a byte,
 * cannot be told from a reset. */
bool km_kernel_unsure(int fd, uint64_t cut, uint64_t ring);
/* Has the stream of fd's peer ended, and not been reset since? */
bool km_kernel_ended(int fd);
/* Will conn's ring not be written any more, or never? */
bool km_tx_by_kernel(const struct km_conn *conn);
/* Bytes ever handed to the kernel on this socket. */
int km_kernel_sent(int fd, uint64_t *out);
/* Bytes ever taken from the kernel, for a peer that cut over at cut and has, or has
 * not, gone back to the kernel since. */
int km_kernel_taken(int fd, uint64_t cut, bool ended, uint64_t *out);

/* -- stream.c: locks and waking ------------------------------------------------------ */

struct km_side {
	struct km_conn *conn;
	km_a32 *lock;
	enum km_lock_result how;
};

/* Locks one direction of f; false when f has no channel (any more), or when this
 * thread holds the lock already (a signal handler): then *err is -EINTR.  held: the
 * caller is a sleeper, for whom f stays even after its descriptor was closed. */
KM_INLINE bool km_side_enter(struct km_file *f, int fd, bool out, bool held,
			     struct km_side *d, int *err)
{
	struct km_conn *conn = f->conn;

	*err = KM_RETRY;
	if (km_unlikely(!conn))
		return false;
	d->conn = conn;
	d->lock = out ? &conn->tx_lock : &conn->rx_lock;
	d->how = km_lock(d->lock);
	if (km_unlikely(d->how == KM_LOCK_NESTED)) {
		*err = -EINTR;
		return false;
	}
	if (km_unlikely(f->conn != conn || (!held && km_file_of(fd) != f))) {
		km_unlock(d->lock, d->how);
		return false;
	}
	/* Whoever died with the lock may have been in the middle of a copy. */
	if (km_unlikely(d->how == KM_LOCK_STOLEN)) {
		if (out)
			km_ring_torn(&conn->tx, conn->row.ring_size);
		km_stream_reset(conn);
	}
	return true;
}

KM_INLINE void km_side_leave(struct km_side *d)
{
	km_unlock(d->lock, d->how);
}
/* The consumer of conn's tx ring has bytes. */
void km_tell_consumer(struct km_file *f, struct km_conn *conn);
/* The producer of conn's rx ring has space, if it asked. */
void km_tell_producer(struct km_file *f, struct km_conn *conn, bool anyway);

/* -- retreat.c: one end leaves its ring; direction lock held -------------------------- */

/* Has the consumer of this end's ring left it, and is there something to be done? */
KM_INLINE bool km_tx_left(const struct km_conn *conn)
{
	return conn->tx_phase == KM_PHASE_DRAIN ||
	       (conn->tx_phase == KM_PHASE_RING &&
		km_load_relaxed(&conn->tx.wire->left) == KM_LEFT_CONSUMER);
}
/* Is there something new to be done about it? */
KM_INLINE bool km_tx_left_news(const struct km_conn *conn)
{
	return km_tx_left(conn) && conn->tx_phase == KM_PHASE_RING;
}
/* TCP_CORK is the kernel's again, with the value that the program has set. */
void km_cork_back(struct km_conn *conn, int fd);
/* Locks the direction for what follows here; one whose holder died resets the
 * connection. */
enum km_lock_result km_tx_lock(struct km_conn *conn);
/* This end stops writing its ring.  False: the consumer has left first, and what it
 * left goes by the kernel now (phase DRAIN). */
bool km_tx_leave(struct km_conn *conn, int fd);
/* The same, for the end of the stream: what a consumer that has not begun to read would
 * find in the ring goes by the kernel, which keeps it when the socket is given away. */
bool km_tx_leave_for_good(struct km_conn *conn, int fd);
/* The same, and the stream goes on by the kernel at the present position. */
bool km_tx_end(struct km_conn *conn, int fd);
/* In phase DRAIN: sends what the consumer left.  0: done, phase ENDED; -EAGAIN: the
 * kernel takes no more now; -EPROTO; errors of the pipe, as -EBADF in the child of a
 * vfork that cannot know its own any more. */
ssize_t km_tx_resend(struct km_file *f, struct km_conn *conn, int fd);
/* The same, and waits a little; for calls after which there is no other. */
int km_tx_resend_all(struct km_file *f, struct km_conn *conn, int fd);
/* Does what is to be done if the consumer has left; no tx_lock held. */
void km_tx_look(struct km_file *f, struct km_conn *conn, int fd);

/* -- recv_phase.c: reading, between the kernel and the ring ---------------------------- */

/* The first look at the ring.  False: the producer has taken all back, and it comes by
 * the kernel (phase ENDED). */
bool km_rx_begin(struct km_conn *conn);
/* The producer has cut over: how much of its kernel bytes is still to come? */
ssize_t km_rx_start_drain(struct km_conn *conn, int fd);
/* Takes notice of a cut-over by the peer. */
void km_recv_settle(struct km_conn *conn, int fd);
/* The ring is empty: has the kernel something to say?  -EAGAIN: no; 1: look at the
 * ring again; 0: end of file; other: error. */
ssize_t km_rx_ask_kernel(struct km_conn *conn, int fd, int flags);
/* The kernel says that the peer has ended.  Did it go without a word, leaving bytes unread
 * that the kernel does not know of?  Then it has to look like a reset: true once, and what
 * is sent from then on is refused.  With KM_MSG_MOVED true, and left for the next call. */
bool km_peer_died(struct km_conn *conn, int fd, int flags);
/* The kernel told an end, or was asked for nothing.  A peer that is gone gets no more into
 * its ring. */
ssize_t km_rx_kernel_end(struct km_conn *conn, int fd, int flags);
/*
 * Back on the kernel: has its stream ended before all came by it that was in the ring?
 * Whoever was to send it again has died, and it is still where it was.
 */
bool km_rx_take_rest(struct km_file *f, struct km_conn *conn, int fd);

/* -- wait.c: sleeping, no direction lock held ----------------------------------------- */

struct km_wait {
	int64_t deadline; /* 0: not asked yet, -1: none */
	unsigned naps;
	bool held;
};

bool km_tx_has_news(const struct km_conn *conn);
/* Sleeps until something may have changed.  0: look again; -EAGAIN: timed out;
 * -EINTR. */
int km_wait_in(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w);
/* The same for more than is there already, which a peek left where it was; -EAGAIN also
 * when no more will come. */
int km_wait_more(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w);
int km_wait_out(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w);
/* What an interrupted wait means for the call: 0 to go on. */
int km_wait_interrupted(int err, const struct km_wait *w);
void km_wait_hold(struct km_file *f, struct km_wait *w);
ssize_t km_wait_done(struct km_file *f, struct km_wait *w, ssize_t result);
/* There is nothing to be had now: is the answer EAGAIN?  Not once the call has slept
 * (w->held): what the descriptor said when it came is what counts. */
bool km_must_not_block(struct km_conn *conn, int fd, int flags,
		       const struct km_wait *w);
/* What a call answers when km_side_enter said err: a handler that interrupted the
 * very call that holds the direction gets EINTR, or EAGAIN where it must not block. */
int km_side_refused(const struct km_file *f, int fd, int err, int flags);

#endif
