/* SPDX-License-Identifier: Apache-2.0 */
/* Epoll sets: registrations, from the program's and from the kernel's point of view. */
#include <string.h>

#include "event/set.h"

#define SLAB 128
#define REG_CHUNKS 8192 /* of SLAB registrations: over a million */

/* What the kernel tells of an upgraded connection. */
#define KERNEL_EVENTS (EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET)

static struct km_reg *reg_chunk[REG_CHUNKS];
static uint32_t reg_chunks;
static struct km_reg *free_regs;
static struct km_set *free_sets, *all_sets[1024];
static uint32_t set_slabs;

static struct km_reg *reg_alloc(void)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);
	struct km_reg *reg = free_regs;

	if (!reg && reg_chunks < REG_CHUNKS) {
		reg = km_pages(SLAB * sizeof(*reg), false);
		for (uint32_t i = 0; reg && i < SLAB; i++) {
			reg[i].index = reg_chunks * SLAB + i;
			reg[i].set_next = i + 1 < SLAB ? &reg[i + 1] : NULL;
		}
		if (reg)
			reg_chunk[reg_chunks++] = reg;
	}
	if (reg)
		free_regs = reg->set_next;
	km_unlock(&km_proc.table_lock, how);
	return reg;
}

static void reg_free(struct km_reg *reg)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);

	reg->set_next = free_regs;
	free_regs = reg;
	km_unlock(&km_proc.table_lock, how);
}

struct km_reg *km_reg_at(uint32_t index)
{
	return index / SLAB < reg_chunks ? &reg_chunk[index / SLAB][index % SLAB]
					 : NULL;
}

void km_event_ended_again(struct km_file *f)
{
	for (struct km_reg *reg = f->regs; reg; reg = reg->next) {
		struct km_set *set = reg->set;
		enum km_lock_result how;

		if (!set)
			continue;
		how = km_lock(&set->lock);
		if (reg->set == set && !(reg->events & KM_NEWS_DATA)) {
			reg->told |= reg->said;
			reg->said = 0;
			reg->stale = true;
		}
		km_unlock(&set->lock, how);
	}
}

void km_event_news(struct km_file *f, uint32_t cause)
{
	for (struct km_reg *reg = f->regs; reg; reg = reg->next) {
		struct km_set *set = reg->set;
		enum km_lock_result how;

		if (!reg->active || ((reg->events & EPOLLET) && !(reg->events & cause)))
			continue;
		how = km_lock(&set->lock);
		if (reg->active)
			km_ready_again(reg);
		km_unlock(&set->lock, how);
	}
}

struct km_set *km_set_for(int epfd)
{
	struct km_set *set = km_set_of(epfd);
	enum km_lock_result how;

	if (set || km_thread.bypass)
		return set;
	how = km_lock(&km_proc.table_lock);
	set = free_sets;
	if (!set && set_slabs < KM_COUNT(all_sets)) {
		set = km_pages(SLAB * sizeof(*set), false);
		for (int i = 0; set && i < SLAB; i++)
			set[i].next_free = i + 1 < SLAB ? &set[i + 1] : NULL;
		if (set)
			all_sets[set_slabs++] = set;
	}
	if (set)
		free_sets = set->next_free;
	km_unlock(&km_proc.table_lock, how);
	if (!set)
		return NULL;
	memset(set, 0, sizeof(*set));
	km_proc.used = true;
	set->epfd = epfd;
	set->fds = 1;
	km_fd_forget(epfd);
	km_fd_swap(epfd, KM_FD_SET, set);
	return set;
}

struct km_reg *km_reg_find(struct km_file *f, struct km_set *set, int fd)
{
	for (struct km_reg *reg = f->regs; reg; reg = reg->next)
		if (reg->set == set && reg->fd == fd)
			return reg;
	return NULL;
}

struct km_reg *km_reg_add(struct km_file *f, struct km_set *set, int fd)
{
	struct km_reg *reg = reg_alloc();
	uint32_t index;

	if (!reg)
		return NULL;
	index = reg->index;
	memset(reg, 0, sizeof(*reg));
	reg->index = index;
	reg->set = set;
	reg->file = f;
	reg->fd = fd;
	reg->set_next = set->regs;
	set->regs = reg;
	/* Readers walk the list without a lock. */
	reg->next = f->regs;
	__atomic_store_n(&f->regs, reg, __ATOMIC_RELEASE);
	return reg;
}

void km_reg_set(struct km_reg *reg, const struct epoll_event *ev)
{
	reg->events = ev->events;
	reg->data = ev->data;
	reg->active = true;
	reg->disarmed = false;
}

int km_reg_convert(struct km_reg *reg, int op)
{
	struct km_set *set = reg->set;
	struct epoll_event ev = {.events = KERNEL_EVENTS};
	int err;

	ev.data.u64 = (uint64_t)km_proc.magic << 32 | reg->index;
	if (op == EPOLL_CTL_ADD && (reg->events & EPOLLEXCLUSIVE))
		ev.events = (KERNEL_EVENTS & KM_EXCLUSIVE_OK) | EPOLLEXCLUSIVE;
	/* First of all: a thread that sleeps in the set may get our cookies from the
	 * next line on, and looks at this count when it wakes.  Pairs with
	 * km_set_wait_begin too. */
	set->mixed = true;
	km_proc.mixed = true;
	km_add_seq(&set->rings, 1);
	err = km_set_hear(set, reg->file->bell);
	if (err == 0)
		err = km_sys_epoll_ctl(set->epfd, op, reg->fd, &ev);
	if (err < 0) {
		km_sub_seq(&set->rings, 1);
		return err;
	}
	reg->ours = true;
	if (reg->file->scan)
		set->scan = true;
	km_ready_again(reg);
	if (km_load_seq(&set->waiters) || km_load_seq(&set->sleepers))
		km_bell_kick(reg->file->bell);
	return 0;
}

/* Makes it the program's again; set's lock held. */
static void reg_restore(struct km_reg *reg)
{
	struct epoll_event ev = {.events = reg->events, .data = reg->data};

	if (km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_MOD, reg->fd, &ev) == -EINVAL) {
		km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_DEL, reg->fd, NULL);
		km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_ADD, reg->fd, &ev);
	}
	km_ready_remove(reg);
	reg->ours = false;
	km_sub_seq(&reg->set->rings, 1);
}

/* Takes back what was done before registration end. */
static void detach_until(struct km_file *f, const struct km_reg *end)
{
	for (struct km_reg *reg = f->regs; reg != end; reg = reg->next) {
		enum km_lock_result how = km_lock(&reg->set->lock);

		if (reg->active && reg->ours)
			reg_restore(reg);
		km_unlock(&reg->set->lock, how);
	}
}

int km_event_attach(struct km_file *f)
{
	for (struct km_reg *reg = f->regs; reg; reg = reg->next) {
		enum km_lock_result how = km_lock(&reg->set->lock);
		int err = 0;

		if (reg->active && !reg->ours) {
			err = km_reg_convert(reg, EPOLL_CTL_MOD);
			if (err == -EINVAL) {
				/* The kernel changes nothing of an exclusive one. */
				km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_DEL, reg->fd,
						 NULL);
				err = km_reg_convert(reg, EPOLL_CTL_ADD);
				if (err < 0) {
					struct epoll_event ev = {reg->events,
								 reg->data};

					km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_ADD,
							 reg->fd, &ev);
				}
			}
			if (err == -ENOENT) {
				/* It went away by a path that is not seen. */
				reg->active = false;
				err = 0;
			}
		}
		km_unlock(&reg->set->lock, how);
		if (err < 0) {
			km_log(KM_LOG_ERROR,
			       "fd %d stays on the kernel: epoll_ctl failed (errno %d)",
			       f->fd, -err);
			detach_until(f, reg);
			return err;
		}
	}
	return 0;
}

static void set_recycle(struct km_set *set)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);

	set->next_free = free_sets;
	free_sets = set;
	km_unlock(&km_proc.table_lock, how);
}

void km_event_detach(struct km_file *f)
{
	struct km_reg *reg = f->regs, *next;

	for (; reg; reg = next) {
		struct km_set *set = reg->set;
		enum km_lock_result how = km_lock(&set->lock);
		struct km_reg **at = &set->regs;
		bool last;

		next = reg->next;
		reg->active = false;
		km_ready_remove(reg);
		if (reg->ours)
			km_sub_seq(&set->rings, 1);
		reg->ours = false;
		while (*at && *at != reg)
			at = &(*at)->set_next;
		if (*at)
			*at = reg->set_next;
		last = set->epfd < 0 && !set->regs;
		km_unlock(&set->lock, how);
		reg_free(reg);
		if (last)
			set_recycle(set);
	}
	f->regs = NULL;
}

void km_set_free(struct km_set *set)
{
	enum km_lock_result how = km_lock(&km_proc.table_lock);
	uint32_t left = --set->fds;
	struct km_reg *reg;
	bool last;

	km_unlock(&km_proc.table_lock, how);
	if (left)
		return;
	how = km_lock(&set->lock);
	for (reg = set->regs; reg; reg = reg->set_next) {
		km_ready_remove(reg);
		reg->active = false;
		reg->ours = false;
		reg->fd = -1;
	}
	/* The registrations stay with their files, and the set object as long as one
	 * of them points at it. */
	km_store_seq(&set->rings, 0);
	set->epfd = -1;
	last = !set->regs;
	km_unlock(&set->lock, how);
	km_bell_forget_set(set);
	if (last)
		set_recycle(set);
}

void km_event_fork_child(void)
{
	for (uint32_t i = 0; i < set_slabs; i++)
		for (uint32_t k = 0; k < SLAB; k++) {
			struct km_set *set = &all_sets[i][k];

			km_store_seq(&set->lock, 0);
			km_store_seq(&set->waiters, 0);
			km_store_seq(&set->sleepers, 0);
			for (struct km_reg *reg = set->regs; reg; reg = reg->set_next)
				if (reg->ours && reg->file->scan)
					set->scan = true;
		}
	km_bell_fork_child();
}
