/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A single-producer single-consumer byte ring in shared memory.
 *
 * Positions count bytes for ever; the byte at position p of a level of size s
 * lies at p & (s - 1) of that level's area.  A ring starts at its first level;
 * a producer that runs out of space moves on to the next level from its present
 * position on, and the consumer follows when it reaches that position.
 *
 * The producer and consumer structures are private to one end (shared with its
 * forked children at most) and hold this end's own copy of every size; nothing
 * that the peer can write is used to form an address without a check.
 *
 * None of these calls blocks or makes a system call.  One thread at a time may
 * use a producer, and one a consumer: callers hold their direction's lock.
 * They are safe in signal handlers as long as that lock is.
 */
#ifndef KM_RING_H
#define KM_RING_H

#include <stdbool.h>
#include <sys/uio.h>

#include "base/spin.h"
#include "shm/wire.h"

struct km_ring_geometry {
	uint32_t levels;
	uint32_t size[KM_RING_LEVELS];	 /* bytes, powers of two */
	uint32_t offset[KM_RING_LEVELS]; /* from the start of the ring's data */
	uint32_t bytes;			 /* of all levels */
};

struct km_producer {
	struct km_wire_ring *wire;
	uint8_t *data;	/* this ring's data area */
	uint64_t w;	/* own position */
	uint64_t r;	/* consumer's position as last seen */
	uint32_t level; /* index in geometry */
	uint32_t size;	/* of the level */
	uint32_t cpu;	/* as last written to pcpu */
	uint32_t holes; /* of a pipe; see core/transport/pipes.c */
	uint8_t *base;	/* of the level */
	struct km_ring_geometry geo;
};

struct km_consumer {
	struct km_wire_ring *wire;
	uint8_t *data;
	uint64_t r; /* own position */
	uint64_t w; /* producer's position as last seen */
	uint32_t level;
	uint32_t size;
	uint32_t cpu; /* as last written to ccpu */
	uint8_t *base;
	struct km_ring_geometry geo;
};

/* Levels for rings that grow to ring_size bytes (a power of two). */
void km_ring_geometry_init(struct km_ring_geometry *geo, uint32_t ring_size);
/* data NULL: the bytes lie elsewhere (core/transport), and the ring is its positions
 * alone, of at most ring_size bytes (any number) in one level.  Only calls that name no
 * memory may then be made. */
void km_producer_init(struct km_producer *p, struct km_wire_ring *wire, void *data,
		      uint32_t ring_size);
void km_consumer_init(struct km_consumer *c, struct km_wire_ring *wire, void *data,
		      uint32_t ring_size);

/* Large copies are handed over in pieces of this many bytes, so that the other end can
 * work on one while this end works on the next.  An eighth of a ring of the usual size; see
 * docs/decisions/0012-copies-to-another-cpu.md. */
#define KM_RING_PIECE 32768u

/*
 * Copies as much of iov as fits, most bytes at the most, growing the ring if that helps
 * all of iov, and publishes it with one store.  Returns the count, 0 when full, -EPROTO
 * when the consumer published an impossible position, -EFAULT when a buffer could not be
 * read: then nothing was put in.
 */
ssize_t km_ring_write(struct km_producer *p, const struct iovec *iov, int iovcnt,
		      size_t most);
/* Does the consumer run on another CPU than this end, as far as is known? */
bool km_ring_consumer_elsewhere(const struct km_producer *p);

/*
 * One buffer of n bytes, all of it or nothing: the usual case, in few instructions.
 * Returns n, 0 when there is no room for all, -EPROTO, -EFAULT as above.
 */
ssize_t km_ring_put(struct km_producer *p, const void *from, size_t n);

/*
 * Copies up to what iov holds and frees its space, piece by piece.  With KM_RING_PEEK it
 * frees nothing, with KM_RING_DISCARD it copies nothing.  Returns the count, 0 when
 * empty, -EPROTO when the producer published an impossible position, -EFAULT when a
 * buffer could not be written and no piece was taken before.
 */
#define KM_RING_PEEK 1u
#define KM_RING_DISCARD 2u
ssize_t km_ring_read(struct km_consumer *c, const struct iovec *iov, int iovcnt,
		     unsigned how);

/* The same into one buffer of n bytes, n > 0, in few instructions where they are few. */
ssize_t km_ring_take(struct km_consumer *c, void *to, size_t n);

/*
 * The next contiguous piece of free space / of waiting bytes, for callers that
 * fill or drain it themselves, and the calls that say how much of it was used.
 * want is how much the caller would like to put in: the ring grows for it.
 * Return its length, 0 when full / empty, -EPROTO.
 */
ssize_t km_ring_space(struct km_producer *p, size_t want, uint8_t **at);
void km_ring_produced(struct km_producer *p, size_t n);
/* The n bytes of space behind this end's position may have been written to, and are not
 * published: for whoever looks at bytes that the consumer has taken (kmap tap). */
void km_ring_torn(struct km_producer *p, size_t n);
ssize_t km_ring_bytes(struct km_consumer *c, const uint8_t **at);
void km_ring_consumed(struct km_consumer *c, size_t n);

/* Bytes waiting (all levels), as published now, or -EPROTO. */
int64_t km_ring_readable(struct km_consumer *c);
/* Space the producer could use now, growth included, or -EPROTO. */
int64_t km_ring_writable(struct km_producer *p);
/* Bytes the consumer has not taken yet, or -EPROTO. */
int64_t km_ring_unread(struct km_producer *p);
/*
 * The next contiguous piece of what this end published, from position at on, for a
 * producer that takes back what its consumer left.  Its length, 0 when at is its own
 * position, -EPROTO when at is no position that can still be in the ring.
 */
ssize_t km_ring_replay(const struct km_producer *p, uint64_t at, const uint8_t **from);

#endif
