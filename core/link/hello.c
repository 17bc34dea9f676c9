/* SPDX-License-Identifier: Apache-2.0 */
/* Datagrams of the handshake, and the descriptors that they carry. */
#include <errno.h>
#include <string.h>

#include "link/internal.h"

int km_link_send_hello(int sock, const struct km_wire_hello *hello, const int *fds,
		       int nfds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * KM_MOST_FDS)];
	struct iovec iov = {(void *)(uintptr_t)hello, sizeof(*hello)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (nfds) {
		struct cmsghdr *c;

		memset(control, 0, sizeof(control));
		msg.msg_control = control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)nfds);
	}
	n = km_sys_sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (n < 0)
		return (int)n;
	return n == (ssize_t)sizeof(*hello) ? 0 : -EPROTO;
}

enum km_reason km_link_exchange_reason(int err)
{
	switch (err) {
	case -EPIPE:
	case -ECONNRESET:
	case -ENOTCONN:
		return KM_REASON_PEER_CANCELLED;
	default:
		return km_stay_reason(err);
	}
}

int km_link_recv_hello(int sock, struct km_wire_hello *hello, int fds[KM_MOST_FDS])
{
	/* Room for more than is allowed, so that extra ones can be closed. */
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)];
	struct iovec iov = {hello, sizeof(*hello)};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control,
			     .msg_controllen = sizeof(control)};
	ssize_t n = km_sys_recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int count = 0, err = 0;
	bool bad = false;

	if (n < 0)
		return (int)n;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		int got[16];
		size_t room;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		room = KM_MIN(c->cmsg_len - CMSG_LEN(0), sizeof(got));
		memcpy(got, CMSG_DATA(c), room);
		for (size_t i = 0; i < room / sizeof(int); i++) {
			if (count < KM_MOST_FDS) {
				fds[count++] = got[i];
			} else {
				km_sys_close(got[i]);
				bad = true;
			}
		}
	}
	if (n == 0 && count == 0)
		return -ECONNRESET;
	/* All versions begin alike; their length, and what comes with them, may differ. */
	if (n >= (ssize_t)offsetof(struct km_wire_hello, kind) &&
	    hello->magic == KM_HELLO_MAGIC && hello->version != KM_WIRE_VERSION)
		err = -EPROTONOSUPPORT;
	else if (bad || n != (ssize_t)sizeof(*hello) ||
		 hello->magic != KM_HELLO_MAGIC ||
		 (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		err = -EPROTO;
	if (err == 0)
		return count;
	while (count)
		km_sys_close(fds[--count]);
	return err;
}

void km_link_close_all(const int *fds, int n)
{
	while (n > 0)
		km_sys_close(fds[--n]);
}
