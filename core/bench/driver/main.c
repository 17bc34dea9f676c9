/* SPDX-License-Identifier: Apache-2.0 */
/* The command line, the two ends as processes, and the line of results. */
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

struct options options = {
	.transport = "tcp",
	.size = 64,
	.warm = 1000,
	.connections = 1,
	.cpu = {-1, -1},
};
struct shared *shared;

/* The ends meet by meeting; done tells the first process of each end that it is
 * through, and the end of release lets the ends go. */
static int meeting[2][2], done[2], release[2];

static const struct {
	const char *name;
	void (*run)(enum side side);
} workloads[] = {
	{"pingpong", pingpong}, {"stream", stream}, {"fanin", fanin}, {"churn", churn},
	{"idle", idle},		{"line", line},	    {"copy", copy},
};
static const char *const modes[] = {"blocking", "epoll", "edge", "busy"};
static const char *const transports[] = {"tcp", "unix", "pipe", "fifo", "ring"};

static const char usage[] =
	"usage: kmap-bench WORKLOAD [OPTION...]\n"
	"\n"
	"Measures one transport between two processes; prints one line of JSON.\n"
	"Workloads: pingpong, stream, fanin, churn, idle; line and copy, which "
	"measure\n"
	"the machine; hog [CPU] and spin [CPU], which use one.\n"
	"\n"
	"  --transport NAME   tcp, unix, pipe, fifo, or ring (libkmap's channel)\n"
	"  --library PATH     libkmap.so, for ring\n"
	"  --mode NAME        blocking, epoll, edge (edge-triggered epoll) or busy\n"
	"  --size BYTES       of one message\n"
	"  --warm N           messages before anything is measured\n"
	"  --count N          messages that are measured, or\n"
	"  --seconds S        for how long\n"
	"  --connections N    of fanin and idle\n"
	"  --server-cpu N, --client-cpu N\n"
	"  --verify           look at every byte and not at numbers of messages\n"
	"  --hold             stay after the results until standard input ends\n";

void fail(const char *what)
{
	fprintf(stderr, "kmap-bench: %s %s: %s: %s\n", options.workload,
		options.transport, what, strerror(errno));
	exit(1);
}

double seconds_now(void)
{
	return (double)ns_now() / 1e9;
}

uint64_t ns_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void meet(enum side side)
{
	char byte = 0;

	CHECK(write(meeting[side][1], &byte, 1) == 1);
	CHECK(read(meeting[1 - side][0], &byte, 1) == 1);
}

static unsigned one_of(const char *text, const char *const *names, size_t count,
		       const char *what)
{
	for (size_t i = 0; i < count; i++)
		if (strcmp(text, names[i]) == 0)
			return (unsigned)i;
	fprintf(stderr, "kmap-bench: there is no %s %s\n%s", what, text, usage);
	exit(2);
}

static double number(const char *text, double least, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (*end || end == text || value < least || value > most) {
		fprintf(stderr, "kmap-bench: %s is not from %.0f to %.0f\n", text,
			least, most);
		exit(2);
	}
	return value;
}

enum {
	TRANSPORT = 1,
	LIBRARY,
	MODE,
	SIZE,
	WARM,
	AMOUNT,
	SECONDS,
	CONNECTIONS,
	SERVER_CPU,
	CLIENT_CPU,
	VERIFY,
	HOLD
};

static const struct option long_options[] = {
	{"transport", required_argument, NULL, TRANSPORT},
	{"library", required_argument, NULL, LIBRARY},
	{"mode", required_argument, NULL, MODE},
	{"size", required_argument, NULL, SIZE},
	{"warm", required_argument, NULL, WARM},
	{"count", required_argument, NULL, AMOUNT},
	{"seconds", required_argument, NULL, SECONDS},
	{"connections", required_argument, NULL, CONNECTIONS},
	{"server-cpu", required_argument, NULL, SERVER_CPU},
	{"client-cpu", required_argument, NULL, CLIENT_CPU},
	{"verify", no_argument, NULL, VERIFY},
	{"hold", no_argument, NULL, HOLD},
	{NULL, 0, NULL, 0},
};

static void set_option(int which, const char *text)
{
	switch (which) {
	case TRANSPORT:
		options.transport = transports[one_of(text, transports,
						      COUNT(transports), "transport")];
		break;
	case LIBRARY:
		options.library = text;
		break;
	case MODE:
		options.mode = (enum mode)one_of(text, modes, COUNT(modes), "mode");
		break;
	case SIZE:
		/* A message begins with its number. */
		options.size = (size_t)number(text, 8, 64 << 20);
		break;
	case WARM:
		options.warm = (uint64_t)number(text, 0, 1e12);
		break;
	case AMOUNT:
		options.count = (uint64_t)number(text, 1, 1e12);
		break;
	case SECONDS:
		options.seconds = number(text, 0, 3600);
		break;
	case CONNECTIONS:
		options.connections = (unsigned)number(text, 1, MAX_CONNECTIONS);
		break;
	case SERVER_CPU:
	case CLIENT_CPU:
		options.cpu[which - SERVER_CPU] = (int)number(text, 0, 1023);
		break;
	case VERIFY:
		options.verify = true;
		break;
	case HOLD:
		options.hold = true;
		break;
	default:
		fputs(usage, stderr);
		exit(2);
	}
}

static void (*parse(int argc, char **argv))(enum side side)
{
	const char *names[COUNT(workloads)];
	unsigned found;
	int which;

	if (argc < 2) {
		fputs(usage, stderr);
		exit(2);
	}
	options.workload = argv[1];
	if (strcmp(argv[1], "hog") == 0 || strcmp(argv[1], "spin") == 0)
		hog(argv[1][0] == 's', argc > 2 ? (int)number(argv[2], 0, 1023) : -1);
	for (size_t i = 0; i < COUNT(workloads); i++)
		names[i] = workloads[i].name;
	found = one_of(argv[1], names, COUNT(names), "workload");
	while ((which = getopt_long(argc - 1, argv + 1, "", long_options, NULL)) != -1)
		set_option(which, optarg);
	if (options.count == 0 && options.seconds == 0) {
		fprintf(stderr, "kmap-bench: --count or --seconds is missing\n");
		exit(2);
	}
	if (workloads[found].run == churn && options.count == 0) {
		fprintf(stderr, "kmap-bench: churn needs --count\n");
		exit(2);
	}
	return workloads[found].run;
}

static _Noreturn void be_end(enum side side, void (*run)(enum side side))
{
	cpu_set_t cpus;
	char byte = 0;

	close(meeting[1 - side][1]);
	close(release[1]);
	close(done[0]);
	if (options.cpu[side] >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(options.cpu[side], &cpus);
		CHECK(sched_setaffinity(0, sizeof(cpus), &cpus) == 0);
	}
	if (side == SERVER)
		transport_listen();
	meet(side);
	run(side);
	CHECK(write(done[1], &byte, 1) == 1);
	if (options.hold)
		CHECK(read(release[0], &byte, 1) == 0);
	exit(0);
}

static pid_t start_end(enum side side, void (*run)(enum side side))
{
	pid_t parent = getpid(), pid = fork();

	CHECK(pid >= 0);
	if (pid)
		return pid;
	CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
	if (getppid() != parent)
		_exit(1);
	be_end(side, run);
}

static void print(void)
{
	static const char *const sides[] = {"server", "client"};
	const struct histogram *rtt = &shared->rtt;

	printf("{\"messages\": %llu, \"bytes\": %llu, \"elapsed_s\": %.9f, ",
	       (unsigned long long)shared->messages, (unsigned long long)shared->bytes,
	       shared->elapsed);
	printf("\"rtt_ns\": {\"count\": %llu, \"p50\": %llu, \"p90\": %llu, "
	       "\"p99\": %llu, \"max\": %llu}",
	       (unsigned long long)rtt->total,
	       (unsigned long long)histogram_percentile(rtt, 0.50),
	       (unsigned long long)histogram_percentile(rtt, 0.90),
	       (unsigned long long)histogram_percentile(rtt, 0.99),
	       (unsigned long long)rtt->max);
	for (int i = 0; i < 2; i++) {
		const struct usage *used = &shared->usage[i];

		printf(", \"%s\": {\"cpu_s\": %.9f, \"user_s\": %.6f, "
		       "\"system_s\": %.6f, \"voluntary\": %llu, \"involuntary\": "
		       "%llu}",
		       sides[i], used->cpu, used->user, used->system,
		       (unsigned long long)used->voluntary,
		       (unsigned long long)used->involuntary);
	}
	printf("}\n");
	fflush(stdout);
}

static bool both_done(void)
{
	char byte;

	/* The end of the pipe means that an end has died. */
	for (int i = 0; i < 2; i++)
		if (read(done[0], &byte, 1) != 1)
			return false;
	return true;
}

static int reap(const pid_t *pids)
{
	int worst = 0;

	for (int i = 0; i < 2; i++) {
		int status;

		CHECK(waitpid(pids[i], &status, 0) == pids[i]);
		if (status)
			worst = 1;
	}
	return worst;
}

int main(int argc, char **argv)
{
	void (*run)(enum side side) = parse(argc, argv);
	pid_t pids[2];
	bool through;
	char byte;

	signal(SIGPIPE, SIG_IGN);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(shared != MAP_FAILED);
	CHECK(pipe(meeting[SERVER]) == 0 && pipe(meeting[CLIENT]) == 0);
	CHECK(pipe(done) == 0 && pipe(release) == 0);
	transport_prepare();
	for (int i = 0; i < 2; i++)
		pids[i] = start_end((enum side)i, run);
	/* Only the ends may hold these, or nobody would see that one has died. */
	close(done[1]);
	close(meeting[SERVER][1]);
	close(meeting[CLIENT][1]);
	transport_leave();
	through = both_done();
	if (through)
		print();
	else
		/* Whoever waits for the end that died would wait for ever. */
		for (int i = 0; i < 2; i++)
			kill(pids[i], SIGTERM);
	if (through && options.hold)
		while (read(STDIN_FILENO, &byte, 1) > 0)
			;
	close(release[1]);
	return reap(pids);
}
