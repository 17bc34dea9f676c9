/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rules of any text, and connections of any kind against them.  What is not known of a
 * connection may leave an answer open, and must not change one that was not.
 */
#include "base/policy.h"
#include "fuzz.h"

static void take_address(struct fuzz_input *in, struct km_address *out)
{
	uint64_t low = fuzz_take(in, 4), kind = fuzz_take(in, 1);

	memset(out, 0, sizeof(*out));
	if (kind & 1)
		memset(out->ip + 10, 0xff, 2);
	else
		memcpy(out->ip, &kind, 1);
	memcpy(out->ip + 12, &low, 4);
	out->port = (uint16_t)fuzz_take(in, 2);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct km_policy_program program = {"envoy", "redis-server"};
	struct fuzz_input in = {data, data + size};
	struct km_policy_query q = {.via_known = true, .uid_known = true};
	uint64_t bits = fuzz_take(&in, 1);
	struct km_policy_decision known, open;
	struct km_policy *policy;
	char error[KM_POLICY_ERROR];
	unsigned line;

	q.connector = bits & 1;
	q.redirected = bits & 2;
	q.uid = (uint32_t)fuzz_take(&in, 1);
	take_address(&in, &q.local);
	take_address(&in, &q.peer);
	take_address(&in, &q.to);
	take_address(&in, &q.via);
	memset(error, 'x', sizeof(error));
	policy = km_policy_parse((const char *)in.at, (size_t)(in.end - in.at),
				 bits & 4 ? &program : NULL, &line, error);
	if (!policy) {
		FUZZ_CHECK(memchr(error, '\0', sizeof(error)));
		FUZZ_CHECK(line <= size);
		return 0;
	}
	known = km_policy_decide(policy, &q);
	FUZZ_CHECK(known.answer != KM_POLICY_OPEN && known.line <= size);
	q.uid_known = bits & 8;
	q.via_known = bits & 16;
	open = km_policy_decide(policy, &q);
	FUZZ_CHECK(open.answer == KM_POLICY_OPEN || open.answer == known.answer);
	km_policy_free(policy);
	return 0;
}
