/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The program's memory, touched as the kernel touches it: a bad pointer is -EFAULT.
 *
 * The copies are a few instructions of our own (fault.S).  A handler of SIGSEGV and
 * SIGBUS that finds the fault inside them, at an address of the range that the program
 * named, lets the copy return -EFAULT; every other signal is the program's and is
 * passed on.  There is nothing to set up or to take down around a copy, so that
 * signal handlers, longjmp and threads need no care.
 *
 * The handlers are installed with the first upgrade of the process.  Before that, and
 * in libkmap.so always, a bad pointer in a copy is a signal; what has to be looked at
 * before that is asked of the kernel first (km_user_readable).
 */
#ifndef KM_FAULT_H
#define KM_FAULT_H

#include <signal.h>
#include <stdbool.h>
#include <string.h>

#include "base/compiler.h"

/* user is the end (dst or src) that the program named.  0 or -EFAULT; then an unknown
 * part of dst is written.  far: another CPU reads dst next, and had it in its caches:
 * stores that do not fetch the lines first are then several times as fast, from
 * KM_FAR_FROM bytes on (docs/decisions/0012-copies-to-another-cpu.md; x86-64 only). */
#define KM_FAR_FROM 2048u
int km_user_copy(void *dst, const void *src, size_t n, bool far, const void *user);
/* Reads a byte of every page of [user, user + n).  0 or -EFAULT. */
int km_user_probe(const void *user, size_t n);

KM_INLINE int km_copy_in(void *dst, const void *user, size_t n, bool far)
{
#ifdef KM_GUARDED
	return km_user_copy(dst, user, n, far, user);
#else
	(void)far;
	memcpy(dst, user, n);
	return 0;
#endif
}

KM_INLINE int km_copy_out(void *user, const void *src, size_t n)
{
#ifdef KM_GUARDED
	return km_user_copy(user, src, n, false, user);
#else
	memcpy(user, src, n);
	return 0;
#endif
}

/* Whether n bytes that the program points at can be read. */
KM_INLINE bool km_readable(const void *user, size_t n)
{
	return km_likely(km_user_probe(user, n) == 0);
}

/* Pointers into the kernel's half: it answers EFAULT to them before it looks at
 * anything else.  All others are found out when they are used. */
KM_INLINE bool km_kernel_pointer(const void *p, size_t n)
{
	return km_unlikely((intptr_t)((uintptr_t)p | ((uintptr_t)p + n)) < 0);
}

/* The same for arguments of calls that may not be about an upgraded connection at
 * all, before and after the handlers are installed. */
extern bool km_fault_armed;
bool km_readable_by_kernel(const void *user, size_t n);

KM_INLINE bool km_user_readable(const void *user, size_t n)
{
	return km_likely(__atomic_load_n(&km_fault_armed, __ATOMIC_RELAXED))
		       ? km_readable(user, n)
		       : km_readable_by_kernel(user, n);
}

KM_INLINE bool km_user_get(void *to, const void *user, size_t n)
{
	return km_user_readable(user, n) && km_copy_in(to, user, n, false) == 0;
}

/* The kernel's own form of struct sigaction. */
struct km_action {
	void *handler;
	unsigned long flags;
	void *restorer;
	uint64_t mask;
};

/* Installs the handlers, once. */
void km_fault_arm(void);

/*
 * The program's action for a signal is remembered while ours stands in its place.
 * Whoever is about to change or read one: recall before, changed after the kernel has
 * been told.  Any thread, and signal handlers.
 */
void km_fault_changed(int sig);
/* False when the library does not handle sig; otherwise what the program wants. */
bool km_fault_recall(int sig, struct km_action *out);
bool km_fault_is_ours(const void *handler);

#endif
