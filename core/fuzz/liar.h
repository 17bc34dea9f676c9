/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hostile end of a TCP connection whose other end is under the library.  It makes its
 * calls by system call, so that nothing of it is tracked, and speaks the rendezvous by
 * the wire structures.
 */
#ifndef KM_FUZZ_LIAR_H
#define KM_FUZZ_LIAR_H

#include "fd/file.h"
#include "fuzz.h"
#include "shm/latch.h"

#define LIAR_FDS 8

struct liar {
	int tcp;    /* its end */
	int victim; /* the other one, tracked */
	bool victim_connects;
	int listener;	       /* of the rendezvous, when the victim accepts */
	int hello;	       /* the rendezvous, once connected */
	struct km_segment seg; /* its mapping */
	struct km_producer tx; /* what it writes honestly */
	struct km_consumer rx;
	struct km_wire_bell *bell; /* the victim's */
	int latch;		   /* the victim's */
};

/* Once: the listener for all pairs, the liar's own bell, and an honest connection whose
 * two ends are the victim's. */
void liar_start(void);
/* A connection, not upgraded. */
void liar_connect(struct liar *l, bool victim_connects, bool blocking);
/* One byte by the kernel each way, so that both ends count as hot. */
void liar_warm(struct liar *l);
/* The rendezvous as the protocol has it; false when the victim has not come. */
bool liar_meet(struct liar *l);
bool liar_handshake(struct liar *l);
/* Closes all, its own end with a reset. */
void liar_end(struct liar *l);

/* Its own bell's descriptors: memfd and latch. */
void liar_bell(int fds[2]);
/* Sends a message with descriptors; all that comes in fds stays the caller's. */
ssize_t liar_send(int sock, const void *bytes, size_t n, const int *fds, int nfds);
/* Receives one; the number of descriptors, -1 when there is none. */
int liar_recv(int sock, struct km_wire_hello *hello, int fds[LIAR_FDS]);
/* A field of shared memory that means something, or any, and a value for it. */
struct fuzz_storm_write liar_pick(struct liar *l, struct fuzz_input *in);
/* Before an input. */
void liar_note_victim(void);
/* After it: nothing of it is left in the process, whose honest connection goes on. */
void liar_check_victim(void);

#endif
