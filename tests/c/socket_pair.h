/* SPDX-License-Identifier: Apache-2.0 */
/* Both ends of an upgraded TCP connection in one process, behind the entry points. */
#ifndef KMAP_TEST_SOCKET_PAIR_H
#define KMAP_TEST_SOCKET_PAIR_H

#include <netinet/in.h>
#include <sched.h>

#include "event/event.h"
#include "link/link.h"
#include "sock/stream.h"
#include "unit.h"

struct socket_end {
	int fd;
	struct km_file *f;
};

struct socket_pair {
	struct socket_end connector, acceptor;
};

/* Hidden sets of the test's few threads go with the process. */
void km_thread_cleanup(void)
{
}

static inline void socket_library(uint64_t ring_size)
{
	km_resolve();
	km_options_init();
	CHECK_IS(km_sys_getrandom(&km_proc.magic, sizeof(km_proc.magic)),
		 sizeof(km_proc.magic));
	km_proc.magic |= 0x80000000u;
	km_proc.options.upgrade_after = 0;
	km_proc.options.spin_us = 0;
	km_proc.options.ring_size = ring_size;
}

/* Bytes that went by the kernel before the upgrade lie in both directions. */
static inline struct socket_pair socket_pair(size_t before)
{
	struct sockaddr_in addr = {.sin_family = AF_INET};
	socklen_t len = sizeof(addr);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	uint8_t bytes[256] = {0};
	struct socket_pair p;

	CHECK(listener >= 0 && before <= sizeof(bytes));
	addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK_IS(bind(listener, (struct sockaddr *)&addr, sizeof(addr)), 0);
	CHECK_IS(listen(listener, 1), 0);
	CHECK_IS(getsockname(listener, (struct sockaddr *)&addr, &len), 0);
	p.connector.fd = socket(AF_INET, SOCK_STREAM, 0);
	CHECK_IS(connect(p.connector.fd, (struct sockaddr *)&addr, len), 0);
	p.acceptor.fd = accept(listener, NULL, NULL);
	CHECK(p.acceptor.fd >= 0);
	CHECK_IS(close(listener), 0);
	CHECK_IS(send(p.connector.fd, bytes, before, 0), before);
	CHECK_IS(send(p.acceptor.fd, bytes, before, 0), before);
	km_file_new(p.connector.fd, KM_ROLE_CONNECTOR);
	km_file_new(p.acceptor.fd, KM_ROLE_ACCEPTOR);
	p.connector.f = km_file_of(p.connector.fd);
	p.acceptor.f = km_file_of(p.acceptor.fd);
	while (p.connector.f->link_state != KM_LINK_DONE ||
	       p.acceptor.f->link_state != KM_LINK_DONE) {
		km_link_made(p.connector.fd, false);
		km_link_made(p.acceptor.fd, false);
		CHECK(km_load_seq(&p.connector.f->mode) != KM_MODE_PINNED);
		CHECK(km_load_seq(&p.acceptor.f->mode) != KM_MODE_PINNED);
	}
	return p;
}

static inline void socket_end_close(struct socket_end *end)
{
	struct km_file *f = km_file_close_begin(end->fd);

	CHECK_IS(close(end->fd), 0);
	if (f)
		km_file_close_end(f);
}

static inline ssize_t socket_send(struct socket_end *end, const void *at, size_t n,
				  int flags)
{
	struct iovec iov = {(void *)(uintptr_t)at, n};

	return km_send(end->f, end->fd, &iov, 1, flags);
}

static inline ssize_t socket_recv(struct socket_end *end, void *at, size_t n, int flags)
{
	struct iovec iov = {at, n};

	return km_recv(end->f, end->fd, &iov, 1, flags);
}

#endif
