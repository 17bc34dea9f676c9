/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec: the new image knows nothing of this one's connections.  Descriptors that close
 * on exec are counted out of what several processes share, so that the one that goes
 * on (a parent whose child execs) is not taken for one of two for ever.
 */
#include "preload/entry.h"

#include <errno.h>
#include <spawn.h>

static void count_out(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	uint32_t by = (uint32_t) * (int *)arg;
	int flags;

	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	flags = km_sys_fcntl(fd, F_GETFD, 0);
	if (flags < 0 || !(flags & FD_CLOEXEC))
		return;
	if (f->conn)
		km_add_seq(&f->conn->refs, by);
	if (f->fd == fd && f->conn)
		km_add_seq(&f->conn->procs, by);
	else if (f->fd == fd && f->procs)
		km_add_seq(f->procs, by);
}

/* by is -1 before exec and 1 when it failed.  A vfork child counts nothing. */
static void leave_image(int by)
{
	if (km_proc.used && !km_thread.bypass)
		km_fd_each(count_out, &by);
}

#define EXEC(call)                                                                     \
	do {                                                                           \
		leave_image(-1);                                                       \
		call;                                                                  \
		leave_image(1);                                                        \
		return -1;                                                             \
	} while (0)

KM_EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
	EXEC(KM_REAL(execve)(path, argv, envp));
}

KM_EXPORT int execv(const char *path, char *const argv[])
{
	EXEC(KM_REAL(execv)(path, argv));
}

KM_EXPORT int execvp(const char *file, char *const argv[])
{
	EXEC(KM_REAL(execvp)(file, argv));
}

KM_EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
	EXEC(KM_REAL(execvpe)(file, argv, envp));
}

KM_EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
	EXEC(KM_REAL(fexecve)(fd, argv, envp));
}

/* posix_spawn's child is libc's own and shares this process's memory until it execs;
 * nothing is to be counted. */
KM_EXPORT int posix_spawn(pid_t *restrict pid, const char *restrict path,
			  const posix_spawn_file_actions_t *restrict actions,
			  const posix_spawnattr_t *restrict attr,
			  char *const argv[restrict], char *const envp[restrict])
{
	return KM_REAL(posix_spawn)(pid, path, actions, attr, argv, envp);
}

KM_EXPORT int posix_spawnp(pid_t *restrict pid, const char *restrict file,
			   const posix_spawn_file_actions_t *restrict actions,
			   const posix_spawnattr_t *restrict attr,
			   char *const argv[restrict], char *const envp[restrict])
{
	return KM_REAL(posix_spawnp)(pid, file, actions, attr, argv, envp);
}
