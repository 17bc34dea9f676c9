/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's own descriptors, kept out of the numbers that the program can use.
 *
 * RLIMIT_NOFILE limits numbers, and a descriptor stays open when the limit falls below
 * its number.  So where the hard limit allows it the soft limit is raised for as long as
 * one dup takes, and the duplicate lies above whatever the program can reach.  Where the
 * soft limit is the hard one there is no such place: a few numbers of a large limit are
 * taken, and none of a small one.
 */
#include <errno.h>
#include <string.h>
#include <sys/resource.h>

#include "event/event.h"
#include "fd/file.h"

/* Where there is no place above the limit they start here: high enough for programs
 * that expect low numbers, low enough not to grow the kernel's table. */
#define INSIDE_FIRST 900
/* The smallest limit of which some numbers are taken, and the part of it. */
#define INSIDE_LEAST 1024
#define INSIDE_SHARE 16
/* While fewer than these of the highest numbers are unused, the library opens nothing:
 * what it opens has a low number for an instant. */
#define SPARE_LOOK 16
#define SPARE 8

struct window {
	struct rlimit was, high;
	bool open;
};

static km_a32 hidden_count;

static int limit_swap(const struct rlimit *set, struct rlimit *old)
{
	return (int)KM_SYS(prlimit64, 0, RLIMIT_NOFILE, set, old, 0, 0);
}

static bool same_limit(const struct rlimit *a, const struct rlimit *b)
{
	return a->rlim_cur == b->rlim_cur && a->rlim_max == b->rlim_max;
}

/* Raises the soft limit; limit_lock held.  Not open: it cannot be raised. */
static void window_open(struct window *w)
{
	struct rlimit old;

	w->open = false;
	if (limit_swap(NULL, &w->was) < 0) {
		w->was = (struct rlimit){0, 0};
		return;
	}
	w->high = w->was;
	w->high.rlim_cur = KM_MIN(w->was.rlim_max, KM_FD_MAX);
	if (w->high.rlim_cur <= w->was.rlim_cur || limit_swap(&w->high, &old) < 0)
		return;
	w->open = same_limit(&old, &w->was);
	/* Another thread has set it in this very instant. */
	if (!w->open) {
		limit_swap(&old, NULL);
		w->was = old;
	}
}

static void window_close(struct window *w)
{
	struct rlimit old;

	if (!w->open || limit_swap(&w->was, &old) < 0)
		return;
	/* What another thread has set meanwhile is what the program wants. */
	if (!same_limit(&old, &w->high))
		limit_swap(&old, NULL);
}

/* A number below the limit, where the hard limit is no higher. */
static int inside(int fd, rlim_t limit)
{
	int first = INSIDE_FIRST;

	if (limit < INSIDE_LEAST || (rlim_t)fd > limit - limit / 4 ||
	    km_load_seq(&hidden_count) >= limit / INSIDE_SHARE)
		return -EMFILE;
	return km_sys_fcntl(fd, F_DUPFD_CLOEXEC, first);
}

/* A duplicate where the program cannot reach it; limit_lock held. */
static int copy_out(const struct window *w, int fd)
{
	return w->open ? km_sys_fcntl(fd, F_DUPFD_CLOEXEC, (long)w->was.rlim_cur)
		       : inside(fd, w->was.rlim_cur);
}

static int mark(int high)
{
	if (high < 0)
		return high == -EINVAL ? -EMFILE : high;
	km_fd_forget(high);
	km_fd_hide_here(high);
	return high;
}

int km_fd_hide_copy(int fd)
{
	enum km_lock_result how;
	struct window w;
	int high;

	if (fd < 0)
		return fd;
	how = km_lock(&km_proc.limit_lock);
	window_open(&w);
	high = copy_out(&w, fd);
	window_close(&w);
	km_unlock(&km_proc.limit_lock, how);
	return mark(high);
}

int km_fd_hide_new(int (*make)(void))
{
	enum km_lock_result how = km_lock(&km_proc.limit_lock);
	struct window w;
	int fd, high;

	window_open(&w);
	high = fd = make();
	if (fd >= 0 && !(w.open && (rlim_t)fd >= w.was.rlim_cur)) {
		high = copy_out(&w, fd);
		km_sys_close(fd);
	}
	window_close(&w);
	km_unlock(&km_proc.limit_lock, how);
	return mark(high);
}

int km_fd_hide(int fd)
{
	int high = km_fd_hide_copy(fd);

	if (fd >= 0)
		km_sys_close(fd);
	return high;
}

void km_fd_hide_here(int fd)
{
	km_fd_swap(fd, KM_FD_HIDDEN, NULL);
	km_add_seq(&hidden_count, 1);
}

void km_fd_unhide(int fd)
{
	if (fd < 0)
		return;
	km_fd_hidden_gone(fd);
	km_sys_close(fd);
}

void km_fd_hidden_gone(int fd)
{
	if (km_fd_kind(km_fd_swap(fd, KM_FD_NONE, NULL)) == KM_FD_HIDDEN)
		km_sub_seq(&hidden_count, 1);
}

bool km_fd_spare(void)
{
	struct pollfd top[SPARE_LOOK];
	struct timespec now = {0, 0};
	struct rlimit limit;
	int n, spare = 0;

	if (limit_swap(NULL, &limit) < 0)
		return true;
	n = (int)KM_MIN(limit.rlim_cur, SPARE_LOOK);
	for (int i = 0; i < n; i++)
		top[i] = (struct pollfd){.fd = (int)KM_MIN(limit.rlim_cur, KM_FD_MAX) -
					       1 - i};
	if (km_sys_poll(top, (nfds_t)n, &now) < 0)
		return true;
	for (int i = 0; i < n; i++)
		spare += (top[i].revents & POLLNVAL) != 0;
	return spare >= SPARE;
}
