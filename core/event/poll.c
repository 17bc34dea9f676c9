/* SPDX-License-Identifier: Apache-2.0 */
/* poll(2) over descriptors of which some are upgraded. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/fault.h"
#include "base/refused.h"
#include "event/event.h"
#include "link/link.h"
#include "sock/stream.h"

#define GONE_BITS (POLLRDHUP | POLLHUP | POLLERR)

/* -- the thread's hidden epoll set ---------------------------------------------- */

static int open_epoll(void)
{
	return km_sys_epoll_create(EPOLL_CLOEXEC);
}

int km_thread_listen(struct km_bell *bell)
{
	struct km_thread *t = &km_thread;
	struct epoll_event ev = {.events = EPOLLIN | EPOLLET};
	int err;

	for (uint32_t i = 0; i < t->bells; i++)
		if (t->bell[i] == bell)
			return t->epfd;
	if (t->epfd < 0) {
		t->epfd = km_fd_hide_new(open_epoll);
		if (t->epfd < 0) {
			err = t->epfd;
			t->epfd = -1;
			return err;
		}
		km_thread_cleanup();
	}
	if (t->bells == KM_COUNT(t->bell)) {
		/* Start anew rather than grow: few threads ever get here. */
		km_fd_unhide(t->epfd);
		t->epfd = -1;
		t->bells = 0;
		return km_thread_listen(bell);
	}
	err = km_sys_epoll_ctl(t->epfd, EPOLL_CTL_ADD, bell->latch, &ev);
	if (err < 0 && err != -EEXIST)
		return err;
	t->bell[t->bells++] = bell;
	return t->epfd;
}

void km_thread_listened(void)
{
	struct epoll_event evs[16];
	struct km_thread *t = &km_thread;

	if (t->epfd < 0 ||
	    !km_refused(km_sys_epoll_wait(t->epfd, evs, KM_COUNT(evs), 0)))
		return;
	/* It would stay readable, and every sleep be none. */
	km_fd_unhide(t->epfd);
	t->epfd = -1;
	t->bells = 0;
}

/* -- poll ------------------------------------------------------------------------- */

struct poll_call {
	struct pollfd *fds;    /* a copy of the program's */
	struct pollfd *asked;  /* for the kernel: n, and one for the bells */
	struct km_file **file; /* of each, or NULL */
	nfds_t n, sets;	       /* how many are epoll sets with channels */
	struct km_bell *bells[16];
	uint32_t nbells;
	bool many_bells; /* more than fit: look again often */
};

/* The epoll set that an entry is, when the kernel does not know all of its readiness. */
static struct km_set *mixed_set(const struct pollfd *pfd)
{
	struct km_set *set = km_set_of(pfd->fd);

	return set && set->mixed ? set : NULL;
}

static void remember_bell(struct poll_call *c, struct km_bell *bell)
{
	for (uint32_t i = 0; i < c->nbells; i++)
		if (c->bells[i] == bell)
			return;
	if (!bell || c->nbells == KM_COUNT(c->bells)) {
		c->many_bells = true;
		return;
	}
	c->bells[c->nbells++] = bell;
}

/* Finds the upgraded ones and holds them.  Their number. */
static nfds_t poll_begin(struct poll_call *c)
{
	nfds_t channels = 0;

	c->sets = 0;
	for (nfds_t i = 0; i < c->n; i++) {
		struct km_file *f = km_file_of(c->fds[i].fd);

		c->asked[i] = c->fds[i];
		c->asked[i].revents = 0;
		c->file[i] = NULL;
		c->sets += mixed_set(&c->fds[i]) != NULL;
		/* One that has gone back to the kernel needs no more than the kernel. */
		if (!f || km_load_acquire(&f->mode) != KM_MODE_CHANNEL ||
		    km_stream_ended(f))
			continue;
		km_file_hold(f);
		/* Either a close sees the hold, or this sees the close. */
		if (km_file_of(c->fds[i].fd) != f ||
		    km_load_seq(&f->mode) != KM_MODE_CHANNEL) {
			km_file_release(f);
			continue;
		}
		if (km_unlikely(f->link_state == KM_LINK_HELLO))
			km_link_advance(f, c->fds[i].fd);
		c->file[i] = f;
		remember_bell(c, f->bell);
		channels++;
	}
	return channels;
}

static void poll_end(struct poll_call *c)
{
	for (nfds_t i = 0; i < c->n; i++)
		if (c->file[i])
			km_file_release(c->file[i]);
}

/* Fills revents of the upgraded ones from user space; how many are ready.  Sets up
 * what the kernel is to be asked of them. */
static int poll_levels(struct poll_call *c)
{
	int ready = 0;

	for (nfds_t i = 0; i < c->n; i++) {
		struct km_file *f = c->file[i];
		uint32_t bits, wanted;
		struct km_conn *conn;

		if (!f) {
			struct km_set *set = c->sets ? mixed_set(&c->fds[i]) : NULL;

			/* Its bells may ring for other sets too: only a look tells. */
			if (set) {
				bits = km_set_look(set, c->fds[i].fd)
					       ? (POLLIN | POLLRDNORM)
					       : 0;
				c->fds[i].revents =
					(short)(bits & (uint16_t)c->fds[i].events);
				ready += c->fds[i].revents != 0;
			}
			continue;
		}
		wanted = (uint32_t)(uint16_t)c->fds[i].events | POLLERR | POLLHUP;
		bits = km_file_level(f, wanted) & wanted;
		c->fds[i].revents = (short)bits;
		ready += bits != 0;
		conn = f->conn;
		/* While a direction is on a ring, what the kernel has to say of it is
		 * that the connection has ended; while it is not, everything. */
		c->asked[i].fd = f->keep_fd >= 0 ? f->keep_fd : c->fds[i].fd;
		c->asked[i].events = c->fds[i].events & POLLPRI;
		if (!conn)
			continue;
		if (conn->rx_phase != KM_PHASE_RING || conn->tx_phase != KM_PHASE_RING)
			c->asked[i].events = c->fds[i].events;
		if (conn->tx_phase == KM_PHASE_RING)
			c->asked[i].events &= (short)~(POLLOUT | POLLWRNORM);
		if ((conn->rx_phase == KM_PHASE_RING ||
		     conn->tx_phase == KM_PHASE_RING) &&
		    !km_load_relaxed(&conn->kernel_bits))
			c->asked[i].events |= POLLRDHUP;
		/* Bytes by the kernel tell of a peer that has gone back to it. */
		if (conn->rx_phase != KM_PHASE_ENDED)
			c->asked[i].events |= POLLIN & c->fds[i].events;
		if (conn->tx_phase == KM_PHASE_DRAIN)
			c->asked[i].events |= POLLOUT;
	}
	return ready;
}

/* What the kernel said of upgraded sockets is news to look at; of the others it is
 * the answer.  How many of the others are ready. */
static int poll_answers(struct poll_call *c)
{
	int ready = 0;

	for (nfds_t i = 0; i < c->n; i++) {
		if (!c->file[i] && c->sets && mixed_set(&c->fds[i])) {
			/* What the kernel says is news to look at. */
		} else if (!c->file[i]) {
			c->fds[i].revents = c->asked[i].revents;
			ready += c->fds[i].revents != 0;
		} else if (c->asked[i].revents & GONE_BITS) {
			if (c->file[i]->conn)
				km_or_seq(&c->file[i]->conn->kernel_bits,
					  (uint32_t)c->asked[i].revents & GONE_BITS);
		} else if ((c->asked[i].revents & POLLIN) && c->file[i]->conn &&
			   c->file[i]->conn->rx_phase == KM_PHASE_RING) {
			/* The next look is to ask the kernel too. */
			c->file[i]->conn->idle_reads = KM_ASK_NOW;
		}
		c->asked[i].revents = 0;
	}
	return ready;
}

static int ask_kernel(struct pollfd *fds, nfds_t n, int64_t left, const sigset_t *mask)
{
	struct timespec ts = {left / 1000000000, left % 1000000000};

	return km_ppoll(fds, n, left == INT64_MAX ? NULL : &ts, mask);
}

static int poll_kernel(struct poll_call *c, bool bells, int64_t left,
		       const sigset_t *mask)
{
	nfds_t n = c->n;
	int err;

	if (bells) {
		c->asked[n].fd = km_thread.epfd;
		c->asked[n].events = POLLIN;
		c->asked[n].revents = 0;
		n++;
	}
	err = ask_kernel(c->asked, n, left, mask);
	if (bells && err > 0 && c->asked[c->n].revents)
		km_thread_listened();
	return err;
}

/* How many entries are looked at again and again. */
#define SPIN_ENTRIES 8

static bool poll_has_news(const void *what)
{
	const struct poll_call *c = what;

	for (nfds_t i = 0; i < c->n; i++) {
		const struct km_conn *conn = c->file[i] ? c->file[i]->conn : NULL;

		if (conn && (c->fds[i].events & POLLIN) &&
		    km_load_relaxed(&conn->rx.wire->wpos) !=
			    __atomic_load_n(&conn->rx.r, __ATOMIC_RELAXED))
			return true;
	}
	return false;
}

/* Looks again for a while, where a peer may be about to have something. */
static bool poll_spin(const struct poll_call *c, int64_t left)
{
	uint32_t cpu = 0;

	for (nfds_t i = 0; i < c->n && !cpu && c->n <= SPIN_ENTRIES; i++)
		if (c->file[i] && c->file[i]->conn && (c->fds[i].events & POLLIN))
			cpu = km_load_relaxed(&c->file[i]->conn->rx.wire->pcpu);
	return km_spin(&km_thread.spin, cpu, left, poll_has_news, c);
}

static int poll_loop(struct poll_call *c, int64_t timeout_ns, const sigset_t *mask,
		     bool others)
{
	int64_t deadline = timeout_ns > 0 ? km_now_ns() + timeout_ns : timeout_ns;
	bool spun = false;

	for (;;) {
		int64_t left = INT64_MAX;
		bool listening = true;
		int ready = poll_levels(c), err = 0;

		if (ready || timeout_ns == 0) {
			if (others || ready == 0) {
				err = poll_kernel(c, false, 0, ready ? NULL : mask);
				if (err < 0 && !ready)
					return err;
				ready = poll_answers(c);
				ready += poll_levels(c);
			}
			return ready;
		}
		if (deadline > 0)
			left = KM_MAX(deadline - km_now_ns(), 0);
		if (!spun && poll_spin(c, left)) {
			spun = true;
			continue;
		}
		for (uint32_t i = 0; i < c->nbells; i++) {
			listening &= km_thread_listen(c->bells[i]) >= 0;
			km_bell_arm(c->bells[i]);
		}
		if (!listening || c->many_bells)
			left = KM_MIN(left, 1000000);
		if (!km_look_sync(POLL_LOOK, poll_levels(c))) {
			km_count(KM_COUNT_BELL_SLEEPS);
			err = poll_kernel(c, listening && c->nbells, left, mask);
		}
		for (uint32_t i = 0; i < c->nbells; i++)
			km_bell_disarm(c->bells[i]);
		if (err < 0)
			return err;
		ready = poll_answers(c);
		ready += poll_levels(c);
		if (ready) {
			km_useful_wake();
			return ready;
		}
		err = err > 0 ? km_idle_wake(c->bells, c->nbells, mask) : 0;
		if (err < 0)
			return err;
		if (deadline > 0 && km_now_ns() >= deadline)
			return 0;
	}
}

/* Plain sockets must not be upgraded while a thread sleeps on them here. */
static void mark_plain(struct poll_call *c, int sign)
{
	for (nfds_t i = 0; i < c->n; i++) {
		struct km_file *f = sign > 0 ? km_file_of(c->fds[i].fd) : c->file[i];

		if (sign > 0)
			c->file[i] = f;
		if (f)
			km_add_seq(&f->busy, (uint32_t)sign);
	}
}

static bool any_mixed_set(const struct poll_call *c)
{
	for (nfds_t i = 0; i < c->n; i++)
		if (mixed_set(&c->fds[i]))
			return true;
	return false;
}

static bool any_channel(const struct poll_call *c)
{
	for (nfds_t i = 0; i < c->n; i++)
		if (c->file[i] && km_load_seq(&c->file[i]->mode) >= KM_MODE_SWITCHING &&
		    km_load_seq(&c->file[i]->mode) != KM_MODE_PINNED &&
		    !km_stream_ended(c->file[i]))
			return true;
	return any_mixed_set(c);
}

#define ON_STACK 64

/* Tells the program what was found, and nothing else: it may be changing the rest. */
static int put_revents(const struct poll_call *c, struct pollfd *fds)
{
	int err = 0;

	for (nfds_t i = 0; i < c->n && err == 0; i++)
		err = km_copy_out(&fds[i].revents, &c->fds[i].revents,
				  sizeof(fds[i].revents));
	return err;
}

int km_poll(struct pollfd *fds, nfds_t n, int64_t timeout_ns, const sigset_t *mask)
{
	struct pollfd asked[ON_STACK + 1], copy[ON_STACK];
	struct km_file *file[ON_STACK];
	struct poll_call c = {.fds = copy, .asked = asked, .file = file, .n = n};
	int64_t deadline = timeout_ns > 0 ? km_now_ns() + timeout_ns : 0;
	nfds_t channels;
	int result;

	if (n > ON_STACK) {
		c.asked = malloc((2 * n + 1) * sizeof(*c.asked) + n * sizeof(*c.file));
		if (!c.asked)
			return -ENOMEM;
		c.fds = c.asked + n + 1;
		c.file = (struct km_file **)(void *)(c.fds + n);
	}
	memcpy(c.fds, fds, n * sizeof(*fds));
	for (;;) {
		mark_plain(&c, 1);
		if (!any_channel(&c)) {
			result = ask_kernel(
				fds, n, timeout_ns < 0 ? INT64_MAX : timeout_ns, mask);
			mark_plain(&c, -1);
			/* A connection in one of the sets was upgraded meanwhile. */
			if (result > 0 && any_mixed_set(&c)) {
				if (deadline)
					timeout_ns = KM_MAX(deadline - km_now_ns(), 0);
				continue;
			}
			break;
		}
		mark_plain(&c, -1);
		channels = poll_begin(&c);
		if (channels + c.sets == 0) {
			sched_yield();
			continue;
		}
		result = mask && !km_readable(mask, KM_SIGSET_SIZE)
				 ? -EFAULT
				 : poll_loop(&c, timeout_ns, mask,
					     channels + c.sets < n);
		poll_end(&c);
		if (result >= 0 && put_revents(&c, fds) < 0)
			result = -EFAULT;
		break;
	}
	if (c.asked != asked)
		free(c.asked);
	return result;
}
