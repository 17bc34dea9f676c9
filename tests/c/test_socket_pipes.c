/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes in kernel pipes: what the positions promise fits, however it is written and read;
 * looking takes nothing; bad pointers and a peer that meddles with the pipe do no harm.
 */
#include "socket_pair.h"
#include "transport/pipes.h"

#define MOST (1u << 18)
#define PAGE 4096

static struct {
	struct km_segment seg;
	struct km_producer p;
	struct km_consumer c;
	int tx, rx; /* both ends' descriptors of ring 0 */
	uint32_t size;
} end;

static uint8_t out[2 * MOST], in[2 * MOST];
static uint32_t random_state = 1;

static uint32_t any(uint32_t limit)
{
	random_state = random_state * 1664525u + 1013904223u;
	return (random_state >> 8) % limit;
}

static uint8_t pattern(uint64_t at)
{
	return (uint8_t)(at * 131 + (at >> 8) * 7 + (at >> 16));
}

static void open_ends(uint32_t size)
{
	const struct km_transport *transport = &km_transport_pipe;
	int made[2], sent[2], taken[2], fd;

	CHECK_IS(km_segment_create(&end.seg, size, true, &fd), 0);
	close(fd);
	CHECK_IS(transport->create(end.seg.wire->token, &size, made, sent), 0);
	/* As much as the library thinks that they take. */
	while (km_pipes_check(made, size + PAGE) == 0)
		size += PAGE;
	km_segment_resize(&end.seg, size);
	CHECK_IS(transport->attach(end.seg.wire->token, size, sent, taken), 0);
	close(sent[0]);
	close(sent[1]);
	CHECK(km_segment_data(&end.seg, 0) == NULL);
	km_producer_init(&end.p, &end.seg.wire->ring[0], NULL, size);
	km_consumer_init(&end.c, &end.seg.wire->ring[0], NULL, size);
	end.tx = taken[0];
	end.rx = made[0];
	end.size = size;
	km_fd_unhide(made[1]);
	km_fd_unhide(taken[1]);
}

static void close_ends(void)
{
	km_fd_unhide(end.tx);
	km_fd_unhide(end.rx);
	km_segment_unmap(&end.seg);
}

/* In one to three parts. */
static int parts_of(uint8_t *buf, size_t n, struct iovec iov[3])
{
	size_t first = any((uint32_t)n + 1), second = any((uint32_t)(n - first) + 1);

	iov[0] = (struct iovec){buf, first};
	iov[1] = (struct iovec){buf + first, second};
	iov[2] = (struct iovec){buf + first + second, n - first - second};
	if (any(2)) {
		iov[0].iov_len = n;
		return 1;
	}
	return 3;
}

static ssize_t put(size_t n)
{
	struct iovec iov[3];

	for (size_t i = 0; i < n; i++)
		out[i] = pattern(end.p.w + i);
	return km_pipes_put(&end.p, end.tx, iov, parts_of(out, n, iov), SIZE_MAX);
}

static ssize_t get(size_t n, unsigned how)
{
	struct iovec iov[3];
	uint64_t at = end.c.r;
	int parts = parts_of(in, n, iov);
	ssize_t got = km_pipes_get(&end.c, end.rx, iov, parts, how);

	for (ssize_t i = 0; i < got && !(how & KM_RING_DISCARD); i++)
		CHECK_IS(in[i], pattern(at + (uint64_t)i));
	return got;
}

static uint64_t unread(void)
{
	return end.p.w - end.c.r;
}

/* Sizes around those at which the kernel merges bytes into a page, or does not. */
static uint32_t a_size(void)
{
	static const uint32_t edges[] = {1,	   2,	     PAGE / 2, PAGE / 2 + 1,
					 PAGE - 1, PAGE,     PAGE + 1, 2 * PAGE - 1,
					 2 * PAGE, 3 * PAGE, 16384,    65536};

	return any(2) ? edges[any(KM_COUNT(edges))] : 1 + any(3 * PAGE);
}

static void replay(void)
{
	uint64_t at = end.c.r + any((uint32_t)unread() + 1);
	size_t room = 1 + any(16384);
	uint8_t buf[16384];
	ssize_t n;

	CHECK_IS(km_ring_unread(&end.p), unread());
	n = km_pipes_replay(&end.p, end.tx, at, buf, room);
	CHECK_IS(n, KM_MIN(room, end.p.w - at));
	for (ssize_t i = 0; i < n; i++)
		CHECK_IS(buf[i], pattern(at + (uint64_t)i));
}

static void what_is_promised_fits(uint32_t wanted)
{
	open_ends(wanted);
	CHECK(end.size >= wanted && end.size <= sizeof(out));
	for (unsigned round = 0; round < unit_rounds(20000); round++) {
		size_t n = a_size();

		uint64_t there = unread(), room = end.size - there;

		n = KM_MIN(n, sizeof(out));
		switch (any(8)) {
		case 0:
		case 1:
		case 2:
		case 3:
			CHECK_IS(put(n), KM_MIN(n, room));
			break;
		case 4:
		case 5:
			CHECK_IS(get(n, 0), KM_MIN(n, there));
			break;
		case 6:
			CHECK_IS(get(n, any(2) ? KM_RING_PEEK : KM_RING_DISCARD),
				 KM_MIN(n, there));
			break;
		case 7:
			replay();
			break;
		}
		unit_progress(round);
	}
	close_ends();
}

/* The most wasteful writes there are, and a reader that leaves a byte on the first page. */
static void the_worst_fits(uint32_t wanted, uint32_t each)
{
	open_ends(wanted);
	CHECK_IS(put(PAGE), PAGE);
	CHECK_IS(get(PAGE - 1, 0), PAGE - 1);
	while (unread() < end.size) {
		size_t n = KM_MIN(each, end.size - unread());

		CHECK_IS(put(n), n);
		each = each == 1 ? PAGE : each == PAGE ? 1 : each;
	}
	CHECK_IS(put(1), 0);
	while (unread())
		CHECK(get(MOST, 0) > 0);
	close_ends();
}

/* More bad pointers than the pipe has pages, with and without bytes in it. */
static void bad_pointers_do_no_harm(uint32_t before)
{
	void *bad = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec nowhere = {bad, 8 * PAGE}, half[2] = {{out, PAGE}, {bad, PAGE}};
	uint64_t w;

	open_ends(65536);
	if (before)
		CHECK_IS(put(before), before);
	for (int i = 0; i < 200; i++) {
		ssize_t n = km_pipes_put(&end.p, end.tx, &nowhere, 1, SIZE_MAX);

		/* With its slots used up it is full, until somebody reads. */
		CHECK(n == -EFAULT || (n == 0 && before));
		CHECK_IS(end.p.w - end.c.r, before);
	}
	CHECK_IS(km_pipes_get(&end.c, end.rx, &nowhere, 1, 0), before ? -EFAULT : 0);
	CHECK_IS(km_pipes_get(&end.c, end.rx, &nowhere, 1, KM_RING_PEEK),
		 before ? -EFAULT : 0);
	CHECK_IS(get(MOST, KM_RING_PEEK), before);
	CHECK_IS(get(MOST, 0), before);
	for (int i = 0; i < 100; i++) {
		w = end.p.w;
		for (size_t k = 0; k < PAGE; k++)
			out[k] = pattern(w + k);
		/* The part that is there may go, as on the kernel. */
		CHECK_IS(km_pipes_put(&end.p, end.tx, half, 2, SIZE_MAX), PAGE);
		CHECK_IS(end.p.w, w + PAGE);
		CHECK_IS(get(PAGE, 0), PAGE);
	}
	CHECK_IS(put(end.size), end.size);
	CHECK_IS(get(MOST, 0), end.size);
	close_ends();
	munmap(bad, 8 * PAGE);
}

/* What older kernels leave behind bad pointers, as far as it can be had on all: a full
 * pipe is one to wait for while there is something to read, and no excuse otherwise. */
static void holes_are_waited_for(void)
{
	uint8_t junk[PAGE] = {0};

	open_ends(65536);
	CHECK_IS(put(100), 100);
	while (write(end.rx, junk, sizeof(junk)) > 0)
		continue;
	end.p.holes = 1;
	CHECK_IS(put(1), 0);
	CHECK_IS(get(100, 0), 100);
	while (write(end.rx, junk, sizeof(junk)) > 0)
		continue;
	CHECK_IS(put(1), -EPROTO);
	close_ends();
}

static void meddling_is_found_out(void)
{
	uint8_t junk[PAGE] = {0};
	int n = 0;

	/* The peer fills the pipe itself. */
	open_ends(65536);
	while (write(end.rx, junk, sizeof(junk)) > 0)
		n++;
	CHECK(n > 1);
	CHECK_IS(put(1), -EPROTO);
	close_ends();
	/* Takes what it says that it has not. */
	open_ends(65536);
	CHECK_IS(put(100), 100);
	CHECK_IS(read(end.tx, junk, 50), 50);
	CHECK_IS(km_ring_unread(&end.p), 100);
	CHECK_IS(km_pipes_replay(&end.p, end.tx, 0, in, 100), -EPROTO);
	close_ends();
	/* Publishes what is not there. */
	open_ends(65536);
	km_store_seq(&end.seg.wire->ring[0].wpos, 10);
	CHECK_IS(get(10, KM_RING_PEEK), -EPROTO);
	CHECK_IS(get(10, KM_RING_DISCARD), -EPROTO);
	CHECK_IS(get(10, 0), -EPROTO);
	km_store_seq(&end.seg.wire->ring[0].wpos, end.size + 1);
	CHECK_IS(get(10, 0), -EPROTO);
	close_ends();
	/* Makes it smaller. */
	open_ends(65536);
	CHECK(fcntl(end.rx, F_SETPIPE_SZ, PAGE) >= PAGE);
	CHECK_IS(put(4 * PAGE), -EPROTO);
	close_ends();
}

/* What is sent is a description of its own: by changing it nobody makes a call block. */
static void descriptions_are_not_shared(void)
{
	uint8_t token[16] = {0};
	uint32_t size = 4096;
	int made[2], sent[2], taken[2];

	CHECK_IS(km_transport_pipe.create(token, &size, made, sent), 0);
	CHECK_IS(km_transport_pipe.attach(token, size, sent, taken), 0);
	for (int i = 0; i < 2; i++) {
		CHECK_IS(fcntl(sent[i], F_SETFL, 0), 0);
		CHECK_IS(fcntl(made[i], F_GETFL) & O_NONBLOCK, O_NONBLOCK);
		CHECK_IS(fcntl(taken[i], F_SETFL, 0), 0);
		CHECK_IS(fcntl(made[i], F_GETFL) & O_NONBLOCK, O_NONBLOCK);
		close(sent[i]);
		km_fd_unhide(made[i]);
		km_fd_unhide(taken[i]);
	}
}

static void others_are_refused(void)
{
	uint8_t token[16] = {0};
	int fds[2], other[2], strange[2], taken[2];

	CHECK_IS(pipe(fds), 0);
	CHECK_IS(pipe(other), 0);
	strange[0] = open("/dev/null", O_RDWR);
	strange[1] = fds[0];
	CHECK_IS(km_transport_pipe.attach(token, 4096, strange, taken), -EPROTO);
	/* Sixteen pages hold eight pages' worth for sure. */
	strange[0] = other[0];
	CHECK_IS(km_transport_pipe.attach(token, 8 * PAGE + 1, strange, taken),
		 -EPROTO);
	CHECK_IS(km_transport_pipe.attach(token, 8 * PAGE, strange, taken), 0);
	km_fd_unhide(taken[0]);
	km_fd_unhide(taken[1]);
	/* One pipe twice would be a mirror; it is the peer's own connection. */
	for (int i = 0; i < 2; i++) {
		close(fds[i]);
		close(other[i]);
	}
}

int main(void)
{
	static const uint32_t sizes[] = {4096, 16384, 65536, MOST};
	static const uint32_t each[] = {1, PAGE / 2 + 1, PAGE - 1, PAGE, PAGE + 1};

	unit_watchdog();
	socket_library(65536);
	if (getpagesize() != PAGE)
		return 77;
	for (unsigned i = 0; i < KM_COUNT(sizes); i++) {
		what_is_promised_fits(sizes[i]);
		for (unsigned k = 0; k < KM_COUNT(each); k++)
			the_worst_fits(sizes[i], each[k]);
	}
	bad_pointers_do_no_harm(0);
	bad_pointers_do_no_harm(1000);
	holes_are_waited_for();
	meddling_is_found_out();
	descriptions_are_not_shared();
	others_are_refused();
	return 0;
}
