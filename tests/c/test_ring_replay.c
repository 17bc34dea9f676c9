/* SPDX-License-Identifier: Apache-2.0 */
/* A producer takes back what its consumer left, whatever levels it lies in. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "shm/segment.h"
#include "unit.h"

#define SIZE 262144u

static uint8_t byte_at(uint64_t position)
{
	return (uint8_t)(position * 31 + (position >> 8));
}

static void put(struct km_producer *p, size_t n)
{
	uint8_t *bytes = malloc(n);
	struct iovec iov = {bytes, n};

	for (size_t i = 0; i < n; i++)
		bytes[i] = byte_at(p->w + i);
	CHECK_IS(km_ring_write(p, &iov, 1, SIZE_MAX), (ssize_t)n);
	free(bytes);
}

static void discard(struct km_consumer *c, size_t n)
{
	struct iovec iov = {NULL, n};

	CHECK_IS(km_ring_read(c, &iov, 1, KM_RING_DISCARD), (ssize_t)n);
}

static void check_replay(const struct km_producer *p, uint64_t at)
{
	const uint8_t *from;
	ssize_t n;

	while ((n = km_ring_replay(p, at, &from)) > 0) {
		for (ssize_t i = 0; i < n; i++)
			CHECK(from[i] == byte_at(at + (uint64_t)i));
		at += (uint64_t)n;
	}
	CHECK_IS(n, 0);
	CHECK(at == p->w);
}

int main(void)
{
	struct km_segment seg = {0};
	struct km_producer p;
	struct km_consumer c;
	const uint8_t *from;
	int fd;

	CHECK_IS(km_segment_create(&seg, SIZE, false, &fd), 0);
	km_producer_init(&p, &seg.wire->ring[0], km_segment_data(&seg, 0), SIZE);
	km_consumer_init(&c, &seg.wire->ring[0], km_segment_data(&seg, 0), SIZE);

	/* Nothing there; and positions that cannot be. */
	CHECK_IS(km_ring_replay(&p, 0, &from), 0);
	CHECK_IS(km_ring_replay(&p, 1, &from), -EPROTO);
	CHECK_IS(km_ring_replay(&p, UINT64_MAX, &from), -EPROTO);

	/* Around the end of the first level, then through all of them. */
	for (int turn = 0; turn < 5; turn++) {
		put(&p, 5000);
		check_replay(&p, c.r);
		discard(&c, 5000);
	}
	for (int turn = 0; turn < 40; turn++) {
		put(&p, 6001);
		check_replay(&p, c.r);
		check_replay(&p, c.r + 3000);
	}
	CHECK(p.level == 2);
	discard(&c, 100000);
	put(&p, 90000);
	check_replay(&p, c.r);
	CHECK_IS(km_ring_replay(&p, p.r - 1, &from), -EPROTO);
	CHECK_IS(km_ring_replay(&p, p.w + 1, &from), -EPROTO);

	/* A peer that writes over the levels' ends gets wrong bytes, not wrong memory. */
	km_store_relaxed(&seg.wire->ring[0].grow_at[0], UINT64_MAX);
	km_store_relaxed(&seg.wire->ring[0].grow_at[1], 1);
	for (uint64_t at = p.r; at < p.w; at += 777) {
		ssize_t n = km_ring_replay(&p, at, &from);

		CHECK(n > 0 && from >= p.data && from + n <= p.data + p.geo.bytes);
	}
	km_segment_unmap(&seg);
	return 0;
}
