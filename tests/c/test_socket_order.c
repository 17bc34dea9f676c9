/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ends of a connection in two threads, from the cut-over to the return to the kernel.
 * Neither sleeps or takes a lock that the other takes, so that only the flags and the
 * decision who leaves order what they do: a weak order is a race for ThreadSanitizer.
 */
#include <pthread.h>

#include "socket_pair.h"

#define BEFORE 100 /* bytes that went by the kernel */
#define BYTES 300
#define ROUNDS 10

static uint8_t byte_at(size_t position)
{
	return (uint8_t)(position < BEFORE ? 0 : position * 7 + 1);
}

/* Cuts over, writes, leaves both rings, and goes on by the kernel. */
static void *leaver(void *arg)
{
	struct socket_end *end = arg;
	uint8_t bytes[BYTES];

	for (size_t i = 0; i < BYTES; i++)
		bytes[i] = byte_at(BEFORE + i);
	CHECK_IS(socket_send(end, bytes, BYTES / 2, MSG_DONTWAIT), BYTES / 2);
	/* A look at what the other has sent, which stays there. */
	for (;;) {
		uint8_t seen[BEFORE + 2 * BYTES];
		ssize_t n =
			socket_recv(end, seen, sizeof(seen), MSG_DONTWAIT | MSG_PEEK);

		CHECK(n > 0 || n == -EAGAIN);
		if (n == BEFORE + BYTES)
			break;
		sched_yield();
	}
	CHECK_IS(km_file_to_kernel(end->f, end->fd, KM_REASON_HANDED_ON, false), 0);
	CHECK_IS(send(end->fd, bytes + BYTES / 2, BYTES / 2, 0), BYTES / 2);
	return NULL;
}

static bool patient; /* it looks at nothing but its own ring until that is over */

/* Finds that what it wrote was left, sends it once more, and reads all that came. */
static void *follower(void *arg)
{
	struct socket_end *end = arg;
	uint8_t bytes[BYTES];
	size_t got = 0;

	for (size_t i = 0; i < BYTES; i++)
		bytes[i] = byte_at(BEFORE + i);
	CHECK_IS(socket_send(end, bytes, BYTES, MSG_DONTWAIT), BYTES);
	while (patient && end->f->conn->tx_phase != KM_PHASE_ENDED) {
		km_stream_look(end->f, end->fd);
		sched_yield();
	}
	while (got < BEFORE + BYTES) {
		uint8_t seen[BEFORE];
		ssize_t n = socket_recv(end, seen, sizeof(seen), MSG_DONTWAIT);

		CHECK(n > 0 || n == -EAGAIN);
		for (ssize_t i = 0; i < n; i++)
			CHECK_IS(seen[i], byte_at(got + (size_t)i));
		if (n > 0)
			got += (size_t)n;
		else
			sched_yield();
	}
	while (!km_stream_ended(end->f)) {
		km_stream_look(end->f, end->fd);
		sched_yield();
	}
	return NULL;
}

static void round_trip(bool connector_leaves)
{
	struct socket_pair p = socket_pair(BEFORE);
	struct socket_end *one = connector_leaves ? &p.connector : &p.acceptor;
	struct socket_end *other = connector_leaves ? &p.acceptor : &p.connector;
	uint8_t bytes[BEFORE + BYTES];
	pthread_t threads[2];

	CHECK_IS(pthread_create(&threads[0], NULL, leaver, one), 0);
	CHECK_IS(pthread_create(&threads[1], NULL, follower, other), 0);
	for (int i = 0; i < 2; i++)
		CHECK_IS(pthread_join(threads[i], NULL), 0);
	/* What was left in the ring came by the kernel. */
	CHECK_IS(recv(one->fd, bytes, sizeof(bytes), MSG_WAITALL), sizeof(bytes));
	for (size_t i = 0; i < sizeof(bytes); i++)
		CHECK_IS(bytes[i], byte_at(i));
	socket_end_close(one);
	socket_end_close(other);
}

int main(void)
{
	unit_watchdog();
	socket_library(65536);
	for (int i = 0; i < ROUNDS; i++) {
		patient = i & 2;
		round_trip(i & 1);
	}
	return 0;
}
