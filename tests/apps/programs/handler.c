/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A signal handler that reads and writes the very sockets its thread is copying on,
 * which are non-blocking: its calls succeed or say EAGAIN, and no byte is lost.
 *
 *   handler SIGNALS    ends with 0 after that many signals
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static int a, b;
static volatile sig_atomic_t signals, wrong;
/* Bytes of the stream from a to b, all alike. */
static volatile uint64_t sent, got;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void on_signal(int sig)
{
	int saved = errno;
	char byte = 'x', into[64];
	ssize_t n = send(a, &byte, 1, 0);

	(void)sig;
	signals++;
	if (n == 1)
		sent++;
	else if (errno != EAGAIN)
		wrong = errno;
	n = recv(b, into, sizeof(into), 0);
	if (n > 0)
		got += (uint64_t)n;
	else if (n == 0 || errno != EAGAIN)
		wrong = n == 0 ? EPIPE : errno;
	errno = saved;
}

static void connect_both(void)
{
	struct sockaddr_in in = {.sin_family = AF_INET};
	socklen_t len = sizeof(in);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	char ball = 'o';

	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *)&in, len) < 0 ||
	    listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&in, &len) < 0)
		die("listen");
	a = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(a, (struct sockaddr *)&in, len) < 0)
		die("connect");
	b = accept(listener, NULL, NULL);
	close(listener);
	for (int i = 0; i < 64; i++)
		if (send(a, &ball, 1, 0) != 1 || recv(b, &ball, 1, 0) != 1 ||
		    send(b, &ball, 1, 0) != 1 || recv(a, &ball, 1, 0) != 1)
			die("warm up");
	fcntl(a, F_SETFL, O_NONBLOCK);
	fcntl(b, F_SETFL, O_NONBLOCK);
}

/* Adds to a counter that the handler adds to as well. */
static void add(volatile uint64_t *to, ssize_t n)
{
	if (n > 0)
		__atomic_fetch_add(to, (uint64_t)n, __ATOMIC_SEQ_CST);
}

int main(int argc, char **argv)
{
	static char buffer[1 << 17];
	struct sigaction act = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
	struct itimerval often = {{0, 100}, {0, 100}}, off = {{0, 0}, {0, 0}};
	int wanted = argc > 1 ? atoi(argv[1]) : 1000;

	connect_both();
	memset(buffer, 'x', sizeof(buffer));
	sigaction(SIGALRM, &act, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	while (signals < wanted && !wrong) {
		ssize_t n = send(a, buffer, sizeof(buffer), 0);

		if (n < 0 && errno != EAGAIN)
			die("send");
		add(&sent, n);
		n = recv(b, buffer, sizeof(buffer), 0);
		if (n < 0 && errno != EAGAIN)
			die("recv");
		add(&got, n);
	}
	setitimer(ITIMER_REAL, &off, NULL);
	while (got < sent && !wrong) {
		struct pollfd pfd = {b, POLLIN, 0};

		if (poll(&pfd, 1, 5000) != 1)
			die("bytes are missing");
		add(&got, recv(b, buffer, sizeof(buffer), 0));
	}
	printf("signals %d, bytes %llu, wrong: %s\n", (int)signals,
	       (unsigned long long)sent, wrong ? strerror(wrong) : "nothing");
	return wrong || got != sent;
}
