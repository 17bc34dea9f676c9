/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault_point.h"

#ifdef KM_FAULT_POINTS

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/atomic.h"
#include "base/compiler.h"
#include "base/sys.h"

enum action { NONE, KILL, STOP, FAIL, MARK };

static const char *const point_names[] = {
#define X(id, name, where) name,
#include "base/faults.def"
#undef X
};

static const struct {
	const char *name;
	int value;
} errors[] = {
#define E(name)                                                                        \
	{                                                                              \
#name, name                                                            \
	}
	E(EPERM),  E(EINTR),  E(EIO),	 E(EAGAIN), E(ENOMEM), E(EACCES),  E(EBUSY),
	E(EINVAL), E(ENFILE), E(EMFILE), E(ENOSPC), E(EPIPE),  E(ENOBUFS),
#undef E
};

static enum km_point wanted = KM_POINTS;
static enum action wanted_action;
static km_a32 passages; /* still to come, this one included */
/* What the thread's next system call fails with, 0: nothing. */
static __thread int next_error __attribute__((tls_model("initial-exec")));

/* Straight to the kernel: nothing said here may be what fails. */
static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
	char line[256];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	km_syscall6(SYS_write, 2, (long)line, KM_MIN(n, (int)sizeof(line) - 1), 0, 0,
		    0);
}

static enum action parse_action(const char *text, int *error)
{
	static const char *const names[] = {"", "kill", "stop", "", "mark"};

	for (int i = KILL; i <= MARK; i++)
		if (names[i][0] && strcmp(names[i], text) == 0)
			return (enum action)i;
	if (strncmp(text, "fail=", 5) != 0)
		return NONE;
	for (size_t i = 0; i < KM_COUNT(errors); i++)
		if (strcmp(errors[i].name, text + 5) == 0) {
			*error = errors[i].value;
			return FAIL;
		}
	return NONE;
}

static int wanted_error;

/* "POINT:ACTION[:COUNT]"; false when it is none. */
static bool parse(char *text)
{
	char *action = strchr(text, ':'), *count, *end = "";
	unsigned long n = 1;

	if (!action)
		return false;
	*action++ = '\0';
	count = strchr(action, ':');
	if (count) {
		*count++ = '\0';
		n = *count >= '1' && *count <= '9' ? strtoul(count, &end, 10) : 0;
	}
	wanted_action = parse_action(action, &wanted_error);
	for (int i = 0; i < KM_POINTS; i++)
		if (strcmp(point_names[i], text) == 0)
			wanted = (enum km_point)i;
	km_store_seq(&passages, (uint32_t)n);
	return wanted != KM_POINTS && wanted_action != NONE && n && n < UINT32_MAX &&
	       !*end;
}

void km_points_init(void)
{
	const char *text = getenv("KMAP_FAULTS");
	char copy[128];

	if (!text || !*text)
		return;
	snprintf(copy, sizeof(copy), "%s", text);
	if (strlen(text) < sizeof(copy) && parse(copy))
		return;
	wanted = KM_POINTS;
	say("kmap: KMAP_FAULTS=%s is not POINT:ACTION[:COUNT] with a point of "
	    "faults.def "
	    "and kill, stop, mark or fail=ERRNO; ignored\n",
	    text);
}

void km_point_reached(enum km_point point)
{
	static const char *const said[] = {"", "kill", "stop", "fail", "mark"};
	int pid;

	if (km_likely(point != wanted) || km_load_relaxed(&passages) == 0 ||
	    km_sub_seq(&passages, 1) != 1)
		return;
	pid = (int)km_syscall6(SYS_getpid, 0, 0, 0, 0, 0, 0);
	say("kmap: fault point %s: %s [%d]\n", point_names[point], said[wanted_action],
	    pid);
	switch (wanted_action) {
	case KILL:
		km_syscall6(SYS_kill, pid, SIGKILL, 0, 0, 0, 0);
		break;
	case STOP:
		km_syscall6(SYS_kill, pid, SIGSTOP, 0, 0, 0, 0);
		break;
	case FAIL:
		next_error = wanted_error;
		break;
	case NONE:
	case MARK:
		break;
	}
}

long km_point_syscall(long n, long a, long b, long c, long d, long e, long f)
{
	int error = next_error;

	/* These two cannot fail. */
	if (km_likely(error == 0) || n == SYS_getpid || n == SYS_gettid)
		return km_syscall6(n, a, b, c, d, e, f);
	next_error = 0;
	say("kmap: system call %ld failed with %d\n", n, error);
	/* A close that fails has closed all the same. */
	if (n == SYS_close)
		km_syscall6(n, a, b, c, d, e, f);
	return -error;
}

#endif
