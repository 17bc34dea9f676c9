/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many connections that have exchanged messages and then have nothing to say: what
 * they cost while both ends sleep in epoll_wait.  Afterwards each answers once more.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include "bench.h"

static struct end *ends;
static int set;
static unsigned char *buf;

static void open_all(enum side side)
{
	struct rlimit files;

	CHECK(getrlimit(RLIMIT_NOFILE, &files) == 0);
	files.rlim_cur = files.rlim_max;
	CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
	CHECK((ends = calloc(options.connections, sizeof(*ends))));
	CHECK((buf = calloc(1, options.size)));
	CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	for (unsigned i = 0; i < options.connections; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data = {.u32 = i}};

		ends[i] = transport_open(side, i);
		CHECK(epoll_ctl(set, EPOLL_CTL_ADD, ends[i].in, &event) == 0);
	}
}

/* Each connection in turn, so that each has moved to where it stays. */
static void exchange(enum side side, uint64_t rounds)
{
	for (unsigned i = 0; i < options.connections; i++) {
		for (uint64_t number = 0; number < rounds; number++) {
			uint64_t offset = i + number * options.size;

			if (side == CLIENT) {
				pattern_fill(buf, options.size, offset);
				end_write_all(&ends[i], buf, options.size);
				memset(buf, 0, options.size);
			}
			CHECK(end_read_all(&ends[i], buf, options.size));
			pattern_check(buf, options.size, offset);
			if (side == SERVER)
				end_write_all(&ends[i], buf, options.size);
		}
	}
}

static void sleep_in_epoll(enum side side)
{
	struct window window = {0};
	struct epoll_event event;

	/* Or one would count the other's last answer. */
	meet(side);
	CHECK(epoll_wait(set, &event, 1, 0) == 0);
	window_start(&window);
	CHECK(epoll_wait(set, &event, 1, (int)(options.seconds * 1000)) == 0);
	if (side == SERVER)
		shared->elapsed = seconds_now() - window.began;
	window_close(&window, side);
	meet(side);
}

void idle(enum side side)
{
	open_all(side);
	exchange(side, options.warm);
	sleep_in_epoll(side);
	exchange(side, 1);
	for (unsigned i = 0; i < options.connections; i++)
		transport_close(&ends[i]);
	shared->messages = options.connections;
	shared->bytes = 2 * options.connections * options.size;
}
