/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry points that carry bytes.  Each looks up whose descriptor it is and hands
 * on; the substance is in sock/.
 */
#include "preload/entry.h"
#include "preload/vector.h"

#define ONE(buf, n)                                                                    \
	(&(struct iovec){(void *)(uintptr_t)(buf), KM_MIN((size_t)(n), RW_MOST)})
/* The kernel moves no more in one call. */
#define RW_MOST 0x7ffff000u

static bool has_bytes(const struct iovec *iov, int iovcnt)
{
	for (int i = 0; i < iovcnt; i++)
		if (iov[i].iov_len)
			return true;
	return false;
}

/* Of nothing, readv and writev are 0 at once, whatever the state of the stream. */
static ssize_t read_vector(struct km_file *f, int fd, const struct iovec *iov,
			   int iovcnt)
{
	return has_bytes(iov, iovcnt) ? KM_RECV(fd, iov, iovcnt, 0) : 0;
}

static ssize_t write_vector(struct km_file *f, int fd, const struct iovec *iov,
			    int iovcnt)
{
	return has_bytes(iov, iovcnt) ? KM_SEND(fd, iov, iovcnt, 0) : 0;
}

KM_EXPORT ssize_t read(int fd, void *buf, size_t n_)
{
	/* read of nothing is 0 at once; recv of nothing is not. */
	KM_DATA_CALL(fd, KM_IN, KM_REAL(read)(fd, buf, n_),
		     n_ ? KM_RECV(fd, ONE(buf, n_), 1, 0) : 0);
}

KM_EXPORT_GLIBC ssize_t __read(int fd, void *buf, size_t n_)
{
	return read(fd, buf, n_);
}

KM_EXPORT_GLIBC ssize_t __read_chk(int fd, void *buf, size_t n_, size_t room)
{
	KM_DATA_CALL(fd, KM_IN, KM_REAL(__read_chk)(fd, buf, n_, room),
		     n_ > room ? KM_REAL(__read_chk)(fd, buf, n_, room)
			       : read_vector(f, fd, ONE(buf, n_), 1));
}

KM_EXPORT ssize_t write(int fd, const void *buf, size_t n_)
{
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(write)(fd, buf, n_),
		     KM_SEND(fd, ONE(buf, n_), 1, 0));
}

KM_EXPORT_GLIBC ssize_t __write(int fd, const void *buf, size_t n_)
{
	return write(fd, buf, n_);
}

KM_EXPORT ssize_t readv(int fd, const struct iovec *iov, int iovcnt)
{
	/* The kernel names what is wrong with a bad vector, and touches nothing. */
	KM_DATA_CALL(fd, KM_IN, KM_REAL(readv)(fd, iov, iovcnt),
		     km_unlikely(km_iov_is_invalid(iov, iovcnt))
			     ? KM_SYS(readv, fd, iov, iovcnt, 0, 0, 0)
			     : read_vector(f, fd, iov, iovcnt));
}

KM_EXPORT ssize_t writev(int fd, const struct iovec *iov, int iovcnt)
{
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(writev)(fd, iov, iovcnt),
		     km_iov_is_invalid(iov, iovcnt)
			     ? KM_SYS(writev, fd, iov, iovcnt, 0, 0, 0)
			     : write_vector(f, fd, iov, iovcnt));
}

/* Those that mean nothing on a socket, and the one that does. */
#define RWF_KNOWN (RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_NOWAIT | RWF_APPEND)

/* What is wrong is told in the kernel's order.  On a socket the offset must be -1, which
 * means that there is none. */
static ssize_t vector_at(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
			 off64_t offset, int flags, bool out)
{
	int msg_flags = flags & RWF_NOWAIT ? MSG_DONTWAIT : 0;

	if (offset != -1)
		return offset < 0 ? -EINVAL : -ESPIPE;
	if (km_iov_is_invalid(iov, iovcnt))
		return KM_SYS(readv, fd, iov, iovcnt, 0, 0, 0);
	if (!has_bytes(iov, iovcnt))
		return 0;
	if (flags & ~RWF_KNOWN)
		return -EOPNOTSUPP;
	return out ? KM_SEND(fd, iov, iovcnt, msg_flags)
		   : KM_RECV(fd, iov, iovcnt, msg_flags);
}

KM_EXPORT ssize_t preadv64v2(int fd, const struct iovec *iov, int iovcnt,
			     off64_t offset, int flags)
{
	KM_DATA_CALL(fd, KM_IN, KM_REAL(preadv64v2)(fd, iov, iovcnt, offset, flags),
		     vector_at(f, fd, iov, iovcnt, offset, flags, false));
}

KM_EXPORT ssize_t preadv2(int fd, const struct iovec *iov, int iovcnt, off_t offset,
			  int flags)
{
	return preadv64v2(fd, iov, iovcnt, offset, flags);
}

KM_EXPORT ssize_t pwritev64v2(int fd, const struct iovec *iov, int iovcnt,
			      off64_t offset, int flags)
{
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(pwritev64v2)(fd, iov, iovcnt, offset, flags),
		     vector_at(f, fd, iov, iovcnt, offset, flags, true));
}

KM_EXPORT ssize_t pwritev2(int fd, const struct iovec *iov, int iovcnt, off_t offset,
			   int flags)
{
	return pwritev64v2(fd, iov, iovcnt, offset, flags);
}

KM_EXPORT ssize_t recv(int fd, void *buf, size_t n_, int flags)
{
	KM_DATA_CALL(fd, KM_IN, KM_REAL(recv)(fd, buf, n_, flags),
		     KM_RECV(fd, ONE(buf, n_), 1, flags));
}

KM_EXPORT_GLIBC ssize_t __recv_chk(int fd, void *buf, size_t n_, size_t room, int flags)
{
	KM_DATA_CALL(fd, KM_IN, KM_REAL(__recv_chk)(fd, buf, n_, room, flags),
		     n_ > room ? KM_REAL(__recv_chk)(fd, buf, n_, room, flags)
			       : KM_RECV(fd, ONE(buf, n_), 1, flags));
}

/* TCP fills in no address, and leaves the length alone. */
static ssize_t receive_from(struct km_file *f, int fd, void *buf, size_t n, int flags,
			    const struct sockaddr *addr, socklen_t *len)
{
	ssize_t got = KM_RECV(fd, ONE(buf, n), 1, flags);
	int room, none = 0;

	if (got < 0 || !addr)
		return got;
	/* What was received is gone, as it is on the kernel. */
	if (km_copy_in(&room, len, sizeof(room), false) < 0)
		return -EFAULT;
	if (room < 0)
		return -EINVAL;
	return km_copy_out(len, &none, sizeof(none)) < 0 ? -EFAULT : got;
}

KM_EXPORT ssize_t recvfrom(int fd, void *restrict buf, size_t n_, int flags,
			   struct sockaddr *restrict addr, socklen_t *restrict len)
{
	KM_DATA_CALL(fd, KM_IN, KM_REAL(recvfrom)(fd, buf, n_, flags, addr, len),
		     receive_from(f, fd, buf, n_, flags, addr, len));
}

KM_EXPORT_GLIBC ssize_t __recvfrom_chk(int fd, void *restrict buf, size_t n_,
				       size_t room, int flags,
				       struct sockaddr *restrict addr,
				       socklen_t *restrict len)
{
	if (n_ > room)
		return KM_REAL(__recvfrom_chk)(fd, buf, n_, room, flags, addr, len);
	return recvfrom(fd, buf, n_, flags, addr, len);
}

KM_EXPORT ssize_t send(int fd, const void *buf, size_t n_, int flags)
{
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(send)(fd, buf, n_, flags),
		     KM_SEND(fd, ONE(buf, n_), 1, flags));
}

KM_EXPORT_GLIBC ssize_t __send(int fd, const void *buf, size_t n_, int flags)
{
	return send(fd, buf, n_, flags);
}

KM_EXPORT ssize_t sendto(int fd, const void *buf, size_t n_, int flags,
			 const struct sockaddr *addr, socklen_t len)
{
	/* A connected TCP socket ignores the address. */
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(sendto)(fd, buf, n_, flags, addr, len),
		     KM_SEND(fd, ONE(buf, n_), 1, flags));
}

static ssize_t send_file(struct km_file *f, int fd, int in, off64_t *offset,
			 size_t count)
{
	off64_t at;
	ssize_t n;

	if (!offset)
		return km_sendfile(f, fd, in, NULL, count);
	if (km_copy_in(&at, offset, sizeof(at), false) < 0)
		return -EFAULT;
	n = km_sendfile(f, fd, in, &at, count);
	/* Written whatever the result, as on the kernel. */
	return km_copy_out(offset, &at, sizeof(at)) < 0 ? -EFAULT : n;
}

KM_EXPORT ssize_t sendfile64(int fd, int in, off64_t *offset, size_t count)
{
	KM_DATA_CALL(fd, KM_OUT, KM_REAL(sendfile64)(fd, in, offset, count),
		     send_file(f, fd, in, offset, count));
}

KM_EXPORT ssize_t sendfile(int fd, int in, off_t *offset, size_t count)
{
	_Static_assert(sizeof(off_t) == sizeof(off64_t), "32-bit files");
	return sendfile64(fd, in, offset, count);
}

static ssize_t splice_from(int in, loff_t *in_offset, int out, loff_t *out_offset,
			   size_t count, unsigned flags)
{
	KM_DATA_CALL(in, KM_IN,
		     KM_REAL(splice)(in, in_offset, out, out_offset, count, flags),
		     in_offset ? -EINVAL : km_splice_out(f, in, out, count, flags));
}

KM_EXPORT ssize_t splice(int in, loff_t *in_offset, int out, loff_t *out_offset,
			 size_t count, unsigned flags)
{
	if (km_file_of(in))
		return splice_from(in, in_offset, out, out_offset, count, flags);
	KM_DATA_CALL(out, KM_OUT,
		     KM_REAL(splice)(in, in_offset, out, out_offset, count, flags),
		     out_offset ? -EINVAL : km_splice_in(f, out, in, count, flags));
}

/* Pipes and regular files only: the kernel refuses sockets by itself. */
KM_EXPORT ssize_t tee(int in, int out, size_t count, unsigned flags)
{
	return KM_REAL(tee)(in, out, count, flags);
}

KM_EXPORT ssize_t vmsplice(int fd, const struct iovec *iov, size_t count,
			   unsigned flags)
{
	return KM_REAL(vmsplice)(fd, iov, count, flags);
}

KM_EXPORT ssize_t copy_file_range(int in, off64_t *in_offset, int out,
				  off64_t *out_offset, size_t count, unsigned flags)
{
	return KM_REAL(copy_file_range)(in, in_offset, out, out_offset, count, flags);
}
