/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rendezvous, with a victim in either role: messages of any length and content, with
 * any descriptors, at any time; a segment that is changed while it is attached.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "event/event.h"
#include "liar.h"

#define POOL 24
#define MOST_FDS 20

static int pool[POOL], pooled, epfd;
static struct km_segment good;
static uint8_t template[KM_WIRE_HEADER];

static void add(int fd)
{
	FUZZ_CHECK(fd >= 0 && pooled < POOL);
	pool[pooled++] = fd;
}

static int memfd(int64_t size, int seals)
{
	int fd = km_sys_memfd_create("pool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	struct km_wire_segment *wire = (void *)template;

	FUZZ_CHECK(km_sys_ftruncate(fd, size) == 0);
	FUZZ_CHECK(size < (int64_t)sizeof(template) ||
		   km_sys_write(fd, wire, sizeof(template)) == sizeof(template));
	if (seals)
		FUZZ_CHECK(km_sys_fcntl(fd, F_ADD_SEALS, seals) == 0);
	return fd;
}

static void make_pool(void)
{
	const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	int fd, pair[2], bell[2];

	/* Those of a proper hello first. */
	FUZZ_CHECK(km_segment_create(&good, 4096, false, &fd) == 0);
	memcpy(template, good.wire, sizeof(template));
	add(fd);
	liar_bell(bell);
	add(bell[0]);
	add(bell[1]);
	add(memfd((int64_t)good.size, 0));
	add(memfd((int64_t)good.size, F_SEAL_SHRINK | F_SEAL_GROW));
	add(memfd((int64_t)good.size, seals | F_SEAL_WRITE));
	add(memfd((int64_t)good.size + 4096, seals));
	add(memfd(4096, seals));
	add(memfd(0, seals));
	add(memfd((int64_t)1 << 40, seals));
	add(memfd(KM_BELL_SIZE, 0));
	add(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	add(open("/dev/full", O_RDWR | O_CLOEXEC));
	add(open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC));
	add(epoll_create1(EPOLL_CLOEXEC));
	add(eventfd(0, EFD_CLOEXEC));
	add(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	add(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
	FUZZ_CHECK(pipe2(pair, O_CLOEXEC) == 0);
	add(pair[0]);
	add(pair[1]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	liar_start();
	make_pool();
	epfd = epoll_create1(EPOLL_CLOEXEC);
	return 0;
}

struct bout {
	struct fuzz_input in;
	struct liar l;
};

/* A proper message of its role with some of it overwritten. */
static void say(struct bout *b, uint64_t how)
{
	union {
		struct km_wire_hello hello;
		uint8_t bytes[256];
	} m = {.hello = {.magic = KM_HELLO_MAGIC,
			 .version = KM_WIRE_VERSION,
			 .kind = b->l.victim_connects ? KM_HELLO : KM_ACK}};
	size_t n = sizeof(m.hello);
	struct sockaddr_in local;
	socklen_t len = sizeof(local);
	int fds[MOST_FDS], nfds = b->l.victim_connects ? 3 : 2;

	for (int i = 0; i < nfds; i++)
		fds[i] = pool[b->l.victim_connects ? i : i + 1];
	km_sys_getsockname(b->l.tcp, &local, &len);
	m.hello.lport = ntohs(local.sin_port);
	m.hello.laddr[10] = m.hello.laddr[11] = 0xff;
	memcpy(m.hello.laddr + 12, &local.sin_addr, 4);
	for (uint64_t i = how & 3; i; i--) {
		size_t at = fuzz_take(&b->in, 1) % (sizeof(m.hello) / 4) * 4;
		uint32_t old, value;

		memcpy(&old, m.bytes + at, 4);
		value = (uint32_t)fuzz_value(&b->in, old);
		memcpy(m.bytes + at, &value, 4);
	}
	if (how & 4)
		n = fuzz_take(&b->in, 1);
	if (how & 8)
		nfds = (int)(fuzz_take(&b->in, 1) % (MOST_FDS + 1));
	for (uint64_t i = how >> 4 & 3; i && nfds; i--) {
		int which = (int)fuzz_take(&b->in, 1);

		fds[(which >> 5) % nfds] = pool[which % pooled];
	}
	for (int i = 3; i < nfds; i++)
		fds[i] = pool[(int)(how + (uint64_t)i) % pooled];
	if (!b->l.victim_connects && nfds > 2)
		fds[2] = pool[how % (uint64_t)pooled];
	liar_send(b->l.hello, m.bytes, n, fds, nfds);
}

static void listen_in(struct bout *b)
{
	struct km_wire_hello hello;
	int fds[LIAR_FDS], n = liar_recv(b->l.hello, &hello, fds);

	/* The victim's segment and bell are the liar's from now on. */
	if (n == 3 && !b->l.seg.wire)
		km_segment_attach(&b->l.seg, false, fds[0]);
	if (n >= 2 && !b->l.bell) {
		void *p = mmap(NULL, KM_BELL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
			       fds[n - 2], 0);

		b->l.bell = p == MAP_FAILED ? NULL : p;
	}
	for (int i = 0; i < n; i++)
		km_sys_close(fds[i]);
}

static void victim_acts(struct bout *b, uint64_t how)
{
	struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT}, got[2];
	struct pollfd pfd = {b->l.victim, POLLIN | POLLOUT, 0};
	char bytes[64];

	switch (how & 7) {
	case 0:
		poll(&pfd, 1, 0);
		break;
	case 1:
		epoll_ctl(epfd, EPOLL_CTL_ADD, b->l.victim, &ev);
		break;
	case 2:
		epoll_wait(epfd, got, 2, 0);
		break;
	case 3:
		send(b->l.victim, bytes, how >> 3, MSG_NOSIGNAL);
		break;
	case 4:
		recv(b->l.victim, bytes, how >> 3, 0);
		break;
	default:
		liar_warm(&b->l);
	}
}

static void step(struct bout *b)
{
	uint64_t op = fuzz_take(&b->in, 1), how = fuzz_take(&b->in, 1);
	struct km_wire_segment *wire = b->l.seg.wire ? b->l.seg.wire : good.wire;
	struct fuzz_storm_write w;

	switch (op & 7) {
	case 0:
	case 1:
		say(b, how);
		break;
	case 2:
		km_store_seq(&wire->state, how & 7);
		break;
	case 3:
		listen_in(b);
		break;
	case 4:
		if (b->l.seg.wire || b->l.bell) {
			w = liar_pick(&b->l, &b->in);
			memcpy(w.at, &w.value, w.bytes);
		} else {
			w.value = fuzz_value(&b->in, 0);
			memcpy((uint8_t *)wire + how % 7 * 4, &w.value, 4);
		}
		break;
	case 5:
		if (how >= 192 && b->l.hello >= 0) {
			km_sys_close(b->l.hello);
			b->l.hello = -1;
		} else if (how >= 176) {
			w = (struct fuzz_storm_write){(uint8_t *)&wire->ring_size,
						      how << 12, 4};
			fuzz_storm_start(&w, 1);
		}
		break;
	default:
		victim_acts(b, how);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bout b = {.in = {data, data + size}};
	uint64_t how = fuzz_take(&b.in, 1);

	memcpy(good.wire, template, sizeof(template));
	km_proc.options.ring_size = 4096;
	liar_note_victim();
	liar_connect(&b.l, how & 1, false);
	FUZZ_CHECK(liar_meet(&b.l));
	for (int steps = 0; b.in.at < b.in.end && steps < 60; steps++)
		step(&b);
	liar_end(&b.l);
	liar_check_victim();
	return 0;
}
