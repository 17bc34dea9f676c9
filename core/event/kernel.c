/* SPDX-License-Identifier: Apache-2.0 */
/* What the kernel tells of an epoll set, and of the sockets in it. */
#include <errno.h>

#include "event/set.h"
#include "sock/stream.h"

/* Is what the kernel says of its own socket an edge for reg?  It says all that is
 * true now, and does not say what has changed. */
static bool kernel_edge(struct km_reg *reg, const struct km_conn *conn, uint32_t events)
{
	uint32_t gone = events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
	uint32_t cause = KM_NEWS_DATA | KM_NEWS_SPACE;
	uint32_t first = gone & ~reg->said;
	/* Told of already, before the kernel came to say so?  Once it has, another event
	 * of a socket that is hung up is news: its reset. */
	bool changed = first ? first & ~reg->told : gone & EPOLLHUP;
	bool stale = reg->stale && !changed;

	reg->said |= gone;
	reg->stale = false;
	/* Unless it is also about room, which is told of where there was none. */
	if (stale && !reg->want_space &&
	    !(km_load_relaxed(&conn->flags) & KM_CONN_NOSPACE))
		return false;
	/* An end is an edge for everybody. */
	if (changed || !(reg->events & EPOLLET))
		return changed || (events & ~(uint32_t)EPOLLOUT) ||
		       conn->tx_phase != KM_PHASE_RING;
	/* An idle socket's send buffer has space: no news on a ring, unless bytes come by
	 * the kernel and have been read already. */
	if (conn->tx_phase == KM_PHASE_RING)
		cause = events & ~(uint32_t)EPOLLOUT || conn->rx_phase == KM_PHASE_ENDED
				? KM_NEWS_DATA
				: 0;
	return reg->events & cause;
}

static uint32_t ended(int fd)
{
	struct pollfd pfd = {.fd = fd, .events = POLLRDHUP};
	struct timespec now = {0, 0};

	return km_sys_poll(&pfd, 1, &now) > 0 ? (uint32_t)pfd.revents & EPOLLRDHUP : 0;
}

/* The kernel has news of a connection's own socket. */
static void kernel_news(struct km_set *set, struct km_reg *reg, uint32_t events)
{
	enum km_lock_result how = km_lock(&set->lock);

	if (reg->set == set && reg->ours && reg->file->conn) {
		struct km_conn *conn = reg->file->conn;

		/* An exclusive registration is not told EPOLLRDHUP. */
		if ((reg->events & EPOLLEXCLUSIVE) && (events & EPOLLIN))
			events |= ended(reg->fd);
		if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
			km_or_seq(&conn->kernel_bits,
				  events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
		else if (conn->rx_phase == KM_PHASE_RING && (events & EPOLLIN))
			conn->idle_reads = KM_ASK_NOW;
		/* An idle socket's send buffer has space: no news on a ring. */
		if (reg->active && kernel_edge(reg, conn, events))
			km_ready_again(reg);
	}
	km_unlock(&set->lock, how);
}

int km_set_translate(struct km_set *set, struct epoll_event *evs, int n)
{
	int kept = 0;

	for (int i = 0; i < n; i++) {
		uint64_t data = evs[i].data.u64;
		struct km_reg *reg;

		if (km_likely(data >> 32 != km_proc.magic)) {
			evs[kept++] = evs[i];
			continue;
		}
		if (data & KM_BELL_COOKIE)
			continue; /* a bell: its news is taken in any case */
		if (data & KM_INNER_COOKIE) {
			if (km_set_inner_event(set, (uint32_t)data & ~KM_INNER_COOKIE,
					       &evs[i]))
				evs[kept++] = evs[i];
			continue;
		}
		reg = km_reg_at((uint32_t)data);
		if (reg)
			kernel_news(set, reg, evs[i].events);
	}
	return kept;
}

int km_set_kernel_wait(int epfd, struct epoll_event *evs, int max, int64_t timeout_ns,
		       const sigset_t *mask)
{
	struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
	long n;

	if (timeout_ns < 0 || timeout_ns % 1000000 == 0 ||
	    timeout_ns > 2147483646000000) {
		int ms = timeout_ns < 0 ? -1
					: (int)KM_MIN(timeout_ns / 1000000, INT32_MAX);

#ifdef SYS_epoll_wait
		/* What libc's own epoll_wait is, and a filter so lets through. */
		if (!mask)
			return (int)KM_SYS(epoll_wait, epfd, evs, max, ms, 0, 0);
#endif
		return (int)KM_SYS(epoll_pwait, epfd, evs, max, ms, mask,
				   KM_SIGSET_SIZE);
	}
#ifdef SYS_epoll_pwait2
	n = KM_SYS(epoll_pwait2, epfd, evs, max, &ts, mask, KM_SIGSET_SIZE);
	if (n != -ENOSYS)
		return (int)n;
#endif
	n = KM_SYS(epoll_pwait, epfd, evs, max, (timeout_ns + 999999) / 1000000, mask,
		   KM_SIGSET_SIZE);
	return (int)n;
}
