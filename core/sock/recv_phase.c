/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading, where the stream passes from the kernel to the ring and back: what the reader
 * finds out once, or when there is nothing to be had.
 */
#include <errno.h>
#include <linux/sockios.h>

#include "base/fault_point.h"
#include "sock/internal.h"
#include "transport/transport.h"

bool km_rx_begin(struct km_conn *conn)
{
	uint32_t seen = 0;

	if (!km_cas_sync(LEFT, &conn->rx.wire->left, &seen, KM_LEFT_READING) &&
	    seen == KM_LEFT_TAKEN_BACK) {
		conn->rx_phase = KM_PHASE_ENDED;
		return false;
	}
	conn->rx_begun = true;
	return true;
}

ssize_t km_rx_start_drain(struct km_conn *conn, int fd)
{
	uint64_t cut = km_load_ordered(&conn->rx.wire->cut), taken;
	uint32_t pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);
	int err;

	KM_FAULT(CUT_SEEN);
	/* All of the stream comes by the kernel after all. */
	if (km_load_relaxed(&conn->rx.wire->left) == KM_LEFT_TAKEN_BACK) {
		conn->rx_phase = KM_PHASE_ENDED;
		return 0;
	}
	err = km_kernel_taken(fd, cut, pflags & KM_P_END, &taken);
	if (err < 0)
		return err;
	if (cut < taken || cut - taken > (uint64_t)1 << 40)
		return -EPROTO;
	if (km_kernel_poll(fd, POLLPRI) & POLLPRI)
		km_or_seq(&conn->flags, KM_CONN_URGENT);
	conn->rx_left = cut - taken;
	conn->row.kernel_rx_bytes = cut;
	conn->rx_phase = conn->rx_left ? KM_PHASE_DRAIN : KM_PHASE_RING;
	return 0;
}

void km_recv_settle(struct km_conn *conn, int fd)
{
	if (conn->rx_phase == KM_PHASE_KERNEL &&
	    (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_CUT))
		km_rx_start_drain(conn, fd);
	if (km_unlikely(km_stream_taken_back(conn)))
		conn->rx_phase = KM_PHASE_ENDED;
	/* Back to the kernel, once the ring is empty. */
	if (conn->rx_phase == KM_PHASE_RING &&
	    (conn->rx_end == conn->rx.r + 1 ||
	     ((km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_END) &&
	      km_load_ordered(&conn->rx.wire->end) == conn->rx.r)))
		conn->rx_phase = KM_PHASE_ENDED;
}

void km_stream_settle(struct km_file *f, int fd)
{
	struct km_side d;
	int err;

	if (!km_side_enter(f, fd, false, true, &d, &err))
		return;
	km_recv_settle(d.conn, km_kernel_fd(f, fd));
	km_side_leave(&d);
}

ssize_t km_rx_ask_kernel(struct km_conn *conn, int fd, int flags)
{
	uint8_t byte;
	struct iovec iov = {&byte, 1};
	uint64_t r = conn->rx.r;
	uint32_t pflags;
	ssize_t k;

	KM_FAULT(READ_ASKS);
	k = km_kernel_recv(fd, &iov, 1, MSG_PEEK | (flags & KM_MSG_MOVED));
	pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);
	conn->idle_reads = 0;
	if (k == -EAGAIN)
		return k;
	/* What the peer published before its FIN or reset comes first. */
	if (km_load_sync(OBSERVE, &conn->rx.wire->wpos) != r)
		return 1;
	/* The flag comes before the first byte by the kernel. */
	if (k > 0)
		return pflags & KM_P_END ? 1 : -EPROTO;
	km_or_seq(&conn->kernel_bits, POLLRDHUP);
	return k == 0 && !(flags & KM_MSG_MOVED) && km_peer_died(conn, fd, flags)
		       ? -ECONNRESET
		       : k;
}

bool km_peer_died(struct km_conn *conn, int fd, int flags)
{
	const struct km_wire_ring *tx = conn->tx.wire;
	uint32_t known = km_load_relaxed(&conn->flags);
	uint32_t pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);

	/* Bytes that the consumer has left behind are sent again, and the kernel knows
	 * those. */
	if ((known & (KM_CONN_RD_SHUT | KM_CONN_DIED)) ||
	    (pflags & (KM_P_FIN | KM_P_CLOSED)) || conn->tx_phase == KM_PHASE_KERNEL ||
	    conn->tx_resend || km_tx_left(conn) ||
	    km_load_sync(SEE_SPACE, &tx->rpos) == conn->tx.w)
		return false;
	if (flags & KM_MSG_MOVED)
		return true;
	if (km_or_seq(&conn->flags, KM_CONN_DIED) & KM_CONN_DIED)
		return false;
	KM_SYS(shutdown, fd, SHUT_WR, 0, 0, 0, 0);
	return true;
}

ssize_t km_rx_kernel_end(struct km_conn *conn, int fd, int flags)
{
	if (flags & KM_MSG_MOVED)
		return 0;
	km_or_seq(&conn->kernel_bits, km_kernel_poll(fd, POLLRDHUP) & KM_GONE_BITS);
	/* What this end had left unread when it ended its own stream may have been given
	 * to another program, whose end of reading is not known. */
	return conn->tx_phase == KM_PHASE_RING && km_load_relaxed(&conn->kernel_bits) &&
			       km_peer_died(conn, fd, flags)
		       ? -ECONNRESET
		       : 0;
}

KM_COLD bool km_rx_take_rest(struct km_file *f, struct km_conn *conn, int fd)
{
	struct iovec none = {NULL, 0};
	uint64_t cut, taken;
	uint32_t pflags = km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags);
	int unread = 0;

	if (!(pflags & KM_P_CUT) || (pflags & (KM_P_END | KM_P_RESENT)))
		return false;
	/* Behind the flag, which orders it. */
	cut = km_load_ordered(&conn->rx.wire->cut);
	if ((km_load_relaxed(&conn->flags) & KM_CONN_GIVEN) ||
	    !(km_kernel_poll(fd, POLLRDHUP) & KM_GONE_BITS) ||
	    km_sys_ioctl(fd, SIOCINQ, &unread) < 0 || unread > 0 ||
	    km_kernel_unsure(fd, cut,
			     km_load_sync(OBSERVE, &conn->rx.wire->wpos) -
				     conn->rx.r) ||
	    km_kernel_taken(fd, cut, false, &taken) < 0 || taken < cut)
		return false;
	none.iov_len = taken - cut;
	if (km_ring_readable(&conn->rx) <= (int64_t)none.iov_len ||
	    (none.iov_len &&
	     km_get(f, conn, &none, 1, KM_RING_DISCARD) != (ssize_t)none.iov_len))
		return false;
	conn->rx_end = 0;
	conn->rx_begun = true;
	conn->rx_phase = KM_PHASE_RING;
	return true;
}

bool km_stream_rest(struct km_file *f, int fd, ssize_t n)
{
	int kept = errno, err;
	bool rest = false;
	struct km_side d;

	if (n > 0 || (n < 0 && (kept == EAGAIN || kept == EINTR)) ||
	    !km_side_enter(f, fd, false, false, &d, &err))
		return false;
	if (d.conn->rx_phase == KM_PHASE_ENDED &&
	    km_load_relaxed(&d.conn->rx.wire->wpos) != d.conn->rx.r)
		rest = km_rx_take_rest(f, d.conn, km_kernel_fd(f, fd));
	km_side_leave(&d);
	errno = kept;
	return rest;
}
