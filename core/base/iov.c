/* SPDX-License-Identifier: Apache-2.0 */
/* Vectors of buffers. */
#include "base/iov.h"

#include "base/compiler.h"

size_t km_iov_total(const struct iovec *iov, int iovcnt)
{
	size_t n = 0;

	for (int i = 0; i < iovcnt; i++)
		n += iov[i].iov_len;
	return n;
}

/* What is left of iov after done bytes, in out (room for iovcnt). */
int km_iov_advance(const struct iovec *iov, int iovcnt, size_t done, struct iovec *out)
{
	int k = 0;

	for (int i = 0; i < iovcnt; i++) {
		size_t skip = KM_MIN(done, iov[i].iov_len);

		done -= skip;
		if (skip == iov[i].iov_len && skip)
			continue;
		out[k].iov_base =
			iov[i].iov_base ? (char *)iov[i].iov_base + skip : NULL;
		out[k].iov_len = iov[i].iov_len - skip;
		k++;
	}
	return k;
}

int km_iov_limit(const struct iovec *iov, int iovcnt, uint64_t limit, struct iovec *out,
		 int most)
{
	int i;

	for (i = 0; i < iovcnt && i < most && limit; i++) {
		out[i] = iov[i];
		if (out[i].iov_len > limit)
			out[i].iov_len = limit;
		limit -= out[i].iov_len;
	}
	return i;
}
