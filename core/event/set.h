/* SPDX-License-Identifier: Apache-2.0 */
/* What the files about epoll sets share: registrations, the ready list, and the kernel. */
#ifndef KM_EVENT_SET_H
#define KM_EVENT_SET_H

#include "event/event.h"

/* In the low half of a cookie: an epoll set inside this one. */
#define KM_INNER_COOKIE 0x40000000u
/* In the low half of a cookie: a bell. */
#define KM_BELL_COOKIE 0x80000000u
#define KM_EVENT_ALWAYS (EPOLLERR | EPOLLHUP)
/* What the kernel allows beside EPOLLEXCLUSIVE. */
#define KM_EXCLUSIVE_OK                                                                \
	((uint32_t)(EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | \
		    EPOLLEXCLUSIVE))

/* -- registrations (registration.c) --------------------------------------------------- */

/* The registration of a cookie; NULL when there is none. */
struct km_reg *km_reg_at(uint32_t index);
struct km_reg *km_reg_find(struct km_file *f, struct km_set *set, int fd);
/* A new one that is not active yet; NULL without memory.  Set's lock held. */
struct km_reg *km_reg_add(struct km_file *f, struct km_set *set, int fd);
/* Takes over what the program asks for. */
void km_reg_set(struct km_reg *reg, const struct epoll_event *ev);
/* Makes the kernel's registration ours, set's lock held.  0 or epoll_ctl's error. */
int km_reg_convert(struct km_reg *reg, int op);

/* -- sets inside sets, and sets that are polled (nest.c) ------------------------------- */

/* Makes the sets inside this one show in the kernel what their rings have. */
void km_set_watch_inner(struct km_set *set);
/* The kernel says that an inner set is readable: is it, for the program? */
bool km_set_inner_event(struct km_set *set, uint32_t i, struct epoll_event *ev);

/* -- the kernel (kernel.c) -------------------------------------------------------------- */

/* epoll_wait of the kernel; timeout_ns below 0 is for ever.  Its count or error. */
int km_set_kernel_wait(int epfd, struct epoll_event *evs, int max, int64_t timeout_ns,
		       const sigset_t *mask);

/* -- the ready list, under the set's lock ------------------------------------------------ */

KM_INLINE void km_ready_push(struct km_reg *reg)
{
	struct km_set *set = reg->set;

	if (reg->listed)
		return;
	reg->listed = true;
	reg->ready_next = NULL;
	reg->ready_prev = set->ready_tail;
	if (set->ready_tail)
		set->ready_tail->ready_next = reg;
	else
		set->ready = reg;
	set->ready_tail = reg;
}

KM_INLINE void km_ready_remove(struct km_reg *reg)
{
	struct km_set *set = reg->set;

	if (!reg->listed)
		return;
	reg->listed = false;
	if (reg->ready_prev)
		reg->ready_prev->ready_next = reg->ready_next;
	else
		set->ready = reg->ready_next;
	if (reg->ready_next)
		reg->ready_next->ready_prev = reg->ready_prev;
	else
		set->ready_tail = reg->ready_prev;
}

KM_INLINE void km_ready_again(struct km_reg *reg)
{
	reg->fresh = true;
	km_ready_push(reg);
}

/* Peers have rung for this sleep of a watched set, and are to do so once more. */
KM_INLINE void km_set_ring_again(struct km_set *set)
{
	uint32_t bells = km_load_seq(&set->bells);

	for (uint32_t i = 0; i < bells; i++)
		km_add_seq(&set->bell[i]->wire->sleep, (uint64_t)1 << 32);
}

#endif
