/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A peer that rings for nothing.
 *
 * Whoever has a bell may ring it at any rate, also after its last connection is closed,
 * and each ring gets a sleeping thread out of the kernel.  A thread that is woken for
 * nothing more than IDLE_WAKES times in IDLE_SPAN_NS, without as much to show for it,
 * takes a nap before each of as many further sleeps.  So a flood costs it about a
 * hundredth of a CPU, and everybody else up to a millisecond; nobody's connection is
 * closed for what another one of the same user id does.
 */
#include "event/event.h"

#define IDLE_WAKES 256
#define IDLE_SPAN_NS 25600000
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

int km_idle_wake(const sigset_t *mask)
{
	struct km_thread *t = &km_thread;
	struct timespec nap = {0, NAP_NS};
	int64_t now;

	if (km_unlikely(++t->idle_wakes >= IDLE_WAKES)) {
		now = km_now_ns();
		t->flooded = now - t->idle_since < IDLE_SPAN_NS;
		t->idle_since = now;
		t->idle_wakes = 0;
		if (t->flooded)
			tell(now);
	}
	if (km_likely(!t->flooded))
		return 0;
	return (int)KM_SYS(ppoll, NULL, 0, &nap, mask, KM_SIGSET_SIZE, 0);
}

void km_useful_wake(void)
{
	struct km_thread *t = &km_thread;

	t->idle_wakes -= KM_MIN(t->idle_wakes, USEFUL_WEIGHT);
}
