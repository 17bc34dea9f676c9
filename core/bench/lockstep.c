/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Both ends of TCP connections in one thread, in lock-step: nobody ever waits, so that
 * instructions and system calls are the same in every run.  scripts/bench-gate counts
 * them with the library.
 *
 *   lockstep NAME MESSAGES      makes so many messages and prints nothing
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define PAIRS 64
#define SMALL 64
#define LARGE 16384
/* Round trips on each connection before anything is counted, which upgrade it. */
#define WARM 64

#define CHECK(what)                                                                    \
	do {                                                                           \
		if (!(what)) {                                                         \
			perror(#what);                                                 \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static int client[PAIRS], server[PAIRS], set = -1;
static unsigned char out[LARGE], in[LARGE];

static void connect_pair(int listener, int i)
{
	struct sockaddr_in to;
	socklen_t len = sizeof(to);
	int one = 1;

	CHECK(getsockname(listener, (struct sockaddr *)&to, &len) == 0);
	CHECK((client[i] = socket(AF_INET, SOCK_STREAM, 0)) >= 0);
	CHECK(connect(client[i], (struct sockaddr *)&to, len) == 0);
	CHECK((server[i] = accept(listener, NULL, NULL)) >= 0);
	CHECK(setsockopt(client[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) == 0);
	CHECK(setsockopt(server[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) == 0);
}

static void put(int fd, size_t size)
{
	CHECK(write(fd, out, size) == (ssize_t)size);
}

static void get(int fd, size_t size)
{
	memset(in, 0, 8);
	for (size_t have = 0; have < size;) {
		ssize_t n = read(fd, in + have, size - have);

		CHECK(n > 0);
		have += (size_t)n;
	}
	CHECK(memcmp(in, out, 8) == 0);
}

static void round_trip(int i)
{
	put(client[i], SMALL);
	get(server[i], SMALL);
	put(server[i], SMALL);
	get(client[i], SMALL);
}

/* One write, read at the other end, and the answer. */
static void pingpong(unsigned long messages)
{
	while (messages--)
		round_trip(0);
}

/* An event loop that is not busy: in turns that follow each other at once the library
 * asks the kernel by the clock, and its calls depend on how loaded the machine is. */
static int wait_slowly(struct epoll_event *events, int most)
{
	struct timespec moment = {.tv_nsec = 30000};

	CHECK(nanosleep(&moment, NULL) == 0);
	return epoll_wait(set, events, most, 1000);
}

/* The same with a look at the epoll set before each read. */
static void epoll(unsigned long messages)
{
	struct epoll_event event;

	while (messages--) {
		put(client[0], SMALL);
		CHECK(wait_slowly(&event, 1) == 1);
		get(server[0], SMALL);
		put(server[0], SMALL);
		get(client[0], SMALL);
	}
}

static void stream(unsigned long messages)
{
	while (messages--) {
		put(client[0], LARGE);
		get(server[0], LARGE);
	}
}

/* All connections ask, and the server answers as its epoll set tells it to. */
static void fanin(unsigned long messages)
{
	struct epoll_event events[PAIRS];

	for (; messages >= PAIRS; messages -= PAIRS) {
		int answered = 0;

		for (int i = 0; i < PAIRS; i++)
			put(client[i], SMALL);
		while (answered < PAIRS) {
			int n = wait_slowly(events, PAIRS);

			CHECK(n > 0);
			for (int i = 0; i < n; i++) {
				get(server[events[i].data.u32], SMALL);
				put(server[events[i].data.u32], SMALL);
			}
			answered += n;
		}
		for (int i = 0; i < PAIRS; i++)
			get(client[i], SMALL);
	}
}

static void vectors(unsigned long messages)
{
	struct iovec from[3] = {{out, 16}, {out + 16, 16}, {out + 32, 32}};
	struct iovec to[2] = {{in, 32}, {in + 32, 32}};

	while (messages--) {
		CHECK(writev(client[0], from, 3) == SMALL);
		CHECK(readv(server[0], to, 2) == SMALL);
	}
}

/* Nothing there: the reads of edge-triggered event loops. */
static void nothing(unsigned long messages)
{
	while (messages--)
		CHECK(recv(server[0], in, SMALL, MSG_DONTWAIT) == -1 &&
		      errno == EAGAIN);
}

static void polled(unsigned long messages)
{
	struct pollfd ready = {.fd = server[0], .events = POLLIN};

	while (messages--) {
		put(client[0], SMALL);
		CHECK(poll(&ready, 1, 1000) == 1);
		get(server[0], SMALL);
	}
}

static void pipes(unsigned long messages)
{
	int fds[2];

	CHECK(pipe(fds) == 0);
	while (messages--) {
		put(fds[1], SMALL);
		get(fds[0], SMALL);
	}
}

static const struct {
	const char *name;
	void (*run)(unsigned long messages);
	int connections;
} runs[] = {
	{"pingpong", pingpong, 1}, {"epoll", epoll, 1},	    {"stream", stream, 1},
	{"fanin", fanin, PAIRS},   {"vectors", vectors, 1}, {"nothing", nothing, 1},
	{"poll", polled, 1},	   {"forwarded", pipes, 0},
};

static void set_up(int connections)
{
	struct sockaddr_in any = {.sin_family = AF_INET,
				  .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(bind(listener, (struct sockaddr *)&any, sizeof(any)) == 0);
	CHECK(listen(listener, PAIRS) == 0);
	CHECK((set = epoll_create1(0)) >= 0);
	for (int i = 0; i < connections; i++) {
		struct epoll_event event = {.events = EPOLLIN,
					    .data = {.u32 = (unsigned)i}};

		connect_pair(listener, i);
		CHECK(epoll_ctl(set, EPOLL_CTL_ADD, server[i], &event) == 0);
		for (int k = 0; k < WARM; k++)
			round_trip(i);
	}
	close(listener);
}

int main(int argc, char **argv)
{
	unsigned long messages = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = (unsigned char)i;
	for (size_t i = 0; argc == 3 && i < COUNT(runs); i++) {
		if (strcmp(argv[1], runs[i].name) != 0)
			continue;
		set_up(runs[i].connections);
		runs[i].run(messages);
		return 0;
	}
	fprintf(stderr, "usage: lockstep NAME MESSAGES; names:");
	for (size_t i = 0; i < COUNT(runs); i++)
		fprintf(stderr, " %s", runs[i].name);
	fputc('\n', stderr);
	return 2;
}
