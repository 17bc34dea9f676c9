/* SPDX-License-Identifier: Apache-2.0 */
/* The transports: what is opened before the ends exist, and at each end. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "bench.h"
#include "ring.h"

static int listener = -1;
/* pipes[i][direction]: 0 from client to server, 1 back; each has two ends. */
static int (*pipes)[2][2];
static char directory[] = "/tmp/kmap-bench-XXXXXX";

static bool is(const char *transport)
{
	return strcmp(options.transport, transport) == 0;
}

static void fifo_path(char *path, size_t len, unsigned i, int direction)
{
	snprintf(path, len, "%s/%u-%d", directory, i, direction);
}

/* Both ends of a named pipe are opened here, for reading and writing so that no open
 * waits for the other, and the names are gone before anything is measured. */
static void make_fifo(unsigned i, int direction)
{
	char path[64];
	int both;

	fifo_path(path, sizeof(path), i, direction);
	CHECK(mkfifo(path, 0600) == 0);
	CHECK((both = open(path, O_RDWR | O_CLOEXEC)) >= 0);
	CHECK((pipes[i][direction][0] = open(path, O_RDONLY | O_CLOEXEC)) >= 0);
	CHECK((pipes[i][direction][1] = open(path, O_WRONLY | O_CLOEXEC)) >= 0);
	close(both);
	unlink(path);
}

void transport_prepare(void)
{
	if (is("ring")) {
		ring_prepare();
		return;
	}
	if (!is("pipe") && !is("fifo"))
		return;
	pipes = calloc(options.connections, sizeof(*pipes));
	CHECK(pipes);
	if (is("fifo"))
		CHECK(mkdtemp(directory));
	for (unsigned i = 0; i < options.connections; i++) {
		for (int direction = 0; direction < 2; direction++) {
			if (is("fifo"))
				make_fifo(i, direction);
			else
				CHECK(pipe2(pipes[i][direction], O_CLOEXEC) == 0);
		}
	}
	if (is("fifo"))
		rmdir(directory);
}

void transport_leave(void)
{
	for (unsigned i = 0; pipes && i < options.connections; i++)
		for (int direction = 0; direction < 2; direction++)
			for (int side = 0; side < 2; side++)
				close(pipes[i][direction][side]);
}

static void listen_tcp(void)
{
	struct sockaddr_in at = {.sin_family = AF_INET,
				 .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t len = sizeof(at);

	CHECK((listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0);
	CHECK(bind(listener, (struct sockaddr *)&at, sizeof(at)) == 0);
	CHECK(listen(listener, MAX_CONNECTIONS) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
	shared->port = at.sin_port;
}

static void listen_unix(void)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	socklen_t len = sizeof(at);

	CHECK((listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0);
	/* The kernel finds a free abstract name. */
	CHECK(bind(listener, (struct sockaddr *)&at, sizeof(at.sun_family)) == 0);
	CHECK(listen(listener, MAX_CONNECTIONS) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
	shared->name_len = (uint32_t)(len - offsetof(struct sockaddr_un, sun_path));
	CHECK(shared->name_len <= sizeof(shared->name));
	memcpy(shared->name, at.sun_path, shared->name_len);
}

void transport_listen(void)
{
	if (is("tcp"))
		listen_tcp();
	else if (is("unix"))
		listen_unix();
}

static int connect_tcp(void)
{
	struct sockaddr_in to = {.sin_family = AF_INET,
				 .sin_port = shared->port,
				 .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0);
	return fd;
}

static int connect_unix(void)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	socklen_t len = offsetof(struct sockaddr_un, sun_path) + shared->name_len;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	memcpy(to.sun_path, shared->name, shared->name_len);
	CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, len) == 0);
	return fd;
}

/* Requests and answers must not wait for one another; a stream is left to Nagle as
 * programs that stream leave it. */
static void no_delay(int fd)
{
	int one = 1;

	if (is("tcp") && strcmp(options.workload, "stream") != 0)
		CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) == 0);
}

struct end transport_open(enum side side, unsigned i)
{
	struct end end = {-1, -1, NULL};

	if (is("ring")) {
		end.channel = ring_open(side);
		return end;
	}
	if (pipes) {
		int in = side == SERVER ? 0 : 1;

		end.in = pipes[i][in][0];
		end.out = pipes[i][1 - in][1];
		/* Or the other process's end of a stream would never show. */
		close(pipes[i][in][1]);
		close(pipes[i][1 - in][0]);
		return end;
	}
	if (side == SERVER)
		end.in = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	else
		end.in = is("tcp") ? connect_tcp() : connect_unix();
	CHECK(end.in >= 0);
	no_delay(end.in);
	end.out = end.in;
	return end;
}

void transport_close(struct end *end)
{
	if (end->channel) {
		ring_close(end->channel);
		return;
	}
	close(end->in);
	if (end->out != end->in)
		close(end->out);
}

void set_nonblocking(const struct end *end)
{
	if (end->channel)
		return;
	for (int i = 0; i < 2; i++) {
		int fd = i ? end->out : end->in;

		CHECK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0);
	}
}

ssize_t end_read(struct end *end, void *buf, size_t len)
{
	ssize_t n;

	if (end->channel)
		return ring_read(end->channel, buf, len);
	n = read(end->in, buf, len);
	if (n < 0 && errno != EAGAIN)
		fail("read");
	return n;
}

ssize_t end_write(struct end *end, const void *buf, size_t len)
{
	ssize_t n;

	if (end->channel)
		return ring_write(end->channel, buf, len);
	n = write(end->out, buf, len);
	if (n < 0 && errno != EAGAIN)
		fail("write");
	return n;
}

void end_write_all(struct end *end, const void *buf, size_t len)
{
	const unsigned char *from = buf;

	while (len) {
		struct pollfd room = {.fd = end->out, .events = POLLOUT};
		ssize_t n = end_write(end, from, len);

		if (n < 0 && options.mode != BUSY && !end->channel)
			CHECK(poll(&room, 1, -1) == 1);
		if (n < 0)
			continue;
		from += n;
		len -= (size_t)n;
	}
}

bool end_read_all(struct end *end, void *buf, size_t len)
{
	unsigned char *to = buf;
	size_t left = len;

	while (left) {
		ssize_t n = end_read(end, to, left);

		if (n == 0) {
			if (left != len) {
				fprintf(stderr,
					"kmap-bench: a message was cut short\n");
				exit(1);
			}
			return false;
		}
		if (n < 0)
			continue;
		to += n;
		left -= (size_t)n;
	}
	return true;
}
