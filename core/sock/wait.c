/* SPDX-License-Identifier: Apache-2.0 */
/* Sleeping in a blocking call. */
#include <errno.h>
#include <sys/time.h>

#include "base/fault_point.h"
#include "base/refused.h"
#include "event/event.h"
#include "sock/internal.h"
#include "sock/signals.h"

static void set_deadline(struct km_wait *w, const struct km_conn *conn, int fd,
			 int option)
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

	if (km_unlikely(km_tx_left_news(conn)))
		return true;
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

bool km_tx_has_news(const struct km_conn *conn)
{
	const struct km_wire_ring *wire = conn->tx.wire;

	if (km_unlikely(km_tx_left_news(conn)))
		return true;
	if (conn->tx_phase != KM_PHASE_RING)
		return false;
	return conn->tx.w - km_load_sync(SEE_SPACE, &wire->rpos) <
		       conn->tx.geo.size[conn->tx.geo.levels - 1] ||
	       (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
		(KM_P_FIN | KM_P_CLOSED));
}

struct wanted {
	const struct km_conn *conn;
	bool (*has_news)(const struct km_conn *);
};

static bool has_come(const void *what)
{
	const struct wanted *wanted = what;

	return wanted->has_news(wanted->conn);
}

/* A short sleep on a wait word, where the peer's next operation wakes directly; or none,
 * where the peer runs on another CPU and may be about to answer. */
static int nap_on_futex(km_a32 *word, const struct km_conn *conn,
			bool (*has_news)(const struct km_conn *), int64_t left,
			struct km_spin *record, uint32_t peer_cpu)
{
	int64_t ns = KM_MIN(left, KM_FUTEX_SLICE_NS);
	struct timespec slice = {ns / 1000000000, ns % 1000000000};
	uint32_t flags;
	int err;

	if (km_spin(record, peer_cpu, left, has_come, &(struct wanted){conn, has_news}))
		return 0;
	flags = km_or_seq(word, KM_WAIT_FUTEX) | KM_WAIT_FUTEX;
	km_fence_sync(NAP);
	if (km_look_sync(NAP_LOOK, has_news(conn)))
		return 0;
	KM_FAULT(WAKE_NAP);
	km_count(KM_COUNT_FUTEX_SLEEPS);
	err = km_sys_futex_wait(word, flags, &slice);
	return err == -EINTR ? err : 0;
}

/* A sleep of any length on the kernel socket and the bell. */
static int nap_on_bell(struct km_file *f, struct km_conn *conn, int fd, short events,
		       bool (*has_news)(const struct km_conn *), int64_t left)
{
	int epfd = km_thread_listen(f->bell), err = 0, sigfd = -1;
	struct pollfd pfds[3] = {{.fd = km_kernel_fd(f, fd), .events = events},
				 {.fd = epfd, .events = POLLIN},
				 {.fd = -1, .events = POLLIN}};
	struct timespec ts;
	uint64_t mask;

	/* With a time limit every signal ends the call. */
	if (left == INT64_MAX && km_signals_mixed())
		sigfd = pfds[2].fd = km_fd_hide(km_signals_wait_begin(&mask));
	/* Without a hidden epoll set to be had, look again often. */
	if (epfd < 0)
		left = KM_MIN(left, 1000000);
	ts = (struct timespec){left / 1000000000, left % 1000000000};
	km_bell_arm(f->bell);
	if (!km_look_sync(BELL_LOOK, has_news(conn))) {
		km_count(KM_COUNT_BELL_SLEEPS);
		err = km_ppoll(pfds, 3, left == INT64_MAX ? NULL : &ts,
			       sigfd < 0 ? NULL : &mask);
		if (km_unlikely(km_refused(err)))
			km_doze();
	}
	if (err > 0 && pfds[0].revents == 0 && pfds[1].revents && !has_news(conn))
		err = km_idle_wake(&f->bell, 1,
				   sigfd < 0 ? NULL : (const sigset_t *)&mask) < 0
			      ? -EINTR
			      : err;
	else if (err > 0)
		km_useful_wake();
	if (sigfd >= 0)
		km_fd_unhide(sigfd);
	km_bell_disarm(f->bell);
	if (err > 0) {
		if (pfds[1].revents)
			km_thread_listened();
		if (pfds[0].revents & KM_GONE_BITS)
			km_or_seq(&conn->kernel_bits,
				  (uint32_t)pfds[0].revents & KM_GONE_BITS);
		if (pfds[0].revents & POLLIN)
			conn->idle_reads = KM_ASK_NOW;
	}
	return err == -EINTR ? err : 0;
}

/* Sleeps until something may have changed.  0: look again; -EAGAIN: timed out;
 * -EINTR. */
int km_wait_in(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w)
{
	int64_t left = INT64_MAX;
	short events = POLLIN | POLLRDHUP;

	set_deadline(w, conn, km_kernel_fd(f, fd), SO_RCVTIMEO);
	if (w->deadline > 0)
		left = w->deadline - km_now_ns();
	if (left <= 0)
		return -EAGAIN;
	if (km_unlikely(conn->tx_phase == KM_PHASE_DRAIN))
		events |= POLLOUT;
	else if (conn->rx_phase == KM_PHASE_RING && w->naps++ == 0 &&
		 !km_signals_mixed())
		return nap_on_futex(&conn->rx.wire->cons_wait, conn, rx_has_news, left,
				    &conn->spin_in,
				    km_load_relaxed(&conn->rx.wire->pcpu));
	return nap_on_bell(f, conn, fd, events, rx_has_news, left);
}

static bool rx_at_end(const struct km_conn *conn)
{
	return (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) &
		(KM_P_FIN | KM_P_CLOSED)) ||
	       km_load_relaxed(&conn->kernel_bits) ||
	       (km_load_relaxed(&conn->flags) & (KM_CONN_RD_SHUT | KM_CONN_RESET));
}

/* No more can come before something is taken. */
static bool rx_is_full(const struct km_conn *conn)
{
	const struct km_ring_geometry *geo = &conn->rx.geo;

	return conn->rx_phase == KM_PHASE_RING &&
	       conn->rx.w - conn->rx.r >= geo->size[geo->levels - 1];
}

/* Is there more than there was when the ring was last looked at? */
static bool rx_has_more(const struct km_conn *conn)
{
	return conn->rx_phase != KM_PHASE_RING ||
	       km_load_sync(OBSERVE, &conn->rx.wire->wpos) != conn->rx.w ||
	       (km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_END) ||
	       rx_at_end(conn);
}

int km_wait_more(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w)
{
	struct timespec nap = {0, 1000000};
	int64_t left = INT64_MAX;
	int err;

	set_deadline(w, conn, km_kernel_fd(f, fd), SO_RCVTIMEO);
	if (w->deadline > 0)
		left = w->deadline - km_now_ns();
	if (left <= 0 || rx_at_end(conn) || rx_is_full(conn))
		return -EAGAIN;
	if (!rx_has_more(conn))
		return nap_on_bell(f, conn, fd, POLLRDHUP, rx_has_more, left);
	if (conn->rx_phase == KM_PHASE_RING &&
	    !(km_load_sync(FLAGS_SEE, &conn->rx.wire->pflags) & KM_P_END))
		return 0;
	/* What the kernel holds already makes every wait for more of it end at once. */
	nap.tv_nsec = KM_MIN(left, nap.tv_nsec);
	err = km_sys_poll(NULL, 0, &nap);
	if (err == 0)
		km_or_seq(&conn->kernel_bits,
			  km_kernel_poll(km_kernel_fd(f, fd), POLLRDHUP) &
				  KM_GONE_BITS);
	return err;
}

int km_wait_out(struct km_file *f, struct km_conn *conn, int fd, struct km_wait *w)
{
	int64_t left = INT64_MAX;

	set_deadline(w, conn, km_kernel_fd(f, fd), SO_SNDTIMEO);
	if (w->deadline > 0)
		left = w->deadline - km_now_ns();
	if (left <= 0)
		return -EAGAIN;
	if (conn->tx_phase != KM_PHASE_RING)
		return nap_on_bell(f, conn, fd, POLLOUT, km_tx_has_news, left);
	if (w->naps++ == 0 && !km_signals_mixed())
		return nap_on_futex(&conn->tx.wire->prod_wait, conn, km_tx_has_news,
				    left, &conn->spin_out,
				    km_load_relaxed(&conn->tx.wire->ccpu));
	km_ask_for_space(f, conn);
	if (km_tx_has_news(conn))
		return 0;
	return nap_on_bell(f, conn, fd, POLLRDHUP, km_tx_has_news, left);
}

/* As on the kernel: with a time limit a signal ends the call whatever its handler
 * asked for, and without one it depends on the handler. */
int km_wait_interrupted(int err, const struct km_wait *w)
{
	if (err != -EINTR || w->deadline > 0)
		return err;
	return km_interrupted();
}

void km_wait_hold(struct km_file *f, struct km_wait *w)
{
	if (!w->held)
		km_file_hold(f);
	w->held = true;
}

ssize_t km_wait_done(struct km_file *f, struct km_wait *w, ssize_t result)
{
	if (w->held)
		km_file_release(f);
	return result;
}

/*
 * O_NONBLOCK belongs to the open file description, which may be shared with processes
 * that the library is not in.  Where such a process is known of, the kernel is asked.
 */
bool km_must_not_block(struct km_conn *conn, int fd, int flags, const struct km_wait *w)
{
	uint32_t known = km_load_relaxed(&conn->flags);
	int now;

	if (flags & MSG_DONTWAIT)
		return true;
	if (w->held)
		return false;
	if (km_likely(!(known & KM_CONN_FOREIGN)))
		return known & KM_CONN_NONBLOCK;
	now = km_sys_fcntl(fd, F_GETFL, 0);
	if (now < 0)
		return known & KM_CONN_NONBLOCK;
	km_conn_nonblock(conn, now & O_NONBLOCK);
	return now & O_NONBLOCK;
}

int km_side_refused(const struct km_file *f, int fd, int err, int flags)
{
	struct km_conn *conn = f->conn;
	struct km_wait fresh = {0};

	if (err != -EINTR || !conn ||
	    !km_must_not_block(conn, km_kernel_fd(f, fd), flags, &fresh))
		return err;
	return -EAGAIN;
}
