/* SPDX-License-Identifier: Apache-2.0 */
#include "base/proc.h"
#include "base/fault_point.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/refused.h"

struct km_proc km_proc = {.log_fd = 2};
__thread struct km_thread km_thread
	__attribute__((tls_model("initial-exec"))) = {.epfd = -1};

void km_resolve(void)
{
	/* Casting through void ** is how POSIX says to take a function from dlsym. */
#define X(name, ...)                                                                   \
	if (!km_proc.real.name)                                                        \
		*(void **)&km_proc.real.name = dlsym(RTLD_NEXT, #name);
#include "base/symbols.def"
#undef X
	km_resolve_missing();
}

#define WAITERS 0x80000000u
#define LOCK_SLICE_NS 10000000

static bool owner_is_dead(uint32_t word)
{
	/* kill() finds threads too, in any thread group of this PID namespace. */
	return km_sys_kill((int)(word & ~WAITERS), 0) == -ESRCH;
}

enum km_lock_result km_lock_slow(km_a32 *lock)
{
	struct timespec slice = {0, LOCK_SLICE_NS};
	uint32_t self = km_tid();
	int err;

	for (unsigned spins = 0;; spins++) {
		uint32_t seen = 0;

		if (km_cas_seq(lock, &seen, spins < 100 ? self : self | WAITERS))
			return KM_LOCK_OK;
		if ((seen & ~WAITERS) == self)
			return KM_LOCK_NESTED;
		if (spins < 100) {
			km_relax();
			continue;
		}
		if (!(seen & WAITERS) && !km_cas_seq(lock, &seen, seen | WAITERS))
			continue;
		seen |= WAITERS;
		err = km_sys_futex_wait(lock, seen, &slice);
		if (km_unlikely(km_refused(err)))
			km_doze();
		if ((err == -ETIMEDOUT || km_refused(err)) && owner_is_dead(seen) &&
		    km_cas_seq(lock, &seen, self | WAITERS))
			return KM_LOCK_STOLEN;
	}
}

void km_unlock_slow(km_a32 *lock)
{
	km_swap_seq(lock, 0);
	km_sys_futex_wake(lock, 1);
}

void *km_pages(size_t bytes, bool shared)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_ANONYMOUS | MAP_NORESERVE |
			       (shared ? MAP_SHARED : MAP_PRIVATE),
		       -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

const char *km_reason_name(enum km_reason reason)
{
	static const char *const names[] = {
#define X(id, name, meaning) name,
#include "base/reasons.def"
#undef X
	};

	return names[reason];
}

/* One write per line, no allocation: logging works in any context. */
static void say(int fd, const char *prefix, const char *format, va_list args)
{
	char line[512];
	int n = snprintf(line, sizeof(line), "%s", prefix);

	n += vsnprintf(line + n, sizeof(line) - (size_t)n - 1, format, args);
	n = KM_MIN(n, (int)sizeof(line) - 2);
	line[n++] = '\n';
	km_sys_write(fd, line, (size_t)n);
}

void km_log_line(enum km_log_level level, const char *format, ...)
{
	static const char *const names[] = {"off", "error", "info", "debug"};
	char prefix[64];
	va_list args;

	snprintf(prefix, sizeof(prefix), "kmap[%d] %s: ", km_sys_getpid(),
		 names[level]);
	va_start(args, format);
	say(km_proc.log_fd, prefix, format, args);
	va_end(args);
}

void km_complain(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(2, "kmap: ", format, args);
	va_end(args);
}

enum option_type { BOOL, UINT, SIZE, STR };

/* Parses "64K" and the like; false when it is no number or does not fit. */
static bool parse_number(const char *text, uint64_t *out)
{
	char *end;
	unsigned long long value;

	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno)
		return false;
	for (const char *suffix = "KMG"; *suffix && *end; suffix++) {
		if (value > UINT64_MAX / 1024)
			return false;
		value *= 1024;
		if (*end == *suffix) {
			end++;
			break;
		}
	}
	*out = value;
	return *end == '\0';
}

static uint64_t number_option(const char *env, enum option_type type, uint64_t min,
			      uint64_t max, uint64_t fallback)
{
	const char *text = getenv(env);
	uint64_t value, size = 1;

	if (!text || !*text)
		return fallback;
	if (!parse_number(text, &value) || value < min || value > max) {
		km_complain("%s=%s is not a number from %llu to %llu; using %llu", env,
			    text, (unsigned long long)min, (unsigned long long)max,
			    (unsigned long long)fallback);
		return fallback;
	}
	if (type != SIZE)
		return value;
	while (size < value)
		size *= 2;
	return size;
}

static const char *text_option(const char *env, const char *fallback)
{
	const char *text = getenv(env);

	return text && *text ? text : fallback;
}

static void transport_init(void)
{
	static const char *const names[] = {
#define X(id, name, meaning) #name,
#include "base/transports.def"
#undef X
	};
	static const char known[] =
#define X(id, name, meaning) " " #name
#include "base/transports.def"
#undef X
		;
	const char *text = km_proc.options.transport;

	for (int i = 0; i < KM_TRANSPORTS; i++) {
		if (strcmp(names[i], text) == 0) {
			km_proc.transport = (enum km_transport_id)i;
			return;
		}
	}
	km_complain("KMAP_TRANSPORT=%s is none of the transports:%s; using shm", text,
		    known);
}

#define FIFO_DIR_MOST 200

static void fifo_dir_init(void)
{
	const char *text = km_proc.options.fifo_dir;

	if (!*text || (*text == '/' && strlen(text) <= FIFO_DIR_MOST))
		return;
	km_complain(
		"KMAP_FIFO_DIR=%s is no absolute path of at most %d bytes; using the "
		"default",
		text, FIFO_DIR_MOST);
	km_proc.options.fifo_dir = "";
}

static void log_init(void)
{
	static const char *const names[] = {"error", "info", "debug"};
	const char *text = km_proc.options.log, *colon = strchr(text, ':');
	size_t len = colon ? (size_t)(colon - text) : strlen(text);
	int fd;

	if (!*text)
		return;
	for (int i = 0; i < (int)KM_COUNT(names); i++)
		if (strlen(names[i]) == len && memcmp(names[i], text, len) == 0)
			km_proc.log_level = (enum km_log_level)(i + 1);
	if (km_proc.log_level == KM_LOG_OFF) {
		km_complain("KMAP_LOG=%s does not start with error, info or debug; "
			    "not logging",
			    text);
		return;
	}
	if (!colon)
		return;
	fd = open(colon + 1, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (fd < 0) {
		km_complain("KMAP_LOG: cannot open %s; logging to standard error",
			    colon + 1);
		return;
	}
	km_proc.log_fd = fd;
}

void km_options_init(void)
{
	struct km_options *o = &km_proc.options;
	int saved = errno;

#define KM_PARSE_BOOL(...) number_option(__VA_ARGS__)
#define KM_PARSE_UINT(...) number_option(__VA_ARGS__)
#define KM_PARSE_SIZE(...) number_option(__VA_ARGS__)
#define KM_PARSE_STR(env, type, min, max, fallback) text_option(env, fallback)
#define X(field, env, type, min, max, fallback, help)                                  \
	o->field = KM_PARSE_##type(env, type, min, max, fallback);
#include "base/options.def"
#undef X
	transport_init();
	fifo_dir_init();
	km_proc.disabled = o->disable;
	log_init();
	if (!km_proc.disabled)
		km_proc.policy = km_policy_load(o->policy);
	KM_FAULTS_INIT();
	errno = saved;
}
