/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A channel of libkmap whose other end writes anything into the segment: between the
 * victim's calls and, from a second thread, during them.
 */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "kmap.h"
#include "shm/latch.h"
#include "shm/segment.h"

struct bout {
	struct fuzz_input in;
	kmap_channel *victim;
	struct km_segment seg; /* the liar's own mapping */
	struct km_producer tx; /* what it writes honestly */
	struct km_consumer rx;
	int fds[KMAP_CHANNEL_FDS];
	int side; /* the victim's */
};

static void begin(struct bout *b, uint64_t how)
{
	static const uint32_t sizes[] = {4096, 16384, 65536, 262144};
	kmap_channel *creator, *attacher;
	int own[KMAP_CHANNEL_FDS], tx;

	b->side = how & 1;
	FUZZ_CHECK(kmap_channel_create(sizes[how >> 1 & 3], &creator) == 0);
	kmap_channel_fds(creator, own);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		b->fds[i] = dup(own[i]);
	FUZZ_CHECK(km_segment_attach(&b->seg, false, b->fds[0]) == 0);
	if (b->side) {
		/* The creator lies; all that is left of it is the mapping. */
		for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
			own[i] = dup(b->fds[i]);
		FUZZ_CHECK(kmap_channel_attach(own, &attacher) == 0);
		kmap_channel_close(creator);
		b->victim = attacher;
		km_store_seq(&b->seg.wire->ring[1].pflags, 0);
		km_store_seq(&b->seg.wire->ring[0].pflags, 0);
	} else {
		b->victim = creator;
	}
	tx = b->side ? 1 : 0;
	km_producer_init(&b->tx, &b->seg.wire->ring[tx], km_segment_data(&b->seg, tx),
			 b->seg.ring_size);
	km_consumer_init(&b->rx, &b->seg.wire->ring[1 - tx],
			 km_segment_data(&b->seg, 1 - tx), b->seg.ring_size);
}

static void end(struct bout *b)
{
	fuzz_storm_stop();
	kmap_channel_close(b->victim);
	km_segment_unmap(&b->seg);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		close(b->fds[i]);
}

/* A field of the header, mostly one that means something. */
static struct fuzz_storm_write one_write(struct bout *b)
{
	struct km_wire_ring *ring = &b->seg.wire->ring[fuzz_take(&b->in, 1) & 1];
	uint64_t which = fuzz_take(&b->in, 1);
	struct fuzz_storm_write w = {.bytes = 8};
	uint64_t now;

	switch (which & 15) {
	case 0:
	case 1:
		w.at = (uint8_t *)&ring->wpos;
		break;
	case 2:
	case 3:
		w.at = (uint8_t *)&ring->rpos;
		break;
	case 4:
	case 5:
	case 6:
		w.at = (uint8_t *)&ring->grow_at[(which & 15) - 4];
		break;
	case 7:
		w.at = (uint8_t *)&ring->cut;
		break;
	case 8:
		w.at = (uint8_t *)&ring->end;
		break;
	case 9:
		w.at = (uint8_t *)&ring->stop;
		break;
	case 10:
		w.at = (uint8_t *)&ring->pflags;
		w.bytes = 4;
		break;
	case 11:
		w.at = (uint8_t *)&ring->cons_wait;
		w.bytes = 4;
		break;
	case 12:
		w.at = (uint8_t *)&ring->prod_wait;
		w.bytes = 4;
		break;
	case 13:
		w.at = (uint8_t *)&ring->left;
		w.bytes = 4;
		break;
	case 14:
		w.at = (uint8_t *)&b->seg.wire->state - 4;
		break;
	default:
		w.at = (uint8_t *)b->seg.wire +
		       fuzz_take(&b->in, 2) % (KM_WIRE_HEADER / 8) * 8;
		break;
	}
	if (w.bytes == 8) {
		memcpy(&now, w.at, 8);
		w.value = fuzz_value(&b->in, now);
	} else {
		w.value = fuzz_take(&b->in, 1);
	}
	return w;
}

static void poke(struct bout *b)
{
	struct fuzz_storm_write w = one_write(b);

	memcpy(w.at, &w.value, w.bytes);
}

static void storm(struct bout *b, uint64_t how)
{
	struct fuzz_storm_write writes[FUZZ_STORM_WRITES];
	unsigned n = 1 + how % FUZZ_STORM_WRITES;

	for (unsigned i = 0; i < n; i++)
		writes[i] = one_write(b);
	fuzz_storm_start(writes, n);
}

/* A buffer of its exact size, so that one byte too many is found. */
static void victim_io(struct bout *b, bool reads)
{
	uint64_t how = fuzz_take(&b->in, 1);
	size_t len = how & 128 ? fuzz_take(&b->in, 3) % 300000 : fuzz_take(&b->in, 2);
	int timeout = (how & 15) == 15 ? 1 : 0;
	uint8_t *buf = malloc(len ? len : 1);
	ssize_t n;

	memset(buf, 'v', len);
	n = reads ? kmap_channel_read(b->victim, buf, len, timeout)
		  : kmap_channel_write(b->victim, buf, len, timeout);
	FUZZ_CHECK(n <= (ssize_t)len);
	/* libFuzzer's timer interrupts calls. */
	FUZZ_CHECK(n >= 0 || n == -EAGAIN || n == -EINTR || n == -ETIMEDOUT ||
		   n == -EPROTO || n == -EPIPE || n == -ECONNRESET);
	free(buf);
}

static void liar_io(struct bout *b, bool reads)
{
	static uint8_t buf[65536];
	struct iovec iov = {buf, fuzz_take(&b->in, 2)};

	if (reads)
		km_ring_read(&b->rx, &iov, 1, 0);
	else
		km_ring_write(&b->tx, &iov, 1, SIZE_MAX);
}

static void step(struct bout *b)
{
	uint64_t op = fuzz_take(&b->in, 1);

	switch (op & 15) {
	case 0:
	case 1:
	case 2:
		poke(b);
		break;
	case 3:
	case 4:
		victim_io(b, true);
		break;
	case 5:
	case 6:
		victim_io(b, false);
		break;
	case 7:
	case 8:
		liar_io(b, false);
		break;
	case 9:
	case 10:
		liar_io(b, true);
		break;
	case 11:
		FUZZ_CHECK(kmap_channel_readable(b->victim) <= b->seg.ring_size);
		FUZZ_CHECK(kmap_channel_unread(b->victim) <= b->seg.ring_size);
		break;
	case 12:
		km_latch_ring(b->fds[1 + (op >> 4) % 4]);
		break;
	case 13:
		if (op >> 4 == 15)
			kmap_channel_shutdown(b->victim);
		break;
	case 14:
		if (op >> 4 < 4)
			storm(b, fuzz_take(&b->in, 1));
		break;
	default:
		fuzz_storm_stop();
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct bout b = {.in = {data, data + size}};

	begin(&b, fuzz_take(&b.in, 1));
	for (int steps = 0; b.in.at < b.in.end && steps < 200; steps++)
		step(&b);
	end(&b);
	return 0;
}
