/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes a call of most kinds that the library stands in front of, with threads and
 * children, and prints what came of them.  Plain C for every libc: built dynamic and
 * static, for glibc and musl, setuid and with capabilities.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 200
#define MOST 5000

#define CHECK(what)                                                                    \
	do {                                                                           \
		if (!(what)) {                                                         \
			printf("%s: %s\n", #what, strerror(errno));                    \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static volatile sig_atomic_t signalled;

static void on_signal(int sig)
{
	signalled += sig;
}

/* Descriptors of this process, and whether one of them is the library's. */
static int descriptors(int *ours)
{
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *entry;
	int count = 0;

	CHECK(dir);
	*ours = 0;
	while ((entry = readdir(dir))) {
		char path[300], name[300] = "";

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
		if (readlink(path, name, sizeof(name) - 1) < 0)
			continue;
		if (strncmp(name, "/memfd:kmap-stats", 17) == 0)
			*ours = 1;
		count++;
	}
	closedir(dir);
	return count;
}

static int passive(struct sockaddr_in *at)
{
	socklen_t len = sizeof(*at);
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	memset(at, 0, sizeof(*at));
	at->sin_family = AF_INET;
	at->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(fd >= 0 && bind(fd, (struct sockaddr *)at, sizeof(*at)) == 0);
	CHECK(listen(fd, 4) == 0);
	CHECK(getsockname(fd, (struct sockaddr *)at, &len) == 0);
	return fd;
}

/* Sends back what comes, from memory that is asked for each time. */
static void *echo(void *arg)
{
	int listener = *(int *)arg, fd = accept(listener, NULL, NULL);
	ssize_t n;

	CHECK(fd >= 0);
	for (;;) {
		char *buf = malloc(MOST);

		CHECK(buf);
		n = recv(fd, buf, MOST, 0);
		if (n <= 0)
			break;
		for (ssize_t done = 0; done < n;) {
			ssize_t k = send(fd, buf + done, (size_t)(n - done), 0);

			CHECK(k > 0);
			done += k;
		}
		free(buf);
	}
	CHECK(n == 0);
	CHECK(close(fd) == 0);
	return NULL;
}

static void round_trip(int fd, int length)
{
	char *out = malloc((size_t)length), *in = calloc(1, (size_t)length);
	struct iovec iov[2] = {{out, (size_t)length / 2},
			       {out + length / 2, (size_t)(length - length / 2)}};

	CHECK(out && in);
	for (int i = 0; i < length; i++)
		out[i] = (char)(i * 31 + length);
	CHECK(writev(fd, iov, 2) == length);
	CHECK(recv(fd, in, (size_t)length, MSG_WAITALL) == length);
	CHECK(memcmp(out, in, (size_t)length) == 0);
	free(out);
	free(in);
}

static void sockets(void)
{
	struct sockaddr_in at;
	struct epoll_event event = {.events = EPOLLIN};
	struct pollfd ready = {.events = POLLOUT};
	int listener = passive(&at), fd = socket(AF_INET, SOCK_STREAM, 0), n, set, ours;
	int file = open("/proc/self/exe", O_RDONLY);
	fd_set writable;
	off_t from = 1;
	pthread_t thread;
	char buf[MOST];

	CHECK(pthread_create(&thread, NULL, echo, &listener) == 0);
	CHECK(connect(fd, (struct sockaddr *)&at, sizeof(at)) == 0);
	for (int i = 1; i <= ROUNDS; i++)
		round_trip(fd, i * 97 % MOST + 1);
	CHECK((set = epoll_create1(EPOLL_CLOEXEC)) >= 0);
	CHECK(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
	CHECK(epoll_wait(set, &event, 1, 0) == 0);
	ready.fd = fd;
	CHECK(poll(&ready, 1, 0) == 1 && ready.revents == POLLOUT);
	FD_ZERO(&writable);
	FD_SET(fd, &writable);
	CHECK(select(fd + 1, NULL, &writable, NULL, NULL) == 1);
	CHECK(file >= 0 && sendfile(fd, file, &from, 1000) == 1000 && from == 1001);
	CHECK(recv(fd, buf, 1000, MSG_WAITALL) == 1000 && buf[0] == 'E');
	CHECK(ioctl(fd, FIONREAD, &n) == 0 && n == 0);
	CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	CHECK(read(fd, buf, 1) == -1 && errno == EAGAIN);
	CHECK(syscall(SYS_write, fd, "x", 1) == 1);
	CHECK(epoll_wait(set, &event, 1, -1) == 1);
	CHECK(read(fd, buf, MOST) == 1);
	descriptors(&ours);
	CHECK(shutdown(fd, SHUT_WR) == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(read(fd, buf, 1) == 0);
	CHECK(close(fd) == 0 && close(listener) == 0 && close(set) == 0);
	CHECK(close(file) == 0);
	printf("sockets, on a ring: %d\n", ours);
}

static void children(void)
{
	char program[] = "true", *argv[] = {program, NULL}, *envp[] = {NULL}, buf[10];
	int fds[2], status;
	pid_t pid;

	CHECK(pipe(fds) == 0);
	fflush(stdout);
	pid = fork();
	if (pid == 0)
		_exit(write(fds[1], "child", 5) == 5 ? 3 : 4);
	CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 3);
	CHECK(read(fds[0], buf, sizeof(buf)) == 5 && memcmp(buf, "child", 5) == 0);
	pid = vfork();
	if (pid == 0) {
		execv("/bin/true", argv);
		_exit(9);
	}
	CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 0);
	CHECK(posix_spawn(&pid, "/bin/true", NULL, NULL, argv, envp) == 0);
	CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 0);
	CHECK(system("exit 6") == 6 << 8);
	CHECK(close(fds[0]) == 0 && close(fds[1]) == 0);
	printf("children\n");
}

static void the_rest(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	int fds[2], copy;
	FILE *stream;

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	CHECK(signal(SIGUSR2, on_signal) == SIG_DFL);
	CHECK(raise(SIGUSR1) == 0 && raise(SIGUSR2) == 0);
	CHECK(signalled == SIGUSR1 + SIGUSR2);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
	CHECK((copy = dup(fds[0])) >= 0 && dup2(copy, copy) == copy);
	CHECK((stream = fdopen(fds[1], "w")) && fprintf(stream, "%d\n", 42) == 3);
	CHECK(fclose(stream) == 0 && close(copy) == 0 && close(fds[0]) == 0);
	CHECK(read(-1, NULL, 0) == -1 && errno == EBADF);
	CHECK(close(9999) == -1 && errno == EBADF);
	printf("the rest, as %s\n", getuid() == geteuid() ? "one user" : "two users");
}

int main(int argc, char **argv)
{
	int ours, before = descriptors(&ours);

	(void)argv;
	printf("descriptors %d\n", before);
	the_rest();
	children();
	sockets();
	children();
	/* With an argument the program says whether anything is left open. */
	if (argc > 1)
		printf("left %d\n", descriptors(&ours) - before);
	return 5;
}
