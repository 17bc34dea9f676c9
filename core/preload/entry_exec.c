/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec: the new image knows nothing of this one's connections.  Those it gets go back to
 * the kernel.  Descriptors that close on exec are counted out of what several processes
 * share, so that the one that goes on (a parent whose child execs) is not taken for one
 * of two for ever.
 */
#include "preload/entry.h"

#include <alloca.h>
#include <errno.h>
#include <spawn.h>
#include <stdarg.h>

#include "link/inherit.h"

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

/* What a new program gets goes back to the kernel.  The descriptor that tells it of
 * unread bytes, or -1. */
static int hand_on(const char *file, char *const env[], bool becomes)
{
	int memfd = -1;
	bool takes;

	if (km_likely(!km_proc.used))
		return -1;
	takes = km_load_relaxed(&km_proc.channels) && file &&
		km_user_readable(file, 1) && km_inherit_possible(file, env);
	km_file_hand_on_survivors(takes ? &memfd : NULL, becomes);
	return memfd;
}

static int leave_image(const char *file, char *const env[])
{
	int memfd = hand_on(file, env, true), minus = -1;

	/* A vfork child counts nothing. */
	if (km_proc.used && !km_thread.bypass)
		km_fd_each(count_out, &minus);
	return memfd;
}

/* exec has failed. */
static void stay(int memfd)
{
	int one = 1;

	if (memfd >= 0)
		km_sys_close(memfd);
	if (km_proc.used && !km_thread.bypass)
		km_fd_each(count_out, &one);
}

/*
 * call is the real one, with env for its environment: that of the program, and a word
 * about unread bytes if there are any.
 */
#define EXEC(file, envp, call)                                                         \
	do {                                                                           \
		char *const *env = envp;                                               \
		int memfd = leave_image(file, env);                                    \
		char **told = memfd >= 0 ? km_inherit_environment(env, memfd) : NULL;  \
		if (told)                                                              \
			env = told;                                                    \
		call;                                                                  \
		stay(memfd);                                                           \
		return -1;                                                             \
	} while (0)

KM_EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
	EXEC(path, envp, KM_REAL(execve)(path, argv, env));
}

KM_EXPORT int execv(const char *path, char *const argv[])
{
	EXEC(path, environ, KM_REAL(execve)(path, argv, env));
}

KM_EXPORT int execvp(const char *file, char *const argv[])
{
	EXEC(file, environ, KM_REAL(execvpe)(file, argv, env));
}

KM_EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
	EXEC(file, envp, KM_REAL(execvpe)(file, argv, env));
}

KM_EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
	/* Which program it is does not matter enough to find out. */
	EXEC(NULL, envp, KM_REAL(fexecve)(fd, argv, env));
}

/*
 * posix_spawn's child is libc's own and shares this process's memory until it execs;
 * nothing is to be counted, and what the new program gets is known beforehand.
 */
#define SPAWN(file, envp, call)                                                        \
	do {                                                                           \
		char *const *env = envp;                                               \
		int memfd = hand_on(file, env, false), err;                            \
		char **told = memfd >= 0 ? km_inherit_environment(env, memfd) : NULL;  \
		if (told)                                                              \
			env = told;                                                    \
		err = call;                                                            \
		if (memfd >= 0)                                                        \
			km_sys_close(memfd);                                           \
		return err;                                                            \
	} while (0)

KM_EXPORT int posix_spawn(pid_t *restrict pid, const char *restrict path,
			  const posix_spawn_file_actions_t *restrict actions,
			  const posix_spawnattr_t *restrict attr,
			  char *const argv[restrict], char *const envp[restrict])
{
	SPAWN(path, envp, KM_REAL(posix_spawn)(pid, path, actions, attr, argv, env));
}

KM_EXPORT int posix_spawnp(pid_t *restrict pid, const char *restrict file,
			   const posix_spawn_file_actions_t *restrict actions,
			   const posix_spawnattr_t *restrict attr,
			   char *const argv[restrict], char *const envp[restrict])
{
	SPAWN(file, envp, KM_REAL(posix_spawnp)(pid, file, actions, attr, argv, env));
}

KM_EXPORT int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *actions,
					       int fd, int to)
{
	km_file_hand_on(fd, to);
	return KM_REAL(posix_spawn_file_actions_adddup2)(actions, fd, to);
}

/* libc starts the shell itself, past the names above. */
KM_EXPORT int system(const char *command)
{
	hand_on(NULL, NULL, false);
	return KM_REAL(system)(command);
}

KM_EXPORT FILE *popen(const char *command, const char *mode)
{
	hand_on(NULL, NULL, false);
	return KM_REAL(popen)(command, mode);
}

/* -- execl and its kin: libc's own go past the symbols above ------------------------- */

/* Makes argv of first and what follows it, up to a NULL; env is what comes after. */
#define GATHER(argv, env, first)                                                       \
	do {                                                                           \
		va_list args;                                                          \
		size_t n = 1;                                                          \
		va_start(args, first);                                                 \
		for (const char *a = first; a; a = va_arg(args, const char *))         \
			n++;                                                           \
		va_end(args);                                                          \
		argv = alloca(n * sizeof(*argv));                                      \
		argv[0] = (char *)(uintptr_t)first;                                    \
		va_start(args, first);                                                 \
		for (size_t i = 1; i < n; i++)                                         \
			argv[i] = va_arg(args, char *);                                \
		env;                                                                   \
		va_end(args);                                                          \
	} while (0)

KM_EXPORT int execl(const char *path, const char *first, ...)
{
	char **argv;

	GATHER(argv, , first);
	return execv(path, argv);
}

KM_EXPORT int execlp(const char *file, const char *first, ...)
{
	char **argv;

	GATHER(argv, , first);
	return execvp(file, argv);
}

KM_EXPORT int execle(const char *path, const char *first, ...)
{
	char **argv, **env;

	GATHER(argv, env = va_arg(args, char **), first);
	return execve(path, argv, env);
}
