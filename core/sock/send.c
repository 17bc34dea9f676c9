/* SPDX-License-Identifier: Apache-2.0 */
/* Writing to an upgraded connection. */
#include <errno.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/link.h"
#include "sock/internal.h"
#include "transport/transport.h"

/* This end's stream moves to the ring at the present byte. */
static int cut_tx(struct km_conn *conn, int fd)
{
	struct km_wire_ring *wire = conn->tx.wire;
	uint64_t sent;
	int err = km_kernel_sent(fd, &sent);

	if (err < 0)
		return err;
	conn->row.kernel_tx_bytes = sent;
	km_store_ordered(&wire->cut, sent);
	KM_FAULT(CUT_COUNTED);
	km_store_sync(FLAGS_SET, &wire->pflags,
		      km_load_relaxed(&wire->pflags) | KM_P_CUT);
	conn->tx_phase = KM_PHASE_RING;
	KM_FAULT(CUT_MADE);
	return 0;
}

/* This end's stream stays on the kernel. */
KM_COLD static void stay(struct km_conn *conn)
{
	conn->tx_phase = KM_PHASE_ENDED;
	conn->row.state = KM_ROW_KERNEL;
	conn->row.reason = KM_REASON_SYSCALL;
}

/* Does the consumer still take what this end writes?  Asks the kernel now and
 * then when it seems not to. */
static void check_consumer(struct km_conn *conn, int fd)
{
	uint64_t r;

	/* A look at where it stands takes the line away from it: not each time. */
	if (km_likely(++conn->stale_writes < KM_STALE_WRITES))
		return;
	conn->stale_writes = 0;
	r = km_load_sync(SEE_SPACE, &conn->tx.wire->rpos);
	if (r != conn->stale_at || r == conn->tx.w) {
		conn->stale_at = r;
		return;
	}
	km_or_seq(&conn->kernel_bits, km_kernel_poll(fd, POLLRDHUP) & KM_GONE_BITS);
}

/* Is the peer's socket closed, or half closed?  Then bytes go by the kernel, which
 * knows all that follows (RST, EPIPE, a peer that dies later). */
static bool peer_stopped(const struct km_conn *conn)
{
	return (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
		(KM_P_FIN | KM_P_CLOSED)) ||
	       km_load_relaxed(&conn->kernel_bits);
}

bool km_tx_by_kernel(const struct km_conn *conn)
{
	return conn->tx_phase == KM_PHASE_ENDED ||
	       (conn->tx_phase == KM_PHASE_KERNEL && peer_stopped(conn));
}

/* Bytes were published: wakes the consumer, unless it has left without seeing them. */
static void published(struct km_file *f, struct km_conn *conn, int fd)
{
	km_tell_consumer(f, conn);
	if (km_unlikely(km_tx_left(conn)) && !km_tx_leave(conn, fd))
		km_tx_resend(f, conn, fd);
	else if (km_unlikely(conn->tx.w - conn->tx.r > conn->tx.size / 2))
		check_consumer(conn, fd);
}

/* The ring has taken bytes; it was at that level before. */
static void put(struct km_file *f, struct km_conn *conn, int fd, uint32_t level)
{
	conn->row.ring_tx_bytes = conn->tx.w;
	conn->row.tx_seen = conn->tx.r;
	published(f, conn, fd);
	if (km_unlikely(conn->tx.level != level))
		km_count(KM_COUNT_GROWS);
}

/* want: bytes in iov */
static ssize_t send_ring(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, size_t want)
{
	uint32_t level = conn->tx.level;
	size_t most = want;
	ssize_t n;

	if (km_unlikely(peer_stopped(conn))) {
		km_tx_end(conn, fd);
		return KM_RETRY;
	}
	/* A consumer that runs beside this end is told of each piece. */
	if (km_unlikely(want > KM_RING_PIECE) && km_ring_consumer_elsewhere(&conn->tx))
		most = KM_RING_PIECE;
	n = km_put(f, conn, iov, iovcnt, most);
	if (km_likely(n > 0)) {
		put(f, conn, fd, level);
		return n;
	}
	/* Nothing to send, and this was the cut-over. */
	if (n < 0 || want == 0)
		return n;
	KM_FAULT(WRITE_FULL);
	if (km_tx_left(conn)) {
		km_tx_leave(conn, fd);
		return KM_RETRY;
	}
	km_or_seq(&conn->kernel_bits, km_kernel_poll(fd, POLLRDHUP) & KM_GONE_BITS);
	if (peer_stopped(conn))
		return KM_RETRY;
	/* Whoever waits for space by events is told when there is some. */
	km_ask_for_space(f, conn);
	return km_look_sync(ASK_LOOK, km_tx_has_news(conn)) ? KM_RETRY : -EAGAIN;
}

/* Has the handshake come to its end, so that this end may use its ring? */
static bool may_cut(struct km_file *f, struct km_conn *conn)
{
	switch (km_load_sync(ATTACH_SEE, &f->seg.wire->state)) {
	case KM_SEG_READY:
		return f->link_state == KM_LINK_DONE && f->peer;
	case KM_SEG_CANCELLED:
		conn->tx_phase = KM_PHASE_ENDED;
		conn->row.state = KM_ROW_KERNEL;
		conn->row.reason = KM_REASON_PEER_CANCELLED;
		return false;
	default:
		return false;
	}
}

static ssize_t by_kernel(struct km_conn *conn, int fd, const struct iovec *iov,
			 int iovcnt, int flags)
{
	ssize_t n = km_kernel_send(fd, iov, iovcnt, flags);

	if (km_unlikely(n < 0 || (size_t)n < km_iov_total(iov, iovcnt)))
		km_or_seq(&conn->flags, KM_CONN_NOSPACE);
	return n;
}

static ssize_t send_once(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, size_t want, int flags)
{
	ssize_t n;

	for (;;) {
		if (km_unlikely(km_load_relaxed(&conn->flags) & KM_CONN_RESET))
			return -ECONNRESET;
		if (km_unlikely(flags & MSG_OOB) && conn->tx_phase == KM_PHASE_RING)
			km_tx_end(conn, fd);
		switch ((enum km_phase)conn->tx_phase) {
		case KM_PHASE_KERNEL:
			/* A send of nothing has no byte to begin with on the ring. */
			if (may_cut(f, conn) && !peer_stopped(conn) &&
			    !(flags & MSG_OOB) && want) {
				/* Without the position there is no cut. */
				if (cut_tx(conn, fd) < 0)
					stay(conn);
				continue;
			}
			return by_kernel(conn, fd, iov, iovcnt, flags);
		case KM_PHASE_DRAIN:
			n = km_tx_resend(f, conn, fd);
			if (n < 0)
				return n;
			continue;
		case KM_PHASE_ENDED:
			return by_kernel(conn, fd, iov, iovcnt, flags);
		case KM_PHASE_RING:
			if (km_unlikely(km_load_relaxed(&conn->kernel_bits)) &&
			    km_peer_died(conn, fd, flags))
				return flags & KM_MSG_MOVED ? -EPIPE : -ECONNRESET;
			n = send_ring(f, conn, fd, iov, iovcnt, want);
			if (n == KM_RETRY)
				continue;
			return n;
		}
	}
}

/* The usual case, in few instructions: one buffer, and room in the ring for all of it.
 * KM_RETRY: it is not so simple, and nothing was done. */
static ssize_t send_at_once(struct km_file *f, int fd, const struct iovec *iov)
{
	struct km_conn *conn = f->conn;
	ssize_t n = KM_RETRY;
	struct km_side d;
	uint32_t level;
	int err;

	if (km_unlikely(!conn || conn->tx_phase != KM_PHASE_RING || !conn->tx.data ||
			iov->iov_len - 1 >= KM_RING_PIECE ||
			f->link_state == KM_LINK_HELLO ||
			!km_side_enter(f, fd, true, false, &d, &err)))
		return KM_RETRY;
	level = conn->tx.level;
	if (km_likely(conn->tx_phase == KM_PHASE_RING &&
		      !(km_load_relaxed(&conn->flags) & KM_CONN_RESET) &&
		      !peer_stopped(conn)))
		n = km_ring_put(&conn->tx, iov->iov_base, iov->iov_len);
	if (km_likely(n > 0))
		put(f, conn, km_kernel_fd(f, fd), level);
	else
		n = KM_RETRY;
	km_side_leave(&d);
	return n;
}

static ssize_t send_slowly(struct km_file *f, int fd, const struct iovec *iov,
			   int iovcnt, int flags)
{
	struct km_wait w = {0};
	size_t want = km_iov_total(iov, iovcnt), done = 0;
	struct iovec rest[KM_IOV_MOST];
	struct km_side d;
	ssize_t n;
	int err;

	if (km_unlikely(f->link_state == KM_LINK_HELLO))
		km_link_advance(f, fd);
	for (;;) {
		if (!km_side_enter(f, fd, true, w.held, &d, &err))
			return km_wait_done(f, &w,
					    done ? (ssize_t)done
						 : km_side_refused(f, fd, err, flags));
		if (want == 0 && d.conn->tx_phase == KM_PHASE_RING &&
		    !peer_stopped(d.conn)) {
			km_side_leave(&d);
			return 0;
		}
		/* Goes on with the lock, as the kernel does, and even when it must not
		 * block: only an attempt that finds the ring full asks to be told of
		 * space. */
		while ((n = send_once(f, d.conn, km_kernel_fd(f, fd), iov, iovcnt,
				      want - done,
				      done ? flags | KM_MSG_MOVED : flags)) > 0) {
			done += (size_t)n;
			w.naps = 0;
			if (km_likely(done == want))
				break;
			iovcnt = km_iov_advance(iov, iovcnt, (size_t)n, rest);
			iov = rest;
		}
		if (n == -EPROTO) {
			km_stream_reset(d.conn);
			n = -ECONNRESET;
		}
		if (n != -EAGAIN ||
		    km_must_not_block(d.conn, km_kernel_fd(f, fd), flags, &w)) {
			km_side_leave(&d);
			return km_wait_done(f, &w, done ? (ssize_t)done : n);
		}
		km_wait_hold(f, &w);
		km_side_leave(&d);
		err = km_wait_interrupted(km_wait_out(f, d.conn, fd, &w), &w);
		if (err < 0)
			return km_wait_done(f, &w, done ? (ssize_t)done : err);
	}
}

/* On its own, so that vectors need not save what it uses. */
KM_ALONE static ssize_t send_one(struct km_file *f, int fd, const struct iovec *iov,
				 int flags)
{
	ssize_t n = send_at_once(f, fd, iov);

	return km_likely(n != KM_RETRY) ? n : send_slowly(f, fd, iov, 1, flags);
}

ssize_t km_send(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags)
{
	return km_likely(iovcnt == 1 && !(flags & ~(MSG_DONTWAIT | MSG_NOSIGNAL)))
		       ? send_one(f, fd, iov, flags)
		       : send_slowly(f, fd, iov, iovcnt, flags);
}

ssize_t km_send_from(struct km_file *f, int fd, int in, off64_t *offset, size_t count)
{
	ssize_t n = KM_RETRY, space;
	struct km_side d;
	bool died = false;
	uint8_t *at;
	int err;

	if (!km_side_enter(f, fd, true, false, &d, &err))
		return KM_RETRY;
	if (d.conn->tx_phase == KM_PHASE_RING && km_unlikely(peer_stopped(d.conn)) &&
	    !(died = km_peer_died(d.conn, km_kernel_fd(f, fd), KM_MSG_MOVED)))
		km_tx_end(d.conn, km_kernel_fd(f, fd));
	/* A pipe is filled from a buffer: what sendfile would put there are pages of the
	 * file, of which fewer bytes may fit. */
	if (d.conn->tx_phase == KM_PHASE_RING && !died && d.conn->tx.data &&
	    !(km_load_relaxed(&d.conn->flags) & KM_CONN_RESET)) {
		space = km_ring_space(&d.conn->tx, count, &at);
		space = KM_MIN(space, (ssize_t)count);
		if (space > 0)
			n = offset ? KM_SYS(pread64, in, at, space, *offset, 0, 0)
				   : km_sys_read(in, at, (size_t)space);
		/* A device may have put more there than it says. */
		if (space > 0 && km_unlikely(n < space))
			km_ring_torn(&d.conn->tx, (size_t)space);
	}
	if (n > 0) {
		KM_FAULT(WRITE_FILE);
		km_ring_produced(&d.conn->tx, (size_t)n);
		d.conn->row.ring_tx_bytes = d.conn->tx.w;
		d.conn->row.tx_seen = d.conn->tx.r;
		published(f, d.conn, km_kernel_fd(f, fd));
		if (offset)
			*offset += n;
	}
	km_side_leave(&d);
	return n;
}
