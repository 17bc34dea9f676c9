/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Segments: one sealed memfd for the two rings of one connection.
 *
 * These calls make system calls and do not block.  They may be made from any
 * thread.  Results: 0 or a negative errno value.
 */
#ifndef KM_SEGMENT_H
#define KM_SEGMENT_H

#include "shm/ring.h"

struct km_segment {
	struct km_wire_segment *wire; /* NULL when not mapped */
	size_t size;		      /* bytes mapped */
	uint32_t ring_size;	      /* this end's own copy, verified */
	bool bare;		      /* no data areas: the bytes lie elsewhere */
};

/* Sizes of rings, in bytes. */
#define KM_RING_SIZE_MIN 4096u
#define KM_RING_SIZE_MAX (16u << 20)

/* Bytes of a segment whose rings grow to ring_size. */
size_t km_segment_size(uint32_t ring_size, bool bare);

/*
 * Creates, seals and maps a segment; *fd is the memfd (close-on-exec), the
 * caller's.  Errors: those of memfd_create, ftruncate, fcntl, mmap; -EINVAL for a
 * ring_size that is none.
 */
int km_segment_create(struct km_segment *seg, uint32_t ring_size, bool bare, int *fd);

/* A bare segment's rings hold ring_size bytes after all.  Before anybody else has it. */
void km_segment_resize(struct km_segment *seg, uint32_t ring_size);

/*
 * Maps a segment that another process made.  The memfd must carry F_SEAL_SHRINK,
 * F_SEAL_GROW and F_SEAL_SEAL (a file that shrinks would be a SIGBUS weapon) and
 * have exactly the size its header claims.
 * Errors: -EPERM (seals), -EPROTO (magic, sizes), -EPROTONOSUPPORT (version),
 * those of fcntl, fstat, mmap.
 */
int km_segment_attach(struct km_segment *seg, bool bare, int fd);

void km_segment_unmap(struct km_segment *seg);

/* Data area of ring 0 or 1; NULL when bare. */
void *km_segment_data(const struct km_segment *seg, int ring);

#endif
