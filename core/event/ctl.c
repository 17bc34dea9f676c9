/* SPDX-License-Identifier: Apache-2.0 */
/* epoll_ctl: what becomes of a registration that a program makes or changes. */
#include <errno.h>

#include "event/set.h"

/* epoll_ctl while the kernel carries the bytes: remembered for later. */
static int ctl_plain(struct km_set *set, struct km_file *f, int op, int fd,
		     struct epoll_event *ev)
{
	struct km_reg *reg = km_reg_find(f, set, fd);
	int err = km_sys_epoll_ctl(set->epfd, op, fd, ev);

	if (err < 0)
		return err;
	if (op == EPOLL_CTL_DEL) {
		if (reg)
			reg->active = false;
		return 0;
	}
	if (!reg)
		reg = km_reg_add(f, set, fd);
	if (reg)
		km_reg_set(reg, ev);
	return 0;
}

/* A changed registration may be ready at once, and another thread asleep. */
static void look_again(struct km_reg *reg)
{
	km_ready_again(reg);
	if (km_load_seq(&reg->set->sleepers) && km_load_seq(&reg->set->bells))
		km_bell_kick(reg->set->bell[0]);
}

static int ctl_channel(struct km_set *set, struct km_file *f, int op, int fd,
		       struct epoll_event *ev)
{
	struct km_reg *reg = km_reg_find(f, set, fd);
	int err;

	/* The kernel looks at these before it looks for the registration. */
	if (op != EPOLL_CTL_DEL && (ev->events & EPOLLEXCLUSIVE) &&
	    (op == EPOLL_CTL_MOD || (ev->events & ~KM_EXCLUSIVE_OK)))
		return -EINVAL;
	switch (op) {
	case EPOLL_CTL_ADD:
		if (reg && reg->active)
			return -EEXIST;
		if (!reg)
			reg = km_reg_add(f, set, fd);
		if (!reg)
			return -ENOMEM;
		km_reg_set(reg, ev);
		if (reg->ours) {
			look_again(reg);
			return 0;
		}
		err = km_reg_convert(reg, EPOLL_CTL_ADD);
		if (err < 0)
			reg->active = false;
		return err;
	case EPOLL_CTL_MOD:
		if (!reg || !reg->active)
			return -ENOENT;
		if (reg->events & EPOLLEXCLUSIVE)
			return -EINVAL;
		km_reg_set(reg, ev);
		look_again(reg);
		return 0;
	case EPOLL_CTL_DEL:
		if (!reg || !reg->active)
			return -ENOENT;
		/* The kernel's registration stays: programs that take a descriptor
		 * out to put it back get by without a system call.  What it tells
		 * meanwhile is dropped. */
		reg->active = false;
		km_ready_remove(reg);
		return 0;
	default:
		return -EINVAL;
	}
}

void km_set_note(int epfd, int op, const struct epoll_event *ev)
{
	struct km_set *set = km_set_of(epfd);

	if (set && op != EPOLL_CTL_DEL && (ev->events & (EPOLLET | EPOLLONESHOT)))
		set->edges = true;
}

int km_epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
	struct km_file *f = km_file_of(fd);
	struct km_set *set;
	enum km_lock_result how;
	bool late;
	int err;

	if (!f || km_load_acquire(&f->mode) == KM_MODE_PINNED || epfd == fd ||
	    (!ev && op != EPOLL_CTL_DEL)) {
		err = km_sys_epoll_ctl(epfd, op, fd, ev);
		if (err == 0)
			km_set_note(epfd, op, ev);
		return err;
	}
	set = km_set_of(epfd);
	if (!set) {
		/* Only an epoll set that does not hold fd says ENOENT. */
		if (op != EPOLL_CTL_ADD ||
		    km_sys_epoll_ctl(epfd, EPOLL_CTL_DEL, fd, NULL) != -ENOENT)
			return km_sys_epoll_ctl(epfd, op, fd, ev);
		set = km_set_for(epfd);
		if (!set) {
			km_file_pin(f, KM_REASON_EPOLL_COOKIE);
			return km_sys_epoll_ctl(epfd, op, fd, ev);
		}
	}
	how = km_lock(&set->lock);
	/* Of the descriptors of the set, this one is open. */
	set->epfd = epfd;
	if (km_load_seq(&f->mode) == KM_MODE_CHANNEL)
		err = ctl_channel(set, f, op, fd, ev);
	else
		err = ctl_plain(set, f, op, fd, ev);
	late = err == 0 && op != EPOLL_CTL_DEL &&
	       km_load_seq(&f->mode) != KM_MODE_PLAIN;
	km_unlock(&set->lock, how);
	if (late) {
		/* An upgrade that is under way may have passed this registration. */
		how = km_lock(&km_proc.link_lock);
		if (km_load_seq(&f->mode) == KM_MODE_CHANNEL)
			km_event_attach(f);
		km_unlock(&km_proc.link_lock, how);
	}
	return err;
}
