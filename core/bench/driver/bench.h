/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kmap-bench: an ordinary program that measures a byte transport between two
 * processes.  It knows nothing of Kmap: "tcp" is plain read, write and epoll_wait on
 * plain sockets, and becomes the measurement of Kmap by being started under it.  Only
 * the transport "ring" loads libkmap and calls its channels.
 *
 * The first process starts two others, the ends: the server (end 0) and the client
 * (end 1).  All three share one page of results.  The client decides when the warm-up
 * is over and when to stop; each end takes its own CPU time and context switches.
 */
#ifndef KMAP_BENCH_H
#define KMAP_BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/atomic.h"

#define MAX_CONNECTIONS 4096
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum side { SERVER, CLIENT };
enum mode { BLOCKING, EPOLL, EDGE, BUSY };
enum phase { WARM_UP, MEASURED };

struct options {
	const char *workload, *transport, *library;
	enum mode mode;
	size_t size;	/* of one message, in bytes */
	uint64_t warm;	/* messages before anything is measured */
	uint64_t count; /* messages that are measured, or 0 */
	double seconds; /* or for how long */
	unsigned connections;
	int cpu[2];  /* of each end, or -1 */
	bool verify; /* every byte, not just numbers of messages */
	bool hold;   /* the ends stay until standard input ends */
};

/* Round trips by their nanoseconds: 64 buckets for each power of two. */
#define BUCKETS (64 * 40)
struct histogram {
	uint64_t bucket[BUCKETS];
	uint64_t total, max;
};

struct usage {
	double cpu, user, system; /* seconds */
	uint64_t voluntary, involuntary;
};

/* What the three processes share. */
struct shared {
	km_a32 phase;
	/* Of the workload line; each on a cache line of its own. */
	_Alignas(64) km_a32 ping;
	_Alignas(64) km_a32 pong;
	_Alignas(64) km_a32 over;
	uint16_t port;
	char name[32]; /* of the Unix listener, in the abstract namespace */
	uint32_t name_len;
	struct usage usage[2];
	uint64_t messages, bytes;
	double elapsed;
	struct histogram rtt;
};

/* One connection as one end has it. */
struct end {
	int in, out;   /* one descriptor for sockets, two for pipes */
	void *channel; /* of the transport ring */
};

/* Where one end's measured window stands. */
struct window {
	bool open;
	double began;
	struct usage before;
};

extern struct options options;
extern struct shared *shared;

/* Ends the process with a message; errno is part of it. */
_Noreturn void fail(const char *what);
#define CHECK(what)                                                                    \
	do {                                                                           \
		if (!(what))                                                           \
			fail(#what);                                                   \
	} while (0)

/* main.c */
double seconds_now(void);
uint64_t ns_now(void);
/* Waits until the other end is here, too. */
void meet(enum side side);

/* measure.c */
/* The window opens at the first look after the client has ended the warm-up. */
void window_look(struct window *window);
/* Called by whoever ends the warm-up. */
void window_start(struct window *window);
void window_close(struct window *window, enum side side);
void histogram_add(struct histogram *histogram, uint64_t ns);
uint64_t histogram_percentile(const struct histogram *histogram, double share);
/* Whether the client has done enough; what has been measured so far is done. */
bool enough(const struct window *window, uint64_t done, uint64_t now_ns);
/* Message number of the stream, or bytes at an offset: what must arrive. */
void pattern_fill(unsigned char *buf, size_t len, uint64_t offset);
void pattern_check(const unsigned char *buf, size_t len, uint64_t offset);

/* transport.c */
/* Before the ends exist. */
void transport_prepare(void);
/* The first process lets go of what only the ends use. */
void transport_leave(void);
/* The server opens its listener, if the transport has one. */
void transport_listen(void);
/* Connection number i, at one end. */
struct end transport_open(enum side side, unsigned i);
void transport_close(struct end *end);
void set_nonblocking(const struct end *end);

/* One read or write; 0 at the end of the stream, -1 when it would block. */
ssize_t end_read(struct end *end, void *buf, size_t len);
ssize_t end_write(struct end *end, const void *buf, size_t len);
/* All of it, waiting in poll where a non-blocking descriptor would block. */
void end_write_all(struct end *end, const void *buf, size_t len);
/* All of it on a blocking end; false at the end of the stream. */
bool end_read_all(struct end *end, void *buf, size_t len);

/* One per file: what each end does. */
void pingpong(enum side side);
void stream(enum side side);
void fanin(enum side side);
void churn(enum side side);
void idle(enum side side);
void line(enum side side);
void copy(enum side side);
/* Uses the CPU until the parent ends; idle_class leaves it to everybody else. */
_Noreturn void hog(bool idle_class, int cpu);

#endif
