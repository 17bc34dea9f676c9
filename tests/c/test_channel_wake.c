/* SPDX-License-Identifier: Apache-2.0 */
/* A sleeper is woken, by the futex and by the doorbell, for bytes, for space, at
 * the end of the stream and at the close.  Every wait here is for ever, so that
 * a wake-up that does not come ends in the watchdog. */
#include <pthread.h>
#include <sched.h>

#include "unit.h"

enum wake { BYTES, SPACE, END, CLOSE_READER, CLOSE_WRITER };

struct sleeper {
	kmap_channel *ch;
	ssize_t result;
};

static uint8_t much[1 << 20], drained[1 << 20];

static void *sleep_for_bytes(void *arg)
{
	struct sleeper *s = arg;
	uint8_t buf[16];

	s->result = kmap_channel_read(s->ch, buf, sizeof(buf), -1);
	return NULL;
}

static void *sleep_for_space(void *arg)
{
	struct sleeper *s = arg;

	s->result = kmap_channel_write(s->ch, much, sizeof(much), -1);
	return NULL;
}

/* Waits until the word of ring says that somebody sleeps, in this way or, as time
 * goes by, in the next. */
static void wait_for_sleeper(const uint8_t *memory, int ring, const char *word,
			     uint32_t flag)
{
	struct kmap_layout rings = unit_field("km_wire_segment", "ring");
	struct kmap_layout at = unit_field("km_wire_ring", word);
	const uint32_t *value =
		(const uint32_t *)(const void *)(memory + rings.offset +
						 ring * (rings.size / 2) + at.offset);

	while (__atomic_load_n(value, __ATOMIC_SEQ_CST) < flag)
		sched_yield();
}

/* The attacher sleeps and the creator wakes it; flag is KM_WAIT_FUTEX or _EVENT. */
static void wakes(enum wake what, uint32_t flag)
{
	struct unit_pair pair = unit_pair(4096);
	struct sleeper s = {pair.attacher, -1};
	int writer_sleeps = what == SPACE || what == CLOSE_WRITER;
	struct kmap_channel_stats stats;
	pthread_t thread;
	uint8_t *memory;
	size_t size;

	memory = unit_map(pair.creator, &size);
	if (writer_sleeps)
		while (kmap_channel_write(pair.attacher, much, sizeof(much), 0) > 0)
			;
	CHECK_IS(pthread_create(&thread, NULL,
				writer_sleeps ? sleep_for_space : sleep_for_bytes, &s),
		 0);
	wait_for_sleeper(memory, writer_sleeps ? 0 : 1,
			 writer_sleeps ? "prod_wait" : "cons_wait", flag);
	switch (what) {
	case BYTES:
		CHECK_IS(kmap_channel_write(pair.creator, "abc", 3, 0), 3);
		break;
	case SPACE:
		CHECK(kmap_channel_read(pair.creator, drained, sizeof(drained), 0) > 0);
		break;
	case END:
		CHECK_IS(kmap_channel_shutdown(pair.creator), 0);
		break;
	case CLOSE_READER:
	case CLOSE_WRITER:
		kmap_channel_close(pair.creator);
		pair.creator = NULL;
		break;
	}
	CHECK_IS(pthread_join(thread, NULL), 0);
	if (pair.creator) {
		/* Not by luck: the sleeper looks again after a while by itself. */
		kmap_channel_get_stats(pair.creator, &stats);
		CHECK_IS(stats.futex_wakes + stats.bells_rung, 1);
	}
	switch (what) {
	case BYTES:
		CHECK_IS(s.result, 3);
		break;
	case SPACE:
		CHECK(s.result > 0);
		break;
	case END:
	case CLOSE_READER:
		CHECK_IS(s.result, 0);
		break;
	case CLOSE_WRITER:
		CHECK_IS(s.result, -EPIPE);
		break;
	}
	CHECK_IS(munmap(memory, size), 0);
	unit_pair_close(&pair);
}

int main(void)
{
	unit_watchdog();
	for (uint32_t flag = 1; flag <= 2; flag++)
		for (enum wake what = BYTES; what <= CLOSE_WRITER; what++)
			wakes(what, flag);
	return 0;
}
