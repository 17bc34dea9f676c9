/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transport fifo: named pipes.
 *
 * Their names exist for the time of a handshake.  The acceptor makes them in a directory
 * of its user's alone, named after the segment's random token; the connector opens them
 * by the same names in the directory that it is set to itself, so no peer can name it a
 * file, and takes them away at once.  A name whose maker has died has no reader: the next
 * process that makes one takes it away.
 */
#include <stdlib.h>
#include <string.h>

#include "transport/pipes.h"

/* "%32x-0": the token, and the number of the ring */
#define NAME_LENGTH 34
/* A name without a reader, and younger than this, may be one whose maker is about to open
 * it.  Seconds. */
#define OLD_S 10
/* The directory may be removed, empty, between its making and its use. */
#define TRIES 8

static char directory[256];
static bool swept;

static void start(void)
{
	const char *set = km_proc.options.fifo_dir, *run = getenv("XDG_RUNTIME_DIR");
	int n;

	if (*set)
		n = snprintf(directory, sizeof(directory), "%s", set);
	else if (run && *run == '/')
		n = snprintf(directory, sizeof(directory), "%s/kmap", run);
	else
		n = snprintf(directory, sizeof(directory), "/tmp/kmap-%u", geteuid());
	/* A name that is cut is another name. */
	if ((size_t)n >= sizeof(directory))
		directory[0] = '\0';
}

static void name_of(const uint8_t token[16], int ring, char name[NAME_LENGTH + 1])
{
	static const char digits[] = "0123456789abcdef";

	for (int i = 0; i < 16; i++) {
		*name++ = digits[token[i] >> 4];
		*name++ = digits[token[i] & 15];
	}
	*name++ = '-';
	*name++ = (char)('0' + ring);
	*name = '\0';
}

static bool is_name(const char *name)
{
	return strlen(name) == NAME_LENGTH &&
	       strspn(name, "0123456789abcdef") == NAME_LENGTH - 2 &&
	       (strcmp(name + NAME_LENGTH - 2, "-0") == 0 ||
		strcmp(name + NAME_LENGTH - 2, "-1") == 0);
}

/* The directory, if it is one that nobody else can change.  Its errors, -EACCES for one
 * that is not. */
static int open_directory(void)
{
	int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	int dir = km_sys_openat(directory, flags, 0), err;
	struct stat st;

	if (dir < 0)
		return dir;
	err = km_sys_fstat(dir, &st);
	if (err == 0 && (st.st_uid != geteuid() || (st.st_mode & 0777) != 0700))
		err = -EACCES;
	if (err < 0)
		km_sys_close(dir);
	return err < 0 ? err : dir;
}

static int open_name(int dir, const char *name, int how)
{
	return (int)KM_SYS(openat, dir, name, how | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC,
			   0, 0, 0);
}

static void remove_name(int dir, const char *name)
{
	KM_SYS(unlinkat, dir, name, 0, 0, 0, 0);
}

static void remove_both(int dir, const uint8_t token[16])
{
	char name[NAME_LENGTH + 1];

	for (int i = 0; i < 2; i++) {
		name_of(token, i, name);
		remove_name(dir, name);
	}
	/* Only when there is nothing else in it. */
	KM_SYS(unlinkat, AT_FDCWD, directory, AT_REMOVEDIR, 0, 0, 0);
}

static bool is_left_behind(int dir, const char *name)
{
	struct timespec now;
	struct stat st;
	int fd;

	if (!is_name(name) ||
	    KM_SYS(newfstatat, dir, name, &st, AT_SYMLINK_NOFOLLOW, 0, 0) < 0 ||
	    !S_ISFIFO(st.st_mode))
		return false;
	clock_gettime(CLOCK_REALTIME, &now);
	if (now.tv_sec - st.st_mtim.tv_sec < OLD_S)
		return false;
	/* Whoever made it has it open for reading. */
	fd = open_name(dir, name, O_WRONLY);
	if (fd >= 0)
		km_sys_close(fd);
	return fd == -ENXIO;
}

/* Takes away the names of processes that have died. */
static void sweep(int dir)
{
	struct entry { /* linux_dirent64 */
		uint64_t ino;
		int64_t off;
		uint16_t length;
		uint8_t type;
		char name[];
	};
	_Alignas(struct entry) char buf[4096];
	long n;

	while ((n = KM_SYS(getdents64, dir, buf, sizeof(buf), 0, 0, 0)) > 0) {
		for (long at = 0; at < n;) {
			const struct entry *entry = (const void *)(buf + at);

			if (is_left_behind(dir, entry->name))
				remove_name(dir, entry->name);
			at += entry->length;
		}
	}
}

static int make_in(int dir, const uint8_t token[16], int pipes[2])
{
	char name[NAME_LENGTH + 1];
	int err = 0;

	for (int i = 0; i < 2 && err == 0; i++) {
		name_of(token, i, name);
		err = (int)KM_SYS(mknodat, dir, name, S_IFIFO | 0600, 0, 0, 0);
		if (err == 0) {
			pipes[i] = km_fd_hide(open_name(dir, name, O_RDWR));
			err = KM_MIN(pipes[i], 0);
		}
	}
	return err;
}

static int make(const uint8_t token[16], int pipes[2])
{
	int err = -ENOENT, dir;

	for (int i = 0; i < TRIES && err == -ENOENT; i++) {
		err = (int)KM_SYS(mkdirat, AT_FDCWD, directory, 0700, 0, 0, 0);
		dir = err < 0 && err != -EEXIST ? err : open_directory();
		err = KM_MIN(dir, 0);
		if (dir < 0)
			continue;
		if (!swept)
			sweep(dir);
		swept = true;
		err = make_in(dir, token, pipes);
		if (err < 0)
			remove_both(dir, token);
		for (int ring = 0; err < 0 && ring < 2; ring++) {
			km_fd_unhide(pipes[ring]);
			pipes[ring] = -1;
		}
		km_sys_close(dir);
	}
	return err;
}

static int create(const uint8_t token[16], uint32_t *ring_size, int pipes[2], int *sent)
{
	int err = make(token, pipes);

	(void)sent;
	if (err < 0)
		return km_pipes_failed(
			"fifo",
			"no names can be made in KMAP_FIFO_DIR, which "
			"has to be a directory of mode 0700 of this user",
			err);
	err = km_pipes_fit(pipes, ring_size);
	if (err < 0)
		return km_pipes_failed("fifo", "pipes are too small", err);
	return 0;
}

static int attach(const uint8_t token[16], uint32_t ring_size, const int *sent,
		  int pipes[2])
{
	char name[NAME_LENGTH + 1];
	int err = 0, dir = open_directory();

	(void)sent;
	for (int i = 0; i < 2 && dir >= 0; i++) {
		name_of(token, i, name);
		pipes[i] = km_fd_hide(open_name(dir, name, O_RDWR));
		err = KM_MIN(err, pipes[i]);
	}
	if (dir >= 0) {
		remove_both(dir, token);
		km_sys_close(dir);
	}
	err = KM_MIN(err, dir);
	if (err < 0)
		return km_pipes_failed(
			"fifo",
			"the other end's names are not in KMAP_FIFO_DIR, "
			"which has to be the same for both",
			err);
	err = km_pipes_check(pipes, ring_size);
	return err == -ENOSPC ? km_pipes_failed("fifo", "pipes are too small", err)
			      : err;
}

static void settled(const uint8_t token[16])
{
	int dir = open_directory();

	if (dir < 0)
		return;
	remove_both(dir, token);
	km_sys_close(dir);
}

const struct km_transport km_transport_fifo = {
	.name = "fifo",
	.bare = true,
	.start = start,
	.create = create,
	.attach = attach,
	.settled = settled,
	.put = km_pipes_put,
	.get = km_pipes_get,
	.replay = km_pipes_replay,
};
