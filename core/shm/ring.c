/* SPDX-License-Identifier: Apache-2.0 */
#include "shm/ring.h"

#include <errno.h>
#include <string.h>

#include "base/fault.h"
#include "base/fault_point.h"

void km_ring_geometry_init(struct km_ring_geometry *geo, uint32_t ring_size)
{
	uint32_t size = KM_MIN(ring_size, KM_RING_FIRST);

	geo->levels = 0;
	geo->bytes = 0;
	for (;;) {
		geo->size[geo->levels] = size;
		geo->offset[geo->levels] = geo->bytes;
		geo->bytes += size;
		geo->levels++;
		if (size == ring_size)
			return;
		/* The last level takes what is left, whatever the step. */
		size = geo->levels == KM_RING_LEVELS - 1
			       ? ring_size
			       : KM_MIN(size * KM_RING_STEP, ring_size);
	}
}

static void choose_geometry(struct km_ring_geometry *geo, const void *data,
			    uint32_t ring_size)
{
	if (data)
		km_ring_geometry_init(geo, ring_size);
	else
		*geo = (struct km_ring_geometry){.levels = 1, .size = {ring_size}};
}

void km_producer_init(struct km_producer *p, struct km_wire_ring *wire, void *data,
		      uint32_t ring_size)
{
	memset(p, 0, sizeof(*p));
	p->wire = wire;
	p->data = data;
	choose_geometry(&p->geo, data, ring_size);
	p->size = p->geo.size[0];
	p->base = p->data;
}

void km_consumer_init(struct km_consumer *c, struct km_wire_ring *wire, void *data,
		      uint32_t ring_size)
{
	memset(c, 0, sizeof(*c));
	c->wire = wire;
	c->data = data;
	choose_geometry(&c->geo, data, ring_size);
	c->size = c->geo.size[0];
	c->base = c->data;
}

/* Reads the consumer's position; it must lie in what this end has written. */
static int see_space(struct km_producer *p)
{
	uint64_t r = km_load_sync(SEE_SPACE, &p->wire->rpos);

	if (km_unlikely(p->w - r > p->geo.size[p->geo.levels - 1] || r < p->r))
		return -EPROTO;
	p->r = r;
	return 0;
}

static uint64_t free_space(const struct km_producer *p)
{
	uint64_t used = p->w - p->r;

	/* After growth, bytes of the smaller level may still be unread; they count
	 * against the larger one, which is more than strictly needed. */
	return used >= p->size ? 0 : p->size - used;
}

static void grow(struct km_producer *p)
{
	/* Relaxed: the store of wpos that publishes bytes beyond this position
	 * releases it. */
	KM_FAULT(GROW_BEGIN);
	km_store_relaxed(&p->wire->grow_at[p->level], p->w + 1);
	KM_FAULT(GROW_STORED);
	p->level++;
	p->size = p->geo.size[p->level];
	p->base = p->data + p->geo.offset[p->level];
}

/* Makes room for want bytes if that can be had. */
static int make_room(struct km_producer *p, uint64_t want)
{
	if (km_likely(free_space(p) >= want))
		return 0;
	if (see_space(p) < 0)
		return -EPROTO;
	while (free_space(p) < want && p->level + 1 < p->geo.levels)
		grow(p);
	return 0;
}

bool km_ring_consumer_elsewhere(const struct km_producer *p)
{
	return km_elsewhere(km_load_relaxed(&p->wire->ccpu));
}

static int copy_in(struct km_producer *p, uint64_t at, const uint8_t *from, size_t n)
{
	size_t pos = at & (p->size - 1);
	size_t first = KM_MIN(n, p->size - pos);
	bool far = km_unlikely(n >= KM_FAR_FROM) && km_ring_consumer_elsewhere(p);
	int err = km_copy_in(p->base + pos, from, first, far);

	if (km_unlikely(first < n && err == 0))
		err = km_copy_in(p->base, from + first, n - first, far);
	return err;
}

/* Relaxed: where a peer runs is a hint. */
static void note_cpu(km_a32 *field, uint32_t *noted)
{
	uint32_t cpu = km_this_cpu();

	if (km_unlikely(cpu != *noted)) {
		*noted = cpu;
		km_store_relaxed(field, cpu);
	}
}

static void publish(struct km_producer *p)
{
	note_cpu(&p->wire->pcpu, &p->cpu);
	km_store_sync(PUBLISH, &p->wire->wpos, p->w);
}

static void release_space(struct km_consumer *c)
{
	note_cpu(&c->wire->ccpu, &c->cpu);
	km_store_sync(RELEASE_SPACE, &c->wire->rpos, c->r);
}

static void begins_write(void)
{
	KM_FAULT(WRITE_COPY);
}

static void wrote(struct km_producer *p, uint64_t at)
{
	KM_FAULT(WRITE_COPIED);
	p->w = at;
	publish(p);
	KM_FAULT(WRITE_PUBLISHED);
}

/* Relaxed: the lock that the caller gives up, or the next publication, is behind it. */
KM_COLD void km_ring_torn(struct km_producer *p, size_t n)
{
	if (p->w + n > km_load_relaxed(&p->wire->torn))
		km_store_relaxed(&p->wire->torn, p->w + n);
}

ssize_t km_ring_write(struct km_producer *p, const struct iovec *iov, int iovcnt,
		      size_t most)
{
	uint64_t want = 0, room, at = p->w;

	for (int i = 0; i < iovcnt; i++)
		want += iov[i].iov_len;
	if (make_room(p, want) < 0)
		return -EPROTO;
	room = KM_MIN(free_space(p), most);
	if (room)
		begins_write();
	for (int i = 0; i < iovcnt && room; i++) {
		size_t n = KM_MIN(iov[i].iov_len, room);

		if (n && km_unlikely(copy_in(p, at, iov[i].iov_base, n) < 0)) {
			km_ring_torn(p, at + n - p->w);
			return -EFAULT;
		}
		at += n;
		room -= n;
	}
	if (at == p->w)
		return 0;
	want = at - p->w;
	wrote(p, at);
	return (ssize_t)want;
}

ssize_t km_ring_put(struct km_producer *p, const void *from, size_t n)
{
	if (km_unlikely(make_room(p, n) < 0))
		return -EPROTO;
	if (km_unlikely(free_space(p) < n))
		return 0;
	begins_write();
	if (km_unlikely(copy_in(p, p->w, from, n) < 0)) {
		km_ring_torn(p, n);
		return -EFAULT;
	}
	wrote(p, p->w + n);
	return (ssize_t)n;
}

ssize_t km_ring_space(struct km_producer *p, size_t want, uint8_t **at)
{
	uint64_t pos, room;

	if (make_room(p, want) < 0)
		return -EPROTO;
	room = free_space(p);
	pos = p->w & (p->size - 1);
	*at = p->base + pos;
	return (ssize_t)KM_MIN(room, p->size - pos);
}

void km_ring_produced(struct km_producer *p, size_t n)
{
	p->w += n;
	publish(p);
}

/* Reads the producer's position; no more may wait than the largest level. */
static int see_bytes(struct km_consumer *c)
{
	uint64_t w = km_load_sync(OBSERVE, &c->wire->wpos);

	if (km_unlikely(w - c->r > c->geo.size[c->geo.levels - 1]))
		return -EPROTO;
	c->w = w;
	return 0;
}

/*
 * How many bytes at position at lie in the current level: moves on to the next
 * level when this one ends there.  Level, size and base are in/out.
 */
static int64_t in_level(const struct km_consumer *c, uint64_t at, uint32_t *level)
{
	while (*level + 1 < c->geo.levels) {
		/* Relaxed: OBSERVE on wpos ordered it before bytes beyond it. */
		uint64_t ends = km_load_relaxed(&c->wire->grow_at[*level]);

		if (ends == 0)
			break;
		ends--;
		if (km_unlikely(ends < at))
			return -EPROTO;
		if (ends > at)
			return (int64_t)KM_MIN(c->w - at, ends - at);
		if (c->w == at)
			break;
		++*level;
	}
	return (int64_t)(c->w - at);
}

static void enter_level(struct km_consumer *c, uint32_t level)
{
	KM_FAULT(GROW_FOLLOW);
	c->level = level;
	c->size = c->geo.size[level];
	c->base = c->data + c->geo.offset[level];
}

static void begins_read(void)
{
	KM_FAULT(READ_COPY);
}

static void took(struct km_consumer *c, uint64_t at, uint32_t level)
{
	KM_FAULT(READ_COPIED);
	if (level != c->level)
		enter_level(c, level);
	c->r = at;
	release_space(c);
	KM_FAULT(READ_RELEASED);
}

ssize_t km_ring_read(struct km_consumer *c, const struct iovec *iov, int iovcnt,
		     unsigned how)
{
	const uint64_t from = c->r;
	uint64_t at = from;
	uint32_t level = c->level;
	int i = 0;
	size_t done = 0; /* in iov[i] */

	if (see_bytes(c) < 0)
		return -EPROTO;
	if (c->w != at)
		begins_read();
	while (i < iovcnt && at < c->w) {
		int64_t here = in_level(c, at, &level);
		uint32_t size = c->geo.size[level];
		const uint8_t *base = c->data + c->geo.offset[level];
		size_t pos = at & (size - 1), n;

		if (km_unlikely(here < 0))
			return -EPROTO;
		n = KM_MIN((size_t)here, iov[i].iov_len - done);
		n = KM_MIN(n, size - pos);
		n = KM_MIN(n, KM_RING_PIECE);
		if (n && !(how & KM_RING_DISCARD) &&
		    km_unlikely(km_copy_out((uint8_t *)iov[i].iov_base + done,
					    base + pos, n) < 0)) {
			if (c->r == from)
				return -EFAULT;
			at = c->r;
			break;
		}
		at += n;
		done += n;
		if (done == iov[i].iov_len) {
			i++;
			done = 0;
		}
		/* A producer that waits for space can go on meanwhile. */
		if (at - c->r >= KM_RING_PIECE && at < c->w && !(how & KM_RING_PEEK))
			took(c, at, level);
	}
	if (at != c->r && !(how & KM_RING_PEEK))
		took(c, at, level);
	return (ssize_t)(at - from);
}

ssize_t km_ring_take(struct km_consumer *c, void *to, size_t n)
{
	struct iovec iov = {to, n};
	size_t pos, first;

	if (km_unlikely(see_bytes(c) < 0))
		return -EPROTO;
	n = KM_MIN(n, c->w - c->r);
	if (n == 0)
		return 0;
	/* Relaxed, and after the look at wpos: see in_level. */
	if (km_unlikely(n > KM_RING_PIECE || n > c->size ||
			(c->level + 1 < c->geo.levels &&
			 km_load_relaxed(&c->wire->grow_at[c->level]))))
		return km_ring_read(c, &iov, 1, 0);
	begins_read();
	pos = c->r & (c->size - 1);
	first = KM_MIN(n, c->size - pos);
	if (km_unlikely(km_copy_out(to, c->base + pos, first) < 0) ||
	    (km_unlikely(first < n) &&
	     km_copy_out((uint8_t *)to + first, c->base, n - first) < 0))
		return -EFAULT;
	took(c, c->r + n, c->level);
	return (ssize_t)n;
}

ssize_t km_ring_bytes(struct km_consumer *c, const uint8_t **at)
{
	uint32_t level = c->level;
	int64_t here;
	size_t pos;

	if (see_bytes(c) < 0)
		return -EPROTO;
	here = in_level(c, c->r, &level);
	if (here < 0)
		return -EPROTO;
	if (level != c->level)
		enter_level(c, level);
	pos = c->r & (c->size - 1);
	*at = c->base + pos;
	return (ssize_t)KM_MIN((size_t)here, c->size - pos);
}

void km_ring_consumed(struct km_consumer *c, size_t n)
{
	c->r += n;
	release_space(c);
}

int64_t km_ring_readable(struct km_consumer *c)
{
	if (see_bytes(c) < 0)
		return -EPROTO;
	return (int64_t)(c->w - c->r);
}

int64_t km_ring_writable(struct km_producer *p)
{
	uint64_t used;

	if (see_space(p) < 0)
		return -EPROTO;
	used = p->w - p->r;
	if (used >= p->geo.size[p->geo.levels - 1])
		return 0;
	return (int64_t)(p->geo.size[p->geo.levels - 1] - used);
}

int64_t km_ring_unread(struct km_producer *p)
{
	if (see_space(p) < 0)
		return -EPROTO;
	return (int64_t)(p->w - p->r);
}

ssize_t km_ring_replay(const struct km_producer *p, uint64_t at, const uint8_t **from)
{
	uint64_t ends = p->w;
	uint32_t level = 0, size;
	size_t pos;

	if (p->w - at > p->w - p->r)
		return -EPROTO;
	/* The levels that this end has left are the only ones that end. */
	while (level < p->level) {
		ends = km_load_relaxed(&p->wire->grow_at[level]) - 1;
		if (ends > at)
			break;
		level++;
	}
	if (level == p->level)
		ends = p->w;
	size = p->geo.size[level];
	pos = at & (size - 1);
	*from = p->data + p->geo.offset[level] + pos;
	/* The peer can write to grow_at, too. */
	return (ssize_t)KM_MIN(KM_MIN(ends, p->w) - at, size - pos);
}
