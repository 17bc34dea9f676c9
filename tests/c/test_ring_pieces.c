/* SPDX-License-Identifier: Apache-2.0 */
/* Large copies are handed over piece by piece, and say how far they came. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "shm/segment.h"
#include "unit.h"

#define SIZE 262144u

static uint8_t bytes[SIZE], got[SIZE];
static struct km_segment seg;
static struct km_producer p;
static struct km_consumer c;
static struct km_wire_ring *wire;

static ssize_t put(size_t n, size_t most)
{
	struct iovec iov = {bytes + p.w % SIZE, n};

	return km_ring_write(&p, &iov, 1, most);
}

/* Most bounds what is published, and the ring has grown for all of it. */
static void writes(void)
{
	CHECK_IS(put(SIZE, KM_RING_PIECE), KM_RING_PIECE);
	CHECK(km_load_relaxed(&wire->wpos) == KM_RING_PIECE);
	CHECK(p.size == SIZE);
	CHECK_IS(put(SIZE - KM_RING_PIECE, SIZE_MAX), SIZE - KM_RING_PIECE);
	CHECK_IS(put(1, SIZE_MAX), 0);
}

#ifdef KM_GUARDED
/* What was taken before a bad pointer is taken, in whole pieces; less is not. */
static void reads_up_to_a_bad_pointer(void)
{
	struct iovec iov[2] = {{got, KM_RING_PIECE + 100}, {(void *)8, SIZE}};

	CHECK_IS(km_ring_read(&c, iov, 2, KM_RING_PEEK), -EFAULT);
	CHECK(c.r == 0);
	CHECK_IS(km_ring_read(&c, iov, 2, 0), KM_RING_PIECE);
	CHECK(km_load_relaxed(&wire->rpos) == KM_RING_PIECE && c.r == KM_RING_PIECE);
	iov[0].iov_len = KM_RING_PIECE - 1;
	CHECK_IS(km_ring_read(&c, iov, 2, 0), -EFAULT);
	CHECK(km_load_relaxed(&wire->rpos) == KM_RING_PIECE);
}
#endif

/* Bytes of all sizes and from all places, to a consumer on another CPU and on none. */
static void bytes_are_the_same(uint32_t consumer_cpu)
{
	size_t taken = 0;

	for (size_t n = 1; n < 3 * KM_RING_PIECE; n += n / 4 + 61) {
		struct iovec in = {bytes + n % 67, n}, out = {got, n};

		km_store_relaxed(&wire->ccpu, consumer_cpu);
		memset(got, 0, n);
		CHECK_IS(km_ring_write(&p, &in, 1, SIZE_MAX), (ssize_t)n);
		CHECK_IS(km_ring_read(&c, &out, 1, 0), (ssize_t)n);
		CHECK_IS(memcmp(got, in.iov_base, n), 0);
		taken += n;
	}
	CHECK(taken > SIZE);
}

int main(void)
{
	struct iovec rest = {got, SIZE};
	int fd;

	unit_watchdog();
	for (size_t i = 0; i < SIZE; i++)
		bytes[i] = (uint8_t)(i * 31 + (i >> 8));
	km_spin_init();
	km_fault_arm();
	CHECK_IS(km_segment_create(&seg, SIZE, false, &fd), 0);
	wire = &seg.wire->ring[0];
	km_producer_init(&p, wire, km_segment_data(&seg, 0), SIZE);
	km_consumer_init(&c, wire, km_segment_data(&seg, 0), SIZE);
	CHECK(!km_ring_consumer_elsewhere(&p));
	writes();
#ifdef KM_GUARDED
	reads_up_to_a_bad_pointer();
#endif
	CHECK(km_ring_read(&c, &rest, 1, 0) > 0);
	CHECK(c.r == p.w);
	bytes_are_the_same(0);
	bytes_are_the_same(km_this_cpu() + 1);
	if (km_this_cpu()) {
		km_store_relaxed(&wire->ccpu, km_this_cpu() + 1);
		CHECK(km_ring_consumer_elsewhere(&p));
	}
	return 0;
}
