/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/pipes.h"

#include <errno.h>
#include <unistd.h>

#include "base/fault_point.h"
#include "base/iov.h"

#define BOUNCE 16384
/* Slots of a new pipe: there is no sense in fewer. */
#define FEWEST_SLOTS 16u

static uint32_t page_size(void)
{
	return (uint32_t)getpagesize();
}

/*
 * Bytes that a pipe takes whatever the sizes of writes and reads, 0 if fd is none.  What
 * does not fit into a full one of s slots makes s / 2 pairs of neighbours together with all
 * slots but the oldest, which may have been read in part.  A pair is more than a page:
 * otherwise its second part would have been merged into its first.
 */
static uint32_t always_takes(int fd)
{
	int size = km_sys_fcntl(fd, F_GETPIPE_SZ, 0);

	return (uint32_t)KM_MAX(size, 0) / page_size() / 2 * page_size();
}

int km_pipes_open(int fd)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return km_fd_hide(km_sys_openat(path, O_RDWR | O_NONBLOCK | O_CLOEXEC, 0));
}

int km_pipes_failed(const char *transport, const char *what, int err)
{
	km_log(KM_LOG_ERROR,
	       "transport %s: %s (errno %d); the connection stays on the kernel",
	       transport, what, -err);
	return err;
}

/* Pages for twice the bytes: half of them may be wasted, see above. */
static uint32_t wanted(uint32_t ring_size)
{
	return KM_MAX(2 * ring_size, FEWEST_SLOTS * page_size());
}

/* As near to size as the system allows (pipe-max-size, pipe-user-pages-soft). */
static void enlarge(int fd, uint32_t size)
{
	int has = km_sys_fcntl(fd, F_GETPIPE_SZ, 0);

	while (has >= 0 && (uint32_t)has < size &&
	       km_sys_fcntl(fd, F_SETPIPE_SZ, (long)size) < 0)
		size /= 2;
}

/* -- looking at a pipe without taking anything ------------------------------------------
 *
 * tee(2) copies a pipe's pages, not their bytes, into another pipe, whose bytes can be
 * read.  One such pipe serves the process and those that it forks, under a lock that they
 * share.  It is as large as any other, so that all of one fits.
 */

static struct {
	int fd; /* 0: none yet; negative: lost to the program, which had no other number */
	uint64_t inode;
	km_a32 *lock;
} copies;

static int make_pipe(void)
{
	int fds[2], fd, err = km_sys_pipe2(fds, O_CLOEXEC | O_NONBLOCK);
	char path[32];

	if (err < 0)
		return err;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[0]);
	fd = km_sys_openat(path, O_RDWR | O_NONBLOCK | O_CLOEXEC, 0);
	km_sys_close(fds[0]);
	km_sys_close(fds[1]);
	return fd;
}

/* link_lock held.  Bytes of which copies can be taken. */
static uint32_t prepare_copies(uint32_t size)
{
	if (!copies.lock)
		copies.lock = km_pages(sizeof(*copies.lock), true);
	if (copies.fd <= 0 && copies.lock)
		copies.fd = km_fd_hide_new(make_pipe);
	if (copies.fd <= 0)
		return 0;
	copies.inode = km_transport_inode(copies.fd);
	enlarge(copies.fd, size);
	return (uint32_t)km_sys_fcntl(copies.fd, F_GETPIPE_SZ, 0);
}

/* Takes up to n bytes; how many. */
static ssize_t drop(int fd, uint64_t n)
{
	uint8_t buf[BOUNCE];
	ssize_t got, done = 0;

	while (n && (got = km_sys_read(fd, buf, KM_MIN(n, sizeof(buf)))) > 0) {
		n -= (uint64_t)got;
		done += got;
	}
	return done;
}

static enum km_lock_result copies_lock(void)
{
	enum km_lock_result how = km_lock(copies.lock);

	/* Whoever died with it left something there. */
	if (how == KM_LOCK_STOLEN)
		drop(copies.fd, UINT64_MAX);
	return how;
}

static void copies_unlock(enum km_lock_result how)
{
	drop(copies.fd, UINT64_MAX);
	km_unlock(copies.lock, how);
}

static ssize_t tee_all(int pipe, size_t n)
{
	ssize_t got = KM_SYS(tee, pipe, copies.fd, n, SPLICE_F_NONBLOCK, 0, 0);

	return got == -EAGAIN ? 0 : got;
}

static ssize_t read_iov(int fd, const struct iovec *iov, int iovcnt)
{
	return iovcnt == 1 ? km_sys_read(fd, iov->iov_base, iov->iov_len)
			   : KM_SYS(readv, fd, iov, iovcnt, 0, 0, 0);
}

/* The first n bytes of pipe, which stay there. */
static ssize_t look(int pipe, const struct iovec *iov, int iovcnt, size_t n)
{
	enum km_lock_result how;
	ssize_t got;

	if (!km_transport_is(copies.fd, copies.inode))
		return -EBADF;
	how = copies_lock();
	if (how == KM_LOCK_NESTED)
		return -EINTR;
	got = tee_all(pipe, n);
	if (got > 0)
		got = read_iov(copies.fd, iov, iovcnt);
	copies_unlock(how);
	return got;
}

ssize_t km_pipes_replay(const struct km_producer *p, int pipe, uint64_t at, void *buf,
			size_t room)
{
	uint64_t rest = p->w - at;
	enum km_lock_result how;
	ssize_t got;

	if (rest > p->w - p->r)
		return -EPROTO;
	if (rest == 0)
		return 0;
	if (!km_transport_is(copies.fd, copies.inode))
		return -EBADF;
	how = copies_lock();
	if (how == KM_LOCK_NESTED)
		return -EAGAIN;
	/* Its last byte is the last that was published, wherever the consumer is. */
	got = tee_all(pipe, INT32_MAX);
	if (got >= 0 && (uint64_t)got < rest) {
		got = -EPROTO;
	} else if (got >= 0) {
		drop(copies.fd, (uint64_t)got - rest);
		got = km_sys_read(copies.fd, buf, KM_MIN(room, rest));
	}
	copies_unlock(how);
	return got;
}

void km_pipes_move(int fd)
{
	enum km_lock_result how;

	if (!copies.fd || copies.fd != fd)
		return;
	how = copies_lock();
	copies.fd = km_fd_hide_copy(fd);
	km_unlock(copies.lock, how);
}

/* -- sizes ------------------------------------------------------------------------------ */

int km_pipes_fit(const int pipes[2], uint32_t *ring_size)
{
	uint32_t size = KM_MIN(wanted(*ring_size), prepare_copies(wanted(*ring_size)));

	for (int i = 0; i < 2; i++) {
		enlarge(pipes[i], size);
		*ring_size = KM_MIN(*ring_size, always_takes(pipes[i]));
	}
	return km_pipes_check(pipes, *ring_size) < 0 ? -ENOSPC : 0;
}

int km_pipes_check(const int pipes[2], uint32_t ring_size)
{
	for (int i = 0; i < 2; i++) {
		int size = km_sys_fcntl(pipes[i], F_GETPIPE_SZ, 0);

		if (size < 0 || always_takes(pipes[i]) < ring_size)
			return -EPROTO;
		if (prepare_copies((uint32_t)size) < (uint32_t)size)
			return -ENOSPC;
	}
	return ring_size < KM_RING_SIZE_MIN ? -ENOSPC : 0;
}

/* -- moving bytes ----------------------------------------------------------------------- */

/* The first n of iov's total bytes, in part if these are not all. */
static const struct iovec *beginning(const struct iovec *iov, int *iovcnt, size_t total,
				     size_t n, struct iovec part[KM_IOV_MOST])
{
	if (n == total)
		return iov;
	*iovcnt = km_iov_limit(iov, *iovcnt, n, part, KM_IOV_MOST);
	return part;
}

static ssize_t write_iov(int fd, const struct iovec *iov, int iovcnt)
{
	return iovcnt == 1 ? km_sys_write(fd, iov->iov_base, iov->iov_len)
			   : KM_SYS(writev, fd, iov, iovcnt, 0, 0, 0);
}

/*
 * Before Linux 6.15 a write that meets a bad pointer leaves an empty slot, which the pairs
 * of always_takes do not know.  Readers pass over them; with nothing unread, this end does.  False: they are
 * no explanation for a pipe that takes nothing.
 */
KM_COLD static bool close_holes(struct km_producer *p, int pipe)
{
	uint8_t byte;

	if (!p->holes || km_ring_unread(p) != 0)
		return false;
	p->holes = 0;
	return km_sys_read(pipe, &byte, 1) <= 0;
}

/*
 * A write of iov, for which there is room, gave done: an error, or less than all.  Was that
 * the buffer's fault, or the pipe's?  What km_pipes_put gives.
 */
KM_COLD static ssize_t write_rest(struct km_producer *p, int pipe,
				  const struct iovec *iov, int iovcnt, ssize_t done)
{
	struct iovec rest[KM_IOV_MOST];
	ssize_t n = done;

	if (done > 0) {
		iovcnt = km_iov_advance(iov, iovcnt, (size_t)done, rest);
		n = write_iov(pipe, rest, iovcnt);
	} else if (done == -EAGAIN && close_holes(p, pipe)) {
		n = write_iov(pipe, iov, iovcnt);
	}
	/* Holes behind bytes that are still to be read are room to wait for. */
	if (n == -EAGAIN)
		return p->holes ? KM_MAX(done, 0) : -EPROTO;
	if (n < 0)
		p->holes++;
	if (done > 0)
		return done + KM_MAX(n, 0);
	if (n < 0)
		close_holes(p, pipe);
	return n;
}

ssize_t km_pipes_put(struct km_producer *p, int pipe, const struct iovec *iov,
		     int iovcnt, size_t most)
{
	struct iovec part[KM_IOV_MOST];
	size_t total = km_iov_total(iov, iovcnt), n;
	int64_t room = km_ring_writable(p);
	ssize_t done;

	if (room < 0)
		return room;
	n = KM_MIN(KM_MIN(total, most), (size_t)room);
	if (n == 0)
		return 0;
	iov = beginning(iov, &iovcnt, total, n, part);
	KM_FAULT(WRITE_COPY);
	done = write_iov(pipe, iov, iovcnt);
	if (km_unlikely(done != (ssize_t)n))
		done = write_rest(p, pipe, iov, iovcnt, done);
	if (done <= 0)
		return done;
	KM_FAULT(WRITE_COPIED);
	km_ring_produced(p, (size_t)done);
	KM_FAULT(WRITE_PUBLISHED);
	return done;
}

static ssize_t take(int pipe, const struct iovec *iov, int iovcnt, size_t n,
		    unsigned how)
{
	if (how & KM_RING_PEEK)
		return look(pipe, iov, iovcnt, n);
	if (how & KM_RING_DISCARD)
		return drop(pipe, n);
	return read_iov(pipe, iov, iovcnt);
}

ssize_t km_pipes_get(struct km_consumer *c, int pipe, const struct iovec *iov,
		     int iovcnt, unsigned how)
{
	struct iovec part[KM_IOV_MOST];
	size_t total = km_iov_total(iov, iovcnt), n;
	int64_t there = km_ring_readable(c);
	ssize_t done;

	if (there < 0)
		return there;
	n = KM_MIN(total, (size_t)there);
	if (n == 0 || how == (KM_RING_PEEK | KM_RING_DISCARD))
		return (ssize_t)n;
	iov = beginning(iov, &iovcnt, total, n, part);
	KM_FAULT(READ_COPY);
	done = take(pipe, iov, iovcnt, n, how);
	if (done <= 0)
		return done == 0 || done == -EAGAIN ? -EPROTO : done;
	if (how & KM_RING_PEEK)
		return done;
	KM_FAULT(READ_COPIED);
	km_ring_consumed(c, (size_t)done);
	KM_FAULT(READ_RELEASED);
	return done;
}
