/* SPDX-License-Identifier: Apache-2.0 */
/* Vectors of buffers.  Any thread, and signal handlers; nothing is copied but the
 * vectors. */
#ifndef KM_IOV_H
#define KM_IOV_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define KM_IOV_MOST 1024 /* the kernel's IOV_MAX */

size_t km_iov_total(const struct iovec *iov, int iovcnt);
/* What is left of iov after done bytes, in out (room for iovcnt); how many parts. */
int km_iov_advance(const struct iovec *iov, int iovcnt, size_t done, struct iovec *out);
/* The first limit bytes of iov, in out (room for most parts); how many parts. */
int km_iov_limit(const struct iovec *iov, int iovcnt, uint64_t limit, struct iovec *out,
		 int most);

#endif
