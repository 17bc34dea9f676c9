/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many connections to one server with an event loop, each with one request under way.
 * The clients are one process with an event loop of its own, as load generators are.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "bench.h"

#define EVENTS 64

struct connection {
	struct end end;
	size_t have;
	uint64_t number, sent_ns;
	unsigned char *buf;
};

static int set;
static unsigned left;
static struct connection *all;

static void open_all(enum side side)
{
	all = calloc(options.connections, sizeof(*all));
	CHECK(all);
	CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	for (unsigned i = 0; i < options.connections; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data = {.u32 = i}};

		all[i].end = transport_open(side, i);
		CHECK((all[i].buf = calloc(1, options.size)));
		set_nonblocking(&all[i].end);
		CHECK(epoll_ctl(set, EPOLL_CTL_ADD, all[i].end.in, &event) == 0);
	}
	left = options.connections;
}

/* Where the bytes of one message stand in this connection's stream. */
static uint64_t place(const struct connection *c)
{
	return c->number * options.size + (uint64_t)(c - all);
}

/* 1 with a whole message, 0 without one, -1 at the end of the stream. */
static int receive(struct connection *c)
{
	ssize_t n = end_read(&c->end, c->buf + c->have, options.size - c->have);

	if (n == 0) {
		CHECK(c->have == 0);
		return -1;
	}
	if (n < 0)
		return 0;
	c->have += (size_t)n;
	if (c->have < options.size)
		return 0;
	c->have = 0;
	if (options.verify)
		pattern_check(c->buf, options.size, place(c));
	return 1;
}

static void serve(void)
{
	struct epoll_event events[EVENTS];
	struct window window = {0};

	while (left) {
		int n = epoll_wait(set, events, EVENTS, -1);

		CHECK(n > 0);
		window_look(&window);
		for (int i = 0; i < n; i++) {
			struct connection *c = &all[events[i].data.u32];
			int got = receive(c);

			if (got > 0) {
				end_write_all(&c->end, c->buf, options.size);
				c->number++;
			} else if (got < 0) {
				transport_close(&c->end);
				left--;
			}
		}
	}
	window_close(&window, SERVER);
}

static void ask(struct connection *c)
{
	if (options.verify)
		pattern_fill(c->buf, options.size, place(c));
	else
		memcpy(c->buf, &c->number, sizeof(c->number));
	c->sent_ns = ns_now();
	end_write_all(&c->end, c->buf, options.size);
}

struct progress {
	struct window window;
	uint64_t done;
	unsigned pending; /* requests under way */
	bool over;
};

/* An answer has come whole. */
static void answered(struct connection *c, struct progress *at)
{
	uint64_t now = ns_now();

	if (!options.verify)
		CHECK(memcmp(c->buf, &c->number, sizeof(c->number)) == 0);
	c->number++;
	at->pending--;
	if (at->over)
		return;
	at->done++;
	if (at->window.open) {
		histogram_add(&shared->rtt, now - c->sent_ns);
		at->over = enough(&at->window, at->done, now);
	} else if (at->done >= options.warm) {
		window_start(&at->window);
		at->done = 0;
	}
	if (!at->over) {
		ask(c);
		at->pending++;
		return;
	}
	shared->elapsed = seconds_now() - at->window.began;
	window_close(&at->window, CLIENT);
	shared->messages = at->done;
	shared->bytes = at->done * options.size * 2;
}

/* Ends when every answer has come, so that no connection is reset. */
static void load(void)
{
	struct epoll_event events[EVENTS];
	struct progress at = {.pending = options.connections};

	for (unsigned i = 0; i < options.connections; i++)
		ask(&all[i]);
	while (at.pending) {
		int n = epoll_wait(set, events, EVENTS, -1);

		CHECK(n > 0);
		for (int i = 0; i < n; i++) {
			struct connection *c = &all[events[i].data.u32];
			int got = receive(c);

			CHECK(got >= 0);
			if (got > 0)
				answered(c, &at);
		}
	}
	for (unsigned i = 0; i < options.connections; i++)
		transport_close(&all[i].end);
}

void fanin(enum side side)
{
	open_all(side);
	if (side == SERVER)
		serve();
	else
		load();
}
