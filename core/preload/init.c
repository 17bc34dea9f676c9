/* SPDX-License-Identifier: Apache-2.0 */
/* The library's start, and its part in fork. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "fd/file.h"
#include "link/inherit.h"
#include "preload/fork.h"
#include "transport/transport.h"

static bool forking; /* under link_lock */
static pthread_key_t thread_key;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;

void km_fork_prepare(void)
{
	if (!km_proc.used)
		return;
	km_file_fork_prepare();
	forking = true;
	KM_FAULT(FORK_PREPARE);
}

void km_fork_parent(void)
{
	if (!forking)
		return;
	forking = false;
	KM_FAULT(FORK_PARENT);
	km_file_fork_parent();
}

void km_fork_child(void)
{
	km_thread.tid = 0;
	if (!forking)
		return;
	forking = false;
	KM_FAULT(FORK_CHILD);
	/* The hidden set is the parent's: one epoll set must not serve two. */
	if (km_thread.epfd >= 0)
		km_fd_unhide(km_thread.epfd);
	km_thread.epfd = -1;
	km_thread.bells = 0;
	km_file_fork_child();
	km_conn_fork_child();
	km_event_fork_child();
}

static void end_thread(void *value)
{
	(void)value;
	km_fd_unhide(km_thread.epfd);
	km_thread.epfd = -1;
	km_thread.bells = 0;
}

static void make_key(void)
{
	pthread_key_create(&thread_key, end_thread);
}

void km_thread_cleanup(void)
{
	pthread_once(&thread_once, make_key);
	pthread_setspecific(thread_key, &km_thread);
}

#ifdef KM_MUSL
static void watch_forks(void)
{
	pthread_atfork(km_fork_prepare, km_fork_parent, km_fork_child);
}
#else
/* pthread_atfork, by the name that libc has it under: weak, because musl has none and
 * its loader ends a program for one name that it does not find. */
extern int __register_atfork(void (*prepare)(void), void (*parent)(void),
			     void (*child)(void), void *library) __attribute__((weak));
extern void *__dso_handle __attribute__((visibility("hidden")));

static void watch_forks(void)
{
	__register_atfork(km_fork_prepare, km_fork_parent, km_fork_child, __dso_handle);
}
#endif

/* Who asked for a log gets it, if need be for one of the program's numbers. */
static void hide_log(void)
{
	int high = km_fd_hide_copy(km_proc.log_fd);

	if (high < 0) {
		km_fd_hide_here(km_proc.log_fd);
		return;
	}
	km_sys_close(km_proc.log_fd);
	km_proc.log_fd = high;
}

__attribute__((constructor(101))) static void start(void)
{
	int saved = errno;

	km_resolve();
	km_spin_init();
	if (!km_proc.disabled) {
		km_options_init();
		km_transport_start();
	}
	if (km_proc.log_fd > STDERR_FILENO)
		hide_log();
	/* Cookies with the top bit set are no pointer and no small number. */
	km_sys_getrandom(&km_proc.magic, sizeof(km_proc.magic));
	km_proc.magic |= 0x80000000u;
	if (!km_proc.disabled) {
		watch_forks();
		km_inherit_start();
	}
	errno = saved;
}
