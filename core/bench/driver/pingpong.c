/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One message there and back, one at a time, over one connection.
 *
 * blocking: read waits.  epoll: epoll_wait, one read, one write, level-triggered.
 * edge: the same edge-triggered, so that reads go on until EAGAIN.  busy: read again
 * until something is there, and never sleep.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "bench.h"

static int set = -1;

static void prepare(struct end *end)
{
	struct epoll_event event = {.events = EPOLLIN};

	if (options.mode == BLOCKING)
		return;
	set_nonblocking(end);
	if (options.mode == BUSY)
		return;
	if (options.mode == EDGE)
		event.events |= EPOLLET;
	CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	CHECK(epoll_ctl(set, EPOLL_CTL_ADD, end->in, &event) == 0);
}

/* One message by way of the epoll set; false at the end of the stream. */
static bool receive_event(struct end *end, unsigned char *buf)
{
	struct epoll_event event;
	size_t have = 0;
	ssize_t n;

	for (;;) {
		CHECK(epoll_wait(set, &event, 1, -1) == 1);
		do {
			/* Room for one byte more: an edge-triggered reader has to meet
			 * EAGAIN. */
			n = end_read(end, buf + have, options.size + 1 - have);
			if (n == 0)
				return false;
			if (n > 0)
				have += (size_t)n;
			CHECK(have <= options.size);
		} while (n > 0 && options.mode == EDGE);
		if (have == options.size)
			return true;
	}
}

static bool receive(struct end *end, unsigned char *buf)
{
	if (set >= 0)
		return receive_event(end, buf);
	return end_read_all(end, buf, options.size);
}

static void serve(struct end *end, unsigned char *buf)
{
	struct window window = {0};

	for (uint64_t number = 0; receive(end, buf); number++) {
		window_look(&window);
		if (options.verify)
			pattern_check(buf, options.size, number * options.size);
		end_write_all(end, buf, options.size);
	}
	window_close(&window, SERVER);
}

/* The number in front is always looked at, the rest only on demand: it would cost
 * more than the round trip. */
static void fill(unsigned char *buf, uint64_t number)
{
	if (options.verify)
		pattern_fill(buf, options.size, number * options.size);
	else
		memcpy(buf, &number, sizeof(number));
}

static void verify(const unsigned char *buf, uint64_t number)
{
	if (options.verify)
		pattern_check(buf, options.size, number * options.size);
	else
		CHECK(memcmp(buf, &number, sizeof(number)) == 0);
}

static void ask(struct end *end, unsigned char *buf)
{
	struct window window = {0};
	uint64_t done = 0, end_ns, began_ns;

	for (uint64_t number = 0;; number++) {
		if (number == options.warm)
			window_start(&window);
		fill(buf, number);
		began_ns = ns_now();
		end_write_all(end, buf, options.size);
		CHECK(receive(end, buf));
		end_ns = ns_now();
		verify(buf, number);
		if (!window.open)
			continue;
		histogram_add(&shared->rtt, end_ns - began_ns);
		if (enough(&window, ++done, end_ns))
			break;
	}
	shared->elapsed = seconds_now() - window.began;
	window_close(&window, CLIENT);
	shared->messages = done;
	shared->bytes = done * options.size * 2;
}

void pingpong(enum side side)
{
	struct end end = transport_open(side, 0);
	unsigned char *buf = calloc(1, options.size + 1);

	CHECK(buf);
	prepare(&end);
	if (side == SERVER)
		serve(&end, buf);
	else
		ask(&end, buf);
	transport_close(&end);
	free(buf);
}
