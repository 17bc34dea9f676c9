/* SPDX-License-Identifier: Apache-2.0 */
/* The channel of kmap.h: a segment, four latches and this end's cursors. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "base/sys.h"
#include "kmap.h"
#include "shm/latch.h"
#include "shm/segment.h"

struct kmap_channel {
	struct km_segment seg;
	struct km_producer tx;
	struct km_consumer rx;
	int fds[KMAP_CHANNEL_FDS]; /* memfd, then one bell per sleeper: see bell_fd */
	int epfd[2]; /* of the reading and the writing thread, once it slept on its bell */
	int side;
	int liveness;
	bool shut; /* the writing thread's */
	km_a32 dead;
	/* Both threads count; nothing is ordered by it. */
	km_a64 futex_wakes, futex_sleeps, bells_rung, bell_sleeps, grows;
};

/* fds[1..4]: for ring 0 its consumer's and its producer's, then for ring 1. */
static int bell_fd(const kmap_channel *ch, int ring, bool consumer)
{
	return ch->fds[1 + ring * 2 + (consumer ? 0 : 1)];
}

static int tx_ring(const kmap_channel *ch)
{
	return ch->side == 0 ? 1 : 0;
}

int kmap_abi_version(void)
{
	return KMAP_ABI_VERSION;
}

int kmap_wire_version(void)
{
	return (int)KM_WIRE_VERSION;
}

static void start(kmap_channel *ch)
{
	int tx = tx_ring(ch), rx = 1 - tx;

	km_producer_init(&ch->tx, &ch->seg.wire->ring[tx],
			 km_segment_data(&ch->seg, tx), ch->seg.ring_size);
	km_consumer_init(&ch->rx, &ch->seg.wire->ring[rx],
			 km_segment_data(&ch->seg, rx), ch->seg.ring_size);
	ch->liveness = -1;
	ch->epfd[0] = ch->epfd[1] = -1;
}

int kmap_channel_create(size_t ring_size, kmap_channel **out)
{
	uint32_t size = 4096;
	kmap_channel *ch;
	int err;

	if (ring_size > (16u << 20) || ring_size == 0)
		return -EINVAL;
	while (size < ring_size)
		size *= 2;
	ch = calloc(1, sizeof(*ch));
	if (!ch)
		return -ENOMEM;
	ch->epfd[0] = ch->epfd[1] = -1;
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		ch->fds[i] = -1;
	err = km_segment_create(&ch->seg, size, false, &ch->fds[0]);
	for (int i = 1; i < KMAP_CHANNEL_FDS && err == 0; i++) {
		ch->fds[i] = km_latch_open();
		err = KM_MIN(ch->fds[i], 0);
	}
	if (err < 0) {
		kmap_channel_close(ch);
		return err;
	}
	ch->side = 0;
	start(ch);
	*out = ch;
	return 0;
}

int kmap_channel_fds(const kmap_channel *ch, int fds[KMAP_CHANNEL_FDS])
{
	memcpy(fds, ch->fds, sizeof(ch->fds));
	return 0;
}

int kmap_channel_attach(const int fds[KMAP_CHANNEL_FDS], kmap_channel **out)
{
	kmap_channel *ch = calloc(1, sizeof(*ch));
	int err;

	if (!ch)
		return -ENOMEM;
	err = km_segment_attach(&ch->seg, false, fds[0]);
	for (int i = 1; i < KMAP_CHANNEL_FDS && err == 0; i++)
		err = km_latch_check(fds[i]);
	if (err < 0) {
		km_segment_unmap(&ch->seg);
		free(ch);
		return err;
	}
	memcpy(ch->fds, fds, sizeof(ch->fds));
	ch->side = 1;
	start(ch);
	km_store_sync(ATTACH_SET, &ch->seg.wire->state, KM_SEG_ATTACHED);
	*out = ch;
	return 0;
}

/* The threads' epoll sets are made anew when they are needed. */
static void forget_sets(kmap_channel *ch)
{
	for (int i = 0; i < 2; i++) {
		if (ch->epfd[i] >= 0)
			km_sys_close(ch->epfd[i]);
		ch->epfd[i] = -1;
	}
}

int kmap_channel_set_liveness(kmap_channel *ch, int sock)
{
	if (sock >= 0 && km_sys_fcntl(sock, F_GETFD, 0) < 0)
		return -EBADF;
	ch->liveness = sock;
	forget_sets(ch);
	return 0;
}

/* Wakes whoever sleeps on word.  The caller has published; the fence orders
 * that before the look at the word (see shm/wire.h). */
static void wake(kmap_channel *ch, km_a32 *word, int bell)
{
	uint32_t flags;

	km_fence_sync(CHANNEL_TELL);
	if (km_likely(km_load_relaxed(word) == 0))
		return;
	flags = km_swap_seq(word, 0);
	if (flags & KM_WAIT_FUTEX) {
		km_add_relaxed(&ch->futex_wakes, 1);
		km_sys_futex_wake(word, INT32_MAX);
	}
	if (flags & KM_WAIT_EVENT) {
		km_add_relaxed(&ch->bells_rung, 1);
		km_latch_ring(bell);
	}
}

static bool peer_is_gone(kmap_channel *ch)
{
	struct pollfd pfd = {.fd = ch->liveness, .events = POLLRDHUP};
	struct timespec now = {0, 0};

	if (km_load_relaxed(&ch->dead))
		return true;
	if (ch->liveness < 0)
		return false;
	if (km_sys_poll(&pfd, 1, &now) > 0 &&
	    (pfd.revents & (POLLHUP | POLLRDHUP | POLLERR)))
		km_store_relaxed(&ch->dead, 1);
	return km_load_relaxed(&ch->dead);
}

/* Milliseconds left until deadline, -1 for ever. */
static int64_t left_ns(int64_t deadline)
{
	if (deadline < 0)
		return INT64_MAX;
	return KM_MAX(deadline - km_now_ns(), 0);
}

/* Sleeps until the bell rings or the peer is gone; often at once for nothing. */
static int nap_on_bell(kmap_channel *ch, int *epfd, int bell, int64_t left)
{
	struct epoll_event ev[2] = {{.events = EPOLLIN | EPOLLET},
				    {.events = EPOLLRDHUP}};
	int ms = left == INT64_MAX ? -1
				   : (int)KM_MIN((left + 999999) / 1000000, INT32_MAX);

	if (*epfd < 0) {
		*epfd = km_sys_epoll_create(EPOLL_CLOEXEC);
		if (*epfd >= 0 &&
		    km_sys_epoll_ctl(*epfd, EPOLL_CTL_ADD, bell, &ev[0]) < 0) {
			km_sys_close(*epfd);
			*epfd = -1;
		}
		if (*epfd >= 0 && ch->liveness >= 0)
			km_sys_epoll_ctl(*epfd, EPOLL_CTL_ADD, ch->liveness, &ev[1]);
	}
	if (*epfd < 0) {
		/* No descriptor to be had: look again often. */
		struct timespec look = {0, 1000000};

		return km_sys_poll(NULL, 0, &look);
	}
	return km_sys_epoll_wait(*epfd, ev, 2, ms);
}

/*
 * One sleep on word, whose flag the caller has set and after which it looked
 * again.  0 (look again), -EINTR, -ETIMEDOUT.  short_nap says that this is the
 * first sleep of the call.
 */
static int nap(kmap_channel *ch, km_a32 *word, uint32_t flag, int *epfd, int bell,
	       int64_t deadline)
{
	int64_t left = left_ns(deadline);
	struct timespec ts;
	int err;

	if (left == 0)
		return -ETIMEDOUT;
	if (flag == KM_WAIT_FUTEX) {
		left = KM_MIN(left, KM_FUTEX_SLICE_NS);
		ts = (struct timespec){left / 1000000000, left % 1000000000};
		km_add_relaxed(&ch->futex_sleeps, 1);
		err = km_sys_futex_wait(word, KM_WAIT_FUTEX, &ts);
		return err == -EINTR ? err : 0;
	}
	km_add_relaxed(&ch->bell_sleeps, 1);
	err = nap_on_bell(ch, epfd, bell, left);
	return err == -EINTR ? err : 0;
}

static int64_t deadline_of(int timeout_ms)
{
	return timeout_ms < 0 ? -1 : km_now_ns() + (int64_t)timeout_ms * 1000000;
}

/* First sleeps on the futex, and when nothing came on the bell. */
static uint32_t next_flag(unsigned naps)
{
	return naps == 0 && KM_FUTEX_SLICE_NS != 0 ? KM_WAIT_FUTEX : KM_WAIT_EVENT;
}

ssize_t kmap_channel_read(kmap_channel *ch, void *buf, size_t len, int timeout_ms)
{
	struct iovec iov = {buf, len};
	struct km_wire_ring *ring = ch->rx.wire;
	int rx = 1 - tx_ring(ch);
	int64_t deadline = deadline_of(timeout_ms);
	unsigned naps = 0;

	for (;;) {
		bool gone = naps != 0 && peer_is_gone(ch);
		uint32_t flags = km_load_sync(FLAGS_SEE, &ring->pflags);
		ssize_t n = km_ring_read(&ch->rx, &iov, 1, 0);
		int err;

		if (n > 0) {
			wake(ch, &ring->prod_wait, bell_fd(ch, rx, false));
			return n;
		}
		if (n < 0)
			return n;
		if (flags & (KM_P_FIN | KM_P_CLOSED) || len == 0)
			return 0;
		if (gone || (timeout_ms == 0 && peer_is_gone(ch))) {
			/* It may have published between the read and its death. */
			n = km_ring_read(&ch->rx, &iov, 1, 0);
			if (n == 0 && (km_load_sync(FLAGS_SEE, &ring->pflags) &
				       (KM_P_FIN | KM_P_CLOSED)))
				return 0;
			return n ? n : -ECONNRESET;
		}
		if (timeout_ms == 0)
			return -EAGAIN;
		km_store_relaxed(&ring->cons_wait, next_flag(naps));
		km_fence_sync(CHANNEL_READ);
		if (!km_look_sync(CHANNEL_READ_LOOK,
				  km_ring_readable(&ch->rx) != 0 ||
					  (km_load_sync(FLAGS_SEE, &ring->pflags) &
					   (KM_P_FIN | KM_P_CLOSED)))) {
			err = nap(ch, &ring->cons_wait, next_flag(naps), &ch->epfd[0],
				  bell_fd(ch, rx, true), deadline);
			if (err < 0)
				return err;
		}
		naps++;
	}
}

ssize_t kmap_channel_write(kmap_channel *ch, const void *buf, size_t len,
			   int timeout_ms)
{
	struct iovec iov = {(void *)(uintptr_t)buf, len};
	struct km_wire_ring *ring = ch->tx.wire;
	int tx = tx_ring(ch);
	int64_t deadline = deadline_of(timeout_ms);
	unsigned naps = 0;

	if (ch->shut)
		return -EPIPE;
	for (;;) {
		uint32_t level = ch->tx.level;
		bool gone = naps != 0 && peer_is_gone(ch);
		ssize_t n;
		int err;

		/* The peer's own stream says whether it has closed altogether. */
		if (km_load_sync(FLAGS_SEE, &ch->rx.wire->pflags) & KM_P_CLOSED)
			return -EPIPE;
		if (gone || km_load_relaxed(&ch->dead))
			return -ECONNRESET;
		n = km_ring_write(&ch->tx, &iov, 1, SIZE_MAX);
		if (km_unlikely(ch->tx.level != level))
			km_add_relaxed(&ch->grows, ch->tx.level - level);
		if (n > 0) {
			wake(ch, &ring->cons_wait, bell_fd(ch, tx, true));
			return n;
		}
		if (n < 0 || len == 0)
			return n;
		if (timeout_ms == 0)
			return peer_is_gone(ch) ? -ECONNRESET : -EAGAIN;
		km_store_relaxed(&ring->prod_wait, next_flag(naps));
		km_fence_sync(CHANNEL_WRITE);
		if (!km_look_sync(
			    CHANNEL_WRITE_LOOK,
			    km_ring_writable(&ch->tx) != 0 ||
				    (km_load_sync(FLAGS_SEE, &ch->rx.wire->pflags) &
				     KM_P_CLOSED))) {
			err = nap(ch, &ring->prod_wait, next_flag(naps), &ch->epfd[1],
				  bell_fd(ch, tx, false), deadline);
			if (err < 0)
				return err;
		}
		naps++;
	}
}

static void end_stream(kmap_channel *ch, uint32_t flags)
{
	int tx = tx_ring(ch);

	km_store_sync(FLAGS_SET, &ch->tx.wire->pflags,
		      km_load_relaxed(&ch->tx.wire->pflags) | flags);
	wake(ch, &ch->tx.wire->cons_wait, bell_fd(ch, tx, true));
	/* A peer that waits for space must see that nobody will make any. */
	if (flags & KM_P_CLOSED)
		wake(ch, &ch->rx.wire->prod_wait, bell_fd(ch, 1 - tx, false));
}

int kmap_channel_shutdown(kmap_channel *ch)
{
	if (!ch->shut)
		end_stream(ch, KM_P_FIN);
	ch->shut = true;
	return 0;
}

size_t kmap_channel_readable(kmap_channel *ch)
{
	int64_t n = km_ring_readable(&ch->rx);

	return n < 0 ? 0 : (size_t)n;
}

size_t kmap_channel_unread(kmap_channel *ch)
{
	int64_t n = km_ring_unread(&ch->tx);

	return n < 0 ? 0 : (size_t)n;
}

void kmap_channel_close(kmap_channel *ch)
{
	if (!ch)
		return;
	if (ch->seg.wire && ch->tx.wire)
		end_stream(ch, KM_P_FIN | KM_P_CLOSED);
	km_segment_unmap(&ch->seg);
	forget_sets(ch);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		if (ch->fds[i] >= 0)
			km_sys_close(ch->fds[i]);
	free(ch);
}

void kmap_channel_get_stats(const kmap_channel *ch, struct kmap_channel_stats *out)
{
	*out = (struct kmap_channel_stats){
		.futex_wakes = km_load_relaxed(&ch->futex_wakes),
		.futex_sleeps = km_load_relaxed(&ch->futex_sleeps),
		.bells_rung = km_load_relaxed(&ch->bells_rung),
		.bell_sleeps = km_load_relaxed(&ch->bell_sleeps),
		.grows = km_load_relaxed(&ch->grows),
	};
}
