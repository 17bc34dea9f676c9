/* SPDX-License-Identifier: Apache-2.0 */
/* fork and system calls by number; vfork is in vfork.S. */
#include "preload/entry.h"

#include <linux/seccomp.h>
#include <stdarg.h>

#include "base/fault.h"
#include "event/event.h"
#include "preload/fork.h"
#include "sock/signals.h"

KM_EXPORT pid_t fork(void)
{
	pid_t pid = KM_REAL(fork)();

	/* The handlers of fork.c ran; only here is it known that there is no child. */
	if (pid < 0)
		km_file_fork_failed();
	return pid;
}

KM_EXPORT_GLIBC pid_t __fork(void)
{
	return fork();
}

/* Runs no handlers of the program's, but must run ours. */
KM_EXPORT pid_t _Fork(void)
{
	pid_t pid;

	km_fork_prepare();
	pid = KM_REAL(_Fork) ? KM_REAL(_Fork)()
			     : (pid_t)km_result(KM_SYS(clone, SIGCHLD, 0, 0, 0, 0, 0));
	if (pid == 0)
		km_fork_child();
	else
		km_fork_parent();
	if (pid < 0)
		km_file_fork_failed();
	return pid;
}

/*
 * Two things depend on the program's handlers: whether a wait is restarted, and what
 * the library's own handler of SIGSEGV and SIGBUS passes on (base/fault.h).  Each call
 * is libc's own; afterwards ours takes the place of what it installed.
 */
static void action_changed(int sig)
{
	km_fault_changed(sig);
	km_signals_changed();
}

KM_EXPORT int sigaction(int sig, const struct sigaction *restrict act,
			struct sigaction *restrict old)
{
	struct km_action before;
	bool kept = km_fault_recall(sig, &before);
	int err = KM_REAL(sigaction)(sig, act, old);

	if (act && err == 0)
		action_changed(sig);
	/* Mask and stack are the program's own in any case. */
	if (km_unlikely(kept && err == 0 && old &&
			km_fault_is_ours((void *)(uintptr_t)old->sa_handler))) {
		old->sa_handler = (sighandler_t)(uintptr_t)before.handler;
		old->sa_flags = (int)before.flags;
		old->sa_restorer = (void (*)(void))(uintptr_t)before.restorer;
	}
	return err;
}

KM_EXPORT_GLIBC int __sigaction(int sig, const struct sigaction *act,
				struct sigaction *old)
{
	return sigaction(sig, act, old);
}

#define HANDLER_CALL(export, name)                                                     \
	export sighandler_t name(int sig, sighandler_t handler)                        \
	{                                                                              \
		struct km_action before;                                               \
		bool kept = km_fault_recall(sig, &before);                             \
		sighandler_t old = KM_REAL(name)(sig, handler);                        \
                                                                                       \
		if (old != SIG_ERR)                                                    \
			action_changed(sig);                                           \
		return kept && km_fault_is_ours((void *)(uintptr_t)old)                \
			       ? (sighandler_t)(uintptr_t)before.handler               \
			       : old;                                                  \
	}

HANDLER_CALL(KM_EXPORT, signal)
HANDLER_CALL(KM_EXPORT, bsd_signal)
HANDLER_CALL(KM_EXPORT_GLIBC, ssignal)
HANDLER_CALL(KM_EXPORT_GLIBC, sysv_signal)
HANDLER_CALL(KM_EXPORT, __sysv_signal)
HANDLER_CALL(KM_EXPORT, sigset)

KM_EXPORT int sigignore(int sig)
{
	int err = KM_REAL(sigignore)(sig);

	action_changed(sig);
	return err;
}

static long sigaction_by_number(int sig, void *act, void *old, long size)
{
	struct km_action before, *was = old;
	bool kept = km_fault_recall(sig, &before);
	long err = KM_REAL(syscall)(SYS_rt_sigaction, sig, act, old, size);

	if (act && err == 0)
		action_changed(sig);
	if (kept && err == 0 && was && km_fault_is_ours(was->handler))
		*was = before;
	return err;
}

/* A filter is about to be installed.  What it lets through is the program's business, and
 * one that kills leaves no second try: the connections go back to the kernel before. */
static void filter_begin(bool strict, const void *filter)
{
	if (!km_proc.disabled && !km_thread.bypass && (strict || filter))
		km_file_all_to_kernel(KM_REASON_SECCOMP);
}

KM_EXPORT int prctl(int option, ...)
{
	unsigned long a[4];
	va_list args;

	va_start(args, option);
	for (unsigned i = 0; i < KM_COUNT(a); i++)
		a[i] = va_arg(args, unsigned long);
	va_end(args);
	if (km_unlikely(option == PR_SET_SECCOMP))
		filter_begin(a[0] == SECCOMP_MODE_STRICT, (void *)a[1]);
	return KM_REAL(prctl)(option, a[0], a[1], a[2], a[3]);
}

#define SYS_IO_URING_SETUP 425

/* Programs that know the number rather than the name (libuv closes like this). */
KM_EXPORT long syscall(long number, ...)
{
	va_list args;
	long a, b, c, d, e, f;

	va_start(args, number);
	a = va_arg(args, long);
	b = va_arg(args, long);
	c = va_arg(args, long);
	d = va_arg(args, long);
	e = va_arg(args, long);
	f = va_arg(args, long);
	va_end(args);
	if (km_unlikely(km_proc.disabled))
		return KM_REAL(syscall)(number, a, b, c, d, e, f);
#define FD ((int)a)
#define PTR(x) ((void *)(x))
	switch (number) {
	case SYS_read:
		return read(FD, PTR(b), (size_t)c);
	case SYS_write:
		return write(FD, PTR(b), (size_t)c);
	case SYS_readv:
		return readv(FD, PTR(b), (int)c);
	case SYS_writev:
		return writev(FD, PTR(b), (int)c);
	case SYS_close:
		return close(FD);
#ifdef SYS_close_range
	case SYS_close_range:
		return km_result(
			km_entry_close_range((unsigned)a, (unsigned)b, (int)c));
#endif
	case SYS_dup:
		return dup(FD);
#ifdef SYS_dup2
	case SYS_dup2:
		return dup2(FD, (int)b);
#endif
	case SYS_dup3:
		return dup3(FD, (int)b, (int)c);
	case SYS_fcntl:
		return km_entry_fcntl(FD, (int)b, PTR(c));
	case SYS_ioctl:
		return km_entry_ioctl(FD, (unsigned long)b, PTR(c));
	case SYS_socket:
		return socket(FD, (int)b, (int)c);
	case SYS_connect:
		return connect(FD, PTR(b), (socklen_t)c);
	case SYS_accept:
		return accept(FD, PTR(b), PTR(c));
	case SYS_accept4:
		return accept4(FD, PTR(b), PTR(c), (int)d);
	case SYS_listen:
		return listen(FD, (int)b);
	case SYS_shutdown:
		return shutdown(FD, (int)b);
	case SYS_setsockopt:
		return setsockopt(FD, (int)b, (int)c, PTR(d), (socklen_t)e);
	case SYS_recvfrom:
		return recvfrom(FD, PTR(b), (size_t)c, (int)d, PTR(e), PTR(f));
	case SYS_sendto:
		return sendto(FD, PTR(b), (size_t)c, (int)d, PTR(e), (socklen_t)f);
	case SYS_recvmsg:
		return recvmsg(FD, PTR(b), (int)c);
	case SYS_sendmsg:
		return sendmsg(FD, PTR(b), (int)c);
	case SYS_sendfile:
		return sendfile(FD, (int)b, PTR(c), (size_t)d);
#ifdef SYS_poll
	case SYS_poll:
		return poll(PTR(a), (nfds_t)b, (int)c);
#endif
#ifdef SYS_epoll_wait
	case SYS_epoll_wait:
		return epoll_wait(FD, PTR(b), (int)c, (int)d);
#endif
	case SYS_epoll_pwait:
		return epoll_pwait(FD, PTR(b), (int)c, (int)d, PTR(e));
	case SYS_epoll_ctl:
		return epoll_ctl(FD, (int)b, (int)c, PTR(d));
	case SYS_rt_sigaction:
		return sigaction_by_number((int)a, PTR(b), PTR(c), d);
	case SYS_prctl:
		return prctl(FD, b, c, d, e);
	case SYS_seccomp:
		/* Flags or no filter: a question whether the kernel has the call. */
		if (a == SECCOMP_SET_MODE_STRICT || a == SECCOMP_SET_MODE_FILTER)
			filter_begin(a == SECCOMP_SET_MODE_STRICT && b == 0, PTR(c));
		break;
	case SYS_IO_URING_SETUP:
		/* Registrations made through a ring of the kernel's would not be
		 * seen; programs that ask like this all know life without it. */
		km_count(KM_COUNT_IO_URING_REFUSED);
		return km_result(-ENOSYS);
	default:
		break;
	}
#undef FD
#undef PTR
	return KM_REAL(syscall)(number, a, b, c, d, e, f);
}
