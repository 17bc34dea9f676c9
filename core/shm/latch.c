/* SPDX-License-Identifier: Apache-2.0 */
#include "shm/latch.h"

#include <errno.h>

int km_latch_open(void)
{
	int fd = km_sys_socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int err = fd < 0 ? fd : km_latch_ring(fd);

	if (err < 0 && fd >= 0)
		km_sys_close(fd);
	return err < 0 ? err : fd;
}

static int option(int fd, int name)
{
	int value = -1;
	socklen_t len = sizeof(value);

	return km_sys_getsockopt(fd, SOL_SOCKET, name, &value, &len) < 0 ? -1 : value;
}

int km_latch_check(int fd)
{
	if (option(fd, SO_DOMAIN) != AF_UNIX || option(fd, SO_TYPE) != SOCK_DGRAM)
		return -EPROTO;
	/* A security module may forbid it. */
	return km_latch_ring(fd);
}
