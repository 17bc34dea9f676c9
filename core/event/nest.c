/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Epoll sets that are waited for from outside: by poll and select, or in another set.
 * Their bells are armed for good, so that the kernel's side shows what the rings have.
 */
#include "event/set.h"

void km_set_watch_inner(struct km_set *set)
{
	for (uint32_t i = 0; i < set->inners; i++) {
		struct km_set *inner = km_set_of(set->inner[i].fd);

		if (inner)
			km_set_watch(inner, set->inner[i].fd);
	}
}

int km_set_nest(struct km_set *set, int epfd, int op, int fd, struct epoll_event *ev)
{
	struct km_inner *inner = NULL;
	struct epoll_event ours;
	enum km_lock_result how = km_lock(&set->lock);
	uint32_t i = 0;
	int err;

	while (i < set->inners && set->inner[i].fd != fd)
		i++;
	if (op != EPOLL_CTL_DEL && i < KM_SET_INNER) {
		inner = &set->inner[i];
		ours.events = ev->events;
		ours.data.u64 = (uint64_t)km_proc.magic << 32 | KM_INNER_COOKIE | i;
		/* Before the kernel can hand out the cookie. */
		set->mixed = true;
	}
	err = km_sys_epoll_ctl(epfd, op, fd, inner ? &ours : ev);
	if (err == 0 && inner) {
		*inner = (struct km_inner){fd, ev->events, ev->data};
		set->inners = KM_MAX(set->inners, i + 1);
	}
	km_unlock(&set->lock, how);
	return err;
}

bool km_set_inner_event(struct km_set *set, uint32_t i, struct epoll_event *ev)
{
	struct km_inner inner;
	struct km_set *in;
	struct epoll_event again;

	if (i >= set->inners)
		return false;
	inner = set->inner[i];
	in = km_set_of(inner.fd);
	if (!in || !in->mixed || (ev->events & ~(uint32_t)EPOLLIN) ||
	    km_set_look(in, inner.fd)) {
		ev->data = inner.data;
		return true;
	}
	if (inner.events & EPOLLONESHOT) {
		again.events = inner.events;
		again.data = ev->data;
		km_sys_epoll_ctl(set->epfd, EPOLL_CTL_MOD, inner.fd, &again);
	}
	return false;
}

/* Would the kernel not tell of this event of the program's again? */
static bool reported_once(const struct km_set *set, const struct epoll_event *ev)
{
	if (set->edges)
		return true;
	for (const struct km_reg *reg = set->regs; reg; reg = reg->set_next)
		if (reg->active && !reg->ours && reg->data.u64 == ev->data.u64 &&
		    (reg->events & (EPOLLET | EPOLLONESHOT)))
			return true;
	return false;
}

static void stash(struct km_set *set, const struct epoll_event *ev)
{
	for (uint32_t i = 0; i < set->stashed; i++)
		if (set->stash[i].data.u64 == ev->data.u64) {
			set->stash[i].events |= ev->events;
			return;
		}
	set->stash[set->stashed++] = *ev;
}

/* Set's lock held. */
static void arm_for_good(struct km_set *set, uint32_t bells)
{
	if (set->watched)
		return;
	set->watched = true;
	for (uint32_t i = 0; i < bells; i++)
		km_bell_arm(set->bell[i]);
}

bool km_set_look(struct km_set *set, int epfd)
{
	struct epoll_event evs[KM_SET_STASH];
	uint32_t bells = km_load_seq(&set->bells);
	enum km_lock_result how;
	bool ready;
	int n;

	if (km_unlikely(set->inners))
		km_set_watch_inner(set);
	how = km_lock(&set->lock);
	arm_for_good(set, bells);
	km_unlock(&set->lock, how);
	km_set_ring_again(set);
	/* Edges of our own make the set readable though the program would find
	 * nothing in it: take them out, and keep what is the program's. */
	n = (int)(KM_COUNT(evs) - set->stashed);
	n = n ? km_set_kernel_wait(epfd, evs, n, 0, NULL) : 0;
	n = n > 0 ? km_set_translate(set, evs, n) : 0;
	for (uint32_t i = 0; i < bells; i++)
		km_bell_drain(set->bell[i]);
	how = km_lock(&set->lock);
	for (int i = 0; i < n; i++)
		if (reported_once(set, &evs[i]))
			stash(set, &evs[i]);
	ready = n > 0 || set->stashed > 0;
	for (struct km_reg *reg = set->ready; reg && !ready; reg = reg->ready_next)
		ready = reg->active && reg->ours && !reg->disarmed &&
			(reg->fresh || !(reg->events & EPOLLET)) &&
			(km_file_level(reg->file, reg->events) &
			 (reg->events | KM_EVENT_ALWAYS));
	km_unlock(&set->lock, how);
	return ready;
}

/* Makes the kernel say that the set is readable.  One without a bell is through the
 * sets inside it; any of them that has nothing is found out by who looks. */
static void make_readable(struct km_set *set)
{
	if (km_load_seq(&set->bells))
		km_bell_kick(set->bell[0]);
	for (uint32_t i = 0; i < set->inners; i++) {
		struct km_set *inner = km_set_of(set->inner[i].fd);

		if (inner)
			make_readable(inner);
	}
}

void km_set_watch(struct km_set *set, int epfd)
{
	enum km_lock_result how;
	uint32_t bells;

	if (set->mixed) {
		if (km_set_look(set, epfd))
			make_readable(set);
		return;
	}
	how = km_lock(&set->lock);
	bells = km_load_seq(&set->bells);
	arm_for_good(set, bells);
	km_unlock(&set->lock, how);
}
