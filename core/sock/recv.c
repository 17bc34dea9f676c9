/* SPDX-License-Identifier: Apache-2.0 */
/* Reading from an upgraded connection. */
#include <errno.h>
#include <linux/sockios.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/link.h"
#include "sock/internal.h"
#include "transport/transport.h"

/* By the kernel for good, as far as anybody knows. */
static ssize_t recv_ended(struct km_file *f, struct km_conn *conn, int fd,
			  const struct iovec *iov, int iovcnt, int flags)
{
	ssize_t n = km_kernel_recv(fd, iov, iovcnt, flags);

	if (km_likely(n > 0 || n == -EAGAIN))
		return n;
	/* Not before the kernel told of an end: a question for each read would be dear. */
	if (km_load_relaxed(&conn->rx.wire->wpos) != conn->rx.r &&
	    km_rx_take_rest(f, conn, fd))
		return KM_RETRY;
	return n ? n : km_rx_kernel_end(conn, fd, flags);
}

/* One more read of nothing: is the kernel to be asked?  A busy pair, whose bytes come
 * after a few of them, does without. */
static bool time_to_ask(struct km_conn *conn)
{
	int64_t now;

	if (++conn->idle_reads < KM_IDLE_READS)
		return false;
	if (conn->idle_reads >= KM_ASK_NOW)
		return true;
	conn->idle_reads = 0;
	now = km_now_ns();
	if (now - conn->asked_at < KM_ASK_AGAIN_NS)
		return false;
	conn->asked_at = now;
	return true;
}

/* The ring is empty.  -EAGAIN, 0 for the end, an error, or KM_RETRY to look again. */
static ssize_t recv_empty(struct km_conn *conn, int fd, int flags)
{
	struct km_consumer *rx = &conn->rx;
	uint32_t pflags;
	ssize_t n;

	pflags = km_load_sync(FLAGS_SEE, &rx->wire->pflags);
	if (pflags & KM_P_END) {
		if (km_load_ordered(&rx->wire->end) == rx->r)
			conn->rx_phase = KM_PHASE_ENDED;
		/* All that came before the flag is there: an end beyond it is one that
		 * would be waited for in vain. */
		else if (km_load_sync(OBSERVE, &rx->wire->wpos) == rx->r)
			return -EPROTO;
		return KM_RETRY;
	}
	/* Shut down here, the kernel says end of file, or the error that comes first. */
	if ((km_load_relaxed(&conn->flags) & KM_CONN_RD_SHUT) ||
	    (pflags & (KM_P_FIN | KM_P_CLOSED)) ||
	    km_load_relaxed(&conn->kernel_bits) || time_to_ask(conn)) {
		n = km_rx_ask_kernel(conn, fd, flags);
		return n == 1 ? KM_RETRY : n;
	}
	return -EAGAIN;
}

static ssize_t recv_ring(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, int flags)
{
	struct km_consumer *rx = &conn->rx;
	unsigned how = (flags & MSG_PEEK ? KM_RING_PEEK : 0) |
		       (flags & MSG_TRUNC ? KM_RING_DISCARD : 0);
	struct iovec part[64];
	ssize_t n;

	if (km_unlikely(!conn->rx_begun) && !km_rx_begin(conn))
		return KM_RETRY;
	if (km_unlikely(conn->rx_end)) {
		/* What lies beyond comes by the kernel. */
		if (rx->r == conn->rx_end - 1) {
			conn->rx_phase = KM_PHASE_ENDED;
			return KM_RETRY;
		}
		iovcnt = km_iov_limit(iov, iovcnt, conn->rx_end - 1 - rx->r, part,
				      KM_COUNT(part));
		iov = part;
	}
	n = km_get(f, conn, iov, iovcnt, how);

	if (km_likely(n > 0)) {
		conn->idle_reads = 0;
		conn->row.rx_seen = rx->w;
		if (!(flags & MSG_PEEK)) {
			conn->row.ring_rx_bytes = rx->r;
			km_tell_producer(f, conn, false);
		}
		return n;
	}
	if (n < 0)
		return n;
	/* Asked for nothing: the answer still depends on whether there is something. */
	if (km_unlikely(rx->w != rx->r))
		return 0;
	return recv_empty(conn, fd, flags);
}

/* One attempt, rx_lock held.  -EAGAIN when there is nothing now. */
static ssize_t recv_once(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, int flags)
{
	struct iovec part[64];
	ssize_t n;

	for (;;) {
		if (km_unlikely(km_load_relaxed(&conn->flags) & KM_CONN_RESET))
			return -ECONNRESET;
		switch ((enum km_phase)conn->rx_phase) {
		case KM_PHASE_KERNEL:
			if (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
			    KM_P_CUT) {
				n = km_rx_start_drain(conn, fd);
				if (n < 0)
					return n;
				continue;
			}
			n = km_kernel_recv(fd, iov, iovcnt, flags);
			/* A cut that came in between explains an empty socket. */
			if (n <= 0 && (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
				       KM_P_CUT))
				continue;
			return km_likely(n != 0) ? n
						 : km_rx_kernel_end(conn, fd, flags);
		case KM_PHASE_DRAIN:
			iovcnt = km_iov_limit(iov, iovcnt, conn->rx_left, part,
					      KM_COUNT(part));
			n = km_kernel_recv(fd, part, iovcnt, flags);
			if (n > 0 && !(flags & MSG_PEEK)) {
				conn->rx_left -= (uint64_t)n;
				if (conn->rx_left == 0) {
					conn->rx_phase = KM_PHASE_RING;
					KM_FAULT(CUT_DRAINED);
				}
			}
			return n;
		case KM_PHASE_RING:
			n = recv_ring(f, conn, fd, iov, iovcnt, flags);
			if (n == KM_RETRY)
				continue;
			return n;
		case KM_PHASE_ENDED:
			n = recv_ended(f, conn, fd, iov, iovcnt, flags);
			if (n == KM_RETRY)
				continue;
			return n;
		}
	}
}

/* Has the reading moved on, so that the next bytes are to be had elsewhere? */
static bool moved_on(const struct km_conn *conn, enum km_phase before)
{
	uint32_t pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);

	switch ((enum km_phase)conn->rx_phase) {
	case KM_PHASE_KERNEL:
		return pflags & KM_P_CUT;
	case KM_PHASE_DRAIN:
	case KM_PHASE_ENDED:
		return conn->rx_phase != before;
	case KM_PHASE_RING:
		return conn->rx_phase != before || conn->rx_end == conn->rx.r + 1 ||
		       ((pflags & KM_P_END) &&
			km_load_ordered(&conn->rx.wire->end) == conn->rx.r);
	}
	return false;
}

/* Adds to the n bytes that were read what lies beyond the change of phase: a reader
 * may take a short read for an empty socket, and no event would tell it otherwise. */
KM_COLD static ssize_t recv_beyond(struct km_file *f, struct km_conn *conn, int fd,
				   const struct iovec *iov, int iovcnt, int flags,
				   ssize_t n)
{
	struct iovec rest[KM_IOV_MOST];
	int left = km_iov_advance(iov, iovcnt, (size_t)n, rest), mark = 0;
	ssize_t m;

	/* A read ends before urgent data, also where that came by the kernel and what
	 * stands before it by the ring. */
	if (((km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_END) ||
	     (km_load_relaxed(&conn->flags) & KM_CONN_URGENT)) &&
	    km_sys_ioctl(fd, SIOCATMARK, &mark) == 0 && mark)
		return n;
	m = left ? recv_once(f, conn, fd, rest, left, flags | KM_MSG_MOVED) : 0;
	return m > 0 ? n + m : n;
}

/* Peeking leaves the phase as it is: adds to the n bytes that were peeked at what lies
 * beyond them, in the ring behind the kernel's last, or in the kernel behind the ring's.
 * (Of a stream that is in the kernel, the ring and the kernel again, the third part is
 * seen when the first has been read.) */
KM_COLD static ssize_t peek_beyond(struct km_file *f, struct km_conn *conn, int fd,
				   const struct iovec *iov, int iovcnt, int flags,
				   ssize_t n)
{
	const struct km_wire_ring *wire = conn->rx.wire;
	struct iovec rest[KM_IOV_MOST];
	ssize_t m = 0;
	int left;

	km_recv_settle(conn, fd);
	/* The producer took back what it had put behind them: all is the kernel's. */
	if (conn->rx_phase == KM_PHASE_ENDED)
		return KM_MAX(n, km_kernel_recv(fd, iov, iovcnt, flags));
	left = km_iov_advance(iov, iovcnt, (size_t)n, rest);
	if (left && conn->rx_phase == KM_PHASE_DRAIN && (uint64_t)n == conn->rx_left &&
	    km_ring_readable(&conn->rx) > 0)
		m = recv_ring(f, conn, fd, rest, left, flags | KM_MSG_MOVED);
	else if (left && conn->rx_phase == KM_PHASE_RING &&
		 (km_load_sync(FLAGS_SEE, &wire->pflags) & KM_P_END) &&
		 km_load_ordered(&wire->end) == conn->rx.r + (uint64_t)n)
		m = km_kernel_recv(fd, rest, left, flags | KM_MSG_MOVED);
	return m > 0 ? n + m : n;
}

/* Goes on through the phases while they have something; n bytes were read in before. */
static ssize_t recv_on(struct km_file *f, struct km_conn *conn, int fd,
		       const struct iovec *iov, int iovcnt, int flags, size_t want,
		       enum km_phase before, ssize_t n)
{
	ssize_t last = 0;

	while (km_unlikely(n > last && (size_t)n < want && moved_on(conn, before))) {
		before = (enum km_phase)conn->rx_phase;
		last = n;
		n = recv_beyond(f, conn, fd, iov, iovcnt, flags, n);
	}
	return n;
}

static ssize_t recv_through(struct km_file *f, struct km_conn *conn, int fd,
			    const struct iovec *iov, int iovcnt, int flags, size_t want)
{
	enum km_phase before = (enum km_phase)conn->rx_phase;
	ssize_t n = recv_once(f, conn, fd, iov, iovcnt, flags);

	if (km_unlikely(flags & MSG_PEEK))
		return n > 0 && (size_t)n < want
			       ? peek_beyond(f, conn, fd, iov, iovcnt, flags, n)
			       : n;
	return recv_on(f, conn, fd, iov, iovcnt, flags, want, before, n);
}

static bool counts_bytes(const struct km_file *f)
{
	const struct km_conn *conn = f->conn;

	return conn && conn->lowat > 1 && f->bell;
}

/* The usual case, in few instructions: one buffer, no flags, and bytes in the ring.
 * KM_RETRY: it is not so simple, and nothing was taken.  rx_lock held. */
static ssize_t recv_at_once(struct km_file *f, struct km_conn *conn, int fd,
			    const struct iovec *iov, int flags)
{
	static const struct km_wait awake;
	uint32_t pflags;
	ssize_t n;

	if (km_unlikely(conn->rx_phase != KM_PHASE_RING || !conn->rx_begun ||
			!conn->rx.data || conn->rx_end || conn->lowat > 1 ||
			(km_load_relaxed(&conn->flags) & KM_CONN_RESET)))
		return KM_RETRY;
	/* Beside the position, whose line the producer may take away at once.  A producer
	 * that leaves later is an event of its own. */
	pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);
	n = km_ring_take(&conn->rx, iov->iov_base, iov->iov_len);
	if (n == 0 && conn->rx.w == conn->rx.r) {
		n = recv_empty(conn, km_kernel_fd(f, fd), flags);
		if (n != -EAGAIN)
			return n == -EPROTO ? KM_RETRY : n;
		km_tx_look(f, conn, km_kernel_fd(f, fd));
		return km_must_not_block(conn, km_kernel_fd(f, fd), flags, &awake)
			       ? n
			       : KM_RETRY;
	}
	if (km_unlikely(n <= 0))
		return KM_RETRY;
	conn->idle_reads = 0;
	conn->row.rx_seen = conn->rx.w;
	conn->row.ring_rx_bytes = conn->rx.r;
	km_tell_producer(f, conn, false);
	return km_unlikely(pflags & KM_P_END)
		       ? recv_on(f, conn, km_kernel_fd(f, fd), iov, 1, 0, iov->iov_len,
				 KM_PHASE_RING, n)
		       : n;
}

/* entered: the caller has the direction's lock already, or NULL. */
static ssize_t recv_slowly(struct km_file *f, int fd, const struct iovec *iov,
			   int iovcnt, int flags, const struct km_side *entered)
{
	struct km_wait w = {0};
	struct iovec discard, rest[64], *left = NULL;
	size_t want = km_iov_total(iov, iovcnt), done = 0, enough;
	struct km_side d;
	ssize_t n;
	int err;

	if (km_unlikely(flags & MSG_TRUNC)) {
		/* TCP's meaning: throw the bytes away. */
		discard = (struct iovec){NULL, want};
		iov = &discard;
		iovcnt = 1;
	}
	for (;;) {
		if (entered)
			d = *entered;
		else if (!km_side_enter(f, fd, false, w.held, &d, &err))
			return km_wait_done(f, &w,
					    done ? (ssize_t)done
						 : km_side_refused(f, fd, err, flags));
		entered = NULL;
		n = recv_through(f, d.conn, km_kernel_fd(f, fd), left ? left : iov,
				 iovcnt, done ? flags | KM_MSG_MOVED : flags,
				 want - done);
		if (n == -EPROTO) {
			km_stream_reset(d.conn);
			n = -ECONNRESET;
		}
		if (km_unlikely(n == -EAGAIN))
			km_tx_look(f, d.conn, km_kernel_fd(f, fd));
		if (n != -EAGAIN ||
		    km_must_not_block(d.conn, km_kernel_fd(f, fd), flags, &w)) {
			enough = flags & MSG_WAITALL ? want : (size_t)d.conn->lowat;
			if (km_unlikely(flags & MSG_PEEK) && n > 0 &&
			    (size_t)n < KM_MIN(enough, want) &&
			    !km_must_not_block(d.conn, km_kernel_fd(f, fd), flags,
					       &w)) {
				km_wait_hold(f, &w);
				km_side_leave(&d);
				err = km_wait_interrupted(
					km_wait_more(f, d.conn, fd, &w), &w);
				if (err < 0)
					return km_wait_done(f, &w, n);
				continue;
			}
			km_side_leave(&d);
			if (flags & MSG_PEEK)
				return km_wait_done(f, &w, n);
			if (n > 0) {
				done += (size_t)n;
				w.naps = 0;
			}
			if (n <= 0 || done >= KM_MIN(enough, want))
				return km_wait_done(f, &w, done ? (ssize_t)done : n);
			if (iovcnt > (int)KM_COUNT(rest))
				return km_wait_done(f, &w, (ssize_t)done);
			iovcnt = km_iov_advance(left ? left : iov, iovcnt, (size_t)n,
						rest);
			left = rest;
			continue;
		}
		km_wait_hold(f, &w);
		km_side_leave(&d);
		err = km_wait_interrupted(km_wait_in(f, d.conn, fd, &w), &w);
		if (err < 0)
			return km_wait_done(f, &w, done ? (ssize_t)done : err);
	}
}

/* What is due before a direction is locked. */
static void before_recv(struct km_file *f, int fd)
{
	if (km_unlikely(f->link_state == KM_LINK_HELLO))
		km_link_advance(f, fd);
	/* Whether there was enough to tell of is seen only before it is taken. */
	if (km_unlikely(counts_bytes(f)))
		km_bell_drain(f->bell);
}

/* On its own, so that vectors need not save what it uses. */
KM_ALONE static ssize_t recv_one(struct km_file *f, int fd, const struct iovec *iov,
				 int flags)
{
	struct km_side d;
	ssize_t n;
	int err;

	before_recv(f, fd);
	if (km_unlikely(!km_side_enter(f, fd, false, false, &d, &err)))
		return km_side_refused(f, fd, err, flags);
	n = recv_at_once(f, d.conn, fd, iov, flags);
	if (km_unlikely(n == KM_RETRY))
		return recv_slowly(f, fd, iov, 1, flags, &d);
	km_side_leave(&d);
	return n;
}

KM_ALONE static ssize_t recv_any(struct km_file *f, int fd, const struct iovec *iov,
				 int iovcnt, int flags)
{
	if (flags & (MSG_OOB | MSG_ERRQUEUE))
		return km_kernel_recv(fd, iov, iovcnt, flags);
	before_recv(f, fd);
	return recv_slowly(f, fd, iov, iovcnt, flags, NULL);
}

ssize_t km_recv(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags)
{
	return km_likely(iovcnt == 1 && !(flags & ~(MSG_DONTWAIT | MSG_NOSIGNAL)))
		       ? recv_one(f, fd, iov, flags)
		       : recv_any(f, fd, iov, iovcnt, flags);
}
