/* SPDX-License-Identifier: Apache-2.0 */
/* A new connection for every request; the server closes it after its answer. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

static void serve(unsigned char *buf)
{
	struct window window = {0};
	uint64_t total = options.warm + options.count;

	for (uint64_t number = 0; number < total; number++) {
		struct end end = transport_open(SERVER, 0);

		window_look(&window);
		CHECK(end_read_all(&end, buf, options.size));
		if (options.verify)
			pattern_check(buf, options.size, number * options.size);
		end_write_all(&end, buf, options.size);
		transport_close(&end);
	}
	window_close(&window, SERVER);
}

static void ask(unsigned char *buf)
{
	struct window window = {0};
	uint64_t total = options.warm + options.count;

	for (uint64_t number = 0; number < total; number++) {
		struct end end;
		uint64_t began_ns;

		if (number == options.warm)
			window_start(&window);
		pattern_fill(buf, options.size, number * options.size);
		began_ns = ns_now();
		end = transport_open(CLIENT, 0);
		end_write_all(&end, buf, options.size);
		CHECK(end_read_all(&end, buf, options.size));
		pattern_check(buf, options.size, number * options.size);
		CHECK(!end_read_all(&end, buf, 1));
		transport_close(&end);
		if (window.open)
			histogram_add(&shared->rtt, ns_now() - began_ns);
	}
	shared->elapsed = seconds_now() - window.began;
	window_close(&window, CLIENT);
	shared->messages = options.count;
	shared->bytes = options.count * options.size * 2;
}

void churn(enum side side)
{
	unsigned char *buf = calloc(1, options.size);

	CHECK(buf);
	if (side == SERVER)
		serve(buf);
	else
		ask(buf);
	free(buf);
}
