/* SPDX-License-Identifier: Apache-2.0 */
#include "base/spin.h"

#include <dlfcn.h>
#include <stddef.h>

#include "base/proc.h"

/* Less than this is not worth the look at the clock. */
#define LEAST_NS 1000u
/* Looks between two looks at the clock. */
#define LOOKS 16
/* Waits between two tries where spinning does not help. */
#define PAUSE_LEAST 8u
#define PAUSE_MOST 64u

intptr_t km_rseq_offset;

void km_spin_init(void)
{
	/* By name: a libc without them must not fail to load this library. */
	const ptrdiff_t *offset = dlsym(RTLD_DEFAULT, "__rseq_offset");
	const unsigned *size = dlsym(RTLD_DEFAULT, "__rseq_size");

	if (offset && size && *size)
		km_rseq_offset = *offset;
}

/* How long the next wait may spin, in nanoseconds; 0: not at all. */
static int64_t time_for(struct km_spin *spin, uint32_t peer_cpu)
{
	uint32_t most = (uint32_t)km_proc.options.spin_us * 1000;
	uint32_t limit, rest;

	if (most == 0 || !km_elsewhere(peer_cpu))
		return 0;
	limit = km_load_relaxed(&spin->limit);
	if (limit)
		return KM_MIN(limit, most);
	rest = km_load_relaxed(&spin->rest);
	if (rest == 0)
		return most;
	km_store_relaxed(&spin->rest, rest - 1);
	return 0;
}

static void note(struct km_spin *spin, bool hit)
{
	uint32_t limit = km_load_relaxed(&spin->limit) / 2;
	uint32_t pause = km_load_relaxed(&spin->pause);

	km_count(hit ? KM_COUNT_SPIN_HITS : KM_COUNT_SPIN_MISSES);
	if (hit) {
		km_store_relaxed(&spin->limit,
				 (uint32_t)km_proc.options.spin_us * 1000);
		km_store_relaxed(&spin->pause, 0);
		return;
	}
	if (limit >= LEAST_NS) {
		km_store_relaxed(&spin->limit, limit);
		return;
	}
	pause = KM_MIN(KM_MAX(pause * 2, PAUSE_LEAST), PAUSE_MOST);
	km_store_relaxed(&spin->limit, 0);
	km_store_relaxed(&spin->rest, pause);
	km_store_relaxed(&spin->pause, pause);
}

bool km_spin(struct km_spin *record, uint32_t peer_cpu, int64_t left,
	     bool (*has_news)(const void *what), const void *what)
{
	int64_t time = time_for(record, peer_cpu), until;
	bool hit = false;

	if (time == 0)
		return false;
	until = km_now_ns() + KM_MIN(time, left);
	do
		for (int i = 0; i < LOOKS && !hit; i++) {
			km_relax();
			hit = has_news(what);
		}
	while (!hit && km_now_ns() < until);
	note(record, hit);
	return hit;
}
