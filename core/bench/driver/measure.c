/* SPDX-License-Identifier: Apache-2.0 */
/* Windows, histograms and the bytes that must arrive. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "bench.h"

static struct usage usage_now(void)
{
	struct rusage used;
	struct timespec cpu;

	CHECK(getrusage(RUSAGE_SELF, &used) == 0);
	CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu) == 0);
	return (struct usage){
		.cpu = (double)cpu.tv_sec + (double)cpu.tv_nsec / 1e9,
		.user = (double)used.ru_utime.tv_sec +
			(double)used.ru_utime.tv_usec / 1e6,
		.system = (double)used.ru_stime.tv_sec +
			  (double)used.ru_stime.tv_usec / 1e6,
		.voluntary = (uint64_t)used.ru_nvcsw,
		.involuntary = (uint64_t)used.ru_nivcsw,
	};
}

static void window_open(struct window *window)
{
	window->open = true;
	window->before = usage_now();
	window->began = seconds_now();
}

void window_look(struct window *window)
{
	if (!window->open && km_load_relaxed(&shared->phase) == MEASURED)
		window_open(window);
}

void window_start(struct window *window)
{
	km_store_release(&shared->phase, MEASURED);
	window_open(window);
}

void window_close(struct window *window, enum side side)
{
	struct usage now = usage_now(), *used = &shared->usage[side];

	CHECK(window->open);
	used->cpu = now.cpu - window->before.cpu;
	used->user = now.user - window->before.user;
	used->system = now.system - window->before.system;
	used->voluntary = now.voluntary - window->before.voluntary;
	used->involuntary = now.involuntary - window->before.involuntary;
}

bool enough(const struct window *window, uint64_t done, uint64_t now_ns)
{
	if (!window->open)
		return false;
	if (options.count)
		return done >= options.count;
	return (double)now_ns / 1e9 - window->began >= options.seconds;
}

void histogram_add(struct histogram *histogram, uint64_t ns)
{
	unsigned power, index;

	if (ns > histogram->max)
		histogram->max = ns;
	histogram->total++;
	if (ns < 64) {
		histogram->bucket[ns]++;
		return;
	}
	/* 64 to 127 has steps of 1, 128 to 255 steps of 2, and so on. */
	power = 63u - (unsigned)__builtin_clzll(ns) - 6u;
	index = 64u * (power + 1) + (unsigned)(ns >> power) - 64u;
	histogram->bucket[index < BUCKETS ? index : BUCKETS - 1]++;
}

uint64_t histogram_percentile(const struct histogram *histogram, double share)
{
	uint64_t wanted = (uint64_t)((double)histogram->total * share), seen = 0;

	for (unsigned i = 0; i < BUCKETS; i++) {
		seen += histogram->bucket[i];
		if (histogram->bucket[i] && seen > wanted)
			return i < 64 ? i : (uint64_t)(64 + i % 64) << (i / 64 - 1);
	}
	return histogram->max;
}

/* A multiplication spreads every bit of the place over the byte, so that a byte that is
 * lost, doubled or moved shows. */
static unsigned char pattern(uint64_t offset)
{
	return (unsigned char)(((offset + 1) * 0x9e3779b97f4a7c15u) >> 56);
}

void pattern_fill(unsigned char *buf, size_t len, uint64_t offset)
{
	for (size_t i = 0; i < len; i++)
		buf[i] = pattern(offset + i);
}

void pattern_check(const unsigned char *buf, size_t len, uint64_t offset)
{
	for (size_t i = 0; i < len; i++) {
		if (buf[i] == pattern(offset + i))
			continue;
		fprintf(stderr, "kmap-bench: byte %llu is %u and not %u\n",
			(unsigned long long)(offset + i), buf[i], pattern(offset + i));
		exit(1);
	}
}
