/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that the kernel serves while a file is plain. */
#include <sched.h>

#include "link/link.h"
#include "sock/stream.h"

static bool link_lock_is_mine(void)
{
	return (km_load_relaxed(&km_proc.link_lock) & 0x7fffffffu) == km_tid();
}

bool km_plain_begin(struct km_file *f, int fd, struct km_plain *call)
{
	for (;;) {
		switch ((enum km_mode)km_load_acquire(&f->mode)) {
		case KM_MODE_PINNED:
			call->f = NULL;
			return true;
		case KM_MODE_CHANNEL:
			return false;
		case KM_MODE_SWITCHING:
			if (link_lock_is_mine()) {
				/* A signal handler inside the upgrade itself. */
				call->f = NULL;
				return true;
			}
			sched_yield();
			continue;
		case KM_MODE_PLAIN:
			if (km_unlikely(f->calls >= f->next_try) &&
			    (f->turns >= 2 || f->link_state != KM_LINK_NONE ||
			     f->calls >= km_proc.options.upgrade_after)) {
				km_link_poke(f, fd);
				if (km_load_acquire(&f->mode) != KM_MODE_PLAIN)
					continue;
			}
			call->f = f;
			call->generation = f->generation;
			/* Pairs with km_link_switch_begin: either it sees this call,
			 * or this call sees the switch. */
			km_add_seq(&f->busy, 1);
			if (km_likely(km_load_seq(&f->mode) == KM_MODE_PLAIN))
				return true;
			km_sub_seq(&f->busy, 1);
			continue;
		}
	}
}

void km_plain_end(const struct km_plain *call, enum km_direction direction, ssize_t n)
{
	struct km_file *f = call->f;

	if (!f)
		return;
	/* Also when the socket was closed meanwhile: the count is the object's, and
	 * outlives what the object stands for. */
	km_sub_seq(&f->busy, 1);
	if (n <= 0 || f->generation != call->generation)
		return;
	f->calls++;
	if (f->last != direction) {
		if (f->last && f->turns < 2)
			f->turns++;
		f->last = (uint8_t)direction;
	}
}
