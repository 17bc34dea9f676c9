/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client and a server in two processes, with plain blocking calls and poll: what the
 * client sends comes back, message by message and then all at once, through small and
 * large messages.  It knows nothing of Kmap.
 */
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                               \
	do {                                                                           \
		if (!(condition)) {                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,             \
				#condition);                                           \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static uint8_t sent[300000], got[sizeof(sent)];

static void move_all(ssize_t (*call)(int, void *, size_t), int fd, uint8_t *at,
		     size_t n)
{
	while (n) {
		ssize_t done = call(fd, at, n);

		CHECK(done > 0);
		at += done;
		n -= (size_t)done;
	}
}

static ssize_t put(int fd, void *at, size_t n)
{
	return write(fd, at, n);
}

static ssize_t get(int fd, void *at, size_t n)
{
	struct pollfd pfd = {.fd = fd, .events = POLLIN};

	CHECK(poll(&pfd, 1, -1) == 1);
	return read(fd, at, n);
}

static void serve(int fd)
{
	static uint8_t bytes[70000];
	ssize_t n;

	while ((n = read(fd, bytes, sizeof(bytes))) > 0)
		move_all(put, fd, bytes, (size_t)n);
	CHECK(n == 0);
	exit(0);
}

int main(void)
{
	struct sockaddr_in addr = {.sin_family = AF_INET};
	socklen_t len = sizeof(addr);
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd, status;
	pid_t child;

	alarm(100);
	addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(bind(listener, (struct sockaddr *)&addr, sizeof(addr)) == 0);
	CHECK(listen(listener, 1) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&addr, &len) == 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		alarm(100);
		serve(accept(listener, NULL, NULL));
	}
	fd = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(connect(fd, (struct sockaddr *)&addr, len) == 0);
	for (size_t i = 0; i < sizeof(sent); i++)
		sent[i] = (uint8_t)((i * 2654435761u) >> 13);
	for (size_t round = 0, n = 1; round < 300; round++, n = 1 + n * 3 % 20011) {
		move_all(put, fd, sent, n);
		memset(got, 0, n);
		move_all(get, fd, got, n);
		CHECK(memcmp(sent, got, n) == 0);
	}
	/* Large ones, which the rings grow for. */
	for (size_t done = 0; done < sizeof(sent); done += 60000) {
		move_all(put, fd, sent + done, 60000);
		move_all(get, fd, got + done, 60000);
	}
	CHECK(memcmp(sent, got, sizeof(sent)) == 0);
	CHECK(shutdown(fd, SHUT_WR) == 0);
	CHECK(read(fd, got, 1) == 0);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	return 0;
}
