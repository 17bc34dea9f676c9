/* SPDX-License-Identifier: Apache-2.0 */
/* What the entry points check of vectors before they hand them on. */
#ifndef KM_PRELOAD_VECTOR_H
#define KM_PRELOAD_VECTOR_H

#include "preload/entry.h"

#include <limits.h>

KM_INLINE bool km_iov_is_kernels(const struct iovec *iov, int iovcnt)
{
	for (int i = 0; i < iovcnt; i++)
		if (km_kernel_pointer(iov[i].iov_base, iov[i].iov_len))
			return true;
	return false;
}

KM_INLINE bool km_iov_is_invalid(const struct iovec *iov, int iovcnt)
{
	size_t left = SSIZE_MAX;

	if (iovcnt < 0 || iovcnt > IOV_MAX ||
	    !km_readable(iov, (size_t)iovcnt * sizeof(*iov)))
		return true;
	for (int i = 0; i < iovcnt; i++) {
		if (iov[i].iov_len > left)
			return true;
		left -= iov[i].iov_len;
	}
	return false;
}

#define KM_RECV(fd, iov, n, flags)                                                     \
	(km_iov_is_kernels(iov, n) ? -EFAULT : km_recv(f, fd, iov, n, flags))
#define KM_SEND(fd, iov, n, flags)                                                     \
	(km_iov_is_kernels(iov, n) ? -EFAULT : km_send(f, fd, iov, n, flags))

#endif
