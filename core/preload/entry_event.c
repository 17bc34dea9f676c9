/* SPDX-License-Identifier: Apache-2.0 */
/* Entry points that wait for readiness. */
#include "preload/entry.h"

#include <stdlib.h>

#include "event/event.h"

/* A set is known from the start, so that whoever sleeps in it is known too. */
static void created(int fd)
{
	if (fd < 0 || km_proc.disabled)
		return;
	km_fd_forget(fd);
	km_set_for(fd);
}

KM_EXPORT int epoll_create(int size)
{
	int fd = KM_REAL(epoll_create)(size);

	created(fd);
	return fd;
}

KM_EXPORT int epoll_create1(int flags)
{
	int fd = KM_REAL(epoll_create1)(flags);

	created(fd);
	return fd;
}

KM_EXPORT int epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
	struct epoll_event copy;

	if (km_unlikely(km_set_of(fd) != NULL)) {
		struct km_set *set = km_set_of(epfd);
		int err;

		if (set && epfd != fd && op >= EPOLL_CTL_ADD && op <= EPOLL_CTL_MOD &&
		    (op == EPOLL_CTL_DEL || km_user_get(&copy, ev, sizeof(copy))))
			err = (int)km_result(km_set_nest(set, epfd, op, fd, &copy));
		else
			err = KM_REAL(epoll_ctl)(epfd, op, fd, ev);
		if (err == 0 && op == EPOLL_CTL_ADD)
			km_set_watch(km_set_of(fd), fd);
		return err;
	}
	if (km_likely(!km_file_of(fd))) {
		int err = KM_REAL(epoll_ctl)(epfd, op, fd, ev);

		if (err == 0)
			km_set_note(epfd, op, ev);
		return err;
	}
	if (op == EPOLL_CTL_DEL)
		return (int)km_result(km_epoll_ctl(epfd, op, fd, NULL));
	/* The kernel names what is wrong with it. */
	if (!km_user_get(&copy, ev, sizeof(copy)))
		return KM_REAL(epoll_ctl)(epfd, op, fd, ev);
	return (int)km_result(km_epoll_ctl(epfd, op, fd, &copy));
}

static int64_t ms_to_ns(int ms)
{
	return ms < 0 ? -1 : (int64_t)ms * 1000000;
}

/* For ever without a time.  False when something is wrong with it, which the kernel
 * names. */
static bool get_time(const struct timespec *user, int64_t *ns)
{
	struct timespec t;

	*ns = -1;
	if (!user)
		return true;
	if (!km_user_get(&t, user, sizeof(t)) || t.tv_sec < 0 || t.tv_nsec < 0 ||
	    t.tv_nsec >= 1000000000)
		return false;
	*ns = KM_MIN(t.tv_sec, 1000000000) * 1000000000LL + t.tv_nsec;
	return true;
}

/*
 * Waits on a set: as the kernel does while it holds no upgraded connection, else
 * in event/wait.c.  real is the kernel's call.
 */
#define WAIT_CALL(epfd, evs, max, timeout_ns, mask, real)                              \
	do {                                                                           \
		struct km_set *set = km_set_of(epfd);                                  \
		int64_t began;                                                         \
		int n;                                                                 \
		if (km_unlikely(!set))                                                 \
			set = inherited(epfd);                                         \
		if (km_unlikely(!set))                                                 \
			return real;                                                   \
		if (!km_set_wait_begin(set))                                           \
			return (int)km_result(                                         \
				km_epoll_wait(set, epfd, evs, max, timeout_ns, mask)); \
		began = timeout_ns > 0 ? km_now_ns() : 0;                              \
		n = real;                                                              \
		km_set_wait_end(set);                                                  \
		if (n <= 0 || !set->mixed)                                             \
			return n;                                                      \
		n = km_set_translate(set, evs, n);                                     \
		if (n)                                                                 \
			return n;                                                      \
		return (int)km_result(km_epoll_wait(                                   \
			set, epfd, evs, max, time_left(timeout_ns, began), mask));     \
	} while (0)

/* A set that came by exec or another unseen way is taken on while there are
 * sockets that could be in it. */
static struct km_set *inherited(int epfd)
{
	return km_load_relaxed(&km_proc.files) && epfd >= 0 ? km_set_for(epfd) : NULL;
}

static int64_t time_left(int64_t timeout_ns, int64_t began)
{
	return timeout_ns > 0 ? KM_MAX(timeout_ns - (km_now_ns() - began), 0)
			      : timeout_ns;
}

KM_EXPORT int epoll_wait(int epfd, struct epoll_event *evs, int max, int timeout)
{
	WAIT_CALL(epfd, evs, max, ms_to_ns(timeout), NULL,
		  KM_REAL(epoll_wait)(epfd, evs, max, timeout));
}

KM_EXPORT int epoll_pwait(int epfd, struct epoll_event *evs, int max, int timeout,
			  const sigset_t *mask)
{
	WAIT_CALL(epfd, evs, max, ms_to_ns(timeout), mask,
		  KM_REAL(epoll_pwait)(epfd, evs, max, timeout, mask));
}

KM_EXPORT int epoll_pwait2(int epfd, struct epoll_event *evs, int max,
			   const struct timespec *timeout, const sigset_t *mask)
{
	int64_t ns;

	if (!get_time(timeout, &ns))
		return KM_REAL(epoll_pwait2)(epfd, evs, max, timeout, mask);
	WAIT_CALL(epfd, evs, max, ns, mask,
		  KM_REAL(epoll_pwait2)(epfd, evs, max, timeout, mask));
}

/* Without sockets, sets that held some may still show edges that are not the
 * program's. */
static bool nothing_tracked(void)
{
	return km_load_relaxed(&km_proc.files) == 0 && !km_proc.mixed;
}

static bool any_tracked(const struct pollfd *fds, nfds_t n)
{
	bool found = false;

	if (km_likely(nothing_tracked()) || km_thread.bypass || n > KM_FD_MAX ||
	    !km_user_readable(fds, n * sizeof(*fds)))
		return false;
	for (nfds_t i = 0; i < n; i++) {
		struct km_set *set = km_set_of(fds[i].fd);

		if (km_unlikely(set != NULL))
			km_set_watch(set, fds[i].fd);
		found |= set || km_file_of(fds[i].fd);
	}
	return found;
}

/* glibc declares the array of poll as written only, and reading it here draws a
 * warning. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

KM_EXPORT int poll(struct pollfd *fds, nfds_t n, int timeout)
{
	if (km_likely(!any_tracked(fds, n)))
		return KM_REAL(poll)(fds, n, timeout);
	return (int)km_result(km_poll(fds, n, ms_to_ns(timeout), NULL));
}

KM_EXPORT_GLIBC int __poll(struct pollfd *fds, nfds_t n, int timeout)
{
	return poll(fds, n, timeout);
}

KM_EXPORT_GLIBC int __poll_chk(struct pollfd *fds, nfds_t n, int timeout, size_t room)
{
	if (room / sizeof(*fds) < n)
		return KM_REAL(__poll_chk)(fds, n, timeout, room);
	return poll(fds, n, timeout);
}

KM_EXPORT int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
		    const sigset_t *mask)
{
	int64_t ns;

	if (km_likely(!any_tracked(fds, n)) || !get_time(timeout, &ns))
		return KM_REAL(ppoll)(fds, n, timeout, mask);
	return (int)km_result(km_poll(fds, n, ns, mask));
}

KM_EXPORT_GLIBC int __ppoll_chk(struct pollfd *fds, nfds_t n,
				const struct timespec *timeout, const sigset_t *mask,
				size_t room)
{
	if (room / sizeof(*fds) < n)
		return KM_REAL(__ppoll_chk)(fds, n, timeout, mask, room);
	return ppoll(fds, n, timeout, mask);
}

#pragma GCC diagnostic pop

/* -- select ------------------------------------------------------------------- */

typedef unsigned long word;
#define WORD_BITS (8 * (int)sizeof(word))
#define SET_WORDS(n) ((size_t)(((n) + WORD_BITS - 1) / WORD_BITS))

/* Sets may be larger than FD_SETSIZE, so the macros will not do. */
static bool in_set(int fd, const fd_set *set)
{
	return set && (((const word *)set)[fd / WORD_BITS] >> (fd % WORD_BITS) & 1);
}

static void put_in(int fd, word *set)
{
	set[fd / WORD_BITS] |= (word)1 << (fd % WORD_BITS);
}

static bool set_readable(int n, const fd_set *set)
{
	return !set || km_user_readable(set, SET_WORDS(n) * sizeof(word));
}

static bool select_tracked(int n, const fd_set *r, const fd_set *w, const fd_set *e)
{
	bool found = false;

	if (km_likely(nothing_tracked()) || km_thread.bypass || n <= 0 ||
	    n > (int)KM_FD_MAX || !set_readable(n, r) || !set_readable(n, w) ||
	    !set_readable(n, e))
		return false;
	for (int fd = 0; fd < n; fd++) {
		if (!in_set(fd, r) && !in_set(fd, w) && !in_set(fd, e))
			continue;
		if (km_unlikely(km_set_of(fd) != NULL))
			km_set_watch(km_set_of(fd), fd);
		found |= km_set_of(fd) || km_file_of(fd);
	}
	return found;
}

/* select by poll; what the bits mean is what the kernel's own select means. */
static int select_by_poll(int n, fd_set *r, fd_set *w, fd_set *e, int64_t timeout_ns,
			  const sigset_t *mask)
{
	size_t words = SET_WORDS(n);
	struct pollfd *fds =
		calloc(1, (size_t)n * sizeof(*fds) + 3 * words * sizeof(word));
	fd_set *user[] = {r, w, e};
	word *found[3];
	nfds_t count = 0;
	int result;

	if (!fds)
		return -ENOMEM;
	for (int i = 0; i < 3; i++)
		found[i] = (word *)(void *)(fds + n) + (size_t)i * words;
	for (int fd = 0; fd < n; fd++) {
		short events = 0;

		if (in_set(fd, r))
			events |= POLLIN | POLLRDNORM | POLLRDBAND;
		if (in_set(fd, w))
			events |= POLLOUT | POLLWRNORM | POLLWRBAND;
		if (in_set(fd, e))
			events |= POLLPRI;
		if (events)
			fds[count++] = (struct pollfd){.fd = fd, .events = events};
	}
	result = km_poll(fds, count, timeout_ns, mask);
	for (nfds_t i = 0; i < count && result >= 0; i++)
		if (fds[i].revents & POLLNVAL)
			result = -EBADF;
	if (result > 0)
		result = 0;
	for (nfds_t i = 0; i < count && result >= 0; i++) {
		short asked = fds[i].events, got = fds[i].revents;

		if ((asked & POLLIN) &&
		    (got & (POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR))) {
			put_in(fds[i].fd, found[0]);
			result++;
		}
		if ((asked & POLLOUT) &&
		    (got & (POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR))) {
			put_in(fds[i].fd, found[1]);
			result++;
		}
		if ((asked & POLLPRI) && (got & POLLPRI)) {
			put_in(fds[i].fd, found[2]);
			result++;
		}
	}
	for (int i = 0; i < 3 && result >= 0; i++)
		if (user[i] && km_copy_out(user[i], found[i], words * sizeof(word)) < 0)
			result = -EFAULT;
	free(fds);
	return result;
}

KM_EXPORT int select(int n, fd_set *restrict r, fd_set *restrict w, fd_set *restrict e,
		     struct timeval *restrict timeout)
{
	int64_t ns = -1, began;
	struct timeval t;
	int result;

	if (km_likely(!select_tracked(n, r, w, e)))
		return KM_REAL(select)(n, r, w, e, timeout);
	if (timeout) {
		if (!km_user_get(&t, timeout, sizeof(t)))
			return (int)km_result(-EFAULT);
		if (t.tv_sec < 0 || t.tv_usec < 0)
			return (int)km_result(-EINVAL);
		ns = KM_MIN(t.tv_sec, 1000000000) * 1000000000LL + t.tv_usec * 1000LL;
	}
	began = ns > 0 ? km_now_ns() : 0;
	result = select_by_poll(n, r, w, e, ns, NULL);
	if (ns > 0) {
		/* Linux tells how much time was left, where that can be written. */
		ns = time_left(ns, began) / 1000;
		t.tv_sec = ns / 1000000;
		t.tv_usec = ns % 1000000;
		km_copy_out(timeout, &t, sizeof(t));
	}
	return (int)km_result(result);
}

KM_EXPORT_GLIBC int __select(int n, fd_set *r, fd_set *w, fd_set *e,
			     struct timeval *timeout)
{
	return select(n, r, w, e, timeout);
}

KM_EXPORT int pselect(int n, fd_set *restrict r, fd_set *restrict w, fd_set *restrict e,
		      const struct timespec *restrict timeout,
		      const sigset_t *restrict mask)
{
	int64_t ns;

	if (km_likely(!select_tracked(n, r, w, e)) || !get_time(timeout, &ns))
		return KM_REAL(pselect)(n, r, w, e, timeout, mask);
	return (int)km_result(select_by_poll(n, r, w, e, ns, mask));
}
