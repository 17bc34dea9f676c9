/* SPDX-License-Identifier: Apache-2.0 */
/* The tables for tools: complete, without doubles, and they end. */
#include "unit.h"

static unsigned names(const char *(*name)(unsigned), const char *(*meaning)(unsigned))
{
	unsigned count = 0;

	while (name(count)) {
		if (meaning)
			CHECK(meaning(count) && *meaning(count));
		for (unsigned i = 0; i < count; i++)
			CHECK(strcmp(name(i), name(count)) != 0);
		count++;
	}
	CHECK(!name(count + 1) && !name(UINT32_MAX));
	if (meaning)
		CHECK(!meaning(count) && !meaning(UINT32_MAX));
	return count;
}

int main(void)
{
	struct kmap_option option;
	struct kmap_layout field;
	unsigned count;

	unit_watchdog();
	CHECK_IS(kmap_abi_version(), KMAP_ABI_VERSION);
	CHECK(kmap_wire_version() > 0);
	/* The statistics memfd has room for 64 of each. */
	count = names(kmap_reason_name, kmap_reason_meaning);
	CHECK(count > 1 && count <= 64);
	count = names(kmap_counter_name, kmap_counter_meaning);
	CHECK(count > 1 && count <= 64);
	CHECK(names(kmap_symbol_name, NULL) > 1);

	for (count = 0; kmap_option_get(count, &option) == 0; count++) {
		CHECK(strncmp(option.env, "KMAP_", 5) == 0);
		CHECK(*option.type && *option.help && option.default_text);
		CHECK(option.min <= option.max);
	}
	CHECK(count > 1);
	CHECK_IS(kmap_option_get(count, &option), -ENOENT);

	for (count = 0; kmap_layout_get(count, &field) == 0; count++)
		CHECK(*field.structure && *field.field && field.size);
	CHECK(count > 1);
	CHECK_IS(kmap_layout_get(count, &field), -ENOENT);
	return 0;
}
