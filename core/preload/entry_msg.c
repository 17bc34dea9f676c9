/* SPDX-License-Identifier: Apache-2.0 */
/* Entry points of messages: recvmsg and sendmsg, and those that move several. */
#include "preload/entry.h"

#include <limits.h>
#include <linux/sockios.h>
#include <string.h>

#include "link/held.h"
#include "preload/vector.h"

/* What the kernel tells of a message, where TCP has no name and no control data. */
static int message_out(struct msghdr *msg, int flags)
{
	/* Stores of the width that whoever reads them next uses: others would have to
	 * reach the cache first. */
	const socklen_t no_name = 0;
	const __typeof__(msg->msg_controllen) no_control = 0;

	if ((msg->msg_name &&
	     km_copy_out(&msg->msg_namelen, &no_name, sizeof(no_name)) < 0) ||
	    km_copy_out(&msg->msg_flags, &flags, sizeof(flags)) < 0 ||
	    km_copy_out(&msg->msg_controllen, &no_control, sizeof(no_control)) < 0)
		return -EFAULT;
	return 0;
}

/* The program's own message, by the kernel.  musl's has holes where the kernel's has the
 * upper halves of its lengths, and only its own calls fill them. */
static ssize_t kernel_recvmsg(int fd, struct msghdr *msg, int flags)
{
#ifdef KM_MUSL
	ssize_t n = KM_REAL(recvmsg)(fd, msg, flags);

	return n < 0 ? -errno : n;
#else
	return km_sys_recvmsg(fd, msg, flags);
#endif
}

static ssize_t kernel_sendmsg(int fd, const struct msghdr *msg, int flags)
{
#ifdef KM_MUSL
	ssize_t n = KM_REAL(sendmsg)(fd, msg, flags);

	return n < 0 ? -errno : n;
#else
	return km_sys_sendmsg(fd, msg, flags);
#endif
}

static ssize_t receive_message(struct km_file *f, int fd, struct msghdr *msg, int flags)
{
	ssize_t n;

	if (!km_readable(msg, sizeof(*msg)))
		return -EFAULT;
	if (km_unlikely(msg->msg_iovlen > IOV_MAX ||
			km_iov_is_invalid(msg->msg_iov, (int)msg->msg_iovlen)))
		return kernel_recvmsg(fd, msg, flags);
	/* Control data comes by the kernel alone: times, and how much is left. */
	if ((flags & MSG_ERRQUEUE) || (msg->msg_controllen && km_stream_by_kernel(f)))
		return kernel_recvmsg(fd, msg, flags);
	n = KM_RECV(fd, msg->msg_iov, (int)msg->msg_iovlen, flags);
	if (n >= 0 && message_out(msg, flags & MSG_CMSG_CLOEXEC) < 0)
		return -EFAULT;
	return n;
}

/* Descriptors that arrive may reuse numbers whose close was not seen. */
static void take_received(struct msghdr *msg)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		size_t count;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
			km_held_received(fd);
		}
	}
}

static ssize_t receive_plain(int fd, struct msghdr *msg, int flags)
{
	ssize_t n = KM_REAL(recvmsg)(fd, msg, flags);

	if (n >= 0 && msg->msg_controllen)
		take_received(msg);
	return n;
}

KM_EXPORT ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	KM_DATA_CALL(fd, KM_IN, receive_plain(fd, msg, flags),
		     receive_message(f, fd, msg, flags));
}

/* Descriptors in a message are about to be another program's. */
static void hand_on_rights(const struct msghdr *msg)
{
	struct msghdr m;
	struct cmsghdr c;
	const char *at, *end;

	if (!km_user_get(&m, msg, sizeof(m)) || !m.msg_controllen)
		return;
	at = m.msg_control;
	for (end = at + m.msg_controllen; end - at >= (long)sizeof(c);
	     at += CMSG_ALIGN(c.cmsg_len)) {
		if (!km_user_get(&c, at, sizeof(c)) || c.cmsg_len < sizeof(c) ||
		    c.cmsg_len > (size_t)(end - at))
			return;
		if (c.cmsg_level != SOL_SOCKET || c.cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t n = CMSG_LEN(0); n + sizeof(int) <= c.cmsg_len;
		     n += sizeof(int)) {
			int fd;

			if (km_user_get(&fd, at + n, sizeof(fd)))
				km_file_hand_on(fd, KM_BY_MESSAGE);
		}
	}
}

static ssize_t send_plain(int fd, const struct msghdr *msg, int flags)
{
	if (km_unlikely(km_load_relaxed(&km_proc.files)) && !km_file_of(fd))
		hand_on_rights(msg);
	return KM_REAL(sendmsg)(fd, msg, flags);
}

static ssize_t send_message(struct km_file *f, int fd, const struct msghdr *msg,
			    int flags)
{
	ssize_t err;

	if (!km_readable(msg, sizeof(*msg)))
		return -EFAULT;
	if (km_unlikely(msg->msg_iovlen > IOV_MAX ||
			km_iov_is_invalid(msg->msg_iov, (int)msg->msg_iovlen)))
		return kernel_sendmsg(fd, msg, flags);
	if (km_unlikely(msg->msg_controllen)) {
		/* The kernel judges control data; none that it takes changes what a
		 * ring does. */
		struct msghdr control = *msg;

		control.msg_iovlen = 0;
		err = kernel_sendmsg(fd, &control, flags | MSG_DONTWAIT);
		if (err < 0)
			return err;
	}
	return KM_SEND(fd, msg->msg_iov, (int)msg->msg_iovlen, flags);
}

KM_EXPORT ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	KM_DATA_CALL(fd, KM_OUT, send_plain(fd, msg, flags),
		     send_message(f, fd, msg, flags));
}

/* The count of one message of several; n is what the call for it returned. */
static ssize_t put_count(struct mmsghdr *msg, ssize_t n)
{
	unsigned len = (unsigned)n;

	if (n < 0 || km_copy_out(&msg->msg_len, &len, sizeof(len)) == 0)
		return n;
	return km_result(-EFAULT);
}

/* The kernel looks for an error before the first message, and leaves one that comes
 * behind a message for the next call. */
static bool error_first(struct km_file *f, int fd, unsigned i)
{
	int err = 0, unread = 0;
	socklen_t len = sizeof(err);

	if (i == 0) {
		km_sys_getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len);
		if (err)
			errno = err;
		return err != 0;
	}
	if (!km_stream_failed(fd))
		return false;
	if (km_load_acquire(&f->mode) == KM_MODE_CHANNEL)
		err = km_stream_inq(f, fd, &unread);
	else
		err = km_sys_ioctl(fd, SIOCINQ, &unread);
	return err == 0 && !unread;
}

/* As recvmmsg does without a time limit, but until the deadline; *left is what was left
 * of it after the last message. */
static int receive_until(struct km_file *f, int fd, struct mmsghdr *msgs,
			 unsigned count, int flags, int64_t deadline, int64_t *left)
{
	int saved = errno;
	unsigned i;

	for (i = 0; i < count; i++) {
		if (km_unlikely(error_first(f, fd, i)))
			return i ? (int)i : -1;
		int more = i && (flags & MSG_WAITFORONE) ? MSG_DONTWAIT : 0;
		ssize_t n =
			recvmsg(fd, &msgs[i].msg_hdr, (flags & ~MSG_WAITFORONE) | more);

		n = put_count(&msgs[i], n);
		if (n < 0) {
			if (i)
				errno = saved;
			return i ? (int)i : -1;
		}
		if (deadline >= 0) {
			*left = KM_MAX(deadline - km_now_ns(), 0);
			if (*left == 0)
				return (int)i + 1;
		}
	}
	return (int)i;
}

static int receive_many(struct km_file *f, int fd, struct mmsghdr *msgs, unsigned count,
			int flags, struct timespec *timeout)
{
	struct timespec limit;
	int64_t deadline = -1, left = 0;
	int n;

	if (timeout) {
		if (!km_user_get(&limit, timeout, sizeof(limit)))
			return (int)km_result(-EFAULT);
		if (limit.tv_sec < 0 || limit.tv_nsec < 0 ||
		    limit.tv_nsec >= 1000000000)
			return (int)km_result(-EINVAL);
		deadline = km_now_ns() +
			   KM_MIN(limit.tv_sec, 1000000000) * 1000000000LL +
			   limit.tv_nsec;
	}
	n = receive_until(f, fd, msgs, count, flags, deadline, &left);
	if (n > 0 && timeout) {
		limit = (struct timespec){left / 1000000000, left % 1000000000};
		if (km_copy_out(timeout, &limit, sizeof(limit)) < 0)
			return (int)km_result(-EFAULT);
	}
	return n;
}

KM_EXPORT int recvmmsg(int fd, struct mmsghdr *msgs, unsigned count,
		       km_mmsg_flags flags, struct timespec *timeout)
{
	struct km_file *f = km_file_of(fd);

	if (!f || km_load_acquire(&f->mode) == KM_MODE_PINNED) {
		int n = KM_REAL(recvmmsg)(fd, msgs, count, flags, timeout);

		for (int i = 0; i < n; i++)
			if (msgs[i].msg_hdr.msg_controllen)
				take_received(&msgs[i].msg_hdr);
		return n;
	}
	return receive_many(f, fd, msgs, count, flags, timeout);
}

KM_EXPORT int sendmmsg(int fd, struct mmsghdr *msgs, unsigned count,
		       km_mmsg_flags flags)
{
	struct km_file *f = km_file_of(fd);
	int saved = errno;
	unsigned i;

	if (!f && km_load_relaxed(&km_proc.files) &&
	    km_user_readable(msgs, count * sizeof(*msgs)))
		for (i = 0; i < count; i++)
			hand_on_rights(&msgs[i].msg_hdr);
	if (!f || km_load_acquire(&f->mode) == KM_MODE_PINNED)
		return KM_REAL(sendmmsg)(fd, msgs, count, flags);
	count = KM_MIN(count, IOV_MAX);
	for (i = 0; i < count; i++) {
		ssize_t n = put_count(&msgs[i], sendmsg(fd, &msgs[i].msg_hdr, flags));

		if (n < 0) {
			if (i)
				errno = saved;
			return i ? (int)i : -1;
		}
	}
	return (int)i;
}
