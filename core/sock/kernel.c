/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel's side of an upgraded socket. */
#include <errno.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <string.h>

#include "base/refused.h"
#include "sock/internal.h"

/* tcpi_state: the states after the peer's FIN.  netinet/tcp.h has these names and
 * linux/tcp.h the longer tcp_info, and they exclude each other. */
#define TCP_STATE_TIME_WAIT 6
#define TCP_STATE_CLOSE 7
#define TCP_STATE_CLOSE_WAIT 8
#define TCP_STATE_LAST_ACK 9
#define TCP_STATE_CLOSING 11

ssize_t km_kernel_recv(int fd, const struct iovec *iov, int iovcnt, int flags)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)iov,
			     .msg_iovlen = (size_t)iovcnt};
	int unread = 0;

	if (km_unlikely(flags & KM_MSG_MOVED)) {
		flags &= ~KM_MSG_MOVED;
		km_sys_ioctl(fd, SIOCINQ, &unread);
		if (unread <= 0)
			return km_kernel_poll(fd, POLLIN | POLLRDHUP) ? 0 : -EAGAIN;
	}
	return km_recv_now(fd, &msg, flags & ~MSG_WAITALL);
}

ssize_t km_kernel_send(int fd, const struct iovec *iov, int iovcnt, int flags)
{
	struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)iov,
			     .msg_iovlen = (size_t)iovcnt};

	if (km_unlikely(flags & KM_MSG_MOVED)) {
		flags &= ~KM_MSG_MOVED;
		flags |= MSG_NOSIGNAL;
		if (km_kernel_poll(fd, 0) & (POLLERR | POLLHUP))
			return -EPIPE;
	}
	return km_send_now(fd, &msg, flags);
}

uint32_t km_kernel_poll(int fd, short events)
{
	struct pollfd pfd = {.fd = fd, .events = events};
	struct timespec now = {0, 0};

	return km_sys_poll(&pfd, 1, &now) > 0 ? (uint32_t)pfd.revents : 0;
}

static int tcp_info(int fd, struct tcp_info *info)
{
	socklen_t len = sizeof(*info);
	int err;

	memset(info, 0, sizeof(*info));
	err = km_sys_getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &len);
	if (err < 0)
		return err;
	return len >= offsetof(struct tcp_info, tcpi_bytes_retrans) + 8 ? 0 : -ENOSYS;
}

/* Bytes ever handed to the kernel on this socket. */
int km_kernel_sent(int fd, uint64_t *out)
{
	struct tcp_info info;
	int err = tcp_info(fd, &info);

	*out = info.tcpi_bytes_sent - info.tcpi_bytes_retrans + info.tcpi_notsent_bytes;
	return err;
}

/*
 * tcpi_bytes_received counts a FIN as one byte, and SIOCINQ leaves it out.  Whether
 * there was one shows in the state, but for a socket that is closed both ways, which
 * may have been reset instead: then it is told by the bytes there can have been.
 */
static bool has_fin(const struct tcp_info *info, int fd, uint64_t cut, bool ended)
{
	switch (info->tcpi_state) {
	case TCP_STATE_TIME_WAIT:
	case TCP_STATE_CLOSE_WAIT:
	case TCP_STATE_LAST_ACK:
	case TCP_STATE_CLOSING:
		return true;
	case TCP_STATE_CLOSE:
		/* A peer that went back to the kernel sent bytes beyond the cut. */
		return ended ? !(km_kernel_poll(fd, 0) & POLLERR)
			     : info->tcpi_bytes_received > cut;
	default:
		return false;
	}
}

bool km_kernel_unsure(int fd, uint64_t cut, uint64_t ring)
{
	struct tcp_info info;
	uint64_t beyond;

	if (tcp_info(fd, &info) < 0)
		return true;
	beyond = info.tcpi_bytes_received - cut;
	return info.tcpi_state == TCP_STATE_CLOSE && (beyond > 1 || beyond == ring);
}

bool km_kernel_ended(int fd)
{
	struct tcp_info info;

	return tcp_info(fd, &info) == 0 && info.tcpi_state != TCP_STATE_CLOSE &&
	       has_fin(&info, fd, 0, false);
}

int km_kernel_taken(int fd, uint64_t cut, bool ended, uint64_t *out)
{
	struct tcp_info info, again;
	int unread, err = tcp_info(fd, &info);

	while (err == 0) {
		unread = 0;
		err = km_sys_ioctl(fd, SIOCINQ, &unread);
		if (err == 0)
			err = tcp_info(fd, &again);
		/* Bytes or a FIN that came in between belong to neither figure. */
		if (err < 0 || (again.tcpi_bytes_received == info.tcpi_bytes_received &&
				again.tcpi_state == info.tcpi_state))
			break;
		info = again;
	}
	if (err < 0)
		return err;
	/* SIOCINQ ends before urgent data, and does not count it. */
	*out = info.tcpi_bytes_received - (uint64_t)unread -
	       has_fin(&info, fd, cut, ended) -
	       (ended && (km_kernel_poll(fd, POLLPRI) & POLLPRI) ? 1 : 0);
	return 0;
}
