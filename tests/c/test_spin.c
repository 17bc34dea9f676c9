/* SPDX-License-Identifier: Apache-2.0 */
/* When a wait looks again before it sleeps, and how it learns that it should not. */
#include <sched.h>

#include "base/proc.h"
#include "unit.h"

#define SPIN_US 20
#define FOR_EVER INT64_MAX

static unsigned looks;

static bool never(const void *what)
{
	(void)what;
	looks++;
	return false;
}

static bool at_once(const void *what)
{
	(void)what;
	looks++;
	return true;
}

/* Some CPU that this thread is not on. */
static uint32_t another_cpu(void)
{
	return km_this_cpu() + 1;
}

/* How many of n waits spin when nothing ever comes. */
static unsigned tries_of(struct km_spin *record, unsigned n)
{
	unsigned tries = 0;

	while (n--) {
		looks = 0;
		CHECK(!km_spin(record, another_cpu(), FOR_EVER, never, NULL));
		tries += looks > 0;
	}
	return tries;
}

/* Before km_spin_init, and where libc has no restartable sequences, a thread does not
 * know where it runs, and so not whether its peer runs elsewhere. */
static void not_where_its_own_cpu_is_unknown(void)
{
	struct km_spin record = {0};

	CHECK_IS(km_this_cpu(), 0);
	CHECK(!km_spin(&record, another_cpu(), FOR_EVER, at_once, NULL));
	CHECK_IS(looks, 0);
}

static void not_where_it_cannot_help(void)
{
	struct km_spin record = {0};

	looks = 0;
	CHECK(!km_spin(&record, 0, FOR_EVER, at_once, NULL));
	CHECK(!km_spin(&record, km_this_cpu(), FOR_EVER, at_once, NULL));
	km_proc.options.spin_us = 0;
	CHECK(!km_spin(&record, another_cpu(), FOR_EVER, at_once, NULL));
	km_proc.options.spin_us = SPIN_US;
	CHECK_IS(looks, 0);
}

static void a_hit_allows_all_and_misses_take_it_away(void)
{
	struct km_spin record = {0};

	CHECK(km_spin(&record, another_cpu(), FOR_EVER, at_once, NULL));
	CHECK_IS(looks, 1);
	/* 20, 10, 5, 2.5 and 1.25 microseconds, and then no more. */
	CHECK_IS(tries_of(&record, 5), 5);
	CHECK_IS(tries_of(&record, 8), 0);
	CHECK_IS(tries_of(&record, 1), 1);
	CHECK_IS(tries_of(&record, 16), 0);
	CHECK_IS(tries_of(&record, 1), 1);
	CHECK_IS(tries_of(&record, 32), 0);
	/* From here on one in 65. */
	CHECK_IS(tries_of(&record, 1), 1);
	CHECK_IS(tries_of(&record, 650), 10);
}

static void one_hit_is_enough_to_go_on(void)
{
	struct km_spin record = {0};
	unsigned waits = 0;

	tries_of(&record, 1000);
	looks = 0;
	while (!km_spin(&record, another_cpu(), FOR_EVER, at_once, NULL))
		CHECK(++waits <= 64);
	CHECK_IS(tries_of(&record, 5), 5);
}

static void it_ends_with_the_wait(void)
{
	struct km_spin record = {0};

	km_proc.options.spin_us = 1000000;
	looks = 0;
	CHECK(!km_spin(&record, another_cpu(), 0, never, NULL));
	CHECK(looks > 0 && looks < 1000);
	km_proc.options.spin_us = SPIN_US;
}

int main(void)
{
	cpu_set_t one;

	unit_watchdog();
	km_proc.options.spin_us = SPIN_US;
	not_where_its_own_cpu_is_unknown();
	km_spin_init();
	/* Nothing spins here, such as under an emulator without rseq(2). */
	if (!km_this_cpu())
		return 0;
	/* Where it is now, so that the number stays what it was. */
	CPU_ZERO(&one);
	CPU_SET((size_t)sched_getcpu(), &one);
	CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
	not_where_it_cannot_help();
	looks = 0;
	a_hit_allows_all_and_misses_take_it_away();
	one_hit_is_enough_to_go_on();
	it_ends_with_the_wait();
	return 0;
}
