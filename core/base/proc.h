/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The process: settings, the real functions, per-thread state, and the small
 * helpers that every module uses.
 *
 * Locks, in the order in which they are taken (and held across fork):
 *   km_proc.link_lock   upgrades and the end of connections
 *   km_bell.lock        draining one bell
 *   km_set.lock         one epoll set's registrations and ready list
 *   km_conn.rx_lock, km_conn.tx_lock   one direction of one connection
 *   km_proc.table_lock  slabs and the table of connections
 *   km_proc.limit_lock  RLIMIT_NOFILE is not what the program made it
 */
#ifndef KM_PROC_H
#define KM_PROC_H

#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#include <fcntl.h>

#include "base/atomic.h"
#include "base/compiler.h"
#include "base/policy.h"
#include "base/spin.h"
#include "base/stats_layout.h"
#include "base/sys.h"

/* libc's aliases and fortified names have no public declaration. */
ssize_t __read(int fd, void *buf, size_t n);
ssize_t __write(int fd, const void *buf, size_t n);
int __close(int fd);
int __connect(int fd, const struct sockaddr *addr, socklen_t len);
ssize_t __send(int fd, const void *buf, size_t n, int flags);
int __fcntl(int fd, int cmd, ...);
int __poll(struct pollfd *fds, nfds_t n, int timeout);
int __dup2(int from, int to);
int __select(int n, fd_set *r, fd_set *w, fd_set *e, struct timeval *timeout);
ssize_t __read_chk(int fd, void *buf, size_t n, size_t room);
ssize_t __recv_chk(int fd, void *buf, size_t n, size_t room, int flags);
ssize_t __recvfrom_chk(int fd, void *buf, size_t n, size_t room, int flags,
		       struct sockaddr *addr, socklen_t *len);
int __poll_chk(struct pollfd *fds, nfds_t n, int timeout, size_t room);
int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
		const sigset_t *mask, size_t room);
int __sigaction(int sig, const struct sigaction *act, struct sigaction *old);
sighandler_t bsd_signal(int sig, sighandler_t handler);
pid_t _Fork(void);
pid_t __fork(void);
pid_t __vfork(void);
int close_range(unsigned first, unsigned last, int flags);
void closefrom(int first);
int epoll_pwait2(int epfd, struct epoll_event *events, int max,
		 const struct timespec *timeout, const sigset_t *mask);
#undef fcntl64
int fcntl64(int fd, int cmd, ...);

/* The next definition of each interposed symbol, those that nobody should use too. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
struct km_real {
#define X(name, ...) __typeof__(name) *name;
#include "base/symbols.def"
#undef X
};
#pragma GCC diagnostic pop

enum km_reason {
#define X(id, name, meaning) KM_REASON_##id,
#include "base/reasons.def"
#undef X
};

enum km_transport_id {
#define X(id, name, meaning) KM_TRANSPORT_##id,
#include "base/transports.def"
#undef X
	KM_TRANSPORTS
};

enum km_counter {
#define X(id, name, meaning) KM_COUNT_##id,
#include "base/counters.def"
#undef X
	KM_COUNTERS
};

struct km_options {
#define BOOL uint64_t
#define UINT uint64_t
#define SIZE uint64_t
#define STR const char *
#define X(field, env, type, min, max, fallback, help) type field;
#include "base/options.def"
#undef X
#undef BOOL
#undef UINT
#undef SIZE
#undef STR
};

enum km_log_level { KM_LOG_OFF, KM_LOG_ERROR, KM_LOG_INFO, KM_LOG_DEBUG };

struct km_proc {
	struct km_real real;
	struct km_options options;
	const struct km_policy *policy; /* NULL: all connections may be upgraded */
	enum km_transport_id
		transport; /* of connections that are upgraded from now on */
	bool disabled;
	uint32_t magic; /* high half of this process's epoll cookies */
	int log_fd;
	enum km_log_level log_level;
	km_a32 link_lock;
	km_a32 table_lock;
	km_a32 limit_lock;
	/* connections with a channel in this process; event calls look at it first */
	km_a32 channels;
	/* TCP sockets tracked in this process */
	km_a32 files;
	bool used;	  /* some socket or epoll set was tracked once */
	bool filtered;	  /* under a seccomp filter of the program's own */
	bool mixed;	  /* some epoll set held an upgraded connection once */
	km_a64 memory;	  /* bytes of segments mapped */
	km_a64 *counters; /* in the statistics memfd, or private before it exists */
	km_a64 *reasons;
};

extern struct km_proc km_proc;

struct km_thread {
	int bypass;	/* calls go straight to the kernel: vfork child, own work */
	int tid;	/* 0: ask the kernel */
	int epfd;	/* hidden epoll set for poll, select and long blocking waits */
	uint32_t bells; /* how many bells epfd listens to */
	void *bell[16];
	struct km_spin spin; /* of poll and select */
	uintptr_t seen_page; /* the program's; see km_readable_by_kernel */
	/* wake-ups for nothing since idle_since; see event/flood.c */
	uint32_t idle_wakes;
	bool flooded;
	int64_t idle_since;
	uint64_t idle_moved;
};

extern __thread struct km_thread km_thread;

/* Fills km_proc.real; called before the first use and by the constructor. */
void km_resolve(void);
/* Its last part: stands in for what this libc does not have. */
void km_resolve_missing(void);

/* The real function of that name, resolved even before the constructor ran. */
#define KM_REAL(name)                                                                  \
	(km_likely(km_proc.real.name != NULL) ? km_proc.real.name                      \
					      : (km_resolve(), km_proc.real.name))

KM_INLINE void km_count(enum km_counter c)
{
	if (km_proc.counters)
		km_add_relaxed(&km_proc.counters[c], 1);
}

KM_INLINE uint32_t km_tid(void)
{
	if (km_unlikely(km_thread.tid == 0))
		km_thread.tid = km_sys_gettid();
	return (uint32_t)km_thread.tid;
}

/*
 * A lock whose word holds the owner's thread id and a waiters bit.  It may lie
 * in memory shared with forked children; a lock whose owner died is taken over
 * (the second result).  km_lock returns KM_LOCK_NESTED, and takes nothing, when
 * this very thread holds it already: a signal handler interrupted the holder.
 * Not for memory that the peer can write.
 */
enum km_lock_result { KM_LOCK_OK, KM_LOCK_STOLEN, KM_LOCK_NESTED };
enum km_lock_result km_lock_slow(km_a32 *lock);
void km_unlock_slow(km_a32 *lock);

KM_INLINE enum km_lock_result km_lock(km_a32 *lock)
{
	uint32_t expected = 0;

	if (km_likely(km_cas_seq(lock, &expected, km_tid())))
		return KM_LOCK_OK;
	return km_lock_slow(lock);
}

KM_INLINE void km_unlock(km_a32 *lock, enum km_lock_result how)
{
	uint32_t expected = km_tid();

	if (km_unlikely(how == KM_LOCK_NESTED))
		return;
	if (km_unlikely(!km_cas_seq(lock, &expected, 0)))
		km_unlock_slow(lock);
}

/* As tools show it. */
const char *km_reason_name(enum km_reason reason);

/* Reads the environment. */
void km_options_init(void);

#define km_log(level, ...)                                                             \
	do {                                                                           \
		if (km_unlikely(km_proc.log_level >= (level)))                         \
			km_log_line(level, __VA_ARGS__);                               \
	} while (0)
void km_log_line(enum km_log_level level, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* One line on standard error, "kmap: " before it: for what the user set and cannot be
 * done.  Any context. */
void km_complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Anonymous zeroed memory that is never given back; NULL when there is none. */
void *km_pages(size_t bytes, bool shared);

#endif
