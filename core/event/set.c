/* SPDX-License-Identifier: Apache-2.0 */
/* Epoll sets: registrations, and readiness found in user space. */
#include <errno.h>
#include <string.h>

#include "base/fault.h"
#include "event/event.h"
#include "sock/stream.h"

#define SLAB 128
#define REG_CHUNKS 8192 /* of SLAB registrations: over a million */

/* What the kernel tells of an upgraded connection. */
#define KERNEL_EVENTS (EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET)
#define ALWAYS (EPOLLERR | EPOLLHUP)
/* In the low half of a cookie: an epoll set inside this one. */
#define INNER_COOKIE 0x40000000u
/* What the kernel allows beside EPOLLEXCLUSIVE. */
#define EXCLUSIVE_OK                                                                   \
	((uint32_t)(EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | \
		    EPOLLEXCLUSIVE))

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

static struct km_reg *reg_at(uint32_t index)
{
	return index / SLAB < reg_chunks ? &reg_chunk[index / SLAB][index % SLAB]
					 : NULL;
}

/* -- the ready list, under the set's lock ---------------------------------------- */

static void ready_push(struct km_reg *reg)
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

static void ready_remove(struct km_reg *reg)
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

static void ready_again(struct km_reg *reg)
{
	reg->fresh = true;
	ready_push(reg);
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
			ready_again(reg);
		km_unlock(&set->lock, how);
	}
}

/* -- registrations ----------------------------------------------------------------- */

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

static struct km_reg *reg_find(struct km_file *f, struct km_set *set, int fd)
{
	for (struct km_reg *reg = f->regs; reg; reg = reg->next)
		if (reg->set == set && reg->fd == fd)
			return reg;
	return NULL;
}

static struct km_reg *reg_add(struct km_file *f, struct km_set *set, int fd)
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

static void reg_set(struct km_reg *reg, const struct epoll_event *ev)
{
	reg->events = ev->events;
	reg->data = ev->data;
	reg->active = true;
	reg->disarmed = false;
}

/* Makes the kernel's registration ours, set's lock held. */
static int reg_convert(struct km_reg *reg, int op)
{
	struct km_set *set = reg->set;
	struct epoll_event ev = {.events = KERNEL_EVENTS};
	int err;

	ev.data.u64 = (uint64_t)km_proc.magic << 32 | reg->index;
	if (op == EPOLL_CTL_ADD && (reg->events & EPOLLEXCLUSIVE))
		ev.events = (KERNEL_EVENTS & EXCLUSIVE_OK) | EPOLLEXCLUSIVE;
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
	ready_again(reg);
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
	ready_remove(reg);
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
			err = reg_convert(reg, EPOLL_CTL_MOD);
			if (err == -EINVAL) {
				/* The kernel changes nothing of an exclusive one. */
				km_sys_epoll_ctl(reg->set->epfd, EPOLL_CTL_DEL, reg->fd,
						 NULL);
				err = reg_convert(reg, EPOLL_CTL_ADD);
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
		ready_remove(reg);
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
		ready_remove(reg);
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

/* epoll_ctl while the kernel carries the bytes: remembered for later. */
static int ctl_plain(struct km_set *set, struct km_file *f, int op, int fd,
		     struct epoll_event *ev)
{
	struct km_reg *reg = reg_find(f, set, fd);
	int err = km_sys_epoll_ctl(set->epfd, op, fd, ev);

	if (err < 0)
		return err;
	if (op == EPOLL_CTL_DEL) {
		if (reg)
			reg->active = false;
		return 0;
	}
	if (!reg)
		reg = reg_add(f, set, fd);
	if (reg)
		reg_set(reg, ev);
	return 0;
}

/* A changed registration may be ready at once, and another thread asleep. */
static void look_again(struct km_reg *reg)
{
	ready_again(reg);
	if (km_load_seq(&reg->set->sleepers) && km_load_seq(&reg->set->bells))
		km_bell_kick(reg->set->bell[0]);
}

static int ctl_channel(struct km_set *set, struct km_file *f, int op, int fd,
		       struct epoll_event *ev)
{
	struct km_reg *reg = reg_find(f, set, fd);
	int err;

	/* The kernel looks at these before it looks for the registration. */
	if (op != EPOLL_CTL_DEL && (ev->events & EPOLLEXCLUSIVE) &&
	    (op == EPOLL_CTL_MOD || (ev->events & ~EXCLUSIVE_OK)))
		return -EINVAL;
	switch (op) {
	case EPOLL_CTL_ADD:
		if (reg && reg->active)
			return -EEXIST;
		if (!reg)
			reg = reg_add(f, set, fd);
		if (!reg)
			return -ENOMEM;
		reg_set(reg, ev);
		if (reg->ours) {
			look_again(reg);
			return 0;
		}
		err = reg_convert(reg, EPOLL_CTL_ADD);
		if (err < 0)
			reg->active = false;
		return err;
	case EPOLL_CTL_MOD:
		if (!reg || !reg->active)
			return -ENOENT;
		if (reg->events & EPOLLEXCLUSIVE)
			return -EINVAL;
		reg_set(reg, ev);
		look_again(reg);
		return 0;
	case EPOLL_CTL_DEL:
		if (!reg || !reg->active)
			return -ENOENT;
		/* The kernel's registration stays: programs that take a descriptor
		 * out to put it back get by without a system call.  What it tells
		 * meanwhile is dropped. */
		reg->active = false;
		ready_remove(reg);
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

/* -- waiting ------------------------------------------------------------------------- */

static void watch_inner(struct km_set *set)
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
		ours.data.u64 = (uint64_t)km_proc.magic << 32 | INNER_COOKIE | i;
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

/* The kernel says that an inner set is readable: is it, for the program? */
static bool inner_event(struct km_set *set, uint32_t i, struct epoll_event *ev)
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

bool km_set_wait_begin(struct km_set *set)
{
	if (km_unlikely(set->inners))
		watch_inner(set);
	km_add_seq(&set->waiters, 1);
	/* Events that poll took out when it looked are still to be told. */
	if (km_likely(km_load_seq(&set->rings) == 0 && set->stashed == 0))
		return true;
	km_sub_seq(&set->waiters, 1);
	return false;
}

void km_set_wait_end(struct km_set *set)
{
	km_sub_seq(&set->waiters, 1);
	/* The kick that woke this thread was meant for all of them. */
	if (km_load_seq(&set->rings) && km_load_seq(&set->waiters) &&
	    km_load_seq(&set->bells))
		km_bell_kick(set->bell[0]);
}

/* Is what the kernel says of its own socket an edge for reg?  It says all that is
 * true now, and does not say what has changed. */
static bool kernel_edge(struct km_reg *reg, const struct km_conn *conn, uint32_t events)
{
	uint32_t gone = events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
	uint32_t cause = KM_NEWS_DATA | KM_NEWS_SPACE;
	uint32_t first = gone & ~reg->said;
	/* Told of already, before the kernel came to say so?  Once it has, another event
	 * of a socket that is hung up is news: its reset. */
	bool changed = first ? first & ~reg->told : gone & EPOLLHUP;
	bool stale = reg->stale && !changed;

	reg->said |= gone;
	reg->stale = false;
	/* Unless it is also about room, which is told of where there was none. */
	if (stale && !reg->want_space &&
	    !(km_load_relaxed(&conn->flags) & KM_CONN_NOSPACE))
		return false;
	/* An end is an edge for everybody. */
	if (changed || !(reg->events & EPOLLET))
		return changed || (events & ~(uint32_t)EPOLLOUT) ||
		       conn->tx_phase != KM_PHASE_RING;
	/* An idle socket's send buffer has space: no news on a ring, unless bytes come by
	 * the kernel and have been read already. */
	if (conn->tx_phase == KM_PHASE_RING)
		cause = events & ~(uint32_t)EPOLLOUT || conn->rx_phase == KM_PHASE_ENDED
				? KM_NEWS_DATA
				: 0;
	return reg->events & cause;
}

static uint32_t ended(int fd)
{
	struct pollfd pfd = {.fd = fd, .events = POLLRDHUP};
	struct timespec now = {0, 0};

	return km_sys_poll(&pfd, 1, &now) > 0 ? (uint32_t)pfd.revents & EPOLLRDHUP : 0;
}

/* The kernel has news of a connection's own socket. */
static void kernel_news(struct km_set *set, struct km_reg *reg, uint32_t events)
{
	enum km_lock_result how = km_lock(&set->lock);

	if (reg->set == set && reg->ours && reg->file->conn) {
		struct km_conn *conn = reg->file->conn;

		/* An exclusive registration is not told EPOLLRDHUP. */
		if ((reg->events & EPOLLEXCLUSIVE) && (events & EPOLLIN))
			events |= ended(reg->fd);
		if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
			km_or_seq(&conn->kernel_bits,
				  events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
		else if (conn->rx_phase == KM_PHASE_RING && (events & EPOLLIN))
			conn->idle_reads = KM_ASK_NOW;
		/* An idle socket's send buffer has space: no news on a ring. */
		if (reg->active && kernel_edge(reg, conn, events))
			ready_again(reg);
	}
	km_unlock(&set->lock, how);
}

int km_set_translate(struct km_set *set, struct epoll_event *evs, int n)
{
	int kept = 0;

	for (int i = 0; i < n; i++) {
		uint64_t data = evs[i].data.u64;
		struct km_reg *reg;

		if (km_likely(data >> 32 != km_proc.magic)) {
			evs[kept++] = evs[i];
			continue;
		}
		if (data & 0x80000000u)
			continue; /* a bell: its news is taken in any case */
		if (data & INNER_COOKIE) {
			if (inner_event(set, (uint32_t)data & ~INNER_COOKIE, &evs[i]))
				evs[kept++] = evs[i];
			continue;
		}
		reg = reg_at((uint32_t)data);
		if (reg)
			kernel_news(set, reg, evs[i].events);
	}
	return kept;
}

/* For files whose news another process may take: has anything moved? */
static bool scan_found(struct km_reg *reg)
{
	struct km_conn *conn = reg->file->conn;
	uint64_t w;

	if (!conn)
		return false;
	w = km_load_sync(OBSERVE, &conn->rx.wire->wpos);
	if (w != reg->seen_w) {
		reg->seen_w = w;
		return !(reg->events & EPOLLET) || (reg->events & KM_NEWS_DATA);
	}
	return reg->want_space &&
	       !(km_load_seq(&conn->tx.wire->prod_wait) & KM_WAIT_EVENT);
}

/* What is there now is about to be looked at: no news when it is scanned later. */
static void note_seen(struct km_reg *reg)
{
	const struct km_conn *conn = reg->file->conn;

	if (conn)
		reg->seen_w = km_load_sync(OBSERVE, &conn->rx.wire->wpos);
}

static int put_event(struct epoll_event *ev, uint32_t events, const epoll_data_t *data)
{
	int err = km_copy_out((char *)ev + offsetof(struct epoll_event, events),
			      &events, sizeof(events));

	return err == 0 ? km_copy_out((char *)ev + offsetof(struct epoll_event, data),
				      data, sizeof(*data))
			: err;
}

/* Moves what is ready to evs, set's lock held.  -EFAULT when the first one could not
 * be written; what was not reported stays ready. */
static int collect(struct km_set *set, struct epoll_event *evs, int max)
{
	struct km_reg *stop = NULL, *reg;
	int n = 0;

	if (km_unlikely(set->scan))
		for (reg = set->regs; reg; reg = reg->set_next)
			if (reg->active && reg->file->scan && scan_found(reg))
				ready_again(reg);
	while ((reg = set->ready) && reg != stop && n < max) {
		uint32_t events = reg->events, found;
		bool fresh = reg->fresh;

		ready_remove(reg);
		if (!reg->active || reg->disarmed || !reg->ours)
			continue;
		if ((events & EPOLLET) && !fresh)
			continue;
		reg->fresh = false;
		note_seen(reg);
		found = km_file_level(reg->file, events) & (events | ALWAYS);
		reg->want_space = (events & EPOLLOUT) && !(found & EPOLLOUT);
		if (!found)
			continue;
		if (km_unlikely(put_event(&evs[n], found, &reg->data) < 0)) {
			reg->fresh = fresh;
			ready_push(reg);
			return n ? n : -EFAULT;
		}
		n++;
		if (reg->file->conn)
			set->peer_cpu =
				km_load_relaxed(&reg->file->conn->rx.wire->pcpu);
		/* The kernel's own event of an end that this tells of is no news. */
		if (reg->file->conn)
			reg->told |= km_load_relaxed(&reg->file->conn->kernel_bits) &
				     (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
		if (events & EPOLLONESHOT) {
			reg->disarmed = true;
		} else if (!(events & EPOLLET)) {
			ready_push(reg);
			if (!stop)
				stop = reg;
		}
	}
	return n;
}

static int kernel_wait(int epfd, struct epoll_event *evs, int max, int64_t timeout_ns,
		       const sigset_t *mask)
{
	struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
	long n;

	if (timeout_ns < 0 || timeout_ns % 1000000 == 0 ||
	    timeout_ns > 2147483646000000) {
		int ms = timeout_ns < 0 ? -1
					: (int)KM_MIN(timeout_ns / 1000000, INT32_MAX);

#ifdef SYS_epoll_wait
		/* What libc's own epoll_wait is, and a filter so lets through. */
		if (!mask)
			return (int)KM_SYS(epoll_wait, epfd, evs, max, ms, 0, 0);
#endif
		return (int)KM_SYS(epoll_pwait, epfd, evs, max, ms, mask,
				   KM_SIGSET_SIZE);
	}
#ifdef SYS_epoll_pwait2
	n = KM_SYS(epoll_pwait2, epfd, evs, max, &ts, mask, KM_SIGSET_SIZE);
	if (n != -ENOSYS)
		return (int)n;
#endif
	n = KM_SYS(epoll_pwait, epfd, evs, max, (timeout_ns + 999999) / 1000000, mask,
		   KM_SIGSET_SIZE);
	return (int)n;
}

/* Peers have rung for this sleep of a watched set, and are to do so once more. */
static void ring_again(struct km_set *set)
{
	uint32_t bells = km_load_seq(&set->bells);

	for (uint32_t i = 0; i < bells; i++)
		km_add_seq(&set->bell[i]->wire->sleep, (uint64_t)1 << 32);
}

static int found_here(struct km_set *set, struct epoll_event *evs, int max)
{
	uint32_t bells = km_load_seq(&set->bells);
	enum km_lock_result how;
	bool more;
	int n;

	for (uint32_t i = 0; i < bells; i++)
		km_bell_drain(set->bell[i]);
	if (!set->ready && !set->scan)
		return 0;
	how = km_lock(&set->lock);
	n = collect(set, evs, max);
	more = n > 0 && set->ready != NULL;
	km_unlock(&set->lock, how);
	if (km_unlikely(set->watched))
		ring_again(set);
	/* As the kernel does: who leaves work behind wakes the next sleeper. */
	if (more && (km_load_seq(&set->sleepers) || set->watched))
		km_bell_kick(set->bell[0]);
	return n;
}

/* found_here for what is left of evs after n. */
static int found_too(struct km_set *set, struct epoll_event *evs, int n, int max)
{
	int more = n < max ? found_here(set, evs + n, max - n) : 0;

	return more > 0 || n == 0 ? n + more : n;
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

bool km_set_look(struct km_set *set, int epfd)
{
	struct epoll_event evs[KM_SET_STASH];
	uint32_t bells = km_load_seq(&set->bells);
	enum km_lock_result how;
	bool ready;
	int n;

	if (km_unlikely(set->inners))
		watch_inner(set);
	how = km_lock(&set->lock);
	if (!set->watched) {
		set->watched = true;
		for (uint32_t i = 0; i < bells; i++)
			km_bell_arm(set->bell[i]);
	}
	km_unlock(&set->lock, how);
	ring_again(set);
	/* Edges of our own make the set readable though the program would find
	 * nothing in it: take them out, and keep what is the program's. */
	n = (int)(KM_COUNT(evs) - set->stashed);
	n = n ? kernel_wait(epfd, evs, n, 0, NULL) : 0;
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
			 (reg->events | ALWAYS));
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
	if (!set->watched) {
		set->watched = true;
		for (uint32_t i = 0; i < bells; i++)
			km_bell_arm(set->bell[i]);
	}
	km_unlock(&set->lock, how);
}

static int take_stash(struct km_set *set, struct epoll_event *evs, int max)
{
	enum km_lock_result how = km_lock(&set->lock);
	int n = KM_MIN(max, (int)set->stashed);

	if (km_copy_out(evs, set->stash, (size_t)n * sizeof(*evs)) < 0) {
		n = -EFAULT;
	} else {
		set->stashed -= (uint32_t)n;
		memmove(set->stash, set->stash + n, set->stashed * sizeof(*evs));
	}
	km_unlock(&set->lock, how);
	return n;
}

static void arm_all(struct km_set *set, uint32_t *bells)
{
	*bells = km_load_seq(&set->bells);
	for (uint32_t i = 0; i < *bells; i++)
		km_bell_arm(set->bell[i]);
	km_add_seq(&set->sleepers, 1);
}

static void disarm_all(struct km_set *set, uint32_t bells)
{
	km_sub_seq(&set->sleepers, 1);
	for (uint32_t i = 0; i < bells; i++)
		km_bell_disarm(set->bell[i]);
}

/* How often the kernel is asked again at the most. */
#define OWN_EVENTS 64

/* The kernel's events of now, *k of its last answer.  The library's own must not take
 * the place of the program's: while they fill evs there may be more. */
static int kernel_now(struct km_set *set, int epfd, struct epoll_event *evs, int max,
		      const sigset_t *mask, int *k)
{
	for (int i = 0; i < OWN_EVENTS; i++) {
		int n;

		*k = kernel_wait(epfd, evs, max, 0, mask);
		n = *k > 0 ? km_set_translate(set, evs, *k) : 0;
		if (n || *k < max)
			return n;
	}
	return 0;
}

/* A busy set's turns follow each other closely, and the kernel has nothing in most of
 * them.  After many such turns it is asked only now and then. */
#define QUICK_NS 20000
#define QUICK_TURNS 16
#define KERNEL_WAITS_NS 50000

static bool kernel_can_wait(struct km_set *set)
{
	int64_t now = km_now_ns();
	bool quick = now - set->turn_at < QUICK_NS;

	set->turn_at = now;
	set->quick = quick ? set->quick + 1 : 0;
	if (set->quick > QUICK_TURNS && now - set->kernel_at < KERNEL_WAITS_NS)
		return true;
	set->kernel_at = now;
	return false;
}

static bool set_has_news(const void *what)
{
	const struct km_set *set = what;
	uint32_t bells = km_load_seq(&set->bells);

	for (uint32_t i = 0; i < bells; i++)
		if (km_bell_has_news(set->bell[i]))
			return true;
	return false;
}

/* What is ready now when the rings have something: the kernel is asked too, before
 * the rings are looked at, so that a FIN behind the last bytes is one edge. */
static int found_at_once(struct km_set *set, int epfd, struct epoll_event *evs, int max)
{
	uint32_t bells = km_load_seq(&set->bells);
	int n = 0, k, room = max;

	for (uint32_t i = 0; i < bells; i++)
		km_bell_drain(set->bell[i]);
	if (!set->ready && !set->scan)
		return 0;
	if (kernel_can_wait(set))
		return found_too(set, evs, 0, max);
	/* With room for a few only, the two take turns. */
	set->kernel_first = !set->kernel_first;
	if (max < 2 && !set->kernel_first)
		room = 0;
	else if (max >= 2)
		room = KM_MAX(max / 2, 1);
	if (room)
		n = kernel_now(set, epfd, evs, room, NULL, &k);
	if (n)
		set->quick = 0;
	return found_too(set, evs, n, max);
}

/* Did peers wake this thread, and nothing that the kernel has to say? */
static bool only_bells(const struct epoll_event *evs, int n)
{
	for (int i = 0; i < n; i++)
		if (evs[i].data.u64 >> 32 != km_proc.magic ||
		    !(evs[i].data.u64 & 0x80000000u))
			return false;
	return n > 0;
}

int km_epoll_wait(struct km_set *set, int epfd, struct epoll_event *evs, int max,
		  int64_t timeout_ns, const sigset_t *mask)
{
	int64_t deadline = timeout_ns > 0 ? km_now_ns() + timeout_ns : timeout_ns;
	bool spun = false, rung;
	uint32_t bells;
	int n, k;

	if (max <= 0)
		return kernel_wait(epfd, evs, max, 0, mask);
	if (mask && !km_readable(mask, KM_SIGSET_SIZE))
		return -EFAULT;
	if (km_unlikely(set->stashed)) {
		n = take_stash(set, evs, max);
		return n < 0 ? n : found_too(set, evs, n, max);
	}
	for (;;) {
		n = found_at_once(set, epfd, evs, max);
		if (n)
			return n;
		if (timeout_ns == 0) {
			n = kernel_now(set, epfd, evs, max, mask, &k);
			if (n == 0 && k < 0)
				return k;
			return found_too(set, evs, n, max);
		}
		/* The kernel's news waits as long. */
		if (!spun && km_spin(&set->spin, set->peer_cpu,
				     timeout_ns < 0 ? INT64_MAX : timeout_ns,
				     set_has_news, set)) {
			spun = true;
			continue;
		}
		arm_all(set, &bells);
		n = km_look_sync(SET_LOOK, true) ? found_here(set, evs, max) : 0;
		if (n) {
			disarm_all(set, bells);
			return n;
		}
		if (deadline > 0) {
			timeout_ns = KM_MAX(deadline - km_now_ns(), 0);
			/* Round up like the kernel: never early. */
			if (timeout_ns)
				timeout_ns = (timeout_ns + 999999) / 1000000 * 1000000;
		}
		km_count(KM_COUNT_BELL_SLEEPS);
		k = kernel_wait(epfd, evs, max, timeout_ns, mask);
		disarm_all(set, bells);
		if (k < 0)
			return k;
		rung = only_bells(evs, k);
		n = found_too(set, evs, km_set_translate(set, evs, k), max);
		if (n > 0)
			km_useful_wake();
		if (n || (k == 0 && timeout_ns >= 0))
			return n;
		k = rung ? km_idle_wake(set->bell, bells, mask) : 0;
		if (k < 0)
			return k;
		/* Only events of the library's own, and the time is up. */
		if (deadline > 0 && km_now_ns() >= deadline)
			timeout_ns = 0;
	}
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
