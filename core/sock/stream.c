/* SPDX-License-Identifier: Apache-2.0 */
#include "sock/stream.h"

#include <errno.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sched.h>
#include <string.h>

#include "event/event.h"
#include "link/link.h"
#include "sock/signals.h"

/* How long a blocking call trusts the futex before it waits on descriptors,
 * where it also sees a peer that died.  Nanoseconds. */
#define FUTEX_SLICE_NS 5000000
/* Empty reads, and writes that the consumer did not follow, after which the
 * kernel is asked whether the peer still lives. */
#define IDLE_READS 32
#define STALE_WRITES 64
/* A sleeping producer is woken when the ring is at most this full. */
#define WAKE_FRACTION 2

/* tcpi_state: the states after the peer's FIN.  netinet/tcp.h has these names and
 * linux/tcp.h the longer tcp_info, and they exclude each other. */
#define TCP_STATE_TIME_WAIT 6
#define TCP_STATE_CLOSE_WAIT 8
#define TCP_STATE_LAST_ACK 9
#define TCP_STATE_CLOSING 11

#define IOV_MOST 1024 /* the kernel's IOV_MAX */

#define GONE_BITS (POLLRDHUP | POLLHUP | POLLERR)

/* -- plain calls -------------------------------------------------------------- */

static bool link_lock_is_mine(void)
{
	return (km_load_relaxed(&km_proc.link_lock) & 0x7fffffffu) == km_tid();
}

bool km_plain_begin(struct km_file *f, int fd, struct km_plain *call)
{
	for (;;) {
		switch ((enum km_mode)km_load_acquire(&f->mode)) {
		case KM_MODE_PINNED:
			call->f = NULL;
			return true;
		case KM_MODE_CHANNEL:
			return false;
		case KM_MODE_SWITCHING:
			if (link_lock_is_mine()) {
				/* A signal handler inside the upgrade itself. */
				call->f = NULL;
				return true;
			}
			sched_yield();
			continue;
		case KM_MODE_PLAIN:
			if (km_unlikely(f->calls >= f->next_try) &&
			    (f->turns >= 2 || f->link_state != KM_LINK_NONE ||
			     f->calls >= km_proc.options.upgrade_after)) {
				km_link_poke(f, fd);
				if (km_load_acquire(&f->mode) != KM_MODE_PLAIN)
					continue;
			}
			call->f = f;
			call->generation = f->generation;
			/* Pairs with switch_begin: either it sees this call, or
			 * this call sees the switch. */
			km_add_seq(&f->busy, 1);
			if (km_likely(km_load_seq(&f->mode) == KM_MODE_PLAIN))
				return true;
			km_sub_seq(&f->busy, 1);
			continue;
		}
	}
}

void km_plain_end(const struct km_plain *call, enum km_direction direction, ssize_t n)
{
	struct km_file *f = call->f;

	if (!f || f->generation != call->generation)
		return;
	km_sub_seq(&f->busy, 1);
	if (n <= 0)
		return;
	f->calls++;
	if (f->last != direction) {
		if (f->last && f->turns < 2)
			f->turns++;
		f->last = (uint8_t)direction;
	}
}

/* -- kernel side -------------------------------------------------------------- */

/* The descriptor to use: after a close under a sleeper the number is not ours. */
static int kernel_fd(const struct km_file *f, int fd)
{
	return km_unlikely(f->keep_fd >= 0) ? f->keep_fd : fd;
}

static ssize_t kernel_recv(int fd, const struct iovec *iov, int iovcnt, int flags)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)iov,
			     .msg_iovlen = (size_t)iovcnt};

	return km_sys_recvmsg(fd, &msg, (flags & ~MSG_WAITALL) | MSG_DONTWAIT);
}

static ssize_t kernel_send(int fd, const struct iovec *iov, int iovcnt, int flags)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)iov,
			     .msg_iovlen = (size_t)iovcnt};

	return km_sys_sendmsg(fd, &msg, flags | MSG_DONTWAIT);
}

static uint32_t kernel_poll(int fd, short events)
{
	struct pollfd pfd = {.fd = fd, .events = events};
	struct timespec now = {0, 0};

	return km_sys_poll(&pfd, 1, &now) > 0 ? (uint32_t)pfd.revents : 0;
}

static int tcp_info(int fd, struct tcp_info *info)
{
	socklen_t len = sizeof(*info);
	int err;

	memset(info, 0, sizeof(*info));
	err = km_sys_getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &len);
	if (err < 0)
		return err;
	return len >= offsetof(struct tcp_info, tcpi_bytes_retrans) + 8 ? 0 : -ENOSYS;
}

/* Bytes ever handed to the kernel on this socket. */
static int bytes_sent(int fd, uint64_t *out)
{
	struct tcp_info info;
	int err = tcp_info(fd, &info);

	*out = info.tcpi_bytes_sent - info.tcpi_bytes_retrans + info.tcpi_notsent_bytes;
	return err;
}

/* Bytes ever taken from the kernel on this socket. */
static int bytes_taken(int fd, uint64_t *out)
{
	struct tcp_info info;
	int unread = 0, err;

	err = km_sys_ioctl(fd, SIOCINQ, &unread);
	if (err == 0)
		err = tcp_info(fd, &info);
	if (err < 0)
		return err;
	*out = info.tcpi_bytes_received - (uint64_t)unread;
	/* A FIN counts as one byte received, but SIOCINQ leaves it out. */
	switch (info.tcpi_state) {
	case TCP_STATE_TIME_WAIT:
	case TCP_STATE_CLOSE_WAIT:
	case TCP_STATE_LAST_ACK:
	case TCP_STATE_CLOSING:
		*out -= 1;
		break;
	default:
		break;
	}
	return 0;
}

/* -- locks ------------------------------------------------------------------- */

struct direction {
	struct km_conn *conn;
	km_a32 *lock;
	enum km_lock_result how;
};

/* Locks one direction of f; false when f has no channel (any more), or when this
 * thread holds the lock already (a signal handler): then *err is -EINTR. */
static bool enter(struct km_file *f, int fd, bool out, bool held, struct direction *d,
		  int *err)
{
	struct km_conn *conn = f->conn;

	*err = KM_RETRY;
	if (!conn)
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
	if (km_unlikely(d->how == KM_LOCK_STOLEN))
		km_stream_reset(conn);
	return true;
}

static void leave(struct direction *d)
{
	km_unlock(d->lock, d->how);
}

/* -- waking ------------------------------------------------------------------ */

/* The consumer of conn's tx ring has bytes. */
static void tell_consumer(struct km_file *f, struct km_conn *conn)
{
	struct km_wire_ring *wire = conn->tx.wire;

	km_fence_seq();
	if (km_unlikely(km_load_relaxed(&wire->cons_wait))) {
		km_swap_seq(&wire->cons_wait, 0);
		km_count(KM_COUNT_FUTEX_WAKES);
		km_sys_futex_wake(&wire->cons_wait, INT32_MAX);
	}
	if (km_likely(f->peer != NULL))
		km_peer_bell_tell(f);
}

/* The producer of conn's rx ring has space, if it asked. */
static void tell_producer(struct km_file *f, struct km_conn *conn, bool anyway)
{
	struct km_wire_ring *wire = conn->rx.wire;
	uint32_t flags;

	km_fence_seq();
	if (km_likely(km_load_relaxed(&wire->prod_wait) == 0))
		return;
	if (!anyway &&
	    km_load_relaxed(&wire->wpos) - conn->rx.r > conn->rx.size / WAKE_FRACTION)
		return;
	flags = km_swap_seq(&wire->prod_wait, 0);
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

/* -- reading ------------------------------------------------------------------ */

static uint32_t limit_iov(const struct iovec *iov, int iovcnt, uint64_t limit,
			  struct iovec *out, int most)
{
	int i;

	for (i = 0; i < iovcnt && i < most && limit; i++) {
		out[i] = iov[i];
		if (out[i].iov_len > limit)
			out[i].iov_len = limit;
		limit -= out[i].iov_len;
	}
	return (uint32_t)i;
}

/* The producer has cut over: how much of its kernel bytes is still to come? */
static ssize_t start_drain(struct km_conn *conn, int fd)
{
	uint64_t cut = km_load_relaxed(&conn->rx.wire->cut), taken;
	int err = bytes_taken(fd, &taken);

	if (err < 0)
		return err;
	if (cut < taken || cut - taken > (uint64_t)1 << 40)
		return -EPROTO;
	conn->rx_left = cut - taken;
	conn->row.kernel_rx_bytes = cut;
	conn->rx_phase = conn->rx_left ? KM_PHASE_DRAIN : KM_PHASE_RING;
	return 0;
}

/* The ring is empty: has the kernel something to say?  -EAGAIN: no; 1: look at the
 * ring again; 0: end of file; other: error. */
static ssize_t ask_kernel(struct km_conn *conn, int fd)
{
	uint8_t byte;
	struct iovec iov = {&byte, 1};
	uint64_t r = conn->rx.r;
	ssize_t k = kernel_recv(fd, &iov, 1, MSG_PEEK);

	conn->idle_reads = 0;
	if (k == -EAGAIN)
		return k;
	/* What the peer published before its FIN or reset comes first. */
	if (km_load_sync(OBSERVE, &conn->rx.wire->wpos) != r)
		return 1;
	if (k > 0) {
		if (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_END)
			return 1;
		return -EPROTO;
	}
	km_or_seq(&conn->kernel_bits, POLLRDHUP);
	/* A peer that went without a word, leaving bytes unread, would have been reset
	 * by the kernel; the kernel does not know of the bytes in the ring. */
	if (k == 0 && conn->tx_phase != KM_PHASE_KERNEL &&
	    !(km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
	      (KM_P_FIN | KM_P_CLOSED)) &&
	    km_load_sync(SEE_SPACE, &conn->tx.wire->rpos) != conn->tx.w &&
	    !(km_or_seq(&conn->flags, KM_CONN_DIED) & KM_CONN_DIED))
		return -ECONNRESET;
	return k;
}

static ssize_t recv_ring(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, int flags)
{
	struct km_consumer *rx = &conn->rx;
	ssize_t n = km_ring_read(rx, iov, iovcnt, flags & MSG_PEEK);
	uint32_t pflags;

	if (km_likely(n > 0)) {
		conn->idle_reads = 0;
		conn->row.rx_seen = rx->w;
		if (!(flags & MSG_PEEK)) {
			conn->row.ring_rx_bytes = rx->r;
			tell_producer(f, conn, false);
		}
		return n;
	}
	if (n < 0)
		return n;
	/* Asked for nothing: the answer still depends on whether there is something. */
	if (km_unlikely(rx->w != rx->r))
		return 0;
	pflags = km_load_sync(FLAGS_SEE, &rx->wire->pflags);
	if ((pflags & KM_P_END) && km_load_relaxed(&rx->wire->end) == rx->r) {
		conn->rx_phase = KM_PHASE_ENDED;
		return KM_RETRY;
	}
	if (km_load_relaxed(&conn->flags) & KM_CONN_RD_SHUT)
		return 0;
	if ((pflags & (KM_P_FIN | KM_P_CLOSED | KM_P_END)) ||
	    km_load_relaxed(&conn->kernel_bits) || ++conn->idle_reads >= IDLE_READS) {
		n = ask_kernel(conn, fd);
		return n == 1 ? KM_RETRY : n;
	}
	return -EAGAIN;
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
				n = start_drain(conn, fd);
				if (n < 0)
					return n;
				continue;
			}
			n = kernel_recv(fd, iov, iovcnt, flags);
			/* A cut that came in between explains an empty socket. */
			if (n <= 0 && (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
				       KM_P_CUT))
				continue;
			return n;
		case KM_PHASE_DRAIN:
			iovcnt = (int)limit_iov(iov, iovcnt, conn->rx_left, part,
						KM_COUNT(part));
			n = kernel_recv(fd, part, iovcnt, flags);
			if (n > 0 && !(flags & MSG_PEEK)) {
				conn->rx_left -= (uint64_t)n;
				if (conn->rx_left == 0)
					conn->rx_phase = KM_PHASE_RING;
			}
			return n;
		case KM_PHASE_RING:
			n = recv_ring(f, conn, fd, iov, iovcnt, flags);
			if (n == KM_RETRY)
				continue;
			return n;
		case KM_PHASE_ENDED:
			return kernel_recv(fd, iov, iovcnt, flags);
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
		return conn->rx_phase != before ||
		       ((pflags & KM_P_END) &&
			km_load_relaxed(&conn->rx.wire->end) == conn->rx.r);
	}
	return false;
}

static int advance_iov(const struct iovec *iov, int iovcnt, size_t done,
		       struct iovec *out);

/* Adds to the n bytes that were read what lies beyond the change of phase: a reader
 * may take a short read for an empty socket, and no event would tell it otherwise. */
KM_COLD static ssize_t recv_beyond(struct km_file *f, struct km_conn *conn, int fd,
				   const struct iovec *iov, int iovcnt, int flags,
				   ssize_t n)
{
	struct iovec rest[IOV_MOST];
	int left = advance_iov(iov, iovcnt, (size_t)n, rest);
	ssize_t m = left ? recv_once(f, conn, fd, rest, left, flags) : 0;

	return m > 0 ? n + m : n;
}

/* recv_once, and on through the phases while they have something. */
static ssize_t recv_through(struct km_file *f, struct km_conn *conn, int fd,
			    const struct iovec *iov, int iovcnt, int flags, size_t want)
{
	enum km_phase before = (enum km_phase)conn->rx_phase;
	ssize_t n = recv_once(f, conn, fd, iov, iovcnt, flags), last = 0;

	while (km_unlikely(n > last && (size_t)n < want && !(flags & MSG_PEEK) &&
			   moved_on(conn, before))) {
		before = (enum km_phase)conn->rx_phase;
		last = n;
		n = recv_beyond(f, conn, fd, iov, iovcnt, flags, n);
	}
	return n;
}

void km_stream_settle(struct km_file *f, int fd)
{
	struct direction d;
	int err;

	if (!enter(f, fd, false, true, &d, &err))
		return;
	if (d.conn->rx_phase == KM_PHASE_KERNEL &&
	    (km_load_sync(FLAGS_SEE, &d.conn->rx.wire->pflags) & KM_P_CUT))
		start_drain(d.conn, kernel_fd(f, fd));
	leave(&d);
}

/* -- waiting ------------------------------------------------------------------ */

struct wait {
	int64_t deadline; /* 0: not asked yet, -1: none */
	unsigned naps;
	bool held;
};

static void set_deadline(struct wait *w, const struct km_conn *conn, int fd, int option)
{
	struct timeval tv = {0, 0};
	socklen_t len = sizeof(tv);

	if (w->deadline)
		return;
	w->deadline = -1;
	if (!(km_load_relaxed(&conn->flags) & KM_CONN_TIMEOUTS))
		return;
	if (km_sys_getsockopt(fd, SOL_SOCKET, option, &tv, &len) == 0 &&
	    (tv.tv_sec || tv.tv_usec))
		w->deadline =
			km_now_ns() + tv.tv_sec * 1000000000LL + tv.tv_usec * 1000LL;
}

/* Is there anything new to look at, in the direction of the wait? */
static bool rx_has_news(const struct km_conn *conn)
{
	const struct km_wire_ring *wire = conn->rx.wire;
	uint32_t pflags = km_load_sync(FLAGS_SEE, &wire->pflags);

	switch ((enum km_phase)conn->rx_phase) {
	case KM_PHASE_KERNEL:
		return pflags & KM_P_CUT;
	case KM_PHASE_DRAIN:
	case KM_PHASE_ENDED:
		return false;
	case KM_PHASE_RING:
		return km_load_sync(OBSERVE, &wire->wpos) != conn->rx.r ||
		       (pflags & KM_P_END) ||
		       (km_load_relaxed(&conn->flags) & KM_CONN_RD_SHUT);
	}
	return false;
}

static bool tx_has_news(const struct km_conn *conn)
{
	const struct km_wire_ring *wire = conn->tx.wire;

	if (conn->tx_phase != KM_PHASE_RING)
		return false;
	return conn->tx.w - km_load_sync(SEE_SPACE, &wire->rpos) <
		       conn->tx.geo.size[conn->tx.geo.levels - 1] ||
	       (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
		(KM_P_FIN | KM_P_CLOSED));
}

/* A short sleep on a wait word, where the peer's next operation wakes directly. */
static int nap_on_futex(km_a32 *word, const struct km_conn *conn,
			bool (*has_news)(const struct km_conn *), int64_t left)
{
	struct timespec slice = {0, KM_MIN(left, FUTEX_SLICE_NS)};
	uint32_t flags = km_or_seq(word, KM_WAIT_FUTEX) | KM_WAIT_FUTEX;
	int err;

	km_fence_seq();
	if (has_news(conn))
		return 0;
	km_count(KM_COUNT_FUTEX_SLEEPS);
	err = km_sys_futex_wait(word, flags, &slice);
	return err == -EINTR ? err : 0;
}

/* A sleep of any length on the kernel socket and the bell. */
static int nap_on_bell(struct km_file *f, struct km_conn *conn, int fd, short events,
		       bool (*has_news)(const struct km_conn *), int64_t left)
{
	int epfd = km_thread_listen(f->bell), err = 0, sigfd = -1;
	struct pollfd pfds[3] = {{.fd = kernel_fd(f, fd), .events = events},
				 {.fd = epfd, .events = POLLIN},
				 {.fd = -1, .events = POLLIN}};
	struct timespec ts;
	uint64_t mask;

	/* With a time limit every signal ends the call. */
	if (left == INT64_MAX && km_signals_mixed())
		sigfd = pfds[2].fd = km_signals_wait_begin(&mask);
	/* Without a hidden epoll set to be had, look again often. */
	if (epfd < 0)
		left = KM_MIN(left, 1000000);
	ts = (struct timespec){left / 1000000000, left % 1000000000};
	km_bell_arm(f->bell);
	if (!has_news(conn)) {
		km_count(KM_COUNT_BELL_SLEEPS);
		err = (int)KM_SYS(ppoll, pfds, 3, left == INT64_MAX ? NULL : &ts,
				  sigfd < 0 ? NULL : &mask, KM_SIGSET_SIZE, 0);
	}
	if (sigfd >= 0)
		km_sys_close(sigfd);
	km_bell_disarm(f->bell);
	if (err > 0) {
		if (pfds[1].revents)
			km_thread_listened();
		if (pfds[0].revents & GONE_BITS)
			km_or_seq(&conn->kernel_bits,
				  (uint32_t)pfds[0].revents & GONE_BITS);
		if (pfds[0].revents & POLLIN)
			conn->idle_reads = IDLE_READS;
	}
	return err == -EINTR ? err : 0;
}

/* Sleeps until something may have changed.  0: look again; -EAGAIN: timed out;
 * -EINTR. */
static int wait_in(struct km_file *f, struct km_conn *conn, int fd, struct wait *w)
{
	int64_t left = INT64_MAX;

	set_deadline(w, conn, kernel_fd(f, fd), SO_RCVTIMEO);
	if (w->deadline > 0)
		left = w->deadline - km_now_ns();
	if (left <= 0)
		return -EAGAIN;
	if (conn->rx_phase == KM_PHASE_RING && w->naps++ == 0 && !km_signals_mixed())
		return nap_on_futex(&conn->rx.wire->cons_wait, conn, rx_has_news, left);
	return nap_on_bell(f, conn, fd, POLLIN | POLLRDHUP, rx_has_news, left);
}

static int wait_out(struct km_file *f, struct km_conn *conn, int fd, struct wait *w)
{
	int64_t left = INT64_MAX;

	set_deadline(w, conn, kernel_fd(f, fd), SO_SNDTIMEO);
	if (w->deadline > 0)
		left = w->deadline - km_now_ns();
	if (left <= 0)
		return -EAGAIN;
	if (conn->tx_phase != KM_PHASE_RING)
		return nap_on_bell(f, conn, fd, POLLOUT, tx_has_news, left);
	if (w->naps++ == 0 && !km_signals_mixed())
		return nap_on_futex(&conn->tx.wire->prod_wait, conn, tx_has_news, left);
	km_or_seq(&conn->tx.wire->prod_wait, KM_WAIT_EVENT);
	km_fence_seq();
	if (tx_has_news(conn))
		return 0;
	return nap_on_bell(f, conn, fd, POLLRDHUP, tx_has_news, left);
}

/* As on the kernel: with a time limit a signal ends the call whatever its handler
 * asked for, and without one it depends on the handler. */
static int interrupted(int err, const struct wait *w)
{
	if (err != -EINTR || w->deadline > 0)
		return err;
	return km_interrupted();
}

static void wait_hold(struct km_file *f, struct wait *w)
{
	if (!w->held)
		km_file_hold(f);
	w->held = true;
}

static ssize_t wait_done(struct km_file *f, struct wait *w, ssize_t result)
{
	if (w->held)
		km_file_release(f);
	return result;
}

static bool must_not_block(const struct km_conn *conn, int flags)
{
	return (flags & MSG_DONTWAIT) ||
	       (km_load_relaxed(&conn->flags) & KM_CONN_NONBLOCK);
}

/* -- recv and send ------------------------------------------------------------- */

static size_t total(const struct iovec *iov, int iovcnt)
{
	size_t n = 0;

	for (int i = 0; i < iovcnt; i++)
		n += iov[i].iov_len;
	return n;
}

/* What is left of iov after done bytes, in out (room for iovcnt). */
static int advance_iov(const struct iovec *iov, int iovcnt, size_t done,
		       struct iovec *out)
{
	int k = 0;

	for (int i = 0; i < iovcnt; i++) {
		size_t skip = KM_MIN(done, iov[i].iov_len);

		done -= skip;
		if (skip == iov[i].iov_len && skip)
			continue;
		out[k].iov_base =
			iov[i].iov_base ? (char *)iov[i].iov_base + skip : NULL;
		out[k].iov_len = iov[i].iov_len - skip;
		k++;
	}
	return k;
}

ssize_t km_recv(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags)
{
	struct wait w = {0};
	struct iovec discard, rest[64], *left = NULL;
	size_t want = total(iov, iovcnt), done = 0, enough;
	struct direction d;
	ssize_t n;
	int err;

	if (flags & (MSG_OOB | MSG_ERRQUEUE))
		return kernel_recv(fd, iov, iovcnt, flags);
	if (km_unlikely(f->link_state == KM_LINK_HELLO))
		km_link_advance(f, fd);
	if (km_unlikely(flags & MSG_TRUNC)) {
		/* TCP's meaning: throw the bytes away. */
		discard = (struct iovec){NULL, want};
		iov = &discard;
		iovcnt = 1;
	}
	for (;;) {
		if (!enter(f, fd, false, w.held, &d, &err))
			return wait_done(f, &w, done ? (ssize_t)done : err);
		n = recv_through(f, d.conn, kernel_fd(f, fd), left ? left : iov, iovcnt,
				 flags, want - done);
		if (n == -EPROTO) {
			km_stream_reset(d.conn);
			n = -ECONNRESET;
		}
		if (n != -EAGAIN || must_not_block(d.conn, flags)) {
			enough = flags & MSG_PEEK      ? 1
				 : flags & MSG_WAITALL ? want
						       : (size_t)d.conn->lowat;
			leave(&d);
			if (n > 0)
				done += (size_t)n;
			if (n <= 0 || done >= KM_MIN(enough, want))
				return wait_done(f, &w, done ? (ssize_t)done : n);
			if (iovcnt > (int)KM_COUNT(rest))
				return wait_done(f, &w, (ssize_t)done);
			iovcnt =
				advance_iov(left ? left : iov, iovcnt, (size_t)n, rest);
			left = rest;
			continue;
		}
		wait_hold(f, &w);
		leave(&d);
		err = interrupted(wait_in(f, d.conn, fd, &w), &w);
		if (err < 0)
			return wait_done(f, &w, done ? (ssize_t)done : err);
	}
}

/* This end's stream goes back to the kernel at the present position. */
static void end_tx_ring(struct km_conn *conn)
{
	struct km_wire_ring *wire = conn->tx.wire;

	km_store_relaxed(&wire->end, conn->tx.w);
	km_store_sync(FLAGS_SET, &wire->pflags,
		      km_load_relaxed(&wire->pflags) | KM_P_END);
	conn->tx_phase = KM_PHASE_ENDED;
}

/* This end's stream moves to the ring at the present byte. */
static int cut_tx(struct km_conn *conn, int fd)
{
	struct km_wire_ring *wire = conn->tx.wire;
	uint64_t sent;
	int err = bytes_sent(fd, &sent);

	if (err < 0)
		return err;
	conn->row.kernel_tx_bytes = sent;
	km_store_relaxed(&wire->cut, sent);
	km_store_sync(FLAGS_SET, &wire->pflags,
		      km_load_relaxed(&wire->pflags) | KM_P_CUT);
	conn->tx_phase = KM_PHASE_RING;
	return 0;
}

/* Does the consumer still take what this end writes?  Asks the kernel now and
 * then when it seems not to. */
static void check_consumer(struct km_conn *conn, int fd)
{
	uint64_t r = km_load_sync(SEE_SPACE, &conn->tx.wire->rpos);

	if (r != conn->stale_at || r == conn->tx.w) {
		conn->stale_at = r;
		conn->stale_writes = 0;
		return;
	}
	if (++conn->stale_writes < STALE_WRITES)
		return;
	conn->stale_writes = 0;
	km_or_seq(&conn->kernel_bits, kernel_poll(fd, POLLRDHUP) & GONE_BITS);
}

/* Is the peer's socket closed, or half closed?  Then bytes go by the kernel, which
 * knows all that follows (RST, EPIPE, a peer that dies later). */
static bool peer_stopped(const struct km_conn *conn)
{
	return (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
		(KM_P_FIN | KM_P_CLOSED)) ||
	       km_load_relaxed(&conn->kernel_bits);
}

static ssize_t send_ring(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt)
{
	uint32_t level = conn->tx.level;
	ssize_t n;

	if (km_unlikely(peer_stopped(conn))) {
		end_tx_ring(conn);
		return KM_RETRY;
	}
	n = km_ring_write(&conn->tx, iov, iovcnt);
	if (km_likely(n > 0)) {
		conn->row.ring_tx_bytes = conn->tx.w;
		conn->row.tx_seen = conn->tx.r;
		tell_consumer(f, conn);
		if (km_unlikely(conn->tx.level != level))
			km_count(KM_COUNT_GROWS);
		if (km_unlikely(conn->tx.w - conn->tx.r > conn->tx.size / 2))
			check_consumer(conn, fd);
		return n;
	}
	if (n < 0)
		return n;
	km_or_seq(&conn->kernel_bits, kernel_poll(fd, POLLRDHUP) & GONE_BITS);
	if (peer_stopped(conn))
		return KM_RETRY;
	/* Whoever waits for space by events is told when there is some. */
	km_or_seq(&conn->tx.wire->prod_wait, KM_WAIT_EVENT);
	km_fence_seq();
	return tx_has_news(conn) ? KM_RETRY : -EAGAIN;
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

static ssize_t send_once(struct km_file *f, struct km_conn *conn, int fd,
			 const struct iovec *iov, int iovcnt, int flags)
{
	ssize_t n;

	for (;;) {
		if (km_unlikely(km_load_relaxed(&conn->flags) & KM_CONN_RESET))
			return -ECONNRESET;
		if (km_unlikely(flags & MSG_OOB) && conn->tx_phase == KM_PHASE_RING)
			end_tx_ring(conn);
		switch ((enum km_phase)conn->tx_phase) {
		case KM_PHASE_KERNEL:
			if (may_cut(f, conn) && !peer_stopped(conn) &&
			    !(flags & MSG_OOB) && cut_tx(conn, fd) == 0)
				continue;
			return kernel_send(fd, iov, iovcnt, flags);
		case KM_PHASE_DRAIN:
		case KM_PHASE_ENDED:
			return kernel_send(fd, iov, iovcnt, flags);
		case KM_PHASE_RING:
			n = send_ring(f, conn, fd, iov, iovcnt);
			if (n == KM_RETRY)
				continue;
			return n;
		}
	}
}

ssize_t km_send(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags)
{
	struct wait w = {0};
	size_t want = total(iov, iovcnt), done = 0;
	struct iovec rest[IOV_MOST];
	struct direction d;
	ssize_t n;
	int err;

	if (km_unlikely(f->link_state == KM_LINK_HELLO))
		km_link_advance(f, fd);
	for (;;) {
		if (!enter(f, fd, true, w.held, &d, &err))
			return wait_done(f, &w, done ? (ssize_t)done : err);
		if (want == 0 && d.conn->tx_phase == KM_PHASE_RING &&
		    !peer_stopped(d.conn)) {
			leave(&d);
			return 0;
		}
		n = send_once(f, d.conn, kernel_fd(f, fd), iov, iovcnt, flags);
		if (n == -EPROTO) {
			km_stream_reset(d.conn);
			n = -ECONNRESET;
		}
		if (n >= 0)
			done += (size_t)n;
		if (n > 0 && done < want) {
			/* Goes on even when it must not block: only an attempt that
			 * finds the ring full asks to be told of space. */
			leave(&d);
			iovcnt = advance_iov(iov, iovcnt, (size_t)n, rest);
			iov = rest;
			continue;
		}
		if (n != -EAGAIN || must_not_block(d.conn, flags)) {
			leave(&d);
			return wait_done(f, &w, done ? (ssize_t)done : n);
		}
		wait_hold(f, &w);
		leave(&d);
		err = interrupted(wait_out(f, d.conn, fd, &w), &w);
		if (err < 0)
			return wait_done(f, &w, done ? (ssize_t)done : err);
	}
}

ssize_t km_send_from(struct km_file *f, int fd, int in, off64_t *offset, size_t count)
{
	ssize_t n = KM_RETRY, space;
	struct direction d;
	uint8_t *at;
	int err;

	if (!enter(f, fd, true, false, &d, &err))
		return KM_RETRY;
	if (d.conn->tx_phase == KM_PHASE_RING && !peer_stopped(d.conn) &&
	    !(km_load_relaxed(&d.conn->flags) & KM_CONN_RESET)) {
		space = km_ring_space(&d.conn->tx, count, &at);
		if (space > 0)
			n = offset ? KM_SYS(pread64, in, at,
					    KM_MIN((size_t)space, count), *offset, 0, 0)
				   : km_sys_read(in, at, KM_MIN((size_t)space, count));
	}
	if (n > 0) {
		km_ring_produced(&d.conn->tx, (size_t)n);
		d.conn->row.ring_tx_bytes = d.conn->tx.w;
		d.conn->row.tx_seen = d.conn->tx.r;
		tell_consumer(f, d.conn);
		if (d.conn->tx.w - d.conn->tx.r > d.conn->tx.size / 2)
			check_consumer(d.conn, kernel_fd(f, fd));
		if (offset)
			*offset += n;
	}
	leave(&d);
	return n;
}

/* -- the rest ------------------------------------------------------------------ */

int km_stream_inq(struct km_file *f, int fd, int *bytes)
{
	struct direction d;
	int64_t n = 0;
	int kernel = 0, err;

	if (!enter(f, fd, false, false, &d, &err))
		return err;
	if (d.conn->rx_phase == KM_PHASE_KERNEL &&
	    (km_load_sync(FLAGS_SEE, &d.conn->rx.wire->pflags) & KM_P_CUT))
		start_drain(d.conn, fd);
	err = 0;
	if (d.conn->rx_phase != KM_PHASE_RING)
		err = km_sys_ioctl(fd, SIOCINQ, &kernel);
	/* The ring's bytes count once all of the kernel's are here. */
	if (d.conn->rx_phase == KM_PHASE_RING ||
	    (d.conn->rx_phase == KM_PHASE_DRAIN && (uint64_t)kernel == d.conn->rx_left))
		n = km_ring_readable(&d.conn->rx);
	leave(&d);
	*bytes = (int)KM_MIN(KM_MAX(n, 0) + kernel, INT32_MAX);
	return err;
}

int km_stream_outq(struct km_file *f, int fd, int *bytes)
{
	struct direction d;
	int64_t n = 0;
	int kernel = 0, err;

	if (!enter(f, fd, true, false, &d, &err))
		return err;
	err = km_sys_ioctl(fd, SIOCOUTQ, &kernel);
	if (d.conn->tx_phase == KM_PHASE_RING || d.conn->tx_phase == KM_PHASE_ENDED)
		n = km_ring_unread(&d.conn->tx);
	leave(&d);
	*bytes = (int)KM_MIN(KM_MAX(n, 0) + kernel, INT32_MAX);
	return err;
}

int km_stream_shutdown(struct km_file *f, int fd, int how)
{
	struct direction d;
	int err;

	if (how != SHUT_RD) {
		if (!enter(f, fd, true, false, &d, &err))
			return err;
		/* The flag tells a half close from a death; the kernel's FIN that
		 * follows wakes the peer. */
		if (km_load_relaxed(&d.conn->tx.wire->pflags) & KM_P_CUT)
			km_store_sync(FLAGS_SET, &d.conn->tx.wire->pflags,
				      km_load_relaxed(&d.conn->tx.wire->pflags) |
					      KM_P_FIN);
		d.conn->tx_phase = KM_PHASE_ENDED;
		leave(&d);
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

void km_stream_abandon(struct km_file *f)
{
	struct km_conn *conn = f->conn;
	enum km_lock_result rx = km_lock(&conn->rx_lock);
	enum km_lock_result tx = km_lock(&conn->tx_lock);

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

	km_or_seq(&wire->pflags, KM_P_FIN | KM_P_CLOSED);
	/* Closing with bytes unread is a reset, here as on the kernel. */
	if (conn->rx_phase != KM_PHASE_ENDED &&
	    km_load_sync(OBSERVE, &conn->rx.wire->wpos) != conn->rx.r)
		km_sys_setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	else if (km_load_relaxed(&conn->flags) & KM_CONN_RESET)
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
