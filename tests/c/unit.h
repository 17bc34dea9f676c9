/* SPDX-License-Identifier: Apache-2.0 */
/* What the unit tests share: a check that names itself, and a watchdog. */
#ifndef KMAP_TEST_UNIT_H
#define KMAP_TEST_UNIT_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kmap.h"

#define CHECK(condition)                                                               \
	do {                                                                           \
		if (!(condition)) {                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,             \
				#condition);                                           \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

/* Checks that a call gives one value, and says what it gave instead. */
#define CHECK_IS(call, expected)                                                       \
	do {                                                                           \
		long long got_ = (long long)(call), want_ = (long long)(expected);     \
		if (got_ != want_) {                                                   \
			fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__,     \
				__LINE__, #call, got_, want_);                         \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static inline unsigned unit_number(const char *variable, unsigned otherwise)
{
	const char *value = getenv(variable);

	return value ? (unsigned)strtoul(value, NULL, 10) : otherwise;
}

/* A test that hangs is killed by SIGALRM. */
static inline void unit_watchdog(void)
{
	alarm(unit_number("KMAP_UNIT_WATCHDOG", 60));
}

/* How often a test repeats what goes wrong rarely. */
static inline unsigned unit_rounds(unsigned otherwise)
{
	return unit_number("KMAP_UNIT_ROUNDS", otherwise);
}

/* Some turns of nothing, few or many, so that two threads meet at any instruction. */
static inline void unit_delay(uint32_t *random)
{
	*random = *random * 1664525u + 1013904223u;
	for (uint32_t i = (*random >> 8) % (16u << (*random >> 29)); i; i--)
		__asm__ __volatile__("");
}

/* One more round is over: the watchdog waits for the next. */
static inline void unit_progress(unsigned round)
{
	if (round % 32 == 0)
		unit_watchdog();
}

/* Where the compiler put a field. */
static inline struct kmap_layout unit_field(const char *structure, const char *field)
{
	struct kmap_layout found;

	for (unsigned i = 0; kmap_layout_get(i, &found) == 0; i++)
		if (strcmp(found.structure, structure) == 0 &&
		    strcmp(found.field, field) == 0)
			return found;
	fprintf(stderr, "no field %s.%s\n", structure, field);
	exit(1);
}

/* Both ends of a channel in one process. */
struct unit_pair {
	kmap_channel *creator, *attacher;
	int attacher_fds[KMAP_CHANNEL_FDS];
};

static inline struct unit_pair unit_pair(size_t ring_size)
{
	struct unit_pair pair;
	int fds[KMAP_CHANNEL_FDS];

	CHECK_IS(kmap_channel_create(ring_size, &pair.creator), 0);
	CHECK_IS(kmap_channel_fds(pair.creator, fds), 0);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++) {
		pair.attacher_fds[i] = dup(fds[i]);
		CHECK(pair.attacher_fds[i] >= 0);
	}
	CHECK_IS(kmap_channel_attach(pair.attacher_fds, &pair.attacher), 0);
	return pair;
}

static inline void unit_pair_close(struct unit_pair *pair)
{
	kmap_channel_close(pair->creator);
	kmap_channel_close(pair->attacher);
}

/* The segment as a hostile peer sees it. */
static inline uint8_t *unit_map(const kmap_channel *ch, size_t *size)
{
	int fds[KMAP_CHANNEL_FDS];
	struct stat st;
	uint8_t *memory;

	CHECK_IS(kmap_channel_fds(ch, fds), 0);
	CHECK_IS(fstat(fds[0], &st), 0);
	*size = (size_t)st.st_size;
	memory = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
	CHECK(memory != MAP_FAILED);
	return memory;
}

#endif
