/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Atomic accesses, named by their order.  The only file that includes
 * <stdatomic.h>.
 *
 * Accesses to shared memory that order others take their order from sync.def, through
 * km_load_sync, km_store_sync and km_fence_sync, so that a mutant can weaken each one.
 * The sleep and wake protocol has second looks besides (km_look_sync), and is otherwise
 * built from sequentially consistent operations.
 */
#ifndef KM_ATOMIC_H
#define KM_ATOMIC_H

#include <stdatomic.h>
#include <stdint.h>

enum km_sync_id {
	KM_SYNC_NONE,
#define ORDER(id, strong, weak, text) KM_SYNC_##id,
#define FENCE(id, text) KM_SYNC_##id,
#define LOOK(id, text) KM_SYNC_##id,
#include "base/sync.def"
#undef ORDER
#undef FENCE
#undef LOOK
};

/* The build of scripts/mutants has all of them, and chooses one as it starts. */
#ifdef KM_MUTANTS
extern int km_mutant_chosen;
#define KM_MUTANT km_mutant_chosen
#elif !defined(KM_MUTANT)
#define KM_MUTANT KM_SYNC_NONE
#endif

enum km_sync_order {
#define ORDER(id, strong, weak, text)                                                  \
	km_strong_##id = memory_order_##strong, km_weak_##id = memory_order_##weak,
#define FENCE(id, text)
#define LOOK(id, text)
#include "base/sync.def"
#undef ORDER
#undef FENCE
#undef LOOK
};

typedef _Atomic(uint32_t) km_a32;
typedef _Atomic(uint64_t) km_a64;

#define km_is_mutant(id) (KM_MUTANT == (int)KM_SYNC_##id)
#define km_load_sync(id, p)                                                            \
	(km_is_mutant(id) ? atomic_load_explicit((p), (memory_order)km_weak_##id)      \
			  : atomic_load_explicit((p), (memory_order)km_strong_##id))
#define km_store_sync(id, p, v)                                                        \
	(km_is_mutant(id)                                                              \
		 ? atomic_store_explicit((p), (v), (memory_order)km_weak_##id)         \
		 : atomic_store_explicit((p), (v), (memory_order)km_strong_##id))
/* *expected becomes what was there. */
#define km_cas_sync(id, p, expected, v)                                                \
	(km_is_mutant(id)                                                              \
		 ? atomic_compare_exchange_strong_explicit((p), (expected), (v),       \
							   (memory_order)km_weak_##id, \
							   (memory_order)km_weak_##id) \
		 : atomic_compare_exchange_strong_explicit(                            \
			   (p), (expected), (v), (memory_order)km_strong_##id,         \
			   (memory_order)km_strong_##id))
#define km_fence_sync(id)                                                              \
	(km_is_mutant(id) ? (void)0 : atomic_thread_fence(memory_order_seq_cst))
/* seen is what the second look found to be new, if anything. */
#define km_look_sync(id, seen) (!km_is_mutant(id) && (seen))

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
#define km_fence_seq() atomic_thread_fence(memory_order_seq_cst)

/*
 * Fields that are looked at only behind an access to another one: cut and end behind
 * pflags.  They are relaxed atomics, because the other end may break the rules; for
 * ThreadSanitizer they are plain, so that a missing order is a race that it reports.
 */
#ifdef __SANITIZE_THREAD__
#define km_load_ordered(p) (*(const uint64_t *)(const void *)(p))
#define km_store_ordered(p, v) (*(uint64_t *)(void *)(p) = (v))
void __tsan_write_range(void *at, long n);
/* From here on this end alone looks at [at, at + n). */
#define km_claim(at, n) __tsan_write_range((void *)(uintptr_t)(at), (n))
#else
#define km_load_ordered(p) km_load_relaxed(p)
#define km_store_ordered(p, v) km_store_relaxed((p), (v))
#define km_claim(at, n) ((void)(at), (void)(n))
#endif

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
