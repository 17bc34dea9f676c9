/* SPDX-License-Identifier: Apache-2.0 */
/*
 * No wake-up of a channel is lost.  One thread goes to sleep just as the other publishes
 * bytes or frees space, at every distance between the two, and says nothing more before
 * the sleeper has answered.  test_channel_lost [bytes|space] runs one of them.
 */
#include <pthread.h>
#include <sched.h>

#include "unit.h"

#define RING 4096

static struct unit_pair pair;
static unsigned rounds;
static uint8_t block[RING], drained[RING];

static void *sleep_for_bytes(void *arg)
{
	uint32_t random = 2;
	uint8_t byte;

	for (unsigned i = 0; i < rounds; i++) {
		unit_delay(&random);
		CHECK_IS(kmap_channel_read(pair.attacher, &byte, 1, -1), 1);
		CHECK_IS(kmap_channel_write(pair.attacher, &byte, 1, 0), 1);
	}
	return arg;
}

static void publish(void)
{
	uint32_t random = 1;
	uint8_t byte = 0;
	ssize_t n;

	for (unsigned i = 0; i < rounds; i++) {
		unit_progress(i);
		unit_delay(&random);
		CHECK_IS(kmap_channel_write(pair.creator, &byte, 1, 0), 1);
		do
			n = kmap_channel_read(pair.creator, &byte, 1, 0);
		while (n == -EAGAIN);
		CHECK_IS(n, 1);
	}
}

static void *sleep_for_space(void *arg)
{
	uint32_t random = 2;

	for (unsigned i = 0; i <= rounds; i++) {
		unit_delay(&random);
		for (size_t done = 0; done < RING;) {
			ssize_t n = kmap_channel_write(pair.attacher, block + done,
						       RING - done, -1);

			CHECK(n > 0);
			done += (size_t)n;
		}
	}
	return arg;
}

static void make_space(void)
{
	uint32_t random = 1;

	for (unsigned i = 0; i < rounds; i++) {
		while (kmap_channel_readable(pair.creator) < RING)
			;
		unit_progress(i);
		unit_delay(&random);
		CHECK_IS(kmap_channel_read(pair.creator, drained, RING, 0), RING);
	}
}

static void run(void *(*sleeper)(void *), void (*teller)(void))
{
	pthread_t thread;

	pair = unit_pair(RING);
	CHECK_IS(pthread_create(&thread, NULL, sleeper, NULL), 0);
	teller();
	CHECK_IS(pthread_join(thread, NULL), 0);
	unit_pair_close(&pair);
}

int main(int argc, char **argv)
{
	unit_watchdog();
	rounds = unit_rounds(20000);
	if (argc < 2 || strcmp(argv[1], "bytes") == 0)
		run(sleep_for_bytes, publish);
	if (argc < 2 || strcmp(argv[1], "space") == 0)
		run(sleep_for_space, make_space);
	return 0;
}
