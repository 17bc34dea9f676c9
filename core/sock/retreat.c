/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Back to the kernel: a connection whose descriptor is given to a program that knows
 * nothing of the rings, or that gets an option which a ring cannot honour.
 *
 * Each ring is left by one of its ends first (km_wire_ring.left), which one is decided
 * by compare-and-swap.  A producer that leaves says END, and the consumer takes what is
 * unread.  A consumer that leaves says where it stopped, and the producer sends what
 * lies beyond by the kernel, before anything newer.  So bytes never depend on memory
 * that the program which gets the descriptor cannot see.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/link.h"
#include "sock/internal.h"
#include "transport/transport.h"

/* How long a close or shutdown waits for the kernel to take what a consumer left.  A
 * hostile one makes it wait for nothing. */
#ifndef PATIENCE_NS
#define PATIENCE_NS 1000000000
#define LOOK_NS 10000000
#endif

/* Who has left: who, if nobody had before. */
static uint32_t leave(km_a32 *left, uint32_t who)
{
	uint32_t seen = 0;

	if (km_cas_sync(LEFT, left, &seen, who) ||
	    (seen == KM_LEFT_READING && km_cas_sync(LEFT, left, &seen, who)))
		return who;
	return seen;
}

enum km_lock_result km_tx_lock(struct km_conn *conn)
{
	enum km_lock_result how = km_conn_lock_tx(conn);

	if (km_unlikely(how == KM_LOCK_STOLEN))
		km_stream_reset(conn);
	return how;
}

void km_cork_back(struct km_conn *conn, int fd)
{
	uint32_t flags = km_load_relaxed(&conn->flags);
	bool done = !(flags & KM_CONN_CORK_KEPT);

	/* Again if a signal handler, for which there is no lock, changes it meanwhile. */
	while (km_unlikely(!done)) {
		int on = (flags & KM_CONN_CORK) != 0;

		km_sys_setsockopt(fd, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
		done = km_cas_seq(&conn->flags, &flags,
				  flags & ~(KM_CONN_CORK_KEPT | KM_CONN_CORK));
	}
}

bool km_tx_leave(struct km_conn *conn, int fd)
{
	if (conn->tx_phase == KM_PHASE_RING &&
	    leave(&conn->tx.wire->left, KM_LEFT_PRODUCER) == KM_LEFT_CONSUMER) {
		conn->tx_phase = KM_PHASE_DRAIN;
		km_cork_back(conn, fd);
	}
	return conn->tx_phase != KM_PHASE_DRAIN;
}

/* Does the kernel keep all that is in the ring, though nobody reads? */
static bool fits_kernel(const struct km_conn *conn, int fd)
{
	int room = 0;
	socklen_t len = sizeof(room);

	/* Half of it is for the kernel's own books. */
	return km_sys_getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, &len) == 0 &&
	       conn->tx.w < (uint64_t)KM_MAX(room, 0) / 4;
}

bool km_tx_leave_for_good(struct km_conn *conn, int fd)
{
	uint32_t nobody = 0;

	if (conn->tx_phase == KM_PHASE_RING && conn->tx.w &&
	    km_load_relaxed(&conn->tx.wire->left) == 0 && fits_kernel(conn, fd) &&
	    km_cas_sync(LEFT, &conn->tx.wire->left, &nobody, KM_LEFT_TAKEN_BACK)) {
		conn->tx_resend = 1;
		conn->tx_phase = KM_PHASE_DRAIN;
		km_cork_back(conn, fd);
		KM_FAULT(CLOSE_TAKEN);
	}
	return km_tx_leave(conn, fd);
}

bool km_tx_end(struct km_conn *conn, int fd)
{
	struct km_wire_ring *wire = conn->tx.wire;

	if (!km_tx_leave(conn, fd))
		return false;
	if (conn->tx_phase == KM_PHASE_RING) {
		km_cork_back(conn, fd);
		km_store_ordered(&wire->end, conn->tx.w);
		km_store_sync(FLAGS_SET, &wire->pflags,
			      km_load_relaxed(&wire->pflags) | KM_P_END);
	}
	KM_FAULT(CLOSE_END);
	conn->tx_phase = KM_PHASE_ENDED;
	return true;
}

ssize_t km_tx_resend(struct km_file *f, struct km_conn *conn, int fd)
{
	uint8_t buf[16384];
	const uint8_t *from;

	/* Whoever died with the lock may have put bytes into the pipe that it never
	 * published. */
	if (f->tx_pipe >= 0 && (km_load_relaxed(&conn->flags) & KM_CONN_RESET))
		return -EPROTO;
	/* From now on the position stands. */
	if (!conn->tx_resend)
		conn->tx_resend =
			km_or_seq(&conn->tx.wire->stop, KM_STOP_SEEN) & ~KM_STOP_SEEN;
	if (!conn->tx_resend)
		return -EPROTO;
	KM_FAULT(CLOSE_RESEND);
	for (;;) {
		ssize_t n = km_replay(f, conn, conn->tx_resend - 1, buf, sizeof(buf),
				      &from);

		if (n < 0)
			return n;
		km_claim(from, n);
		/* An error is for the program's own next call to find. */
		if (n > 0 && (km_kernel_poll(fd, 0) & (POLLERR | POLLHUP)))
			n = -EPIPE;
		if (n > 0)
			n = km_kernel_send(
				fd, &(struct iovec){(void *)(uintptr_t)from, (size_t)n},
				1, MSG_NOSIGNAL);
		if (n == -EAGAIN || n == -EINTR)
			return -EAGAIN;
		if (n == 0)
			km_store_sync(FLAGS_SET, &conn->tx.wire->pflags,
				      km_load_relaxed(&conn->tx.wire->pflags) |
					      KM_P_RESENT);
		if (n <= 0) {
			/* All of it went, or the connection is over: the program's
			 * own next call is told why. */
			conn->tx_phase = KM_PHASE_ENDED;
			conn->row.reason = KM_REASON_HANDED_ON;
			if (conn->rx_phase == KM_PHASE_ENDED)
				conn->row.state = KM_ROW_KERNEL;
			return 0;
		}
		conn->tx_resend += (uint64_t)n;
		conn->row.ring_tx_bytes -= (uint64_t)n;
		conn->row.kernel_tx_bytes += (uint64_t)n;
	}
}

/* Makes the send buffer large enough for what the consumer left, within what the system
 * allows: with rings of the usual size nothing is left to wait for. */
static void make_send_room(const struct km_conn *conn, int fd)
{
	uint64_t rest = conn->tx.w - (conn->tx_resend - 1);
	int room = 0, wanted = (int)KM_MIN(rest, (uint64_t)INT32_MAX);
	socklen_t len = sizeof(room);

	/* The kernel doubles what it is told, for its own books. */
	if (km_sys_getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, &len) == 0 &&
	    room / 2 < wanted)
		km_sys_setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof(wanted));
}

int km_tx_resend_all(struct km_file *f, struct km_conn *conn, int fd)
{
	int64_t deadline = km_now_ns() + PATIENCE_NS;
	struct timespec look = {0, LOOK_NS};
	bool grown = false;
	ssize_t n;

	while (conn->tx_phase == KM_PHASE_DRAIN) {
		struct pollfd pfd = {.fd = fd, .events = POLLOUT};

		n = km_tx_resend(f, conn, fd);
		if (n != -EAGAIN)
			return (int)n;
		if (!grown) {
			grown = true;
			make_send_room(conn, fd);
			continue;
		}
		if (km_now_ns() > deadline)
			return -ETIMEDOUT;
		km_sys_poll(&pfd, 1, &look);
	}
	return 0;
}

void km_tx_look(struct km_file *f, struct km_conn *conn, int fd)
{
	enum km_lock_result how;
	ssize_t n = 0;

	if (km_likely(!km_tx_left(conn)))
		return;
	how = km_tx_lock(conn);
	if (how == KM_LOCK_NESTED)
		return;
	if (f->conn == conn && !km_tx_leave(conn, fd))
		n = km_tx_resend(f, conn, fd);
	km_unlock(&conn->tx_lock, how);
	if (n == -EPROTO)
		km_stream_reset(conn);
}

/* Stops reading the ring, both direction locks held.  -EBUSY: there are bytes in it
 * that the peer cannot send again, because it has left before or is gone. */
static int leave_rx(struct km_conn *conn, int fd, bool take)
{
	struct km_wire_ring *wire = conn->rx.wire;
	uint64_t stop = conn->rx.r + 1;
	int64_t unread;
	uint32_t left;
	bool alone;

	km_recv_settle(conn, fd);
	if (conn->rx_phase == KM_PHASE_ENDED)
		return 0;
	/* It has left already, and keeps what is unread. */
	if (conn->rx_end)
		return take ? 0 : -EBUSY;
	KM_FAULT(CLOSE_LEAVE);
	/* Before the decision, which orders it: who finds that this end has left knows
	 * where, and need not wait for a process that may be stopped or dead. */
	if (km_load_relaxed(&wire->left) != KM_LEFT_CONSUMER)
		km_store_relaxed(&wire->stop, stop);
	left = leave(&wire->left, KM_LEFT_CONSUMER);
	KM_FAULT(CLOSE_LEFT);
	if (left == KM_LEFT_TAKEN_BACK) {
		conn->rx_phase = KM_PHASE_ENDED;
		return 0;
	}
	alone = left == KM_LEFT_PRODUCER;
	/* Pairs with the producer's fence between its publication and its look at
	 * left: either its bytes are seen here, or it sees that they were not. */
	km_fence_sync(LEAVE);
	alone = alone || (km_kernel_poll(fd, POLLRDHUP) & KM_GONE_BITS);
	unread = km_ring_readable(&conn->rx);
	if (unread < 0)
		return (int)unread;
	if (alone && unread)
		return -EBUSY;
	/* What is unread can be kept as long as nobody has begun to send it again. */
	if (take && unread && km_cas_seq(&wire->stop, &stop, conn->rx.w + 1))
		conn->rx_end = conn->rx.w + 1;
	else
		conn->rx_phase = KM_PHASE_ENDED;
	return 0;
}

/* The peer, and other threads here, look at the connection again. */
static void tell_all(struct km_file *f, struct km_conn *conn)
{
	km_tell_producer(f, conn, true);
	km_tell_consumer(f, conn);
	km_sys_futex_wake(&conn->rx.wire->cons_wait, INT32_MAX);
	km_sys_futex_wake(&conn->tx.wire->prod_wait, INT32_MAX);
	if (f->bell)
		km_bell_kick(f->bell);
}

int km_stream_retreat(struct km_file *f, int fd, enum km_reason reason, bool take)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result rx = km_lock(&conn->rx_lock), tx;
	int err = -EAGAIN;

	if (rx == KM_LOCK_NESTED)
		return err;
	tx = km_tx_lock(conn);
	if (tx != KM_LOCK_NESTED) {
		err = km_tx_end(conn, fd) ? 0 : km_tx_resend_all(f, conn, fd);
		if (err == 0)
			err = leave_rx(conn, fd, take);
		if (err == 0) {
			conn->row.state = KM_ROW_KERNEL;
			conn->row.reason = reason;
			f->reason = (uint8_t)reason;
		}
		km_unlock(&conn->tx_lock, tx);
	}
	km_unlock(&conn->rx_lock, rx);
	tell_all(f, conn);
	if (err < 0)
		km_log(KM_LOG_ERROR, "fd %d cannot go back to the kernel (%d)", fd,
		       err);
	return err;
}

void km_stream_finish(struct km_file *f, int fd)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result how;

	/* Siblings that go on with the connection answer for themselves. */
	if (!conn || km_load_seq(&conn->procs) != 1)
		return;
	how = km_tx_lock(conn);
	if (how == KM_LOCK_NESTED)
		return;
	if (!km_tx_leave_for_good(conn, fd))
		km_tx_resend_all(f, conn, fd);
	km_unlock(&conn->tx_lock, how);
}

uint64_t km_stream_unread(struct km_conn *conn, uint64_t *before)
{
	int64_t n = 0;

	*before = conn->rx_phase == KM_PHASE_DRAIN ? conn->rx_left : 0;
	if (conn->rx_phase == KM_PHASE_DRAIN || conn->rx_phase == KM_PHASE_RING)
		n = km_ring_readable(&conn->rx);
	if (conn->rx_end)
		n = KM_MIN(n, (int64_t)(conn->rx_end - 1 - conn->rx.r));
	return (uint64_t)KM_MAX(n, 0);
}
