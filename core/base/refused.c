/* SPDX-License-Identifier: Apache-2.0 */
#include "base/refused.h"

#include <errno.h>
#include <sys/uio.h>

int km_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
	     const void *mask)
{
	struct timespec copy;
	long got = -ENOSYS;

#ifdef SYS_poll
	/* What libc's own poll is, and a filter so lets through. */
	if (!mask && (!timeout || (timeout->tv_nsec % 1000000 == 0 &&
				   timeout->tv_sec < INT32_MAX / 1000))) {
		int ms = timeout ? (int)(timeout->tv_sec * 1000 +
					 timeout->tv_nsec / 1000000)
				 : -1;

		got = KM_SYS(poll, fds, n, ms, 0, 0, 0);
	}
#endif
	if (km_likely(!km_refused(got)))
		return (int)got;
	if (timeout)
		copy = *timeout;
	got = KM_SYS(ppoll, fds, n, timeout ? &copy : NULL, mask, KM_SIGSET_SIZE, 0);
#ifdef SYS_poll
	if (km_refused(got) && !mask && timeout)
		got = KM_SYS(poll, fds, n,
			     KM_MIN(timeout->tv_sec, INT32_MAX / 1000 - 1) * 1000 +
				     (timeout->tv_nsec + 999999) / 1000000,
			     0, 0, 0);
#endif
	return (int)got;
}

void km_doze(void)
{
	struct timespec ms = {0, 1000000};
	uint32_t word = 0;

	if (!km_refused(KM_SYS(nanosleep, &ms, NULL, 0, 0, 0, 0)) ||
	    !km_refused(KM_SYS(clock_nanosleep, CLOCK_MONOTONIC, 0, &ms, NULL, 0, 0)) ||
	    !km_refused(km_sys_futex_wait(&word, 0, &ms)) ||
	    !km_refused(km_ppoll(NULL, 0, &ms, NULL)))
		return;
	KM_SYS(sched_yield, 0, 0, 0, 0, 0, 0);
}

static bool is_ready(int fd, short events)
{
	struct pollfd pfd = {.fd = fd, .events = events};
	struct timespec now = {0, 0};

	return km_ppoll(&pfd, 1, &now, NULL) > 0;
}

ssize_t km_recv_now(int fd, const struct msghdr *msg, int flags)
{
	const struct iovec *iov = msg->msg_iov;
	ssize_t n = KM_SYS(recvmsg, fd, msg, flags | MSG_DONTWAIT, 0, 0, 0);

	if (km_likely(!km_refused(n)) || !msg->msg_iovlen)
		return n;
	n = km_sys_recvfrom(fd, iov->iov_base, iov->iov_len, flags | MSG_DONTWAIT);
	if (!km_refused(n) || flags)
		return n;
	return is_ready(fd, POLLIN) ? km_sys_read(fd, iov->iov_base, iov->iov_len)
				    : -EAGAIN;
}

ssize_t km_send_now(int fd, const struct msghdr *msg, int flags)
{
	const struct iovec *iov = msg->msg_iov;
	ssize_t n = KM_SYS(sendmsg, fd, msg, flags | MSG_DONTWAIT, 0, 0, 0);

	if (km_likely(!km_refused(n)) || !msg->msg_iovlen)
		return n;
	n = km_sys_sendto(fd, iov->iov_base, iov->iov_len, flags | MSG_DONTWAIT, NULL,
			  0);
	if (!km_refused(n) || flags)
		return n;
	return is_ready(fd, POLLOUT) ? km_sys_write(fd, iov->iov_base, iov->iov_len)
				     : -EAGAIN;
}
