/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire format: what the two ends of a connection share.  docs/protocol.md
 * is normative; a test holds its tables against this header.
 *
 * The other end can write anything here at any time.  Whoever reads a field
 * loads it once into a local, checks it, and uses the local.
 */
#ifndef KM_WIRE_H
#define KM_WIRE_H

#include "base/atomic.h"
#include "base/compiler.h"

#define KM_WIRE_MAGIC 0x31474553504d414bULL /* "KAMPSEG1" in memory */
/* A test builds a library of another version. */
#ifndef KM_WIRE_VERSION
#define KM_WIRE_VERSION 4u
#endif
#define KM_WIRE_HEADER 4096u /* bytes before the first ring's data */

/* A ring starts at its first size and grows through at most three levels. */
#define KM_RING_LEVELS 3
#define KM_RING_FIRST 16384u
#define KM_RING_STEP 4u /* each level is this many times the one before */

/* struct km_wire_ring.pflags, set by the producer, never cleared */
#define KM_P_CUT 1u	/* cut is valid: the ring follows that many kernel bytes */
#define KM_P_END 2u	/* end is valid: the kernel follows that ring position */
#define KM_P_FIN 4u	/* the producer shut down writing; a kernel FIN follows */
#define KM_P_CLOSED 8u	/* the producer closed its socket altogether */
#define KM_P_RESENT 16u /* all that the consumer left has been handed to the kernel */

/* wait words, set by the sleeper, cleared by whoever wakes it */
#define KM_WAIT_FUTEX 1u
#define KM_WAIT_EVENT 2u

/* struct km_wire_ring.left: which end has left the ring first, by compare-and-swap.
 * What is unread belongs to the consumer when the producer left first, and goes by the
 * kernel, from the position stop on, when the consumer did.  Before the consumer's first
 * look at the ring, a producer that ends its stream takes back all that it wrote. */
#define KM_LEFT_PRODUCER 1u
#define KM_LEFT_CONSUMER 2u
#define KM_LEFT_TAKEN_BACK 3u
#define KM_LEFT_READING 4u /* nobody has left, and the consumer has begun */

/* In km_wire_ring.stop: the producer has seen it, and it cannot change any more. */
#define KM_STOP_SEEN ((uint64_t)1 << 63)

/* struct km_wire_segment.state */
#define KM_SEG_HELLO 1u	    /* created, the attacher has not answered */
#define KM_SEG_ATTACHED 2u  /* the attacher has mapped it and is listening */
#define KM_SEG_READY 3u	    /* the creator has its answer: the rings may be used */
#define KM_SEG_CANCELLED 4u /* one end gave up before that */

struct km_wire_ring {
	/* written by the producer */
	_Alignas(KM_APART) km_a64 wpos; /* bytes ever put into the ring */
	km_a64 grow_at
		[KM_RING_LEVELS]; /* 1 + position where level i ends; 0: not yet */
	km_a64 cut;		  /* bytes sent by the kernel before the ring */
	km_a64 end;		  /* ring bytes before the kernel takes over again */
	km_a32 pflags;
	km_a32 pcpu; /* 1 + the CPU that it last published on; 0: not known */
	/* writes that failed half-way may have changed bytes up to this position */
	km_a64 torn;
	/* written by the consumer */
	_Alignas(KM_APART) km_a64 rpos; /* bytes ever taken from the ring */
	km_a64 stop; /* 1 + the position at which the consumer left or would leave */
	km_a32 ccpu; /* 1 + the CPU that it last took bytes on; 0: not known */
	/* written by both; rarely changed, so that a look at it hits the cache */
	_Alignas(KM_APART) km_a32 cons_wait; /* consumer sleeps for bytes */
	km_a32 prod_wait;		     /* producer sleeps for space */
	km_a32 left;			     /* who left first, 0: nobody */
};

struct km_wire_segment {
	uint64_t magic;
	uint32_t version;
	uint32_t header_size;
	uint32_t ring_size; /* largest size of one ring */
	km_a32 state;
	uint8_t token[16]; /* random, the connection's name in statistics */
	/* ring[0] carries bytes from the attacher (connector) to the creator
	 * (acceptor), ring[1] the other way */
	struct km_wire_ring ring[2];
};

/*
 * A bell: how an end that waits for events is woken.  One memfd of
 * KM_BELL_SIZE bytes and one latch (shm/latch.h), made by the end that sleeps for
 * one of its epoll sets (or for all its other waits) and one user id of peers;
 * every connection that is waited for there gets a slot.  The owner counts itself
 * into sleep before it sleeps; a peer that has news for a slot sets its bit
 * and, when somebody sleeps and has not been woken since, rings the latch.
 */
#define KM_BELL_MAGIC 0x314c45425041474bULL
#define KM_BELL_SIZE 4096u
#define KM_BELL_SLOTS 16384u

struct km_wire_bell {
	/* written by the owner */
	uint64_t magic;
	uint32_t version;
	uint32_t slots;
	_Alignas(KM_APART) km_a64 sleep; /* high 32: how often armed; low: sleepers */
	/* bits set by peers, cleared by the owner */
	_Alignas(KM_APART) km_a64 summary[KM_BELL_SLOTS / 64 / 64]; /* non-zero words */
	_Alignas(KM_APART) km_a64 news[KM_BELL_SLOTS / 64];
};

/* The one datagram each end sends on the rendezvous socket. */
#define KM_HELLO_MAGIC 0x4f4c4c48u
/* acceptor: here is the segment; fds: segment, bell, latch, those of the transport */
#define KM_HELLO 1u
#define KM_ACK 2u    /* connector: attached; fds: bell, latch */
#define KM_REFUSE 3u /* connector: no, for this reason; no fds */

struct km_wire_hello {
	uint32_t magic;
	uint32_t version;
	uint32_t kind;
	uint32_t slot;	    /* of this connection in the sender's bell */
	uint32_t reason;    /* KM_REFUSE: index in reasons.def */
	uint32_t transport; /* KM_HELLO: index in transports.def */
	uint16_t lport;	    /* KM_HELLO: the acceptor's own local port */
	uint8_t laddr[16];  /* and address, IPv4 as v4-mapped */
};

_Static_assert(sizeof(struct km_wire_bell) <= KM_BELL_SIZE, "bell too large");
_Static_assert(sizeof(struct km_wire_segment) <= KM_WIRE_HEADER, "header too large");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock-free");

#endif
