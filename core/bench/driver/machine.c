/* SPDX-License-Identifier: Apache-2.0 */
/* What bounds every transport here: a cache line that goes to the other end and back,
 * and copying memory. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

/* Bytes that one copying workload moves between two looks at the clock. */
#define LOOK (64u << 20)

static void bounce(void)
{
	struct window window = {0};
	uint32_t turn = 0;

	while (km_load_relaxed(&shared->over) == 0) {
		uint32_t seen = km_load_acquire(&shared->ping);

		if (seen == turn)
			continue;
		window_look(&window);
		turn = seen;
		km_store_release(&shared->pong, turn);
	}
	window_close(&window, SERVER);
}

/* A clock reading costs a good part of one round trip, so that they are timed by the
 * hundred. */
static void line_client(void)
{
	struct window window = {0};
	uint64_t done = 0, began;
	uint32_t turn = 0;

	do {
		if (done >= options.warm && !window.open) {
			window_start(&window);
			done = 0;
		}
		began = ns_now();
		for (int i = 0; i < 100; i++) {
			km_store_release(&shared->ping, ++turn);
			while (km_load_acquire(&shared->pong) != turn)
				;
		}
		done += 100;
		if (window.open)
			histogram_add(&shared->rtt, (ns_now() - began) / 100);
	} while (!enough(&window, done, ns_now()));
	shared->elapsed = seconds_now() - window.began;
	window_close(&window, CLIENT);
	shared->messages = done;
	km_store_release(&shared->over, 1);
}

void line(enum side side)
{
	if (side == SERVER)
		bounce();
	else
		line_client();
}

void copy(enum side side)
{
	unsigned char *from = malloc(options.size), *to = malloc(options.size);
	struct window window = {0};
	uint64_t done = 0;

	CHECK(from && to);
	memset(from, 1, options.size);
	memset(to, 2, options.size);
	window_start(&window);
	/* The server only keeps the client company. */
	while (side == CLIENT && !enough(&window, done, ns_now())) {
		for (size_t n = 0; n < LOOK; n += options.size) {
			memcpy(to, from, options.size);
			/* The compiler must not see that nobody reads it. */
			__asm__ volatile("" : : "r"(to) : "memory");
			done++;
		}
	}
	if (side == CLIENT) {
		shared->elapsed = seconds_now() - window.began;
		shared->messages = done;
		shared->bytes = done * options.size;
	}
	window_close(&window, side);
	free(from);
	free(to);
}
