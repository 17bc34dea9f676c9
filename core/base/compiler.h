/* SPDX-License-Identifier: Apache-2.0 */
/* Shorthands for what the compiler is told. */
#ifndef KM_COMPILER_H
#define KM_COMPILER_H

#include <stddef.h>
#include <stdint.h>

#define km_likely(x) __builtin_expect(!!(x), 1)
#define km_unlikely(x) __builtin_expect(!!(x), 0)

#define KM_EXPORT __attribute__((visibility("default")))
/* Of names that only glibc has: a program on musl must not find them either. */
#ifdef KM_MUSL
#define KM_EXPORT_GLIBC __attribute__((visibility("hidden")))
#else
#define KM_EXPORT_GLIBC KM_EXPORT
#endif
#define KM_COLD __attribute__((cold, noinline))
#define KM_ALONE __attribute__((noinline))
#define KM_INLINE static inline __attribute__((always_inline))

#define KM_CACHE_LINE 64
/* Adjacent-line prefetch pulls pairs of lines on x86-64, and some arm64 cores
 * have 128-byte lines: what two CPUs write stands this far apart. */
#define KM_APART 128

#define KM_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KM_MAX(a, b) ((a) > (b) ? (a) : (b))
#define KM_COUNT(array) (sizeof(array) / sizeof((array)[0]))

#endif
