/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two ends of a TCP connection, each its own program and built for either libc:
 *
 *   ends serve       prints a port and sends back what comes on one connection
 *   ends ask PORT    sends, in ways that differ between the libcs, and compares; prints
 *                    "done" when all was right
 *
 * Both end when their standard input does.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                               \
	do {                                                                           \
		if (!(condition)) {                                                    \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__,         \
				#condition, strerror(errno));                          \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static void put_all(int fd, const uint8_t *at, size_t n)
{
	while (n) {
		ssize_t done = write(fd, at, n);

		CHECK(done > 0);
		at += done;
		n -= (size_t)done;
	}
}

static int serve(void)
{
	static uint8_t bytes[70000];
	struct sockaddr_in addr = {.sin_family = AF_INET};
	socklen_t len = sizeof(addr);
	struct epoll_event event = {.events = EPOLLIN};
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd, set;
	ssize_t n;

	addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(bind(listener, (struct sockaddr *)&addr, sizeof(addr)) == 0);
	CHECK(listen(listener, 1) == 0);
	CHECK(getsockname(listener, (struct sockaddr *)&addr, &len) == 0);
	printf("%d\n", ntohs(addr.sin_port));
	fflush(stdout);
	CHECK((fd = accept(listener, NULL, NULL)) >= 0);
	CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	CHECK(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
	for (;;) {
		CHECK(epoll_wait(set, &event, 1, -1) == 1);
		n = recv(fd, bytes, sizeof(bytes), 0);
		if (n <= 0)
			break;
		put_all(fd, bytes, (size_t)n);
	}
	CHECK(n == 0);
	return 0;
}

static uint8_t sent[100000], got[sizeof(sent)];

/* A message in which every byte is set that no field is. */
static struct msghdr message(struct iovec *iov, size_t n)
{
	struct msghdr msg;

	memset(&msg, 0xff, sizeof(msg));
	msg.msg_name = NULL;
	msg.msg_namelen = 0;
	msg.msg_iov = iov;
	msg.msg_iovlen = (__typeof__(msg.msg_iovlen))n;
	msg.msg_control = NULL;
	msg.msg_controllen = 0;
	msg.msg_flags = 0;
	return msg;
}

static void by_messages(int fd, size_t n)
{
	struct iovec out[2] = {{sent, n / 2}, {sent + n / 2, n - n / 2}};
	struct iovec in = {got, n};
	struct msghdr msg = message(out, 2);

	memset(got, 0, n);
	CHECK(sendmsg(fd, &msg, 0) == (ssize_t)n);
	msg = message(&in, 1);
	CHECK(recvmsg(fd, &msg, MSG_WAITALL) == (ssize_t)n);
	CHECK(msg.msg_controllen == 0 && msg.msg_flags == 0);
	CHECK(memcmp(sent, got, n) == 0);
}

/* Messages that the library leaves to the kernel to judge. */
static void odd_messages(int fd)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec bad = {sent, SIZE_MAX}, good = {sent, 5}, in = {got, 5};
	struct msghdr msg = message(&bad, 1);
	struct cmsghdr *c;
	int out = 1;

	CHECK(sendmsg(fd, &msg, 0) == -1 && errno == EINVAL);
	CHECK(recvmsg(fd, &msg, 0) == -1 && errno == EINVAL);
	msg = message(&in, 1);
	CHECK(recvmsg(fd, &msg, MSG_ERRQUEUE) == -1 && errno == EAGAIN);
	msg = message(&good, 1);
	memset(control, 0, sizeof(control));
	msg.msg_control = control;
	msg.msg_controllen = sizeof(control);
	c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &out, sizeof(out));
	CHECK(sendmsg(fd, &msg, 0) == 5);
	msg = message(&in, 1);
	CHECK(recvmsg(fd, &msg, MSG_WAITALL) == 5 && memcmp(sent, got, 5) == 0);
}

static void by_stream(int fd)
{
	char line[100];
	int copy = dup(fd);
	FILE *stream = fdopen(copy, "r+");

	CHECK(stream && fileno(stream) == copy);
	for (int i = 0; i < 50; i++) {
		char expected[sizeof(line)];

		snprintf(expected, sizeof(expected), "line %d\n", i * i);
		CHECK(fputs(expected, stream) >= 0 && fflush(stream) == 0);
		CHECK(fgets(line, sizeof(line), stream) && !strcmp(line, expected));
		CHECK(fseek(stream, 0, SEEK_CUR) == -1);
	}
	CHECK(fclose(stream) == 0);
	CHECK(write(copy, "", 1) == -1 && errno == EBADF);
}

static void by_child(int fd)
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		by_messages(fd, 3000);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void *in_thread(void *arg)
{
	by_messages(*(int *)arg, 20000);
	return NULL;
}

static int ask(int port)
{
	struct sockaddr_in addr = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	pthread_t thread;

	addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	addr.sin_port = htons((uint16_t)port);
	for (size_t i = 0; i < sizeof(sent); i++)
		sent[i] = (uint8_t)((i * 2654435761u) >> 13);
	CHECK(connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0);
	for (size_t round = 0, n = 1; round < 300; round++, n = 1 + n * 3 % 20011)
		by_messages(fd, n);
	odd_messages(fd);
	by_child(fd);
	CHECK(pthread_create(&thread, NULL, in_thread, &fd) == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	by_stream(fd);
	by_messages(fd, 1000);
	printf("done\n");
	fflush(stdout);
	while (getchar() != EOF)
		;
	CHECK(shutdown(fd, SHUT_WR) == 0 && read(fd, got, 1) == 0);
	return 0;
}

int main(int argc, char **argv)
{
	alarm(100);
	if (argc == 3 && strcmp(argv[1], "ask") == 0)
		return ask(atoi(argv[2]));
	return serve();
}
