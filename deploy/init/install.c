/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kmap-install SOURCE DIRECTORY: puts a copy of SOURCE into DIRECTORY.
 *
 * All that the init image has beside the library.  The copy appears under its name at
 * once and whole, so that a container that is restarted alone never loads half of it,
 * and anybody may read it.  Exits 0, 1 with a line that names what failed, 2 for usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char target[4096], temporary[sizeof(target) + 8];

static void fail(const char *format, ...)
	__attribute__((format(printf, 1, 2), noreturn));
static void fail(const char *format, ...)
{
	int err = errno;
	va_list args;

	fputs("kmap-install: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, ": %s\n", strerror(err));
	if (*temporary)
		unlink(temporary);
	exit(1);
}

static void copy(int from, const char *source, int to)
{
	static char buffer[1 << 16];
	ssize_t n, done;

	while ((n = read(from, buffer, sizeof(buffer))) != 0) {
		if (n < 0)
			fail("cannot read %s", source);
		for (ssize_t at = 0; at < n; at += done) {
			done = write(to, buffer + at, (size_t)(n - at));
			if (done < 0)
				fail("cannot write %s", target);
		}
	}
}

int main(int argc, char **argv)
{
	const char *name;
	int from, to;

	if (argc != 3) {
		fputs("usage: kmap-install SOURCE DIRECTORY\n", stderr);
		return 2;
	}
	name = strrchr(argv[1], '/');
	name = name ? name + 1 : argv[1];
	if (snprintf(target, sizeof(target), "%s/%s", argv[2], name) >=
	    (int)sizeof(target)) {
		errno = ENAMETOOLONG;
		fail("%s", argv[2]);
	}
	from = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (from < 0)
		fail("cannot open %s", argv[1]);
	snprintf(temporary, sizeof(temporary), "%s.XXXXXX", target);
	to = mkostemp(temporary, O_CLOEXEC);
	if (to < 0) {
		*temporary = '\0';
		fail("cannot make a file in %s", argv[2]);
	}
	copy(from, argv[1], to);
	if (fchmod(to, 0444) < 0 || close(to) < 0)
		fail("cannot write %s", target);
	if (rename(temporary, target) < 0)
		fail("cannot put %s in its place", target);
	return 0;
}
