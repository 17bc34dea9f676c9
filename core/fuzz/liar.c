/* SPDX-License-Identifier: Apache-2.0 */
#include "liar.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/un.h>

static int listener, bell_fds[2];
static uint16_t port;
static struct km_wire_bell *own_bell;

static int shared_file(size_t size, void **memory)
{
	int fd = km_sys_memfd_create("liar", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	FUZZ_CHECK(km_sys_ftruncate(fd, (int64_t)size) == 0);
	km_sys_fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	*memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	FUZZ_CHECK(*memory != MAP_FAILED);
	return fd;
}

/* Another address each time: a port that waits in TIME_WAIT is free towards others. */
static struct sockaddr_in next_address(void)
{
	static uint32_t host;
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = port};

	host = (host + 1) % 0xfffff0;
	in.sin_addr.s_addr = htonl(0x7f000001 + host);
	return in;
}

/* libFuzzer's timer interrupts calls. */
static bool connected(int result)
{
	return result == 0 || result == -EISCONN;
}

static bool again(int result)
{
	return result == -EINTR || result == -EALREADY;
}

static int accept_raw(void)
{
	int fd;

	do
		fd = km_sys_accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	while (fd == -EINTR);
	return fd;
}

static void connect_raw(int fd, const struct sockaddr_in *to)
{
	int err;

	do
		err = km_sys_connect(fd, to, sizeof(*to));
	while (again(err));
	FUZZ_CHECK(connected(err));
}

static void connect_tracked(int fd, const struct sockaddr_in *to)
{
	int err;

	do
		err = connect(fd, (const struct sockaddr *)to, sizeof(*to)) < 0 ? -errno
										: 0;
	while (again(err));
	FUZZ_CHECK(connected(err));
}

static int neighbour[2];

static void check_neighbour(void)
{
	char byte = 0;

	for (int i = 0; i < 2; i++) {
		FUZZ_CHECK(send(neighbour[i], "n", 1, MSG_DONTWAIT) == 1);
		FUZZ_CHECK(recv(neighbour[1 - i], &byte, 1, 0) == 1 && byte == 'n');
	}
}

static void start_neighbour(void)
{
	struct sockaddr_in in = next_address();

	neighbour[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	connect_tracked(neighbour[0], &in);
	neighbour[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	for (int i = 0; i < 10; i++)
		check_neighbour();
	FUZZ_CHECK(km_load_seq(&km_proc.channels) == 2);
}

void liar_start(void)
{
	struct sockaddr_in in = {.sin_family = AF_INET};
	socklen_t len = sizeof(in);
	void *memory;

	listener = km_sys_socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	FUZZ_CHECK(km_sys_bind(listener, &in, len) == 0);
	FUZZ_CHECK(km_sys_listen(listener, 64) == 0);
	FUZZ_CHECK(km_sys_getsockname(listener, &in, &len) == 0);
	port = in.sin_port;
	bell_fds[0] = shared_file(KM_BELL_SIZE, &memory);
	own_bell = memory;
	own_bell->magic = KM_BELL_MAGIC;
	own_bell->version = KM_WIRE_VERSION;
	own_bell->slots = KM_BELL_SLOTS;
	bell_fds[1] = km_latch_open();
	signal(SIGPIPE, SIG_IGN);
	km_proc.options.upgrade_after = 1;
	start_neighbour();
}

void liar_bell(int fds[2])
{
	memcpy(fds, bell_fds, sizeof(bell_fds));
}

void liar_connect(struct liar *l, bool victim_connects, bool blocking)
{
	struct sockaddr_in to = next_address();
	struct timeval tv = {0, 2000};

	memset(l, 0, sizeof(*l));
	l->listener = l->hello = l->latch = -1;
	l->victim_connects = victim_connects;
	if (victim_connects) {
		l->victim = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		connect_tracked(l->victim, &to);
		l->tcp = accept_raw();
	} else {
		l->tcp = km_sys_socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		connect_raw(l->tcp, &to);
		do
			l->victim = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		while (l->victim < 0 && errno == EINTR);
	}
	FUZZ_CHECK(l->tcp >= 0 && l->victim >= 0);
	if (blocking) {
		setsockopt(l->victim, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
		setsockopt(l->victim, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
	} else {
		fcntl(l->victim, F_SETFL, O_NONBLOCK);
	}
}

void liar_warm(struct liar *l)
{
	char byte;

	send(l->victim, "w", 1, MSG_NOSIGNAL);
	km_sys_recvfrom(l->tcp, &byte, 1, MSG_DONTWAIT);
	km_sys_sendto(l->tcp, "w", 1, MSG_NOSIGNAL, NULL, 0);
	recv(l->victim, &byte, 1, 0);
}

/* -- the rendezvous ------------------------------------------------------------------ */

static void put_hex(char **at, const struct sockaddr_in *in)
{
	uint8_t bytes[18] = {[10] = 0xff, [11] = 0xff};

	memcpy(bytes + 12, &in->sin_addr, 4);
	memcpy(bytes + 16, &in->sin_port, 2);
	for (int i = 0; i < 18; i++)
		*at += sprintf(*at, "%02x", bytes[i]);
}

static socklen_t name_of(const struct liar *l, struct sockaddr_un *un)
{
	struct sockaddr_in local, peer;
	socklen_t len = sizeof(local);
	char text[128], *at = text;

	km_sys_getsockname(l->tcp, &local, &len);
	len = sizeof(peer);
	km_sys_getpeername(l->tcp, &peer, &len);
	at += sprintf(at, "kmap1:");
	put_hex(&at, l->victim_connects ? &peer : &local);
	put_hex(&at, l->victim_connects ? &local : &peer);
	memset(un, 0, sizeof(*un));
	un->sun_family = AF_UNIX;
	memcpy(un->sun_path + 1, text, (size_t)(at - text));
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
			   (size_t)(at - text));
}

ssize_t liar_send(int sock, const void *bytes, size_t n, const int *fds, int nfds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * 64)];
	struct iovec iov = {(void *)(uintptr_t)bytes, n};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (nfds) {
		struct cmsghdr *c;

		memset(control, 0, sizeof(control));
		msg.msg_control = control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)nfds);
	}
	return km_sys_sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
}

int liar_recv(int sock, struct km_wire_hello *hello, int fds[LIAR_FDS])
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * LIAR_FDS)];
	struct iovec iov = {hello, sizeof(*hello)};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control,
			     .msg_controllen = sizeof(control)};
	ssize_t n = km_sys_recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct cmsghdr *c;
	int count = 0;

	if (n <= 0)
		return -1;
	c = CMSG_FIRSTHDR(&msg);
	if (c) {
		count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)count * sizeof(int));
	}
	return count;
}

bool liar_meet(struct liar *l)
{
	struct sockaddr_un un;
	socklen_t len = name_of(l, &un);
	int sock = km_sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (l->victim_connects) {
		liar_warm(l);
		liar_warm(l);
		if (km_sys_connect(sock, &un, len) < 0) {
			km_sys_close(sock);
			return false;
		}
		l->hello = sock;
		return true;
	}
	FUZZ_CHECK(km_sys_bind(sock, &un, len) == 0);
	FUZZ_CHECK(km_sys_listen(sock, 4) == 0);
	l->listener = sock;
	liar_warm(l);
	liar_warm(l);
	l->hello = km_sys_accept4(sock, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	return l->hello >= 0;
}

static void take_bell(struct liar *l, int memfd, int latch)
{
	l->bell =
		mmap(NULL, KM_BELL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	FUZZ_CHECK(l->bell != MAP_FAILED);
	km_sys_close(memfd);
	l->latch = latch;
}

static void cursors(struct liar *l)
{
	int tx = l->victim_connects ? 1 : 0;

	km_producer_init(&l->tx, &l->seg.wire->ring[tx], km_segment_data(&l->seg, tx),
			 l->seg.ring_size);
	km_consumer_init(&l->rx, &l->seg.wire->ring[1 - tx],
			 km_segment_data(&l->seg, 1 - tx), l->seg.ring_size);
}

static bool as_acceptor(struct liar *l)
{
	struct km_wire_hello hello = {
		.magic = KM_HELLO_MAGIC, .version = KM_WIRE_VERSION, .kind = KM_HELLO};
	struct sockaddr_in local;
	socklen_t len = sizeof(local);
	int fds[3], got[LIAR_FDS];

	FUZZ_CHECK(km_segment_create(&l->seg, (uint32_t)km_proc.options.ring_size,
				     false, &fds[0]) == 0);
	memcpy(fds + 1, bell_fds, sizeof(bell_fds));
	km_sys_getsockname(l->tcp, &local, &len);
	hello.lport = ntohs(local.sin_port);
	hello.laddr[10] = hello.laddr[11] = 0xff;
	memcpy(hello.laddr + 12, &local.sin_addr, 4);
	liar_send(l->hello, &hello, sizeof(hello), fds, 3);
	km_sys_close(fds[0]);
	cursors(l);
	liar_warm(l);
	if (liar_recv(l->hello, &hello, got) != 2)
		return false;
	take_bell(l, got[0], got[1]);
	km_store_seq(&l->seg.wire->state, KM_SEG_READY);
	return true;
}

static bool as_connector(struct liar *l)
{
	struct km_wire_hello hello, ack = {.magic = KM_HELLO_MAGIC,
					   .version = KM_WIRE_VERSION,
					   .kind = KM_ACK};
	int fds[LIAR_FDS];

	if (liar_recv(l->hello, &hello, fds) != 3)
		return false;
	FUZZ_CHECK(km_segment_attach(&l->seg, false, fds[0]) == 0);
	km_sys_close(fds[0]);
	take_bell(l, fds[1], fds[2]);
	cursors(l);
	liar_send(l->hello, &ack, sizeof(ack), bell_fds, 2);
	km_store_seq(&l->seg.wire->state, KM_SEG_ATTACHED);
	liar_warm(l);
	return true;
}

bool liar_handshake(struct liar *l)
{
	if (!liar_meet(l))
		return false;
	return l->victim_connects ? as_acceptor(l) : as_connector(l);
}

void liar_end(struct liar *l)
{
	struct linger linger = {1, 0};

	fuzz_storm_stop();
	km_sys_setsockopt(l->tcp, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	km_sys_close(l->tcp);
	if (l->victim >= 0)
		close(l->victim);
	if (l->hello >= 0)
		km_sys_close(l->hello);
	if (l->listener >= 0)
		km_sys_close(l->listener);
	if (l->latch >= 0)
		km_sys_close(l->latch);
	if (l->bell)
		munmap(l->bell, KM_BELL_SIZE);
	km_segment_unmap(&l->seg);
}

/* -- lies -------------------------------------------------------------------------------- */

static uint8_t *ring_field(struct km_wire_ring *ring, uint64_t which, uint8_t *bytes)
{
	km_a32 *words[] = {&ring->pflags, &ring->cons_wait, &ring->prod_wait,
			   &ring->left};
	km_a64 *positions[] = {&ring->wpos,	  &ring->rpos, &ring->grow_at[0],
			       &ring->grow_at[1], &ring->cut,  &ring->end,
			       &ring->stop,	  &ring->wpos};

	if (which & 1) {
		*bytes = 4;
		return (uint8_t *)words[which >> 1 & 3];
	}
	return (uint8_t *)positions[which >> 1 & 7];
}

struct fuzz_storm_write liar_pick(struct liar *l, struct fuzz_input *in)
{
	struct fuzz_storm_write w = {.bytes = 8};
	uint64_t which = fuzz_take(in, 1), now;
	uint32_t word;

	if (which < 208 && l->seg.wire) {
		w.at = ring_field(&l->seg.wire->ring[which >> 4 & 1], which, &w.bytes);
	} else if (which < 224 && l->seg.wire) {
		w.at = (uint8_t *)l->seg.wire +
		       fuzz_take(in, 2) % (KM_WIRE_HEADER / 8) * 8;
	} else if (which < 240 && l->bell) {
		w.at = (uint8_t *)l->bell + fuzz_take(in, 2) % (KM_BELL_SIZE / 8) * 8;
	} else if (l->bell && which < 248) {
		w.at = (uint8_t *)&l->bell->summary[which & 3];
	} else {
		w.at = (uint8_t *)&own_bell->sleep;
	}
	if (w.bytes == 8) {
		memcpy(&now, w.at, 8);
		w.value = fuzz_value(in, now);
	} else {
		memcpy(&word, w.at, 4);
		w.value = fuzz_take(in, 1);
		w.value = w.value & 128 ? word | (w.value & 15) : w.value & 31;
	}
	return w;
}

static int lowest_free(int from)
{
	int fd = km_sys_fcntl(listener, F_DUPFD, from);

	km_sys_close(fd);
	return fd;
}

static int low, high;

void liar_note_victim(void)
{
	low = lowest_free(0);
	if (!high)
		high = lowest_free(900);
}

void liar_check_victim(void)
{
	FUZZ_CHECK(km_load_seq(&km_proc.files) == 2);
	FUZZ_CHECK(km_load_seq(&km_proc.channels) == 2);
	check_neighbour();
	FUZZ_CHECK(lowest_free(0) == low);
	/* Bells stay for the next connection. */
	FUZZ_CHECK(lowest_free(900) <= high + 16);
}
