/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one call costs that the library has nothing to do with: nanoseconds per call on
 * a pipe, a file, a Unix socket and a TCP connection whose other end has no Kmap.
 * scripts/forwarding runs it with and without the library in turn.
 *
 *   forwarding CALLS            measures every call, a line each: its name, nanoseconds
 *                               in the fastest batch of calls and in the median one
 *   forwarding CALLS NAME       makes that call so often and prints nothing, for tools
 *                               that count instructions
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
/* Calls on the TCP connection before anything is measured: more than the library makes
 * its attempts at an upgrade with. */
#define WARM 4096
/* Short enough that most batches run without an interruption. */
#define BATCH 256

static int pipe_fds[2], file_fd, null_fd, unix_fds[2], tcp_fd, set_fd;
static struct pollfd ready;
static char byte;

#define CHECK(what)                                                                    \
	do {                                                                           \
		if (!(what)) {                                                         \
			perror(#what);                                                 \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static void pipe_read_write(void)
{
	CHECK(write(pipe_fds[1], &byte, 1) == 1);
	CHECK(read(pipe_fds[0], &byte, 1) == 1);
}

static void file_read(void)
{
	CHECK(read(file_fd, &byte, 1) == 0);
}

static void null_write(void)
{
	CHECK(write(null_fd, &byte, 1) == 1);
}

static void unix_send_recv(void)
{
	CHECK(send(unix_fds[0], &byte, 1, 0) == 1);
	CHECK(recv(unix_fds[1], &byte, 1, 0) == 1);
}

static void tcp_recv(void)
{
	CHECK(recv(tcp_fd, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
}

static void tcp_send(void)
{
	CHECK(send(tcp_fd, &byte, 1, 0) == 1);
}

static void pipe_poll(void)
{
	CHECK(poll(&ready, 1, 0) == 1);
}

static void epoll_wait_pipe(void)
{
	struct epoll_event event;

	CHECK(epoll_wait(set_fd, &event, 1, 0) == 1);
}

static void pipe_fcntl(void)
{
	CHECK(fcntl(pipe_fds[0], F_GETFL) >= 0);
}

static void pipe_ioctl(void)
{
	int n;

	CHECK(ioctl(pipe_fds[0], FIONREAD, &n) == 0);
}

static void dup_close(void)
{
	int fd = dup(null_fd);

	CHECK(fd >= 0);
	CHECK(close(fd) == 0);
}

/* calls: how many calls of libc one run makes. */
static const struct {
	const char *name;
	void (*run)(void);
	unsigned calls;
} measures[] = {
	{"read-write-pipe", pipe_read_write, 2},
	{"read-file", file_read, 1},
	{"write-null", null_write, 1},
	{"send-recv-unix", unix_send_recv, 2},
	{"recv-tcp", tcp_recv, 1},
	{"send-tcp", tcp_send, 1},
	{"poll", pipe_poll, 1},
	{"epoll_wait", epoll_wait_pipe, 1},
	{"fcntl", pipe_fcntl, 1},
	{"ioctl", pipe_ioctl, 1},
	{"dup-close", dup_close, 2},
};

/* The other end of the TCP connection, without Kmap: reads until the end. */
static int sink(const char *port)
{
	struct sockaddr_in to = {.sin_family = AF_INET,
				 .sin_port = htons((unsigned short)atoi(port)),
				 .sin_addr = {htonl(INADDR_LOOPBACK)}};
	static char buf[65536];
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0);
	while (read(fd, buf, sizeof(buf)) > 0)
		;
	return 0;
}

/* self: as the program was called, because under valgrind /proc/self/exe is valgrind. */
static pid_t start_sink(int listener, char *self)
{
	struct sockaddr_in at;
	socklen_t len = sizeof(at);
	char port[16], flag[] = "--sink";
	char *argv[] = {self, flag, port, NULL}, *envp[] = {NULL};
	pid_t pid;

	CHECK(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
	snprintf(port, sizeof(port), "%d", ntohs(at.sin_port));
	errno = posix_spawn(&pid, self, NULL, NULL, argv, envp);
	CHECK(errno == 0);
	return pid;
}

static pid_t set_up(char *self)
{
	struct sockaddr_in any = {.sin_family = AF_INET,
				  .sin_addr = {htonl(INADDR_LOOPBACK)}};
	struct epoll_event event = {.events = EPOLLOUT};
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	pid_t pid;

	CHECK(bind(listener, (struct sockaddr *)&any, sizeof(any)) == 0);
	CHECK(listen(listener, 1) == 0);
	CHECK(pipe2(pipe_fds, O_CLOEXEC) == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, unix_fds) == 0);
	CHECK((file_fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC)) >= 0);
	CHECK(lseek(file_fd, 0, SEEK_END) > 0);
	CHECK((null_fd = open("/dev/null", O_WRONLY | O_CLOEXEC)) >= 0);
	CHECK((set_fd = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	CHECK(epoll_ctl(set_fd, EPOLL_CTL_ADD, pipe_fds[1], &event) == 0);
	ready = (struct pollfd){.fd = pipe_fds[1], .events = POLLOUT};
	pid = start_sink(listener, self);
	CHECK((tcp_fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0);
	close(listener);
	for (int i = 0; i < WARM; i++)
		tcp_send();
	return pid;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void measure(void (*run)(void), const char *name, unsigned calls, long batches)
{
	double *ns = calloc((size_t)batches, sizeof(*ns));

	CHECK(ns);
	for (long i = 0; i < batches; i++) {
		double began = now();

		for (int k = 0; k < BATCH; k++)
			run();
		ns[i] = (now() - began) / (double)(BATCH * calls);
	}
	qsort(ns, (size_t)batches, sizeof(*ns), compare);
	printf("%s %.2f %.2f\n", name, ns[0], ns[batches / 2]);
	free(ns);
}

int main(int argc, char **argv)
{
	const char *only = argc > 2 ? argv[2] : NULL;
	long calls;
	int status;
	pid_t pid;

	if (argc > 2 && strcmp(argv[1], "--sink") == 0)
		return sink(argv[2]);
	calls = argc > 1 ? atol(argv[1]) : 0;
	if (calls <= 0) {
		fprintf(stderr, "usage: forwarding CALLS [NAME]\n");
		return 2;
	}
	pid = set_up(argv[0]);
	for (size_t i = 0; i < COUNT(measures); i++) {
		long runs = calls / measures[i].calls;

		if (!only)
			measure(measures[i].run, measures[i].name, measures[i].calls,
				runs / BATCH + 1);
		else if (strcmp(only, measures[i].name) == 0)
			while (runs--)
				measures[i].run();
	}
	close(tcp_fd);
	CHECK(waitpid(pid, &status, 0) == pid);
	return status != 0;
}
