/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's own system calls.  They go straight to the kernel: not through
 * libc's symbols, which this library interposes, and not through errno, which
 * belongs to the program.  Results are those of the kernel: a negative errno
 * value on error.  Safe from any thread and in signal handlers; none is a
 * cancellation point.
 */
#ifndef KM_SYS_H
#define KM_SYS_H

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>

#if defined(__x86_64__)
static inline long km_syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	long ret;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;

	__asm__ __volatile__("syscall"
			     : "=a"(ret)
			     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8),
			       "r"(r9)
			     : "rcx", "r11", "memory");
	return ret;
}
#elif defined(__aarch64__)
static inline long km_syscall6(long n, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ __volatile__("svc 0"
			     : "+r"(x0)
			     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			     : "memory");
	return x0;
}
#else
#error "Kmap runs on x86-64 and arm64"
#endif

#ifdef KM_FAULT_POINTS
/* The same; fails when a fault point (base/fault_point.h) said so. */
long km_point_syscall(long n, long a, long b, long c, long d, long e, long f);
#define km_syscall km_point_syscall
#else
#define km_syscall km_syscall6
#endif

#define KM_SYS(name, a, b, c, d, e, f)                                                 \
	km_syscall(SYS_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e),  \
		   (long)(f))
/* Size of the kernel's signal set. */
#define KM_SIGSET_SIZE 8

static inline int km_sys_close(int fd)
{
	return (int)KM_SYS(close, fd, 0, 0, 0, 0, 0);
}
static inline ssize_t km_sys_read(int fd, void *buf, size_t n)
{
	return KM_SYS(read, fd, buf, n, 0, 0, 0);
}
static inline ssize_t km_sys_write(int fd, const void *buf, size_t n)
{
	return KM_SYS(write, fd, buf, n, 0, 0, 0);
}
static inline int km_sys_fcntl(int fd, int cmd, long arg)
{
	return (int)KM_SYS(fcntl, fd, cmd, arg, 0, 0, 0);
}
static inline int km_sys_fstat(int fd, struct stat *st)
{
	return (int)KM_SYS(fstat, fd, st, 0, 0, 0, 0);
}
static inline int km_sys_ftruncate(int fd, int64_t size)
{
	return (int)KM_SYS(ftruncate, fd, size, 0, 0, 0, 0);
}
static inline int km_sys_pipe2(int fds[2], int flags)
{
	return (int)KM_SYS(pipe2, fds, flags, 0, 0, 0, 0);
}
static inline int km_sys_openat(const char *path, int flags, int mode)
{
	return (int)KM_SYS(openat, -100 /* AT_FDCWD */, path, flags, mode, 0, 0);
}
static inline int km_sys_memfd_create(const char *name, unsigned flags)
{
	return (int)KM_SYS(memfd_create, name, flags, 0, 0, 0, 0);
}
/* Readable, writable and shared; NULL and *err when there is none to be had. */
static inline void *km_sys_mmap(size_t n, int flags, int fd, int *err)
{
#if defined(__SANITIZE_THREAD__) || defined(KM_MMAP_BY_LIBC)
	/* By libc, where sanitizers and fuzz targets see it. */
	void *seen = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0);

	*err = seen == MAP_FAILED ? -errno : 0;
	return *err < 0 ? NULL : seen;
#else
	long p = KM_SYS(mmap, NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd,
			0);

	*err = p < 0 && p > -4096 ? (int)p : 0;
	return *err < 0 ? NULL : (void *)p;
#endif
}
static inline ssize_t km_sys_getrandom(void *buf, size_t n)
{
	return KM_SYS(getrandom, buf, n, 0, 0, 0, 0);
}
static inline int km_sys_gettid(void)
{
	return (int)KM_SYS(gettid, 0, 0, 0, 0, 0, 0);
}
static inline void km_sys_yield(void)
{
	(void)KM_SYS(sched_yield, 0, 0, 0, 0, 0, 0);
}
static inline int km_sys_getpid(void)
{
	return (int)KM_SYS(getpid, 0, 0, 0, 0, 0, 0);
}
static inline int km_sys_kill(int pid, int sig)
{
	return (int)KM_SYS(kill, pid, sig, 0, 0, 0, 0);
}
static inline int km_sys_socket(int domain, int type, int protocol)
{
	return (int)KM_SYS(socket, domain, type, protocol, 0, 0, 0);
}
static inline int km_sys_bind(int fd, const void *addr, socklen_t len)
{
	return (int)KM_SYS(bind, fd, addr, len, 0, 0, 0);
}
static inline int km_sys_listen(int fd, int backlog)
{
	return (int)KM_SYS(listen, fd, backlog, 0, 0, 0, 0);
}
static inline int km_sys_shutdown(int fd, int how)
{
	return (int)KM_SYS(shutdown, fd, how, 0, 0, 0, 0);
}
static inline int km_sys_connect(int fd, const void *addr, socklen_t len)
{
	return (int)KM_SYS(connect, fd, addr, len, 0, 0, 0);
}
static inline int km_sys_accept4(int fd, void *addr, socklen_t *len, int flags)
{
	return (int)KM_SYS(accept4, fd, addr, len, flags, 0, 0);
}
static inline ssize_t km_sys_recvfrom(int fd, void *buf, size_t n, int flags)
{
	return KM_SYS(recvfrom, fd, buf, n, flags, 0, 0);
}
static inline ssize_t km_sys_sendto(int fd, const void *buf, size_t n, int flags,
				    const void *addr, socklen_t len)
{
	return KM_SYS(sendto, fd, buf, n, flags, addr, len);
}
static inline ssize_t km_sys_recvmsg(int fd, struct msghdr *msg, int flags)
{
	return KM_SYS(recvmsg, fd, msg, flags, 0, 0, 0);
}
static inline ssize_t km_sys_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	return KM_SYS(sendmsg, fd, msg, flags, 0, 0, 0);
}
static inline int km_sys_getsockopt(int fd, int level, int name, void *val,
				    socklen_t *len)
{
	return (int)KM_SYS(getsockopt, fd, level, name, val, len, 0);
}
static inline int km_sys_setsockopt(int fd, int level, int name, const void *val,
				    socklen_t len)
{
	return (int)KM_SYS(setsockopt, fd, level, name, val, len, 0);
}
static inline int km_sys_getsockname(int fd, void *addr, socklen_t *len)
{
	return (int)KM_SYS(getsockname, fd, addr, len, 0, 0, 0);
}
static inline int km_sys_getpeername(int fd, void *addr, socklen_t *len)
{
	return (int)KM_SYS(getpeername, fd, addr, len, 0, 0, 0);
}
static inline int km_sys_ioctl(int fd, unsigned long request, void *arg)
{
	return (int)KM_SYS(ioctl, fd, request, arg, 0, 0, 0);
}
/* ppoll, or poll where that is refused; see base/refused.h. */
int km_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
	     const void *mask);
static inline int km_sys_poll(struct pollfd *fds, nfds_t n, const struct timespec *to)
{
	return km_ppoll(fds, n, to, NULL);
}
static inline int km_sys_epoll_create(int flags)
{
	return (int)KM_SYS(epoll_create1, flags, 0, 0, 0, 0, 0);
}
static inline int km_sys_epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
	return (int)KM_SYS(epoll_ctl, epfd, op, fd, ev, 0, 0);
}
static inline int km_sys_epoll_wait(int epfd, struct epoll_event *evs, int max, int ms)
{
#ifdef SYS_epoll_wait
	return (int)KM_SYS(epoll_wait, epfd, evs, max, ms, 0, 0);
#else
	return (int)KM_SYS(epoll_pwait, epfd, evs, max, ms, NULL, KM_SIGSET_SIZE);
#endif
}

/* How long a sleeper trusts the futex before it waits on descriptors, where it also sees
 * a peer that died.  Nanoseconds. */
#ifdef KM_MUTANTS
extern int64_t km_mutant_slice_ns;
#define KM_FUTEX_SLICE_NS km_mutant_slice_ns
#else
#define KM_FUTEX_SLICE_NS INT64_C(5000000)
#endif

/* FUTEX_WAIT on a word that other processes share; timeout NULL waits for ever.
 * 0, -EAGAIN (the word differs), -EINTR, -ETIMEDOUT. */
static inline int km_sys_futex_wait(void *word, uint32_t value,
				    const struct timespec *timeout)
{
	return (int)KM_SYS(futex, word, 0 /* FUTEX_WAIT */, value, timeout, 0, 0);
}
/* Wakes up to n sleepers; the number woken. */
static inline int km_sys_futex_wake(void *word, int n)
{
	return (int)KM_SYS(futex, word, 1 /* FUTEX_WAKE */, n, 0, 0, 0);
}

/* CLOCK_MONOTONIC in nanoseconds, through the vDSO. */
static inline int64_t km_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

#endif
