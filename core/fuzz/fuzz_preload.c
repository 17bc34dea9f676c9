/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The whole library as the victim: an upgraded TCP connection whose other end writes
 * anything into the segment and the bell at any time, while the victim sends, receives,
 * polls, waits and closes.  An honest connection in the same process has to go on.
 */
#include <errno.h>
#include <linux/sockios.h>

#include "event/event.h"
#include "liar.h"

static int epfd;

struct bout {
	struct fuzz_input in;
	struct liar l;
};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	liar_start();
	epfd = epoll_create1(EPOLL_CLOEXEC);
	return 0;
}

/* -- what the victim does ------------------------------------------------------------ */

static void victim_recv(struct bout *b, uint64_t how)
{
	static const int flags[] = {0,	      0,	   0,	      0,
				    MSG_PEEK, MSG_WAITALL, MSG_TRUNC, MSG_DONTWAIT};
	size_t len = fuzz_take(&b->in, 2) * (how & 8 ? 5 : 1);
	uint8_t *buf = malloc(len ? len : 1);
	struct iovec iov[2] = {{buf, len / 2}, {buf + len / 2, len - len / 2}};
	ssize_t n;

	if (how & 16)
		n = readv(b->l.victim, iov, 2);
	else
		n = recv(b->l.victim, buf, len, flags[how & 7]);
	FUZZ_CHECK(n <= (ssize_t)len);
	free(buf);
}

static void victim_send(struct bout *b, uint64_t how)
{
	size_t len = fuzz_take(&b->in, 2) * (how & 8 ? 5 : 1);
	uint8_t *buf = malloc(len ? len : 1);
	struct iovec iov[2] = {{buf, len / 2}, {buf + len / 2, len - len / 2}};
	ssize_t n;

	memset(buf, 'v', len);
	if (how & 16)
		n = writev(b->l.victim, iov, 2);
	else
		n = send(b->l.victim, buf, len,
			 MSG_NOSIGNAL | ((how & 7) == 7 ? MSG_OOB : 0));
	FUZZ_CHECK(n <= (ssize_t)len);
	free(buf);
}

static void victim_events(struct bout *b, uint64_t how)
{
	struct epoll_event ev = {.events = (uint32_t)fuzz_take(&b->in, 1) |
					   (how & 4 ? EPOLLET : 0) |
					   (how & 8 ? EPOLLONESHOT : 0)},
			   got[4];
	struct pollfd pfd = {b->l.victim, (short)fuzz_take(&b->in, 1), 0};

	ev.data.u64 = 4711;
	switch (how & 3) {
	case 0:
		poll(&pfd, 1, (how & 24) == 24);
		break;
	case 1:
		epoll_ctl(epfd, 1 + (int)(how >> 2) % 3, b->l.victim, &ev);
		break;
	default: {
		int n = epoll_wait(epfd, got, 4, (how & 24) == 24);

		for (int i = 0; i < n; i++)
			FUZZ_CHECK(got[i].data.u64 == 4711);
	}
	}
}

static void victim_asks(struct bout *b, uint64_t how)
{
	static const unsigned long requests[] = {FIONREAD, SIOCOUTQ, SIOCATMARK};
	int value = 0, pair[2];

	switch (how & 15) {
	case 8:
		shutdown(b->l.victim, how >> 4 & 1);
		break;
	case 9:
		/* Given to another program: back to the kernel. */
		if (how >> 4 == 3 && socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0) {
			_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
			struct iovec iov = {"", 1};
			struct msghdr msg = {.msg_iov = &iov,
					     .msg_iovlen = 1,
					     .msg_control = control,
					     .msg_controllen = sizeof(control)};
			struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

			memset(control, 0, sizeof(control));
			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(c), &b->l.victim, sizeof(int));
			sendmsg(pair[0], &msg, MSG_DONTWAIT);
			close(pair[0]);
			close(pair[1]);
		}
		break;
	case 10:
		value = (int)fuzz_take(&b->in, 2);
		setsockopt(b->l.victim, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
		break;
	default:
		ioctl(b->l.victim, requests[how % KM_COUNT(requests)], &value);
		FUZZ_CHECK(value >= 0);
	}
}

/* -- what the liar does ----------------------------------------------------------------- */

static void liar_acts(struct bout *b, uint64_t how)
{
	static uint8_t buf[65536];
	struct liar *l = &b->l;
	struct iovec iov = {buf, fuzz_take(&b->in, 2)};

	switch (how & 7) {
	case 0:
	case 1:
		/* Its own stream's cut-over, which an honest end does first. */
		if (!(km_load_seq(&l->tx.wire->pflags) & KM_P_CUT)) {
			km_store_seq(&l->tx.wire->cut, 3 + (how >> 6 == 3));
			km_or_seq(&l->tx.wire->pflags, KM_P_CUT);
		}
		km_ring_write(&l->tx, &iov, 1, SIZE_MAX);
		break;
	case 2:
	case 3:
		km_ring_read(&l->rx, &iov, 1, 0);
		break;
	case 4:
		km_sys_sendto(l->tcp, buf, how >> 4, MSG_DONTWAIT | MSG_NOSIGNAL, NULL,
			      0);
		break;
	case 5:
		km_sys_recvfrom(l->tcp, buf, sizeof(buf), MSG_DONTWAIT);
		break;
	case 6:
		if (how >> 5 == 7)
			km_sys_shutdown(l->tcp, SHUT_WR);
		km_latch_ring(l->latch);
		break;
	default: {
		struct km_file *f = km_file_of(l->victim);

		/* An honest hint: its connection has news. */
		if (f && f->bell) {
			km_or_seq(&l->bell->news[f->slot / 64],
				  (uint64_t)1 << f->slot % 64);
			km_or_seq(&l->bell->summary[f->slot / 4096],
				  (uint64_t)1 << f->slot / 64 % 64);
			km_latch_ring(l->latch);
		}
	}
	}
}

static void lie(struct bout *b)
{
	struct fuzz_storm_write w = liar_pick(&b->l, &b->in);

	memcpy(w.at, &w.value, w.bytes);
}

static void storm(struct bout *b, uint64_t how)
{
	struct fuzz_storm_write writes[FUZZ_STORM_WRITES];
	unsigned n = 1 + (unsigned)how % FUZZ_STORM_WRITES;

	for (unsigned i = 0; i < n; i++)
		writes[i] = liar_pick(&b->l, &b->in);
	fuzz_storm_start(writes, n);
}

static void step(struct bout *b)
{
	uint64_t op = fuzz_take(&b->in, 1), how = fuzz_take(&b->in, 1);

	switch (op & 15) {
	case 0:
	case 1:
	case 2:
	case 3:
		lie(b);
		break;
	case 4:
	case 5:
	case 6:
		victim_recv(b, how);
		break;
	case 7:
	case 8:
		victim_send(b, how);
		break;
	case 9:
	case 10:
		victim_events(b, how);
		break;
	case 11:
		victim_asks(b, how);
		break;
	case 12:
		if (op >> 4 == 7)
			storm(b, how);
		else
			fuzz_storm_stop();
		break;
	default:
		liar_acts(b, how);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bout b = {.in = {data, data + size}};
	uint64_t how = fuzz_take(&b.in, 1);

	km_proc.options.ring_size = how & 4 ? 262144 : 4096;
	liar_note_victim();
	liar_connect(&b.l, how & 1, (how & 0xf0) == 0x10);
	if (!liar_handshake(&b.l)) {
		liar_end(&b.l);
		FUZZ_CHECK(!"the handshake did not succeed");
	}
	for (int steps = 0; b.in.at < b.in.end && steps < 100; steps++)
		step(&b);
	liar_end(&b.l);
	liar_check_victim();
	return 0;
}
