/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A latch: the descriptor through which one process wakes the epoll sets of another.
 *
 * It is an unconnected Unix datagram socket that was shut down for reading, so that it is
 * readable for good, and each further shutdown() of it, by whoever has it, is an edge.
 * Both processes share the open file description, and the other one may be hostile: there
 * is no counter or buffer that it could fill, no flag by which it could make the call
 * block, and nothing that it could read away.  (A write to a shared eventfd blocks once
 * the other end has cleared O_NONBLOCK and filled the counter.)
 */
#ifndef KM_LATCH_H
#define KM_LATCH_H

#include "base/compiler.h"
#include "base/sys.h"

/* A new latch, close-on-exec; or an error of socket(2). */
int km_latch_open(void);

/* Is fd, which another process sent, a latch, and may this process ring it?  0, -EPROTO,
 * or the error of shutdown(2). */
int km_latch_check(int fd);

/* An edge for every epoll set that has fd registered.  Never blocks. */
KM_INLINE int km_latch_ring(int fd)
{
	return km_sys_shutdown(fd, SHUT_RD);
}

#endif
