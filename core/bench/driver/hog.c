/* SPDX-License-Identifier: Apache-2.0 */
/* A neighbour that computes: for a CPU that is shared, or one that must not halt. */
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "bench.h"

void hog(bool idle_class, int cpu)
{
	struct sched_param none = {0};
	cpu_set_t cpus;

	if (cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(cpu, &cpus);
		CHECK(sched_setaffinity(0, sizeof(cpus), &cpus) == 0);
	}

	CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
	if (idle_class)
		CHECK(sched_setscheduler(0, SCHED_IDLE, &none) == 0);
	for (volatile uint64_t turns = 0;; turns++)
		;
}
