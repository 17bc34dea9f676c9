/* SPDX-License-Identifier: Apache-2.0 */
/* What the fuzz targets share. */
#ifndef KM_FUZZ_H
#define KM_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/compiler.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

#define FUZZ_CHECK(condition)                                                          \
	do {                                                                           \
		if (km_unlikely(!(condition))) {                                       \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,             \
				#condition);                                           \
			abort();                                                       \
		}                                                                      \
	} while (0)

/* The input, from its start; zeroes beyond its end. */
struct fuzz_input {
	const uint8_t *at, *end;
};

KM_INLINE uint64_t fuzz_take(struct fuzz_input *in, size_t bytes)
{
	uint64_t value = 0;
	size_t there = KM_MIN(bytes, (size_t)(in->end - in->at));

	memcpy(&value, in->at, there);
	in->at += there;
	return value;
}

/* A number that is small, close to a power of two, relative to base, or anything. */
KM_INLINE uint64_t fuzz_value(struct fuzz_input *in, uint64_t base)
{
	uint64_t how = fuzz_take(in, 1);

	switch (how >> 5) {
	case 0:
		return how & 31;
	case 1:
		return base + (how & 31);
	case 2:
		return base - (how & 31);
	case 3:
		return ((uint64_t)1 << (how & 31)) - 1 + fuzz_take(in, 1) % 3;
	case 4:
		return base + ((uint64_t)1 << (how & 31));
	case 5:
		return base + (int64_t)(int16_t)fuzz_take(in, 2);
	case 6:
		return (uint64_t)0 - (how & 31);
	default:
		return fuzz_take(in, 8);
	}
}

/*
 * A thread that writes to memory while the victim's calls run.  fuzz_storm_start takes
 * its list of writes from the input.
 */
struct fuzz_storm_write {
	uint8_t *at;
	uint64_t value;
	uint8_t bytes; /* 4 or 8 */
};
#define FUZZ_STORM_WRITES 16
void fuzz_storm_start(const struct fuzz_storm_write *writes, unsigned n);
void fuzz_storm_stop(void);

#endif
