/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes that only this process has, for the program that it becomes.
 *
 * Most connections that go through an exec have nothing unread in their ring, or a peer
 * that sends it again.  What is left is put into a memfd that the new image inherits,
 * named in its environment; there the library makes a ring of it that ends where the
 * kernel goes on.
 */
#include "link/inherit.h"

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/xattr.h>

#include "event/event.h"
#include "link/link.h"
#include "sock/stream.h"
#include "transport/transport.h"

#define VARIABLE "KMAP_INHERIT"
#define RECORD_MAGIC 0x31544948u
#define MOST_BYTES (64u << 20)

struct record {
	uint32_t magic;
	int32_t fd;
	uint64_t inode;
	uint64_t before; /* bytes to be taken from the kernel first */
	uint64_t bytes;	 /* that follow */
};

/* -- can the library get into the new image? ----------------------------------------- */

static const char *in_environment(char *const env[], const char *name)
{
	size_t n = strlen(name);

	for (; env && *env; env++)
		if (strncmp(*env, name, n) == 0 && (*env)[n] == '=')
			return *env + n + 1;
	return NULL;
}

static bool names_this_library(const char *preload)
{
	Dl_info info;
	const char *name;

	if (!preload || !dladdr((void *)&km_proc, &info) || !info.dli_fname)
		return false;
	name = strrchr(info.dli_fname, '/');
	return strstr(preload, name ? name + 1 : info.dli_fname) != NULL;
}

static bool is_for_glibc(int fd)
{
	ElfW(Ehdr) head;
	ElfW(Phdr) part;
	char interpreter[256] = "";

	if (KM_SYS(pread64, fd, &head, sizeof(head), 0, 0, 0) != sizeof(head) ||
	    memcmp(head.e_ident, ELFMAG, SELFMAG) != 0)
		return false;
	for (int i = 0; i < head.e_phnum; i++) {
		if (KM_SYS(pread64, fd, &part, sizeof(part),
			   head.e_phoff + (size_t)i * sizeof(part), 0,
			   0) != sizeof(part))
			return false;
		if (part.p_type == PT_INTERP)
			KM_SYS(pread64, fd, interpreter,
			       KM_MIN(part.p_filesz, sizeof(interpreter) - 1),
			       part.p_offset, 0, 0);
	}
	return strstr(interpreter, "ld-linux") != NULL;
}

static bool loads_library(const char *path, int depth)
{
	char head[256] = "";
	struct stat st;
	bool loads = false;
	int fd = (int)KM_SYS(openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0, 0, 0);

	if (fd < 0)
		return false;
	if (km_sys_fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
	    !(st.st_mode & (S_ISUID | S_ISGID)) &&
	    KM_SYS(fgetxattr, fd, "security.capability", NULL, 0, 0, 0) < 0) {
		if (KM_SYS(pread64, fd, head, sizeof(head) - 1, 0, 0, 0) > 2 &&
		    head[0] == '#' && head[1] == '!' && depth == 0) {
			char *at = head + 2 + strspn(head + 2, " \t");

			at[strcspn(at, " \t\n")] = '\0';
			loads = loads_library(at, 1);
		} else {
			loads = is_for_glibc(fd);
		}
	}
	km_sys_close(fd);
	return loads;
}

/* As execvp finds it. */
static bool found_loads_library(const char *file)
{
	const char *path = getenv("PATH"), *end;
	char full[4096];

	if (strchr(file, '/'))
		return loads_library(file, 0);
	for (path = path ? path : "/bin:/usr/bin"; *path; path = *end ? end + 1 : end) {
		end = path + strcspn(path, ":");
		if ((size_t)(end - path) + strlen(file) + 2 > sizeof(full))
			continue;
		memcpy(full, path, (size_t)(end - path));
		full[end - path] = '/';
		strcpy(full + (end - path) + 1, file);
		if (KM_SYS(faccessat, AT_FDCWD, full, X_OK, 0, 0, 0) == 0)
			return loads_library(full, 0);
	}
	return false;
}

bool km_inherit_possible(const char *file, char *const env[])
{
	const char *off = in_environment(env, "KMAP_DISABLE");

	return !(off && strcmp(off, "1") == 0) &&
	       names_this_library(in_environment(env, "LD_PRELOAD")) &&
	       found_loads_library(file);
}

/* -- the image that goes ---------------------------------------------------------------- */

/* All of it, or an error: a part would be taken for the whole. */
static ssize_t put(int memfd, const void *bytes, size_t n)
{
	ssize_t done = km_sys_write(memfd, bytes, n);

	return done < 0 ? done : (size_t)done == n ? 0 : -ENOSPC;
}

int km_inherit_add(struct km_file *f, int fd, int *memfd)
{
	struct record record = {.magic = RECORD_MAGIC, .fd = fd};
	struct km_conn *conn = f->conn;
	uint64_t bytes = km_stream_unread(conn, &record.before);
	struct iovec iov = {km_pages(KM_MAX(bytes, 1), false), bytes};
	ssize_t n = 0;

	if (!iov.iov_base)
		return -ENOMEM;
	if (*memfd < 0)
		*memfd = km_sys_memfd_create("kmap-inherit", 0);
	if (*memfd < 0)
		n = *memfd;
	if (n == 0 && bytes)
		n = km_get(f, conn, &iov, 1, KM_RING_PEEK);
	if (n >= 0 && (uint64_t)n != bytes)
		n = -EPROTO;
	record.inode = conn->row.inode;
	record.bytes = bytes;
	if (n >= 0)
		n = put(*memfd, &record, sizeof(record));
	if (n >= 0)
		n = put(*memfd, iov.iov_base, bytes);
	munmap(iov.iov_base, KM_MAX(bytes, 1));
	return n < 0 ? (int)n : 0;
}

char **km_inherit_environment(char *const env[], int memfd)
{
	static const char name[] = VARIABLE "=";
	size_t n = 0;
	char **out, *text;

	while (env && env[n])
		n++;
	out = km_pages((n + 2) * sizeof(*out) + sizeof(name) + 16, false);
	if (!out)
		return NULL;
	text = (char *)(out + n + 2);
	memcpy(out, env, n * sizeof(*out));
	memcpy(text, name, sizeof(name));
	out[n] = text;
	text += sizeof(name) - 1;
	/* No stdio: this may be the child of a vfork. */
	for (int digits = 1000000000; digits; digits /= 10)
		if (memfd >= digits || digits == 1)
			*text++ = (char)('0' + memfd / digits % 10);
	return out;
}

/* -- the image that comes --------------------------------------------------------------- */

static struct km_file *find_inode(uint64_t inode, const int *fds, int n)
{
	struct stat st;

	for (int i = 0; i < n; i++)
		if (km_file_of(fds[i]) && km_sys_fstat(fds[i], &st) == 0 &&
		    st.st_ino == inode)
			return km_file_of(fds[i]);
	return NULL;
}

/* A ring that holds what was unread, and ends there. */
static void take(const struct record *record, const uint8_t *bytes)
{
	struct iovec iov = {(void *)(uintptr_t)bytes, record->bytes};
	struct km_producer left;
	struct km_file *f;
	uint32_t size = 4096;

	while (size < record->bytes)
		size *= 2;
	km_file_new(record->fd, KM_ROLE_UNKNOWN);
	f = km_file_of(record->fd);
	if (!f || km_link_alone(f, record->fd, size) < 0) {
		km_log(KM_LOG_ERROR, "fd %d: no memory for what was unread",
		       record->fd);
		return;
	}
	km_producer_init(&left, f->conn->rx.wire, f->conn->rx.data, size);
	km_ring_write(&left, &iov, 1, SIZE_MAX);
	km_store_ordered(&left.wire->end, record->bytes);
	km_store_sync(FLAGS_SET, &left.wire->pflags, KM_P_CUT | KM_P_END);
	f->conn->rx_left = record->before;
	f->conn->rx_phase = record->before ? KM_PHASE_DRAIN : KM_PHASE_RING;
	km_store_seq(&f->mode, KM_MODE_CHANNEL);
}

void km_inherit_start(void)
{
	const char *text = getenv(VARIABLE);
	int fds[64], n = 0, memfd = text ? atoi(text) : -1;
	uint8_t *map, *at;
	struct stat st;

	if (!text)
		return;
	unsetenv(VARIABLE);
	if (memfd <= 2 || km_sys_fstat(memfd, &st) < 0 || !S_ISREG(st.st_mode) ||
	    st.st_size < (off_t)sizeof(struct record) || st.st_size > MOST_BYTES)
		return;
	map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, memfd, 0);
	if (map == MAP_FAILED)
		return;
	for (at = map; n < (int)KM_COUNT(fds);) {
		size_t left = (size_t)(map + st.st_size - at);
		struct record record;
		struct km_file *same;

		if (left < sizeof(record))
			break;
		memcpy(&record, at, sizeof(record));
		if (record.magic != RECORD_MAGIC ||
		    record.bytes > left - sizeof(record))
			break;
		at += sizeof(record);
		same = find_inode(record.inode, fds, n);
		if (same)
			km_fd_dup(same->fd, record.fd);
		else if (km_sys_fstat(record.fd, &st) == 0 &&
			 st.st_ino == record.inode && record.bytes <= 16u << 20)
			take(&record, at);
		fds[n++] = record.fd;
		at += record.bytes;
		/* fstat above is of another file. */
		km_sys_fstat(memfd, &st);
	}
	munmap(map, (size_t)st.st_size);
	km_sys_close(memfd);
}
