/* SPDX-License-Identifier: Apache-2.0 */
/* Locks, waking, queue lengths and the end of an upgraded connection's streams. */
#include "sock/stream.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "sock/internal.h"

/* A sleeping producer is woken when the ring is at most this full. */
#define WAKE_FRACTION 2

/* The consumer of conn's tx ring has bytes. */
void km_tell_consumer(struct km_file *f, struct km_conn *conn)
{
	struct km_wire_ring *wire = conn->tx.wire;

	km_fence_sync(TELL_CONSUMER);
	KM_FAULT(WAKE_CONSUMER);
	if (km_unlikely(km_load_relaxed(&wire->cons_wait))) {
		km_swap_seq(&wire->cons_wait, 0);
		KM_FAULT(WAKE_FUTEX);
		km_count(KM_COUNT_FUTEX_WAKES);
		km_sys_futex_wake(&wire->cons_wait, INT32_MAX);
	}
	if (km_likely(f->peer != NULL))
		km_peer_bell_tell(f);
}

/* The producer of conn's rx ring has space, if it asked. */
void km_tell_producer(struct km_file *f, struct km_conn *conn, bool anyway)
{
	struct km_wire_ring *wire = conn->rx.wire;
	uint32_t flags;

	km_fence_sync(TELL_PRODUCER);
	if (km_likely(km_load_relaxed(&wire->prod_wait) == 0))
		return;
	if (!anyway &&
	    km_load_relaxed(&wire->wpos) - conn->rx.r > conn->rx.size / WAKE_FRACTION)
		return;
	flags = km_swap_seq(&wire->prod_wait, 0);
	KM_FAULT(WAKE_PRODUCER);
	if (flags & KM_WAIT_FUTEX) {
		km_count(KM_COUNT_FUTEX_WAKES);
		km_sys_futex_wake(&wire->prod_wait, INT32_MAX);
	}
	if ((flags & KM_WAIT_EVENT) && f->peer)
		km_peer_bell_tell(f);
}

void km_stream_reset(struct km_conn *conn)
{
	if (km_or_seq(&conn->flags, KM_CONN_RESET) & KM_CONN_RESET)
		return;
	conn->row.reason = KM_REASON_PROTOCOL;
	km_count(KM_COUNT_RESETS);
	km_log(KM_LOG_ERROR,
	       "fd %d: the other end broke the ring protocol; the connection is reset",
	       conn->row.fd);
}

bool km_stream_failed(int fd)
{
	return km_kernel_poll(fd, 0) & POLLERR;
}

bool km_stream_finished(const struct km_file *f, int fd)
{
	const struct km_conn *conn = f->conn;

	return km_kernel_ended(fd) ||
	       (conn && (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
			 (KM_P_FIN | KM_P_CLOSED)));
}

int km_stream_inq(struct km_file *f, int fd, int *bytes)
{
	struct km_side d;
	int64_t n = 0;
	int kernel = 0, mark = 0, err;
	uint64_t before;

	if (!km_side_enter(f, fd, false, false, &d, &err))
		return err;
	km_recv_settle(d.conn, fd);
	err = 0;
	if (d.conn->rx_phase != KM_PHASE_RING ||
	    (km_load_sync(FLAGS_SEE, &d.conn->rx.wire->pflags) & KM_P_END))
		err = km_sys_ioctl(fd, SIOCINQ, &kernel);
	/* The ring's bytes count once all of the kernel's are here. */
	if (d.conn->rx_phase == KM_PHASE_RING ||
	    (d.conn->rx_phase == KM_PHASE_DRAIN && (uint64_t)kernel == d.conn->rx_left))
		n = (int64_t)km_stream_unread(d.conn, &before);
	/* A read ends before urgent data, and so does this count. */
	if (km_unlikely(km_load_relaxed(&d.conn->flags) & KM_CONN_URGENT) &&
	    d.conn->rx.r == 0 && km_sys_ioctl(fd, SIOCATMARK, &mark) == 0 && mark)
		n = 0;
	km_side_leave(&d);
	*bytes = (int)KM_MIN(KM_MAX(n, 0) + kernel, INT32_MAX);
	return err;
}

bool km_stream_behind(struct km_file *f, int fd)
{
	struct km_side d;
	bool behind;
	int err;

	if (!km_side_enter(f, fd, false, false, &d, &err))
		return false;
	km_recv_settle(d.conn, fd);
	behind = d.conn->rx_phase == KM_PHASE_RING && km_ring_readable(&d.conn->rx) > 0;
	km_side_leave(&d);
	return behind;
}

int km_stream_outq(struct km_file *f, int fd, int *bytes)
{
	struct km_side d;
	int64_t n = 0;
	int kernel = 0, err;

	if (!km_side_enter(f, fd, true, false, &d, &err))
		return err;
	err = km_sys_ioctl(fd, SIOCOUTQ, &kernel);
	if (d.conn->tx_resend)
		n = (int64_t)(d.conn->tx.w - (d.conn->tx_resend - 1));
	else if (d.conn->tx_phase == KM_PHASE_RING ||
		 d.conn->tx_phase == KM_PHASE_ENDED)
		n = km_ring_unread(&d.conn->tx);
	km_side_leave(&d);
	*bytes = (int)KM_MIN(KM_MAX(n, 0) + kernel, INT32_MAX);
	return err;
}

int km_stream_shutdown(struct km_file *f, int fd, int how)
{
	struct km_side d;
	int err;

	if (how != SHUT_RD) {
		if (!km_side_enter(f, fd, true, false, &d, &err))
			return err;
		if (!km_tx_leave_for_good(d.conn, fd))
			km_tx_resend_all(f, d.conn, fd);
		/* The flag tells a half close from a death; the kernel's FIN that
		 * follows wakes the peer. */
		km_store_sync(FLAGS_SET, &d.conn->tx.wire->pflags,
			      km_load_relaxed(&d.conn->tx.wire->pflags) | KM_P_FIN);
		d.conn->tx_phase = KM_PHASE_ENDED;
		km_side_leave(&d);
		KM_FAULT(CLOSE_HALF);
	}
	err = KM_REAL(shutdown)(fd, how) < 0 ? -errno : 0;
	if (err < 0)
		return err;
	if (how != SHUT_WR && f->conn) {
		km_or_seq(&f->conn->flags, KM_CONN_RD_SHUT);
		km_or_seq(&f->conn->kernel_bits, POLLRDHUP);
		km_sys_futex_wake(&f->conn->rx.wire->cons_wait, INT32_MAX);
	}
	if (how != SHUT_RD && f->conn)
		km_sys_futex_wake(&f->conn->tx.wire->prod_wait, INT32_MAX);
	if (f->bell)
		km_bell_kick(f->bell);
	return 0;
}

/* Kept from the first time on that the kernel has switched it off: until then it may
 * hold bytes back, which the peer needs before those of the ring. */
static int keep_cork(struct km_conn *conn, int fd, bool on)
{
	uint32_t flags = km_load_relaxed(&conn->flags);
	int off = 0, err;

	if (flags & KM_CONN_CORK_KEPT) {
		if (on)
			km_or_seq(&conn->flags, KM_CONN_CORK);
		else
			km_and_seq(&conn->flags, ~KM_CONN_CORK);
		return 0;
	}
	if (on)
		return KM_RETRY;
	err = km_sys_setsockopt(fd, IPPROTO_TCP, TCP_CORK, &off, sizeof(off));
	if (err == 0)
		km_or_seq(&conn->flags, KM_CONN_CORK_KEPT);
	return err;
}

int km_stream_cork(struct km_file *f, int fd, bool on)
{
	struct km_side d;
	int err;

	if (!km_side_enter(f, fd, true, false, &d, &err)) {
		/* A signal handler, and what it has interrupted looks at the note. */
		if (err == -EINTR &&
		    (km_load_relaxed(&f->conn->flags) & KM_CONN_CORK_KEPT))
			return keep_cork(f->conn, fd, on);
		return KM_RETRY;
	}
	err = KM_RETRY;
	if (km_load_relaxed(&d.conn->flags) & KM_CONN_FOREIGN)
		km_cork_back(d.conn, fd);
	else if (d.conn->tx_phase == KM_PHASE_RING)
		err = keep_cork(d.conn, fd, on);
	km_side_leave(&d);
	return err;
}

void km_stream_cork_read(struct km_file *f, int fd)
{
	struct km_side d;
	int err;

	if (km_side_enter(f, fd, true, false, &d, &err)) {
		km_cork_back(d.conn, fd);
		km_side_leave(&d);
	} else if (err == -EINTR) {
		km_cork_back(f->conn, fd);
	}
}

bool km_stream_left(const struct km_file *f)
{
	return f->conn && km_tx_left(f->conn);
}

void km_stream_look(struct km_file *f, int fd)
{
	if (f->conn)
		km_tx_look(f, f->conn, km_kernel_fd(f, fd));
}

void km_stream_abandon(struct km_file *f)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result rx = km_lock(&conn->rx_lock);
	enum km_lock_result tx = km_conn_lock_tx(conn);

	conn->rx_phase = KM_PHASE_ENDED;
	conn->tx_phase = KM_PHASE_ENDED;
	km_unlock(&conn->tx_lock, tx);
	km_unlock(&conn->rx_lock, rx);
}

void km_stream_closing(struct km_file *f, int fd)
{
	struct km_conn *conn = f->conn;
	struct km_wire_ring *wire = conn->tx.wire;
	struct linger linger = {1, 0};
	enum km_lock_result tx = km_tx_lock(conn);
	bool lost =
		!km_tx_leave_for_good(conn, fd) && km_tx_resend_all(f, conn, fd) < 0;

	km_unlock(&conn->tx_lock, tx);
	/* The kernel tells the rest, and knows whether another program has the socket. */
	if (!lost &&
	    ((km_load_relaxed(&conn->flags) & KM_CONN_GIVEN) ||
	     (conn->tx_phase == KM_PHASE_ENDED && conn->rx_phase == KM_PHASE_ENDED)))
		return;
	km_or_seq(&wire->pflags, KM_P_FIN | KM_P_CLOSED);
	KM_FAULT(CLOSE_FLAGS);
	/* Closing with bytes unread is a reset, here as on the kernel. */
	if (conn->rx_phase != KM_PHASE_ENDED &&
	    km_load_sync(OBSERVE, &conn->rx.wire->wpos) != conn->rx.r)
		km_sys_setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	else if (lost || (km_load_relaxed(&conn->flags) & KM_CONN_RESET))
		km_sys_setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
}

void km_stream_goodbye(struct km_file *f, struct km_conn *conn)
{
	struct km_wire_ring *wire = conn->tx.wire;

	(void)f;
	if (km_load_seq(&conn->refs))
		return;
	if (km_load_relaxed(&wire->cons_wait)) {
		km_swap_seq(&wire->cons_wait, 0);
		km_sys_futex_wake(&wire->cons_wait, INT32_MAX);
	}
	if (km_swap_seq(&conn->rx.wire->prod_wait, 0))
		km_sys_futex_wake(&conn->rx.wire->prod_wait, INT32_MAX);
}
