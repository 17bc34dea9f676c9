/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One ring, its two ends in two threads over one mapping, and nothing that orders them
 * but the ring's own positions: no sleep, no lock, no system call.  What a weak order
 * would let through is a race for ThreadSanitizer, and a wrong byte elsewhere.
 */
#include <pthread.h>
#include <sched.h>

#include "shm/segment.h"
#include "unit.h"

#define TOTAL (1u << 20)

struct run {
	struct km_segment seg;
	struct km_producer p;
	struct km_consumer c;
	bool in_place; /* without copies by the ring itself */
};

static uint8_t byte_at(uint64_t position)
{
	return (uint8_t)((position * 2654435761u) >> 11);
}

static void *produce(void *arg)
{
	struct run *run = arg;
	uint8_t piece[1500], *to = piece;
	ssize_t n = 0;

	for (uint64_t at = 0; at < TOTAL; at += (uint64_t)n) {
		size_t want = KM_MIN(1 + at % sizeof(piece), TOTAL - at);
		struct iovec iov = {piece, want};

		if (run->in_place) {
			n = km_ring_space(&run->p, want, &to);
			CHECK(n >= 0);
			want = KM_MIN(want, (size_t)n);
		}
		for (size_t i = 0; i < want; i++)
			to[i] = byte_at(at + i);
		n = (ssize_t)want;
		if (!run->in_place)
			n = km_ring_write(&run->p, &iov, 1, SIZE_MAX);
		else if (n)
			km_ring_produced(&run->p, want);
		CHECK(n >= 0);
		if (n == 0)
			sched_yield();
	}
	return NULL;
}

static void *consume(void *arg)
{
	struct run *run = arg;
	uint8_t piece[1000];
	const uint8_t *from = piece;
	ssize_t n;

	for (uint64_t at = 0; at < TOTAL; at += (uint64_t)n) {
		struct iovec iov = {piece, 1 + at % sizeof(piece)};

		n = run->in_place ? km_ring_bytes(&run->c, &from)
				  : km_ring_read(&run->c, &iov, 1, 0);
		CHECK(n >= 0);
		for (ssize_t i = 0; i < n; i++)
			CHECK_IS(from[i], byte_at(at + (uint64_t)i));
		if (run->in_place && n)
			km_ring_consumed(&run->c, (size_t)n);
		if (n == 0)
			sched_yield();
	}
	return NULL;
}

static void stream(uint32_t size, bool in_place)
{
	struct run run = {.in_place = in_place};
	pthread_t threads[2];
	int fd;

	CHECK_IS(km_segment_create(&run.seg, size, false, &fd), 0);
	km_producer_init(&run.p, &run.seg.wire->ring[0], km_segment_data(&run.seg, 0),
			 size);
	km_consumer_init(&run.c, &run.seg.wire->ring[0], km_segment_data(&run.seg, 0),
			 size);
	CHECK_IS(pthread_create(&threads[0], NULL, produce, &run), 0);
	CHECK_IS(pthread_create(&threads[1], NULL, consume, &run), 0);
	for (int i = 0; i < 2; i++)
		CHECK_IS(pthread_join(threads[i], NULL), 0);
	CHECK_IS(km_ring_unread(&run.p), 0);
	km_segment_unmap(&run.seg);
	CHECK_IS(close(fd), 0);
}

int main(void)
{
	unit_watchdog();
	stream(4096, false);
	stream(4096, true);
	stream(262144, false);
	stream(262144, true);
	return 0;
}
