/* SPDX-License-Identifier: Apache-2.0 */
/* Both ends as threads over one mapping, both ways at once: every byte arrives
 * once and in order, through wrap-around, growth, full and empty rings. */
#include <pthread.h>

#include "unit.h"

/* Enough to wrap the largest ring many times, little enough under TSan. */
#define TOTAL (8u << 20)
#define PIECE_MAX 9001u

struct stream {
	kmap_channel *ch;
	uint32_t seed;
	int timeout_ms;
};

static uint32_t next(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

/* Every position has its own byte, so that a shifted stream is seen. */
static uint8_t byte_at(uint64_t position, uint32_t seed)
{
	return (uint8_t)((position * 2654435761u + seed) >> 11);
}

static void *writer(void *arg)
{
	const struct stream *s = arg;
	uint32_t random = s->seed;
	uint8_t piece[PIECE_MAX];

	for (uint64_t at = 0; at < TOTAL;) {
		size_t n = 1 + next(&random) % PIECE_MAX;
		ssize_t done;

		if (n > TOTAL - at)
			n = TOTAL - at;
		for (size_t i = 0; i < n; i++)
			piece[i] = byte_at(at + i, s->seed);
		done = kmap_channel_write(s->ch, piece, n, s->timeout_ms);
		if (done == -EAGAIN)
			continue;
		CHECK(done > 0 && (size_t)done <= n);
		at += (uint64_t)done;
	}
	CHECK_IS(kmap_channel_shutdown(s->ch), 0);
	return NULL;
}

static void *reader(void *arg)
{
	const struct stream *s = arg;
	uint32_t random = ~s->seed;
	uint8_t piece[PIECE_MAX];
	uint64_t at = 0;

	for (;;) {
		ssize_t done = kmap_channel_read(
			s->ch, piece, 1 + next(&random) % PIECE_MAX, s->timeout_ms);

		if (done == -EAGAIN)
			continue;
		if (done == 0)
			break;
		CHECK(done > 0);
		for (ssize_t i = 0; i < done; i++)
			CHECK_IS(piece[i], byte_at(at + (uint64_t)i, s->seed));
		at += (uint64_t)done;
	}
	CHECK_IS(at, TOTAL);
	return NULL;
}

static void exchange(size_t ring_size, int timeout_ms)
{
	struct unit_pair pair = unit_pair(ring_size);
	struct stream there = {pair.creator, 1, timeout_ms};
	struct stream back = {pair.attacher, 2, timeout_ms};
	struct stream there_end = {pair.attacher, 1, timeout_ms};
	struct stream back_end = {pair.creator, 2, timeout_ms};
	pthread_t threads[4];

	CHECK_IS(pthread_create(&threads[0], NULL, writer, &there), 0);
	CHECK_IS(pthread_create(&threads[1], NULL, reader, &there_end), 0);
	CHECK_IS(pthread_create(&threads[2], NULL, writer, &back), 0);
	CHECK_IS(pthread_create(&threads[3], NULL, reader, &back_end), 0);
	for (int i = 0; i < 4; i++)
		CHECK_IS(pthread_join(threads[i], NULL), 0);
	CHECK_IS(kmap_channel_unread(pair.creator), 0);
	CHECK_IS(kmap_channel_readable(pair.creator), 0);
	unit_pair_close(&pair);
}

int main(void)
{
	unit_watchdog();
	exchange(4096, -1);
	exchange(65536, -1);
	exchange(262144, 20000);
	exchange(65536, 0);
	return 0;
}
