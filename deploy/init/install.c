/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kmap-install GLIBC MUSL DIRECTORY: puts copies of the two preload libraries into
 * DIRECTORY, and links to them so that one value of LD_PRELOAD serves either libc:
 * DIRECTORY/$LIB/NAME, with the NAME of GLIBC.
 *
 * glibc's loader reads $LIB as the directory of libraries of its system (ld.so(8)): lib,
 * lib64 or, on Debian, lib/ARCHITECTURE.  musl's takes it as it stands.  So a program
 * loads the library for its own libc, and no other.
 *
 * All that the init image has beside the libraries.  A copy appears under its name at
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

#if defined(__x86_64__)
#define MULTIARCH "x86_64-linux-gnu"
#elif defined(__aarch64__)
#define MULTIARCH "aarch64-linux-gnu"
#else
#error "add what $LIB is on Debian for this architecture"
#endif

static char target[4096], temporary[sizeof(target) + 8];

/* Where links are, in an order in which their directories can be made. */
static const struct {
	const char *directory, *up;
	int musl;
} links[] = {
	{"lib", "..", 0},
	{"lib/" MULTIARCH, "../..", 0},
	{"lib64", "..", 0},
	{"$LIB", "..", 1},
};

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

static const char *base(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

static void name_target(const char *directory, const char *name)
{
	if (snprintf(target, sizeof(target), "%s/%s", directory, name) >=
	    (int)sizeof(target)) {
		errno = ENAMETOOLONG;
		fail("%s", directory);
	}
}

static void copy_bytes(int from, const char *source, int to)
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

static void copy(const char *source, const char *directory)
{
	int from, to;

	name_target(directory, base(source));
	from = open(source, O_RDONLY | O_CLOEXEC);
	if (from < 0)
		fail("cannot open %s", source);
	snprintf(temporary, sizeof(temporary), "%s.XXXXXX", target);
	to = mkostemp(temporary, O_CLOEXEC);
	if (to < 0) {
		*temporary = '\0';
		fail("cannot make a file in %s", directory);
	}
	copy_bytes(from, source, to);
	if (fchmod(to, 0444) < 0 || close(to) < 0)
		fail("cannot write %s", target);
	if (rename(temporary, target) < 0)
		fail("cannot put %s in its place", target);
	*temporary = '\0';
	close(from);
}

/* What is there already is from an earlier run, and the same. */
static void make_links(const char *glibc, const char *musl, const char *directory)
{
	char path[sizeof(target)], to[512];

	for (size_t i = 0; i < sizeof(links) / sizeof(*links); i++) {
		name_target(directory, links[i].directory);
		if (mkdir(target, 0755) < 0 && errno != EEXIST)
			fail("cannot make %s", target);
		memcpy(path, target, sizeof(path));
		name_target(path, base(glibc));
		snprintf(to, sizeof(to), "%s/%s", links[i].up,
			 base(links[i].musl ? musl : glibc));
		if (symlink(to, target) < 0 && errno != EEXIST)
			fail("cannot make %s", target);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fputs("usage: kmap-install GLIBC MUSL DIRECTORY\n", stderr);
		return 2;
	}
	umask(022);
	copy(argv[1], argv[3]);
	copy(argv[2], argv[3]);
	make_links(argv[1], argv[2], argv[3]);
	return 0;
}
