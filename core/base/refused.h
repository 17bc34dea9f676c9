/* SPDX-License-Identifier: Apache-2.0 */
/*
 * System calls that a seccomp filter may refuse where the program's own are let
 * through: where another call does the same, it is tried.  Results are those of the
 * kernel.  Safe from any thread and in signal handlers.
 */
#ifndef KM_REFUSED_H
#define KM_REFUSED_H

#include <errno.h>
#include <stdbool.h>

#include "base/compiler.h"
#include "base/sys.h"

/* Is this how a filter, or an old kernel, answers? */
static inline bool km_refused(long err)
{
	return err == -EPERM || err == -ENOSYS || err == -EACCES;
}

/* Sleeps for about a millisecond, by whatever call there is; for loops that would
 * otherwise be busy because the call they sleep in is refused. */
void km_doze(void);
/* recvmsg and sendmsg that do not block, or else the same for the first part of the
 * vector by recvfrom and sendto, read and write. */
ssize_t km_recv_now(int fd, const struct msghdr *msg, int flags);
ssize_t km_send_now(int fd, const struct msghdr *msg, int flags);

#endif
