/* SPDX-License-Identifier: Apache-2.0 */
/* Readiness of one connection, from its rings and from what the kernel has said. */
#include <linux/sockios.h>

#include "event/event.h"
#include "sock/stream.h"

#define GONE_BITS (POLLRDHUP | POLLHUP | POLLERR)
#define KEPT_BITS (POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM)

/* A ring is writable while at least this fraction of it is free. */
#define WRITABLE_FRACTION 4

static bool ring_writable(const struct km_conn *conn)
{
	const struct km_producer *tx = &conn->tx;
	uint32_t most = tx->geo.size[tx->geo.levels - 1];
	uint64_t used = __atomic_load_n(&tx->w, __ATOMIC_RELAXED) -
			km_load_sync(SEE_SPACE, &tx->wire->rpos);

	return used <= most - most / WRITABLE_FRACTION;
}

/* SO_RCVLOWAT, as far as a writer can get that stops when it is told to. */
static uint64_t low_water(const struct km_conn *conn)
{
	const struct km_ring_geometry *geo = &conn->rx.geo;
	uint64_t most = geo->size[geo->levels - 1] / 2;

	return KM_MAX(KM_MIN((uint64_t)KM_MAX(conn->lowat, 0), most), 1);
}

/* Bytes behind the ring's that came by the kernel count towards SO_RCVLOWAT. */
KM_COLD static uint64_t kernel_bytes(int fd, uint32_t bits)
{
	int n = 0;

	km_sys_ioctl(fd, SIOCINQ, &n);
	/* An urgent byte ends that count, and is not in it. */
	return (uint64_t)KM_MAX(n, 0) + (bits & POLLPRI ? 1 : 0);
}

/* No lock is held: another thread may move either position meanwhile, which makes
 * the answer as old as any answer of poll. */
uint32_t km_file_level(struct km_file *f, uint32_t wanted)
{
	struct km_conn *conn = f->conn;
	const struct km_wire_ring *in;
	uint32_t bits = 0, kernel = 0, pflags, rx, tx;
	bool ask;

	if (!conn)
		return POLLHUP | POLLERR;
	in = conn->rx.wire;
	if (km_unlikely((conn->rx_phase == KM_PHASE_KERNEL &&
			 (km_load_sync(FLAGS_SEE, &in->pflags) & KM_P_CUT)) ||
			km_stream_taken_back(conn)))
		km_stream_settle(f, f->fd);
	km_stream_look(f, f->fd);
	rx = conn->rx_phase;
	tx = conn->tx_phase;
	pflags = km_load_sync(FLAGS_SEE, &in->pflags);
	/* Read the own position first: the other one never falls behind it. */
	uint64_t r = __atomic_load_n(&conn->rx.r, __ATOMIC_RELAXED);
	uint64_t waiting = km_load_sync(OBSERVE, &in->wpos) - r;

	if (km_unlikely(conn->rx_end)) {
		waiting = conn->rx_end - 1 - r;
		pflags |= KM_P_END;
	}
	ask = (wanted & POLLPRI) || km_load_relaxed(&conn->kernel_bits) ||
	      rx != KM_PHASE_RING || tx != KM_PHASE_RING ||
	      (pflags & (KM_P_FIN | KM_P_CLOSED)) ||
	      ((waiting == 0 || conn->lowat > 1) && (pflags & KM_P_END));
	if (km_unlikely(ask || conn->idle_reads >= KM_ASK_NOW)) {
		struct pollfd pfd = {.fd = f->keep_fd >= 0 ? f->keep_fd : f->fd,
				     .events = KEPT_BITS | POLLRDHUP | POLLPRI};
		struct timespec now = {0, 0};

		if (km_sys_poll(&pfd, 1, &now) > 0)
			kernel = (uint32_t)pfd.revents;
		if (kernel & GONE_BITS)
			km_or_seq(&conn->kernel_bits, kernel & GONE_BITS);
		bits |= kernel & (GONE_BITS | POLLPRI);
		if (km_unlikely(conn->lowat > 1) && waiting && (pflags & KM_P_END))
			waiting += kernel_bytes(pfd.fd, kernel);
	}
	/* An end of file or error shows as readable, on the kernel as here. */
	if (kernel & POLLIN)
		bits |= POLLIN | POLLRDNORM;
	/* While kernel bytes are under way, those in the ring have to wait. */
	if (km_unlikely(rx == KM_PHASE_DRAIN && conn->lowat > 1) &&
	    kernel_bytes(f->keep_fd >= 0 ? f->keep_fd : f->fd, 0) + waiting >=
		    low_water(conn))
		bits |= POLLIN | POLLRDNORM;
	if (rx == KM_PHASE_RING && waiting >= low_water(conn))
		bits |= POLLIN | POLLRDNORM;
	if (km_load_relaxed(&conn->flags) & (KM_CONN_RD_SHUT | KM_CONN_RESET))
		bits |= POLLIN | POLLRDNORM;
	if (km_load_relaxed(&conn->flags) & KM_CONN_RESET)
		bits |= POLLERR | POLLHUP;
	if (tx == KM_PHASE_DRAIN) {
		/* Not before all that came earlier has gone. */
	} else if (tx != KM_PHASE_RING || km_load_relaxed(&conn->kernel_bits)) {
		bits |= kernel & (POLLOUT | POLLWRNORM);
	} else if (ring_writable(conn)) {
		bits |= POLLOUT | POLLWRNORM;
	} else if (wanted & (POLLOUT | POLLWRNORM)) {
		km_ask_for_space(f, conn);
		if (ring_writable(conn))
			bits |= POLLOUT | POLLWRNORM;
	}
	return bits;
}
