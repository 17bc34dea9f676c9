/* SPDX-License-Identifier: Apache-2.0 */
/* The parser of policies, for tools: they have no other. */
#include <errno.h>

#include "base/policy.h"
#include "kmap.h"

_Static_assert(KMAP_POLICY_ERROR == KM_POLICY_ERROR, "room for an error");

int kmap_policy_check(const char *text, size_t length, unsigned *line, char *error)
{
	struct km_policy *policy = km_policy_parse(text, length, NULL, line, error);

	if (!policy)
		return -EINVAL;
	km_policy_free(policy);
	return 0;
}
