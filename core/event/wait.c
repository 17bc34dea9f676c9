/* SPDX-License-Identifier: Apache-2.0 */
/* epoll_wait: rings and the kernel looked at in turn, and sleeping until either has news. */
#include <errno.h>
#include <string.h>

#include "base/fault.h"
#include "event/set.h"

bool km_set_wait_begin(struct km_set *set)
{
	if (km_unlikely(set->inners))
		km_set_watch_inner(set);
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
				km_ready_again(reg);
	while ((reg = set->ready) && reg != stop && n < max) {
		uint32_t events = reg->events, found;
		bool fresh = reg->fresh;

		km_ready_remove(reg);
		if (!reg->active || reg->disarmed || !reg->ours)
			continue;
		if ((events & EPOLLET) && !fresh)
			continue;
		reg->fresh = false;
		note_seen(reg);
		found = km_file_level(reg->file, events) & (events | KM_EVENT_ALWAYS);
		reg->want_space = (events & EPOLLOUT) && !(found & EPOLLOUT);
		if (!found)
			continue;
		if (km_unlikely(put_event(&evs[n], found, &reg->data) < 0)) {
			reg->fresh = fresh;
			km_ready_push(reg);
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
			km_ready_push(reg);
			if (!stop)
				stop = reg;
		}
	}
	return n;
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
		km_set_ring_again(set);
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

		*k = km_set_kernel_wait(epfd, evs, max, 0, mask);
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
		    !(evs[i].data.u64 & KM_BELL_COOKIE))
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
		return km_set_kernel_wait(epfd, evs, max, 0, mask);
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
		k = km_set_kernel_wait(epfd, evs, max, timeout_ns, mask);
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
