/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A peer that rings for nothing.
 *
 * Whoever has a bell may ring it at any rate, also after its last connection is closed,
 * and each ring gets sleeping threads out of the kernel.  A thread that is woken for
 * nothing IDLE_WAKES times in IDLE_SPAN_NS, while this process moved fewer bytes than
 * that on the connections of the bell, takes a nap before each of as many further sleeps.
 * So a flood costs it about a hundredth of a CPU, and others up to a millisecond; nobody's
 * connection is closed for what another one of the same user id does.
 *
 * (A thread that waits for one of many connections is woken for nothing by honest
 * traffic on the others.  How much there is of that shows in this end's own positions,
 * which the peer cannot write.)
 */
#include "base/refused.h"
#include "event/event.h"

#define IDLE_WAKES 256
#define IDLE_SPAN_NS 256000000
#define NAP_NS 1000000
/* An honest peer that is faster than its reader rings for nothing about as often as for
 * something. */
#define USEFUL_WEIGHT 4
#define TELL_AGAIN_NS 60000000000

static km_a64 told_at;

static void tell(int64_t now)
{
	uint64_t last = km_load_seq(&told_at);

	km_count(KM_COUNT_FLOODS);
	if ((last == 0 || now - (int64_t)last > TELL_AGAIN_NS) &&
	    km_cas_seq(&told_at, &last, (uint64_t)now))
		km_log(KM_LOG_ERROR,
		       "a peer rings without news; waits that hear it look once a "
		       "millisecond from now on");
}

/* No lock: what a recycled connection had moved makes the answer wrong by one look. */
static uint64_t moved(struct km_bell *const *bells, uint32_t n)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t slot = 0; slot < bells[i]->used; slot++) {
			const struct km_file *f = bells[i]->slot[slot];
			const struct km_conn *conn = f ? f->conn : NULL;

			if (conn)
				bytes +=
					__atomic_load_n(&conn->rx.r, __ATOMIC_RELAXED) +
					__atomic_load_n(&conn->tx.w, __ATOMIC_RELAXED);
		}
	return bytes;
}

static void judge(struct km_thread *t, struct km_bell *const *bells, uint32_t n)
{
	uint64_t bytes = moved(bells, n);
	int64_t now = km_now_ns();

	t->flooded = now - t->idle_since < IDLE_SPAN_NS &&
		     bytes - t->idle_moved < IDLE_WAKES;
	t->idle_since = now;
	t->idle_moved = bytes;
	t->idle_wakes = 0;
	if (t->flooded)
		tell(now);
}

int km_idle_wake(struct km_bell *const *bells, uint32_t n, const sigset_t *mask)
{
	struct km_thread *t = &km_thread;
	struct timespec nap = {0, NAP_NS};
	int err;

	if (km_unlikely(++t->idle_wakes >= IDLE_WAKES))
		judge(t, bells, n);
	if (km_likely(!t->flooded))
		return 0;
	err = km_ppoll(NULL, 0, &nap, mask);
	if (km_unlikely(km_refused(err))) {
		km_doze();
		err = 0;
	}
	return err;
}

void km_useful_wake(void)
{
	struct km_thread *t = &km_thread;

	t->idle_wakes -= KM_MIN(t->idle_wakes, USEFUL_WEIGHT);
}
