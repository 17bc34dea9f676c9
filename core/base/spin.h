/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking again for a while before sleeping.
 *
 * A wake-up costs the one who sleeps some microseconds, and tens of them where an idle
 * virtual CPU has to be woken.  Spinning instead helps only while the peer runs on
 * another CPU and answers soon; otherwise it takes the time of whoever would have run.
 * So each place that waits keeps a record: a hit allows the whole of KMAP_SPIN_US for
 * the next wait, a miss halves it, and once that is less than is worth it only one in
 * many waits tries again, at twice the distance after every failure.
 *
 * Records are hints that several threads may change at the same time.
 */
#ifndef KM_SPIN_H
#define KM_SPIN_H

#include <stdbool.h>

#include "base/atomic.h"
#include "base/compiler.h"

struct km_spin {
	km_a32 limit; /* nanoseconds that the next wait may spin; 0: see rest */
	km_a32 rest;  /* waits without spinning, before the next try */
	km_a32 pause; /* how many there were the last time */
};

/* Where the restartable sequences' area of a thread lies, from its thread pointer; 0
 * where libc does not have it registered.  See rseq(2) and glibc's __rseq_offset. */
extern intptr_t km_rseq_offset;
void km_spin_init(void);

/* 1 + the number of the CPU that the calling thread runs on, 0 if that is not known.
 * No system call, and it may be old by the time it returns. */
KM_INLINE uint32_t km_this_cpu(void)
{
	uintptr_t thread;

	if (km_unlikely(!km_rseq_offset))
		return 0;
#if defined(__x86_64__)
	__asm__("mov %%fs:0, %0" : "=r"(thread));
#elif defined(__aarch64__)
	__asm__("mrs %0, tpidr_el0" : "=r"(thread));
#else
	return 0;
#endif
	/* cpu_id follows cpu_id_start; it is negative while there is none. */
	return 1 + *(volatile uint32_t *)(thread + (uintptr_t)km_rseq_offset + 4);
}

/* Is cpu, a number as from km_this_cpu, another CPU than the one of the calling thread?
 * Not where either is unknown. */
KM_INLINE bool km_elsewhere(uint32_t cpu)
{
	uint32_t here = km_this_cpu();

	return cpu && here && cpu != here;
}

/* Asks has_news(what) again and again for as long as a wait for a peer that was last seen
 * on that CPU may spin, left nanoseconds at the most.  Is there news?  If not, or if it
 * may not spin, sleep.  Signal handlers run meanwhile, and do not end it. */
bool km_spin(struct km_spin *record, uint32_t peer_cpu, int64_t left,
	     bool (*has_news)(const void *what), const void *what);

#endif
