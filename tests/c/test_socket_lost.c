/* SPDX-License-Identifier: Apache-2.0 */
/*
 * No wake-up of an upgraded connection is lost, in blocking calls, poll and epoll.  One
 * thread goes to sleep just as the other publishes bytes or frees space, at every
 * distance between the two, and says nothing more before the sleeper has answered.
 * test_socket_lost [recv|poll|epoll|send|edge] runs one of them.
 */
#include <poll.h>
#include <pthread.h>

#include "socket_pair.h"

#define RING 4096

static struct socket_pair pair;
static unsigned rounds;
static uint8_t block[RING], drained[RING];
static struct km_set *set;
static int epfd;

/* -- the ways to sleep ----------------------------------------------------------- */

static void in_recv(void)
{
}

static void in_poll(void)
{
	struct pollfd pfd = {.fd = pair.acceptor.fd, .events = POLLIN};

	CHECK_IS(km_poll(&pfd, 1, -1, NULL), 1);
}

static void in_epoll(void)
{
	struct epoll_event ev;

	CHECK_IS(km_epoll_wait(set, epfd, &ev, 1, -1, NULL), 1);
}

static void *sleep_for_bytes(void *arg)
{
	void (*wait)(void) = *(void (**)(void))arg;
	uint32_t random = 2;
	uint8_t byte;

	for (unsigned i = 0; i < rounds; i++) {
		unit_delay(&random);
		wait();
		CHECK_IS(socket_recv(&pair.acceptor, &byte, 1, 0), 1);
		CHECK_IS(socket_send(&pair.acceptor, &byte, 1, 0), 1);
	}
	return arg;
}

static void publish(void)
{
	uint32_t random = 1;
	uint8_t byte = 0;
	ssize_t n;

	for (unsigned i = 0; i < rounds; i++) {
		unit_progress(i);
		unit_delay(&random);
		CHECK_IS(socket_send(&pair.connector, &byte, 1, 0), 1);
		do
			n = socket_recv(&pair.connector, &byte, 1, MSG_DONTWAIT);
		while (n == -EAGAIN);
		CHECK_IS(n, 1);
	}
}

static void *sleep_for_space(void *arg)
{
	void (*wait)(void) = *(void (**)(void))arg;
	int flags = wait == in_epoll ? MSG_DONTWAIT : 0;
	uint32_t random = 2;

	for (unsigned i = 0; i <= rounds; i++) {
		unit_delay(&random);
		for (size_t done = 0; done < RING;) {
			ssize_t n = socket_send(&pair.acceptor, block + done,
						RING - done, flags);

			CHECK(n > 0 || n == -EAGAIN);
			if (n < 0)
				wait();
			else
				done += (size_t)n;
		}
	}
	return arg;
}

static void make_space(void)
{
	uint32_t random = 1;

	for (unsigned i = 0; i < rounds; i++) {
		int waiting;

		do
			CHECK_IS(km_stream_inq(pair.connector.f, pair.connector.fd,
					       &waiting),
				 0);
		while (waiting < RING);
		unit_progress(i);
		unit_delay(&random);
		CHECK_IS(socket_recv(&pair.connector, drained, RING, 0), RING);
	}
}

/* -------------------------------------------------------------------------------- */

static const struct way {
	const char *name;
	void (*wait)(void);
	uint32_t events;
	void *(*sleeper)(void *);
	void (*teller)(void);
} ways[] = {
	{"recv", in_recv, 0, sleep_for_bytes, publish},
	{"poll", in_poll, 0, sleep_for_bytes, publish},
	{"epoll", in_epoll, EPOLLIN, sleep_for_bytes, publish},
	{"send", in_recv, 0, sleep_for_space, make_space},
	{"edge", in_epoll, EPOLLOUT | EPOLLET, sleep_for_space, make_space},
};

static void run(const struct way *way)
{
	struct epoll_event ev = {.events = way->events};
	void (*wait)(void) = way->wait;
	pthread_t thread;
	uint8_t byte = 0;

	pair = socket_pair(0);
	/* Both directions cut over before anybody sleeps. */
	CHECK_IS(socket_send(&pair.connector, &byte, 1, 0), 1);
	CHECK_IS(socket_recv(&pair.acceptor, &byte, 1, 0), 1);
	CHECK_IS(socket_send(&pair.acceptor, &byte, 1, 0), 1);
	CHECK_IS(socket_recv(&pair.connector, &byte, 1, 0), 1);
	if (way->events) {
		epfd = epoll_create1(EPOLL_CLOEXEC);
		CHECK(epfd >= 0);
		CHECK_IS(km_epoll_ctl(epfd, EPOLL_CTL_ADD, pair.acceptor.fd, &ev), 0);
		set = km_set_of(epfd);
		CHECK(set != NULL);
	}
	CHECK_IS(pthread_create(&thread, NULL, way->sleeper, &wait), 0);
	way->teller();
	CHECK_IS(pthread_join(thread, NULL), 0);
	socket_end_close(&pair.connector);
	socket_end_close(&pair.acceptor);
	if (way->events) {
		km_fd_forget(epfd);
		CHECK_IS(close(epfd), 0);
	}
}

int main(int argc, char **argv)
{
	unit_watchdog();
	rounds = unit_rounds(10000);
	socket_library(RING);
	for (size_t i = 0; i < KM_COUNT(ways); i++)
		if (argc < 2 || strcmp(argv[1], ways[i].name) == 0)
			run(&ways[i]);
	return 0;
}
