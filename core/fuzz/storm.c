/* SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>

#include "fuzz.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct fuzz_storm_write list[FUZZ_STORM_WRITES];
static unsigned listed;
static int wanted, running, started;

static void blow(void)
{
	for (unsigned i = 0; i < listed; i++) {
		if (list[i].bytes == 8)
			__atomic_store_n((uint64_t *)(void *)list[i].at, list[i].value,
					 __ATOMIC_RELAXED);
		else
			__atomic_store_n((uint32_t *)(void *)list[i].at,
					 (uint32_t)list[i].value, __ATOMIC_RELAXED);
	}
}

static void *storm(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&mutex);
	for (;;) {
		while (!wanted)
			pthread_cond_wait(&changed, &mutex);
		running = 1;
		pthread_cond_broadcast(&changed);
		pthread_mutex_unlock(&mutex);
		while (__atomic_load_n(&wanted, __ATOMIC_RELAXED))
			blow();
		pthread_mutex_lock(&mutex);
		running = 0;
		pthread_cond_broadcast(&changed);
	}
	return NULL;
}

void fuzz_storm_start(const struct fuzz_storm_write *writes, unsigned n)
{
	pthread_t thread;

	fuzz_storm_stop();
	pthread_mutex_lock(&mutex);
	if (!started) {
		FUZZ_CHECK(pthread_create(&thread, NULL, storm, NULL) == 0);
		pthread_detach(thread);
		started = 1;
	}
	memcpy(list, writes, n * sizeof(*writes));
	listed = n;
	__atomic_store_n(&wanted, 1, __ATOMIC_RELAXED);
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mutex);
}

void fuzz_storm_stop(void)
{
	pthread_mutex_lock(&mutex);
	__atomic_store_n(&wanted, 0, __ATOMIC_RELAXED);
	while (running)
		pthread_cond_wait(&changed, &mutex);
	pthread_mutex_unlock(&mutex);
}
