/* SPDX-License-Identifier: Apache-2.0 */
/* Entry points that make sockets, connect them and set them up. */
#include "preload/entry.h"

#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <sys/ioctl.h>

#include "event/event.h"
#include "link/link.h"

static bool is_inet(int family)
{
	return family == AF_INET || family == AF_INET6;
}

KM_EXPORT int socket(int domain, int type, int protocol)
{
	int fd = KM_REAL(socket)(domain, type, protocol);

	if (km_unlikely(fd >= 0 && is_inet(domain) && !km_proc.disabled &&
			(type & 0xf) == SOCK_STREAM &&
			(protocol == 0 || protocol == IPPROTO_TCP)))
		km_file_new(fd, KM_ROLE_UNKNOWN);
	else if (fd >= 0)
		km_fd_forget(fd);
	return fd;
}

KM_EXPORT int socketpair(int domain, int type, int protocol, int fds[2])
{
	int err = KM_REAL(socketpair)(domain, type, protocol, fds);

	if (err == 0) {
		km_fd_forget(fds[0]);
		km_fd_forget(fds[1]);
	}
	return err;
}

/* On the loopback device a connection is there before connect says that it is on its
 * way. */
static void made(int fd, bool wait)
{
	int saved = errno;

	km_link_made(fd, wait);
	errno = saved;
}

KM_EXPORT int connect(int fd, const struct sockaddr *addr, socklen_t len)
{
	struct km_file *f = km_file_of(fd);

	int err;

	if (f && f->role == KM_ROLE_UNKNOWN)
		f->role = KM_ROLE_CONNECTOR;
	err = KM_REAL(connect)(fd, addr, len);
	/* Connecting to nobody ends the connection and leaves a fresh socket. */
	if (km_unlikely(err == 0 && f && addr->sa_family == AF_UNSPEC))
		km_file_new(fd, KM_ROLE_UNKNOWN);
	else if (f && (err == 0 || errno == EINPROGRESS))
		made(fd, err == 0);
	return err;
}

KM_EXPORT_GLIBC int __connect(int fd, const struct sockaddr *addr, socklen_t len)
{
	return connect(fd, addr, len);
}

/* A new descriptor of a listener; its family is known from what the caller was
 * told, or else asked. */
static void accepted(int fd, const struct sockaddr *addr, const socklen_t *len,
		     socklen_t room)
{
	int family = AF_UNSPEC;

	if (km_proc.disabled) {
		return;
	} else if (addr && len && *len >= sizeof(addr->sa_family) &&
		   room >= sizeof(addr->sa_family)) {
		family = addr->sa_family;
	} else {
		socklen_t size = sizeof(family);

		km_sys_getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size);
	}
	if (is_inet(family)) {
		km_file_new(fd, KM_ROLE_ACCEPTOR);
		km_link_made(fd, true);
	} else {
		km_fd_forget(fd);
	}
}

/* What the kernel may write of the address. */
static socklen_t room_of(const struct sockaddr *addr, const socklen_t *len)
{
	socklen_t room;

	return addr && len && km_user_get(&room, len, sizeof(room)) ? room : 0;
}

KM_EXPORT int accept(int fd, struct sockaddr *restrict addr, socklen_t *restrict len)
{
	socklen_t room = room_of(addr, len);
	int got = KM_REAL(accept)(fd, addr, len);

	if (got >= 0)
		accepted(got, addr, len, room);
	return got;
}

KM_EXPORT int accept4(int fd, struct sockaddr *restrict addr, socklen_t *restrict len,
		      int flags)
{
	socklen_t room = room_of(addr, len);
	int got = KM_REAL(accept4)(fd, addr, len, flags);

	if (got >= 0)
		accepted(got, addr, len, room);
	return got;
}

KM_EXPORT int bind(int fd, const struct sockaddr *addr, socklen_t len)
{
	return KM_REAL(bind)(fd, addr, len);
}

KM_EXPORT int listen(int fd, int backlog)
{
	int err = KM_REAL(listen)(fd, backlog);
	struct km_file *f = km_file_of(fd);

	/* A listener carries no bytes. */
	if (err == 0 && f)
		km_file_pin(f, KM_REASON_NONE);
	return err;
}

KM_EXPORT int shutdown(int fd, int how)
{
	struct km_file *f = km_file_of(fd);

	if (f && km_load_acquire(&f->mode) == KM_MODE_CHANNEL && how >= SHUT_RD &&
	    how <= SHUT_RDWR) {
		int err = km_stream_shutdown(f, fd, how);

		if (err != KM_RETRY)
			return (int)km_result(err);
	} else if (f) {
		km_file_pin(f, KM_REASON_HALF_CLOSED);
	}
	return KM_REAL(shutdown)(fd, how);
}

/*
 * Options that a ring cannot honour keep the connection on the kernel, or bring it back.
 * late: the answer when it cannot come back.  That is what an older kernel says, which
 * programs know to live with; 0 to let the kernel take the option all the same.
 */
static bool needs_kernel(int level, int name, int *late)
{
	*late = 0;
	if (level == IPPROTO_TCP) {
		switch (name) {
		case TCP_ULP:
			/* Bytes that are left in a ring would go around the cipher. */
			*late = -ENOENT;
			return true;
		case TCP_REPAIR:
			*late = -EPERM;
			return true;
		case TCP_INQ:
			*late = -ENOPROTOOPT;
			return true;
		default:
			return false;
		}
	}
	if (level != SOL_SOCKET)
		return false;
	switch (name) {
	case SO_PEEK_OFF:
		*late = -EOPNOTSUPP;
		return true;
	case SO_ZEROCOPY:
	case SO_TIMESTAMP_OLD:
	case SO_TIMESTAMPNS_OLD:
	case SO_TIMESTAMPING_OLD:
	case SO_TIMESTAMP_NEW:
	case SO_TIMESTAMPNS_NEW:
	case SO_TIMESTAMPING_NEW:
	case SO_ATTACH_FILTER:
	case SO_ATTACH_BPF:
		return true;
	default:
		return false;
	}
}

/* What the library goes by itself. */
static void note_option(struct km_file *f, int fd, int name)
{
	socklen_t len = sizeof(f->conn->lowat);

	if (name == SO_RCVTIMEO || name == SO_SNDTIMEO)
		km_or_seq(&f->conn->flags, KM_CONN_TIMEOUTS);
	if (name == SO_RCVLOWAT) {
		/* As the kernel understood it. */
		km_sys_getsockopt(fd, SOL_SOCKET, name, &f->conn->lowat, &len);
		if ((km_file_level(f, POLLIN) & (POLLIN | POLLERR | POLLHUP)) == POLLIN)
			km_event_news(f, KM_NEWS_DATA);
		if (km_stream_finished(f, fd))
			km_event_ended_again(f);
	}
}

/* Servers switch it on and off with each answer.  What the kernel would refuse is left
 * for it to do so. */
static int set_cork(struct km_file *f, int fd, const void *value, socklen_t len)
{
	int on;

	if (km_load_acquire(&f->mode) != KM_MODE_CHANNEL || len < sizeof(on) ||
	    len > INT32_MAX || !km_user_get(&on, value, sizeof(on)))
		return KM_RETRY;
	return km_stream_cork(f, fd, on != 0);
}

KM_EXPORT int setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
	struct km_file *f = km_file_of(fd);
	int err, late;

	if (f && level == IPPROTO_TCP && name == TCP_CORK) {
		err = set_cork(f, fd, value, len);
		if (err != KM_RETRY)
			return (int)km_result(err);
	}
	if (km_unlikely(f && needs_kernel(level, name, &late)) &&
	    km_file_to_kernel(f, fd, KM_REASON_OPTION, false) < 0 && late)
		return (int)km_result(late);
	err = KM_REAL(setsockopt)(fd, level, name, value, len);
	if (km_unlikely(err == 0 && f && level == SOL_SOCKET && f->conn))
		note_option(f, fd, name);
	return err;
}

KM_EXPORT int getsockopt(int fd, int level, int name, void *restrict value,
			 socklen_t *restrict len)
{
	struct km_file *f;

	/* It takes bytes from the stream. */
	if (km_unlikely(level == IPPROTO_TCP && name == TCP_ZEROCOPY_RECEIVE)) {
		f = km_file_of(fd);
		if (f && km_file_to_kernel(f, fd, KM_REASON_OPTION, false) < 0)
			return (int)km_result(-ENOPROTOOPT);
	}
	if (level == IPPROTO_TCP && name == TCP_CORK && (f = km_file_of(fd)))
		km_stream_cork_read(f, fd);
	return KM_REAL(getsockopt)(fd, level, name, value, len);
}

KM_EXPORT int getsockname(int fd, struct sockaddr *restrict addr,
			  socklen_t *restrict len)
{
	return KM_REAL(getsockname)(fd, addr, len);
}

KM_EXPORT int getpeername(int fd, struct sockaddr *restrict addr,
			  socklen_t *restrict len)
{
	return KM_REAL(getpeername)(fd, addr, len);
}

static void note_nonblock(struct km_file *f, bool on)
{
	struct km_conn *conn = f->conn;

	if (!conn)
		return;
	if (on)
		km_or_seq(&conn->flags, KM_CONN_NONBLOCK);
	else
		km_and_seq(&conn->flags, ~KM_CONN_NONBLOCK);
}

int km_entry_ioctl(int fd, unsigned long request, void *arg)
{
	struct km_file *f = km_file_of(fd);
	int err, bytes;

	if (km_unlikely(km_thread.bypass) && request == FIONCLEX)
		km_file_hand_on(fd, fd);
	if (km_unlikely(km_thread.bypass) && request == FIONBIO)
		km_file_flags_unseen(fd);
	if (km_unlikely(f && request == FIOASYNC))
		km_file_to_kernel(f, fd, KM_REASON_OPTION, false);
	if (km_likely(!f) || km_load_acquire(&f->mode) != KM_MODE_CHANNEL)
		return KM_REAL(ioctl)(fd, request, arg);
	if (request == SIOCINQ || request == SIOCOUTQ) {
		err = request == SIOCINQ ? km_stream_inq(f, fd, &bytes)
					 : km_stream_outq(f, fd, &bytes);
		if (err == KM_RETRY)
			return KM_REAL(ioctl)(fd, request, arg);
		if (err == 0)
			err = km_copy_out(arg, &bytes, sizeof(bytes));
		return (int)km_result(err);
	}
	err = KM_REAL(ioctl)(fd, request, arg);
	/* Urgent data goes by the kernel, behind all that is in the ring. */
	if (request == SIOCATMARK && err == 0 && *(int *)arg)
		*(int *)arg = !km_stream_behind(f, fd);
	if (request == FIONBIO && err == 0)
		note_nonblock(f, *(int *)arg != 0);
	return err;
}

KM_EXPORT int ioctl(int fd, km_ioctl_request request, ...)
{
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	return km_entry_ioctl(fd, request, arg);
}

int km_entry_fcntl(int fd, int cmd, void *arg)
{
	int result = KM_REAL(fcntl)(fd, cmd, arg);
	struct km_file *f;

	/* The child of a vfork makes ready what its program gets, while it still has
	 * all that it takes to wake the peer. */
	if (km_unlikely(km_thread.bypass) && cmd == F_SETFL)
		km_file_flags_unseen(fd);
	if (km_unlikely(km_thread.bypass) &&
	    ((cmd == F_SETFD && !((uintptr_t)arg & FD_CLOEXEC)) ||
	     (cmd == F_DUPFD && result >= 0)))
		km_file_hand_on(fd, cmd == F_DUPFD ? result : fd);
	if (result < 0)
		return result;
	if (cmd == F_DUPFD || cmd == F_DUPFD_CLOEXEC) {
		km_fd_forget(result);
		km_fd_dup(fd, result);
	} else if (cmd == F_SETFL) {
		f = km_file_of(fd);
		if (f)
			note_nonblock(f, (uintptr_t)arg & O_NONBLOCK);
		/* SIGIO is for bytes that come by the kernel. */
		if (f && ((uintptr_t)arg & O_ASYNC))
			km_file_to_kernel(f, fd, KM_REASON_OPTION, false);
	} else if (cmd == F_GETFL) {
		/* The program knows now, so the library has to. */
		f = km_file_of(fd);
		if (f && f->conn)
			km_conn_nonblock(f->conn, result & O_NONBLOCK);
	}
	return result;
}

KM_EXPORT int fcntl(int fd, int cmd, ...)
{
	va_list args;
	void *arg;

	va_start(args, cmd);
	arg = va_arg(args, void *);
	va_end(args);
	return km_entry_fcntl(fd, cmd, arg);
}

KM_EXPORT int fcntl64(int fd, int cmd, ...)
{
	va_list args;
	void *arg;

	va_start(args, cmd);
	arg = va_arg(args, void *);
	va_end(args);
	return km_entry_fcntl(fd, cmd, arg);
}

KM_EXPORT_GLIBC int __fcntl(int fd, int cmd, ...)
{
	va_list args;
	void *arg;

	va_start(args, cmd);
	arg = va_arg(args, void *);
	va_end(args);
	return km_entry_fcntl(fd, cmd, arg);
}
