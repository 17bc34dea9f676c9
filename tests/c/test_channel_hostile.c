/* SPDX-License-Identifier: Apache-2.0 */
/* The other end writes nonsense into the shared memory: the answer is -EPROTO or
 * an ordinary error, on this connection only, and never a crash. */
#include "unit.h"

struct target {
	struct unit_pair pair;
	uint8_t *memory;
	size_t size;
	uint32_t ring[2]; /* offsets of the two rings in the segment */
};

static struct target target(void)
{
	struct target t = {.pair = unit_pair(65536)};
	struct kmap_layout rings = unit_field("km_wire_segment", "ring");

	t.memory = unit_map(t.pair.creator, &t.size);
	t.ring[0] = rings.offset;
	t.ring[1] = rings.offset + rings.size / 2;
	return t;
}

static void end(struct target *t)
{
	unit_pair_close(&t->pair);
	CHECK_IS(munmap(t->memory, t->size), 0);
}

static void poke(struct target *t, int ring, const char *field, uint64_t value)
{
	struct kmap_layout at = unit_field("km_wire_ring", field);

	memcpy(t->memory + t->ring[ring] + at.offset, &value,
	       at.size < sizeof(value) ? at.size : sizeof(value));
}

/* The creator reads ring 0. */
static void lying_producer(uint64_t wpos)
{
	struct target t = target();
	uint8_t buf[256];

	CHECK_IS(kmap_channel_write(t.pair.attacher, "abc", 3, 0), 3);
	CHECK_IS(kmap_channel_read(t.pair.creator, buf, sizeof(buf), 0), 3);
	poke(&t, 0, "wpos", wpos);
	CHECK_IS(kmap_channel_read(t.pair.creator, buf, sizeof(buf), 0), -EPROTO);
	CHECK_IS(kmap_channel_readable(t.pair.creator), 0);
	/* The other direction is not touched. */
	CHECK_IS(kmap_channel_write(t.pair.creator, "xyz", 3, 0), 3);
	CHECK_IS(kmap_channel_read(t.pair.attacher, buf, sizeof(buf), 0), 3);
	end(&t);
}

/* The creator writes ring 1. */
static void lying_consumer(uint64_t rpos)
{
	struct target t = target();
	static uint8_t much[65536];
	ssize_t n;

	CHECK(kmap_channel_write(t.pair.creator, much, sizeof(much), 0) > 0);
	poke(&t, 1, "rpos", rpos);
	/* The position is looked at only when the ring seems full. */
	do
		n = kmap_channel_write(t.pair.creator, much, sizeof(much), 0);
	while (n > 0);
	CHECK_IS(n, -EPROTO);
	CHECK_IS(kmap_channel_unread(t.pair.creator), 0);
	end(&t);
}

/* A level of the ring that ends before what has been read already. */
static void lying_growth(void)
{
	struct target t = target();
	uint8_t buf[256] = {0};

	for (int i = 0; i < 3; i++) {
		CHECK_IS(kmap_channel_write(t.pair.attacher, buf, 100, 0), 100);
		CHECK_IS(kmap_channel_read(t.pair.creator, buf, sizeof(buf), 0), 100);
	}
	CHECK_IS(kmap_channel_write(t.pair.attacher, buf, 100, 0), 100);
	poke(&t, 0, "grow_at", 1 + 150);
	CHECK_IS(kmap_channel_read(t.pair.creator, buf, sizeof(buf), 0), -EPROTO);
	end(&t);
}

/* Whatever stands in the header, the calls come back and touch nothing else. */
static void noise(void)
{
	uint32_t random = 12345;

	for (int round = 0; round < 300; round++) {
		struct target t = target();
		static uint8_t buf[65536];

		for (int step = 0; step < 20; step++) {
			random = random * 1664525u + 1013904223u;
			memcpy(t.memory + 128 + (random >> 8) % 700, &random, 4);
			(void)kmap_channel_read(t.pair.creator, buf,
						1 + random % sizeof(buf), 0);
			(void)kmap_channel_write(t.pair.creator, buf,
						 1 + random % sizeof(buf), 0);
		}
		end(&t);
	}
}

int main(void)
{
	unit_watchdog();
	lying_producer(0);
	lying_producer(2);
	lying_producer(3 + 65536 + 1);
	lying_producer(UINT64_MAX);
	lying_consumer(UINT64_MAX);
	lying_consumer(1u << 30);
	lying_growth();
	noise();
	return 0;
}
