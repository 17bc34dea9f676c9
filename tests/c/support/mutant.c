/* SPDX-License-Identifier: Apache-2.0 */
/* The mutant that this run is to be, by its name in KMAP_MUTANT, and how long a sleeper
 * trusts the futex: without an end, a wake-up that is lost is seen. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/atomic.h"

#ifdef KM_MUTANTS
int km_mutant_chosen = KM_SYNC_NONE;
extern int64_t km_mutant_slice_ns;
int64_t km_mutant_slice_ns = 5000000;

static const char *const names[] = {
	"",
#define ORDER(id, strong, weak, text) #id,
#define FENCE(id, text) #id,
#define LOOK(id, text) #id,
#include "base/sync.def"
#undef ORDER
#undef FENCE
#undef LOOK
};

__attribute__((constructor)) static void choose(void)
{
	const char *name = getenv("KMAP_MUTANT"), *slice = getenv("KMAP_MUTANT_SLICE");

	if (slice)
		km_mutant_slice_ns = strtoll(slice, NULL, 10);
	if (!name || !*name)
		return;
	for (size_t i = 1; i < sizeof(names) / sizeof(names[0]); i++)
		if (strcmp(name, names[i]) == 0)
			km_mutant_chosen = (int)i;
	if (km_mutant_chosen == KM_SYNC_NONE) {
		fprintf(stderr, "KMAP_MUTANT=%s is not in sync.def\n", name);
		exit(2);
	}
}
#endif
