/* SPDX-License-Identifier: Apache-2.0 */
/* Bytes one way, as fast as they go: the client writes, the server reads. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

#define READ_SIZE 65536
/* Bytes between two looks at the clock. */
#define LOOK 262144

static void drain(struct end *end)
{
	size_t size = options.size > READ_SIZE ? options.size : READ_SIZE;
	unsigned char *buf = malloc(size);
	struct window window = {0};
	uint64_t offset = 0, first = 0;
	ssize_t n;

	CHECK(buf);
	while ((n = end_read(end, buf, size)) != 0) {
		if (n < 0)
			continue;
		if (!window.open) {
			window_look(&window);
			first = offset;
		}
		if (options.verify)
			pattern_check(buf, (size_t)n, offset);
		offset += (uint64_t)n;
	}
	shared->elapsed = seconds_now() - window.began;
	window_close(&window, SERVER);
	shared->bytes = offset - first;
	free(buf);
}

static void pour(struct end *end)
{
	unsigned char *buf = malloc(options.size);
	uint64_t done = 0, every = LOOK / options.size + 1;
	struct window window = {0};

	CHECK(buf);
	/* Memory that was never written is one page of zeros, which no program sends. */
	memset(buf, 1, options.size);
	for (uint64_t number = 0;; number++) {
		if (number == options.warm)
			window_start(&window);
		if (options.verify)
			pattern_fill(buf, options.size, number * options.size);
		end_write_all(end, buf, options.size);
		if (!window.open)
			continue;
		done++;
		if (options.count
			    ? done == options.count
			    : done % every == 0 && enough(&window, done, ns_now()))
			break;
	}
	window_close(&window, CLIENT);
	shared->messages = done;
	free(buf);
}

void stream(enum side side)
{
	struct end end = transport_open(side, 0);

	if (options.mode == BUSY)
		set_nonblocking(&end);
	if (side == SERVER)
		drain(&end);
	else
		pour(&end);
	transport_close(&end);
}
