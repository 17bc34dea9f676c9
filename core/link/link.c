/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The upgrade of a connection from outside: when its next step is due, what an error means
 * for it, and how what is under way is ended.  The steps themselves are in connector.c and
 * acceptor.c.
 */
#include <errno.h>

#include "link/held.h"
#include "link/internal.h"

/* The first tries come with every call, later ones with every doubling: a sender may fill
 * megabytes of socket buffers before its peer has read for the first time. */
#define EAGER_TRIES 8

/* With KMAP_UPGRADE_AFTER=0, how long connect and accept wait for the other end. */
#define MADE_PATIENCE_NS 10000000
#define MADE_NAP_NS 1000000

void km_link_back_off(struct km_file *f, unsigned most, enum km_reason reason)
{
	f->tries++;
	f->reason = (uint8_t)reason;
	f->next_try = f->tries < EAGER_TRIES ? f->calls + 1 : f->calls * 2;
	if (f->tries < most)
		return;
	km_link_cancel(f);
	km_store_seq(&f->mode, KM_MODE_PINNED);
	km_stay(f, reason);
}

void km_link_give_up(struct km_file *f, enum km_reason reason)
{
	f->tries = UINT8_MAX - 1;
	km_link_back_off(f, 0, reason);
}

void km_link_failed(struct km_file *f, const char *call, int err)
{
	km_log(KM_LOG_ERROR, "fd %d stays on the kernel: %s failed (errno %d)", f->fd,
	       call, -err);
	km_link_give_up(f, km_stay_reason(err));
}

void km_link_no_address(struct km_file *f, int err)
{
	if (err == -ENOTCONN)
		km_link_back_off(f, KM_CONNECTOR_TRIES, KM_REASON_HALF_CLOSED);
	else
		km_link_failed(f, "getsockname or getpeername", err);
}

void km_link_poke(struct km_file *f, int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	if (how == KM_LOCK_NESTED)
		return;
	/* With a thread in the kernel there is no switching now, which is no reason
	 * to try less often later. */
	if (km_load_seq(&f->mode) != KM_MODE_PLAIN || f->calls < f->next_try ||
	    km_load_seq(&f->busy) || km_file_of(fd) != f) {
		/* Not now. */
	} else if (!km_fd_spare()) {
		km_link_give_up(f, KM_REASON_BUDGET_FD);
	} else {
		switch ((enum km_link_state)f->link_state) {
		case KM_LINK_NONE:
			if (f->passed && !km_held_take(f, fd))
				km_link_back_off(f, KM_ACCEPTOR_TRIES,
						 KM_REASON_SHARED);
			else if (f->role == KM_ROLE_CONNECTOR)
				km_link_offer(f, fd);
			else if (f->role == KM_ROLE_ACCEPTOR)
				km_link_knock(f, fd);
			else
				f->next_try = UINT32_MAX;
			break;
		case KM_LINK_OFFERED:
		case KM_LINK_ACCEPTED:
			km_link_take_hello(f, fd);
			break;
		case KM_LINK_HELLO:
		case KM_LINK_DONE:
			break;
		}
	}
	km_unlock(&km_proc.link_lock, how);
}

void km_link_made(int fd, bool wait)
{
	struct km_file *f = km_file_of(fd);
	struct timespec nap = {0, MADE_NAP_NS};
	int64_t end;

	if (km_likely(!f || km_proc.options.upgrade_after))
		return;
	end = km_now_ns() + MADE_PATIENCE_NS;
	do {
		struct pollfd pfd = {.events = POLLIN};

		/* None of these counts as one of the few tries. */
		f->tries = 0;
		f->next_try = 0;
		km_link_poke(f, fd);
		if (km_load_acquire(&f->mode) == KM_MODE_CHANNEL)
			km_link_advance(f, fd);
		if (f->link_state == KM_LINK_DONE ||
		    km_load_acquire(&f->mode) == KM_MODE_PINNED)
			return;
		if (!wait)
			break;
		pfd.fd = f->link_fd;
		km_sys_poll(&pfd, 1, &nap);
	} while (km_now_ns() < end && km_file_of(fd) == f);
	/* The first call that carries bytes goes on. */
	f->next_try = f->calls;
}

void km_link_advance(struct km_file *f, int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	(void)fd;
	if (how == KM_LOCK_NESTED)
		return;
	if (f->link_state == KM_LINK_HELLO && f->conn)
		km_link_take_ack(f);
	km_unlock(&km_proc.link_lock, how);
}

void km_link_cancel(struct km_file *f)
{
	uint32_t hello_state = KM_SEG_HELLO;

	switch ((enum km_link_state)f->link_state) {
	case KM_LINK_NONE:
	case KM_LINK_DONE:
		return;
	case KM_LINK_HELLO:
		if (f->seg.wire)
			km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_CANCELLED);
		if (f->conn)
			km_link_transport_settled(f);
		break;
	case KM_LINK_OFFERED:
	case KM_LINK_ACCEPTED:
		break;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
	f->link_state = KM_LINK_NONE;
}

void km_link_settle(struct km_file *f)
{
	uint32_t hello_state = KM_SEG_HELLO;

	switch ((enum km_link_state)f->link_state) {
	case KM_LINK_NONE:
	case KM_LINK_DONE:
		return;
	case KM_LINK_OFFERED:
	case KM_LINK_ACCEPTED:
		km_link_cancel(f);
		f->next_try = f->calls + EAGER_TRIES;
		return;
	case KM_LINK_HELLO:
		if (km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_CANCELLED)) {
			km_link_abandon(f, KM_REASON_SHARED);
			km_fd_unhide(f->link_fd);
			f->link_fd = -1;
		} else {
			km_link_take_ack(f);
		}
		return;
	}
}

void km_link_withdraw(struct km_file *f)
{
	uint32_t state = KM_SEG_HELLO;

	if (f->link_state != KM_LINK_HELLO)
		return;
	/* Attached or not, the connector uses nothing before it sees ready. */
	if (!km_cas_seq(&f->seg.wire->state, &state, KM_SEG_CANCELLED) &&
	    state == KM_SEG_ATTACHED)
		km_cas_seq(&f->seg.wire->state, &state, KM_SEG_CANCELLED);
	km_link_abandon(f, KM_REASON_HANDED_ON);
	if (km_thread.bypass) {
		/* The descriptor is the parent's, which finds the handshake
		 * cancelled. */
		f->link_state = KM_LINK_HELLO;
		return;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
}

struct find {
	struct km_file *f;
	int fd;
};

static void match(int fd, uint64_t entry, void *arg)
{
	struct find *find = arg;

	if (km_fd_kind(entry) == KM_FD_FILE && km_fd_object(entry) == find->f)
		find->fd = fd;
}

int km_link_other_fd(struct km_file *f)
{
	struct find find = {f, -1};

	km_fd_each(match, &find);
	return find.fd;
}

static void move_link(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	int wanted = *(int *)arg;

	(void)fd;
	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	if (f->link_fd == wanted)
		f->link_fd = km_fd_hide_copy(wanted);
	if (f->held_fd == wanted)
		f->held_fd = km_fd_hide_copy(wanted);
	if (f->keep_fd == wanted)
		f->keep_fd = km_fd_hide_copy(wanted);
	km_transport_move_pipes(f, wanted);
}

void km_link_move(int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	km_fd_each(move_link, &fd);
	km_unlock(&km_proc.link_lock, how);
}
