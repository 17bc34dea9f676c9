/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A blocking recv or send that a signal interrupts goes on when the handler was
 * installed with SA_RESTART and ends with EINTR when not.  The waits of this library
 * are made of calls that the kernel never restarts, so it sees to that itself: signals
 * whose handlers ask for a restart are kept blocked in the wait and seen through a
 * signalfd, and the others interrupt it.
 */
#ifndef KM_SIGNALS_H
#define KM_SIGNALS_H

#include "base/proc.h"

/* The program has installed a handler: look at all of them again. */
void km_signals_changed(void);

/* Are there handlers of both kinds?  Any thread; a system call or 64 after a change. */
bool km_signals_mixed(void);

/* After -EINTR in a process whose handlers are all of one kind: 0 to go on waiting,
 * else -EINTR. */
int km_interrupted(void);

/*
 * For one wait in a process with both kinds.  Fills mask for ppoll and gives a
 * signalfd to poll with; the pending signals are delivered when ppoll returns.  A
 * negative errno value when there is none to be had; the caller closes it.
 */
int km_signals_wait_begin(uint64_t *mask);

#endif
