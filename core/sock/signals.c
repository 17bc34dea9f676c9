/* SPDX-License-Identifier: Apache-2.0 */
#include "sock/signals.h"

#include <errno.h>
#include <sys/signalfd.h>

#include "base/fault.h"

#define SIGNALS 64

static km_a32 known; /* 0: look again */
static km_a64 restarting, ending;

void km_signals_changed(void)
{
	km_store_seq(&known, 0);
}

static void look(void)
{
	uint64_t restart = 0, end = 0;

	if (km_swap_seq(&known, 1))
		return;
	for (int sig = 1; sig <= SIGNALS; sig++) {
		struct km_action sa;

		if (KM_SYS(rt_sigaction, sig, NULL, &sa, KM_SIGSET_SIZE, 0, 0) < 0)
			continue;
		if (km_fault_is_ours(sa.handler))
			km_fault_recall(sig, &sa);
		if (sa.handler == (void *)SIG_DFL || sa.handler == (void *)SIG_IGN)
			continue;
		if (sa.flags & SA_RESTART)
			restart |= 1ULL << (sig - 1);
		else
			end |= 1ULL << (sig - 1);
	}
	km_store_seq(&restarting, restart);
	km_store_seq(&ending, end);
}

bool km_signals_mixed(void)
{
	look();
	return km_load_seq(&restarting) && km_load_seq(&ending);
}

int km_interrupted(void)
{
	look();
	return km_load_seq(&ending) ? -EINTR : 0;
}

int km_signals_wait_begin(uint64_t *mask)
{
	uint64_t now = 0, set;
	long err =
		KM_SYS(rt_sigprocmask, SIG_SETMASK, NULL, &now, KM_SIGSET_SIZE, 0, 0);

	if (err < 0)
		return (int)err;
	/* What the program itself blocks stays pending and is none of our business. */
	set = km_load_seq(&restarting) & ~now;
	*mask = now | set;
	return (int)KM_SYS(signalfd4, -1, &set, KM_SIGSET_SIZE, SFD_CLOEXEC, 0, 0);
}
