/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the sources take from glibc's headers and musl's do not have.  CMake includes
 * this file in front of every source; with glibc it is but two types.
 *
 * KM_MUSL is defined in a build for musl.  Names of musl and layouts of its structures
 * are from its public headers; what is known beyond them stands where it is used.
 */
#ifndef KM_MUSL_COMPAT_H
#define KM_MUSL_COMPAT_H

#include <features.h>
#ifndef __GLIBC__
#define KM_MUSL
#endif

#ifndef __ASSEMBLER__
#ifdef KM_MUSL
#include <asm/socket.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>

/* In musl's headers these are other words for the names without 64; older libraries
 * of musl have them as names of their own, too. */
#undef fcntl64
#undef preadv64v2
#undef pwritev64v2
#undef sendfile64
ssize_t sendfile64(int out, int in, off_t *offset, size_t count);
ssize_t preadv64v2(int fd, const struct iovec *iov, int iovcnt, off_t offset,
		   int flags);
ssize_t pwritev64v2(int fd, const struct iovec *iov, int iovcnt, off_t offset,
		    int flags);
/* Since musl 1.2.5. */
ssize_t preadv2(int fd, const struct iovec *iov, int iovcnt, off_t offset, int flags);
ssize_t pwritev2(int fd, const struct iovec *iov, int iovcnt, off_t offset, int flags);

void (*ssignal(int sig, void (*handler)(int)))(int);
void (*sysv_signal(int sig, void (*handler)(int)))(int);
void (*__sysv_signal(int sig, void (*handler)(int)))(int);

/* Arguments that the two declare differently, and pass alike. */
typedef unsigned km_mmsg_flags;
typedef int km_ioctl_request;
#else
typedef int km_mmsg_flags;
typedef unsigned long km_ioctl_request;
#endif /* KM_MUSL */
#endif /* __ASSEMBLER__ */

#endif
