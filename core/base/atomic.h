/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Atomic accesses, named by their order.  The only file that includes
 * <stdatomic.h>.
 *
 * Accesses to shared memory that carry a meaning between the two ends take
 * their order from sync.def through km_load_sync and km_store_sync, so that a
 * mutant build can weaken each one.  The sleep and wake protocol (shm/wait.h,
 * event/bell.c) is built from sequentially consistent operations alone.
 */
#ifndef KM_ATOMIC_H
#define KM_ATOMIC_H

#include <stdatomic.h>
#include <stdint.h>

enum km_sync_id {
	KM_SYNC_NONE,
#define X(id, strong, weak, text) KM_SYNC_##id,
#include "base/sync.def"
#undef X
};

#ifndef KM_MUTANT
#define KM_MUTANT KM_SYNC_NONE
#endif

enum km_sync_order {
#define X(id, strong, weak, text)                                                      \
	km_order_##id = KM_MUTANT == KM_SYNC_##id ? memory_order_##weak                \
						  : memory_order_##strong,
#include "base/sync.def"
#undef X
};

typedef _Atomic(uint32_t) km_a32;
typedef _Atomic(uint64_t) km_a64;

#define km_load_sync(id, p) atomic_load_explicit((p), (memory_order)km_order_##id)
#define km_store_sync(id, p, v)                                                        \
	atomic_store_explicit((p), (v), (memory_order)km_order_##id)

#define km_load_relaxed(p) atomic_load_explicit((p), memory_order_relaxed)
#define km_load_acquire(p) atomic_load_explicit((p), memory_order_acquire)
#define km_load_seq(p) atomic_load_explicit((p), memory_order_seq_cst)
#define km_store_relaxed(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
#define km_store_release(p, v) atomic_store_explicit((p), (v), memory_order_release)
#define km_store_seq(p, v) atomic_store_explicit((p), (v), memory_order_seq_cst)
#define km_add_seq(p, v) atomic_fetch_add_explicit((p), (v), memory_order_seq_cst)
#define km_add_relaxed(p, v) atomic_fetch_add_explicit((p), (v), memory_order_relaxed)
#define km_sub_seq(p, v) atomic_fetch_sub_explicit((p), (v), memory_order_seq_cst)
#define km_or_seq(p, v) atomic_fetch_or_explicit((p), (v), memory_order_seq_cst)
#define km_and_seq(p, v) atomic_fetch_and_explicit((p), (v), memory_order_seq_cst)
#define km_swap_seq(p, v) atomic_exchange_explicit((p), (v), memory_order_seq_cst)
#define km_cas_seq(p, expected, v)                                                     \
	atomic_compare_exchange_strong_explicit(                                       \
		(p), (expected), (v), memory_order_seq_cst, memory_order_seq_cst)
/* Orders the store of a position before the load of a sleeper's word, and the
 * store of that word before the look at the position. */
#define km_fence_seq() atomic_thread_fence(memory_order_seq_cst)

/* Tells the CPU that this is a spin. */
static inline void km_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ __volatile__("yield");
#endif
}

#endif
