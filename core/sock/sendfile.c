/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sendfile and splice with an upgraded socket at one end.  Bytes go between the
 * file or pipe and the ring's own memory in one copy; what cannot be moved now is
 * left where it was, never taken and dropped.
 *
 * sendfile reads straight into the ring while there is space; everything else (other
 * phases, waiting, errors, splice) goes through km_send and km_recv with a buffer on
 * the stack.
 */
#include <errno.h>
#include <string.h>

#include "event/event.h"
#include "sock/internal.h"

#define BOUNCE 16384

/* Reads from in into buf, at *offset if there is one. */
static ssize_t take(int in, off64_t *offset, void *buf, size_t n)
{
	if (!offset)
		return km_sys_read(in, buf, n);
	return KM_SYS(pread64, in, buf, n, *offset, 0, 0);
}

/* Puts back what take took from the descriptor's own position. */
static void untake(int in, off64_t *offset, size_t n)
{
	if (!offset)
		KM_SYS(lseek, in, -(long)n, SEEK_CUR, 0, 0, 0);
}

ssize_t km_sendfile(struct km_file *f, int fd, int in, off64_t *offset, size_t count)
{
	char buf[BOUNCE];
	off64_t at = offset ? *offset : 0;
	size_t done = 0;
	ssize_t result = 0;
	struct stat st;

	if (km_sys_fstat(in, &st) < 0)
		return -EBADF;
	/* As the kernel: only what has pages. */
	if ((!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) || at < 0 ||
	    (ssize_t)count < 0)
		return -EINVAL;
	count = KM_MIN(count, 0x7ffff000u);
	while (done < count) {
		ssize_t direct =
			km_send_from(f, fd, in, offset ? &at : NULL, count - done);

		if (direct > 0) {
			done += (size_t)direct;
			continue;
		}
		if (direct != KM_RETRY) {
			result = direct;
			break;
		}
		/* Back on the kernel, which knows how much of it a reset leaves. */
		if (f->conn && km_tx_by_kernel(f->conn)) {
			result = KM_SYS(sendfile, fd, in, offset ? &at : NULL,
					count - done, 0, 0);
			done += (size_t)KM_MAX(result, 0);
			break;
		}
		/* Not the fast case: through a buffer, and km_send for all the rest. */
		size_t want = KM_MIN(count - done, sizeof(buf));
		ssize_t n = take(in, offset ? &at : NULL, buf, want), sent;
		struct iovec iov = {buf, 0};

		if (n <= 0) {
			result = n;
			break;
		}
		iov.iov_len = (size_t)n;
		sent = km_send(f, fd, &iov, 1, done ? KM_MSG_MOVED : 0);
		if (sent < n)
			untake(in, offset, (size_t)(n - KM_MAX(sent, 0)));
		if (sent > 0) {
			done += (size_t)sent;
			at += sent;
		}
		if (sent < n) {
			result = sent < 0 ? sent : 0;
			break;
		}
	}
	if (offset && done)
		*offset = at;
	return done ? (ssize_t)done : result;
}

ssize_t km_splice_out(struct km_file *f, int fd, int pipe, size_t count, unsigned flags)
{
	char buf[BOUNCE];
	int recv_flags = flags & SPLICE_F_NONBLOCK ? MSG_DONTWAIT : 0;
	struct iovec iov = {buf, KM_MIN(count, sizeof(buf))};
	struct pollfd pfd = {.fd = pipe, .events = POLLOUT};
	struct timespec now = {0, 0};
	ssize_t n, written, taken;

	/* Back on the kernel, which has its own ways with urgent data. */
	km_stream_settle(f, fd);
	if (f->conn && f->conn->rx_phase == KM_PHASE_ENDED)
		return KM_SYS(splice, fd, NULL, pipe, NULL, count, flags);
	/* Look first, so that what the pipe cannot take stays in the ring. */
	if (flags & SPLICE_F_NONBLOCK) {
		if (km_sys_poll(&pfd, 1, &now) == 0)
			return -EAGAIN;
		/* A pipe that polls writable takes a page without blocking. */
		iov.iov_len = KM_MIN(iov.iov_len, 4096);
	}
	n = km_recv(f, fd, &iov, 1, recv_flags | MSG_PEEK);
	if (n <= 0)
		return n;
	written = km_sys_write(pipe, buf, (size_t)n);
	if (written <= 0)
		return written;
	iov.iov_len = (size_t)written;
	taken = km_recv(f, fd, &iov, 1, MSG_DONTWAIT);
	return taken == written ? written : -EIO;
}

static ssize_t splice_some(struct km_file *f, int fd, int pipe, size_t count,
			   unsigned flags)
{
	char buf[4096];
	struct pollfd in = {.fd = pipe, .events = POLLIN};
	struct pollfd out = {.fd = fd, .events = POLLOUT};
	struct timespec now = {0, 0};
	struct iovec iov = {buf, 0};
	ssize_t n, sent, done = 0;

	if ((flags & SPLICE_F_NONBLOCK) && km_sys_poll(&in, 1, &now) == 0)
		return -EAGAIN;
	if (km_poll(&out, 1, 0, NULL) == 0 && f->conn &&
	    km_must_not_block(f->conn, fd, 0, &(struct km_wait){0}))
		return -EAGAIN;
	n = km_sys_read(pipe, buf, KM_MIN(count, sizeof(buf)));
	/* Bytes taken from the pipe cannot be put back: they are sent now, even if
	 * that takes a moment on a socket that is not to block. */
	while (done < n) {
		iov = (struct iovec){buf + done, (size_t)(n - done)};
		sent = km_send(f, fd, &iov, 1, 0);
		if (sent > 0)
			done += sent;
		else if (sent == -EAGAIN)
			km_poll(&out, 1, -1, NULL);
		else if (sent != -EINTR)
			return done ? done : sent;
	}
	return n;
}

ssize_t km_splice_in(struct km_file *f, int fd, int pipe, size_t count, unsigned flags)
{
	ssize_t n = splice_some(f, fd, pipe, count, flags), more = n;
	size_t done = 0;

	/* What else is in the pipe now goes along, as far as there is room. */
	while (more > 0) {
		struct pollfd pfds[2] = {{.fd = pipe, .events = POLLIN},
					 {.fd = fd, .events = POLLOUT}};

		done += (size_t)more;
		if (done >= count || km_poll(pfds, 2, 0, NULL) != 2 ||
		    pfds[0].revents != POLLIN || pfds[1].revents != POLLOUT)
			break;
		more = splice_some(f, fd, pipe, count - done, flags);
	}
	return done ? (ssize_t)done : n;
}
