/* SPDX-License-Identifier: Apache-2.0 */
/* The policy of this process, as its environment names it. */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "base/proc.h"

/* The text of a file, in pages of its own.  Its length, or a negative errno value. */
static ssize_t read_file(const char *path, char *text, size_t room)
{
	int fd = km_sys_openat(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0);
	size_t used = 0;
	ssize_t n = 1;

	if (fd < 0)
		return fd;
	while (n > 0 && used < room) {
		n = km_sys_read(fd, text + used, room - used);
		used += n > 0 ? (size_t)n : 0;
	}
	km_sys_close(fd);
	return n < 0 ? n : (ssize_t)used;
}

/* Says so; a policy that allows nothing. */
static const struct km_policy *refuse(const char *value, const char *why)
{
	km_complain(
		"KMAP_POLICY=%.150s: %s; until that is mended every connection stays "
		"on the kernel",
		value, why);
	return &km_policy_nothing;
}

static const char *read_error(ssize_t err)
{
	switch (err) {
	case -ENOENT:
	case -ENOTDIR:
		return "there is no such file";
	case -EACCES:
	case -EPERM:
		return "this user may not read it (chmod a+r)";
	case -EISDIR:
		return "it is a directory";
	default:
		return "it cannot be read";
	}
}

/* Its own names, as it was started. */
static void own_names(char comm[16], char *exe, size_t room)
{
	ssize_t n = KM_SYS(readlinkat, -100 /* AT_FDCWD */, "/proc/self/exe", exe,
			   room - 1, 0, 0);
	const char *slash;

	exe[n > 0 ? n : 0] = '\0';
	slash = strrchr(exe, '/');
	if (slash)
		memmove(exe, slash + 1, strlen(slash));
	memset(comm, 0, 16);
	(void)KM_SYS(prctl, PR_GET_NAME, comm, 0, 0, 0, 0);
}

const struct km_policy *km_policy_load(const char *value)
{
	static const char inline_prefix[] = "rules:";
	char comm[16], exe[4096], error[KM_POLICY_ERROR], why[KM_POLICY_ERROR + 32];
	struct km_policy_program program = {comm, exe};
	const struct km_policy *policy;
	const char *text = value;
	char *file = NULL;
	unsigned line;
	ssize_t n;

	if (!*value)
		return NULL;
	if (strncmp(value, inline_prefix, sizeof(inline_prefix) - 1) == 0) {
		text = value + sizeof(inline_prefix) - 1;
		n = (ssize_t)strlen(text);
		value = "rules:...";
	} else {
		/* A byte more than is allowed, to see that there is more. */
		file = km_pages(KM_POLICY_TEXT + 1, false);
		n = file ? read_file(value, file, KM_POLICY_TEXT + 1) : -ENOMEM;
		text = file;
	}
	if (n < 0) {
		policy = refuse(value, read_error(n));
	} else {
		own_names(comm, exe, sizeof(exe));
		policy = km_policy_parse(text, (size_t)n, &program, &line, error);
		if (!policy) {
			snprintf(why, sizeof(why), line ? "line %u: %s" : "%.0u%s",
				 line, error);
			policy = refuse(value, why);
		}
	}
	if (file)
		munmap(file, KM_POLICY_TEXT + 1);
	return policy;
}
