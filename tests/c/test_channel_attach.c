/* SPDX-License-Identifier: Apache-2.0 */
/* What an attacher refuses: memory that can shrink under it, and headers that
 * are not what this version writes.  A refusal leaves the descriptors open. */
#include <fcntl.h>

#include "unit.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* A copy of a good segment in a memfd of its own, changed and sealed as asked. */
static int attach_copy(const char *field, uint64_t value, int seals, off_t size_change)
{
	kmap_channel *good, *bad;
	int fds[KMAP_CHANNEL_FDS], copy[KMAP_CHANNEL_FDS];
	size_t size;
	uint8_t *memory;
	int result;

	CHECK_IS(kmap_channel_create(65536, &good), 0);
	CHECK_IS(kmap_channel_fds(good, fds), 0);
	memory = unit_map(good, &size);
	copy[0] = memfd_create("copy", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	CHECK(copy[0] >= 0);
	CHECK_IS(ftruncate(copy[0], (off_t)size + size_change), 0);
	CHECK_IS(pwrite(copy[0], memory, 4096, 0), 4096);
	if (field) {
		struct kmap_layout at = unit_field("km_wire_segment", field);

		CHECK_IS(pwrite(copy[0], &value, at.size, at.offset), at.size);
	}
	if (seals)
		CHECK_IS(fcntl(copy[0], F_ADD_SEALS, seals), 0);
	for (int i = 1; i < KMAP_CHANNEL_FDS; i++)
		CHECK((copy[i] = dup(fds[i])) >= 0);

	result = kmap_channel_attach(copy, &bad);
	if (result == 0) {
		kmap_channel_close(bad);
	} else {
		for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
			CHECK_IS(close(copy[i]), 0);
	}
	CHECK_IS(munmap(memory, size), 0);
	kmap_channel_close(good);
	return result;
}

static void refuses_sizes(void)
{
	kmap_channel *ch;

	CHECK_IS(kmap_channel_create(0, &ch), -EINVAL);
	CHECK_IS(kmap_channel_create((16u << 20) + 1, &ch), -EINVAL);
	CHECK_IS(kmap_channel_create(1, &ch), 0);
	kmap_channel_close(ch);
	CHECK_IS(kmap_channel_create(16u << 20, &ch), 0);
	kmap_channel_close(ch);
	kmap_channel_close(NULL);
}

static void refuses_descriptors(void)
{
	int pipe_fds[2], none[KMAP_CHANNEL_FDS] = {-1, -1, -1, -1, -1};
	int pipes[KMAP_CHANNEL_FDS];
	kmap_channel *ch;

	CHECK_IS(kmap_channel_attach(none, &ch), -EBADF);
	CHECK_IS(pipe(pipe_fds), 0);
	for (int i = 0; i < KMAP_CHANNEL_FDS; i++)
		pipes[i] = pipe_fds[0];
	CHECK_IS(kmap_channel_attach(pipes, &ch), -EPERM);
	CHECK_IS(close(pipe_fds[0]), 0);
	CHECK_IS(close(pipe_fds[1]), 0);
}

int main(void)
{
	unit_watchdog();
	refuses_sizes();
	refuses_descriptors();

	CHECK_IS(attach_copy(NULL, 0, SEALS, 0), 0);
	CHECK_IS(attach_copy(NULL, 0, 0, 0), -EPERM);
	CHECK_IS(attach_copy(NULL, 0, F_SEAL_SHRINK, 0), -EPERM);
	CHECK_IS(attach_copy(NULL, 0, F_SEAL_GROW | F_SEAL_SHRINK, 0), -EPERM);
	CHECK_IS(attach_copy(NULL, 0, SEALS | F_SEAL_WRITE, 0), -EPERM);

	CHECK_IS(attach_copy(NULL, 0, SEALS, 4096), -EPROTO);
	CHECK_IS(attach_copy(NULL, 0, SEALS, -4096), -EPROTO);
	CHECK_IS(attach_copy("magic", 0, SEALS, 0), -EPROTO);
	CHECK_IS(attach_copy("version", 99, SEALS, 0), -EPROTONOSUPPORT);
	CHECK_IS(attach_copy("header_size", 8192, SEALS, 0), -EPROTO);
	CHECK_IS(attach_copy("ring_size", 0, SEALS, 0), -EPROTO);
	CHECK_IS(attach_copy("ring_size", 65535, SEALS, 0), -EPROTO);
	CHECK_IS(attach_copy("ring_size", 131072, SEALS, 0), -EPROTO);
	CHECK_IS(attach_copy("ring_size", 0x80000000u, SEALS, 0), -EPROTO);
	return 0;
}
