/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is missing in the libc that the program runs with.
 *
 * An older glibc lacks some of the calls.  The library exports their names all the same,
 * and a program that asks the loader for one finds it: such calls are made by number.
 *
 * A library made for one libc and preloaded in a program on the other forwards every
 * call: streams, messages and fork differ inside.  musl's loader takes one that was made
 * for glibc, and ends the program when it does not find a name that the library needs;
 * glibc's takes one that was made for musl, because that names no libc that it needs.
 */
#include <dlfcn.h>
#include <errno.h>

#include "base/proc.h"

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif

#ifdef KM_MUSL
#define MADE_FOR_GLIBC 0
#else
#define MADE_FOR_GLIBC 1
#endif

static long answer(long n)
{
	if (n >= 0)
		return n;
	errno = (int)-n;
	return -1;
}

static int pwait2(int epfd, struct epoll_event *evs, int max,
		  const struct timespec *timeout, const sigset_t *mask)
{
	return (int)answer(
		KM_SYS(epoll_pwait2, epfd, evs, max, timeout, mask, KM_SIGSET_SIZE));
}

/* The second half of the offset is for machines of 32 bits. */
static ssize_t read_at(int fd, const struct iovec *iov, int n, off64_t at, int flags)
{
	return answer(KM_SYS(preadv2, fd, iov, n, at, 0, flags));
}

static ssize_t write_at(int fd, const struct iovec *iov, int n, off64_t at, int flags)
{
	return answer(KM_SYS(pwritev2, fd, iov, n, at, 0, flags));
}

static ssize_t copy_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t n,
			  unsigned flags)
{
	return answer(KM_SYS(copy_file_range, in, in_at, out, out_at, n, flags));
}

static ssize_t send_file(int out, int in, off64_t *at, size_t n)
{
	return answer(KM_SYS(sendfile, out, in, at, n, 0, 0));
}

void km_resolve_missing(void)
{
	struct km_real *real = &km_proc.real;
	bool missing = false;
	int saved = errno;

	/* musl knows no such name, and says so by errno. */
	if ((confstr(_CS_GNU_LIBC_VERSION, NULL, 0) != 0) != MADE_FOR_GLIBC)
		km_proc.disabled = true;
	errno = saved;
#define X(name, ...) missing |= !real->name;
#include "base/symbols.def"
#undef X
	if (!missing)
		return;
	/* What a failed lookup left is not the program's. */
	dlerror();
	if (!real->epoll_pwait2)
		real->epoll_pwait2 = pwait2;
	if (!real->preadv64v2)
		real->preadv64v2 = read_at;
	if (!real->pwritev64v2)
		real->pwritev64v2 = write_at;
	if (!real->copy_file_range)
		real->copy_file_range = copy_range;
	if (!real->sendfile64)
		real->sendfile64 = send_file;
}
