/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sockets that were passed in a message: who else has one?
 *
 * Whoever passes a plain socket on binds an abstract name made from the socket's cookie,
 * before it sends the message, and keeps it for as long as it has the socket.  The one
 * that receives it finds the name taken, so it knows that the other is bound by these
 * rules too, and upgrades the connection only once it can have the name itself.  A
 * sender without the library takes no name, and what comes from it stays on the kernel.
 */
#include "link/held.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/un.h>

#include "link/link.h"

#ifndef SO_COOKIE
#define SO_COOKIE 57
#endif

/* A socket bound to the name, or a negative errno value. */
static int bind_name(int fd)
{
	static const char digits[] = "0123456789abcdef", prefix[] = "kmap1h:";
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	char *at = un.sun_path + 1;
	uint64_t cookie;
	socklen_t len = sizeof(cookie);
	int sock, err = km_sys_getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &len);

	if (err < 0)
		return err;
	memcpy(at, prefix, sizeof(prefix) - 1);
	at += sizeof(prefix) - 1;
	for (int shift = 60; shift >= 0; shift -= 4)
		*at++ = digits[cookie >> shift & 15];
	sock = km_sys_socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return sock;
	err = km_sys_bind(sock, &un, (socklen_t)(at - (char *)&un));
	if (err == 0)
		return sock;
	km_sys_close(sock);
	return err;
}

bool km_held_take(struct km_file *f, int fd)
{
	int sock;

	if (f->held_fd > 0)
		return true;
	sock = km_fd_hide(bind_name(fd));
	if (sock < 0)
		return false;
	f->held_fd = sock;
	return true;
}

void km_held_drop(struct km_file *f)
{
	if (f->held_fd > 0)
		km_fd_unhide(f->held_fd);
	f->held_fd = 0;
}

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t len = sizeof(value);

	return km_sys_getsockopt(fd, level, name, &value, &len) < 0 ? -1 : value;
}

static bool is_established(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof(info);

	return km_sys_getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0 &&
	       info.tcpi_state == TCP_ESTABLISHED;
}

void km_held_received(int fd)
{
	enum km_role role;
	struct km_file *f;
	int sock;

	km_fd_forget(fd);
	if (km_proc.disabled || km_thread.bypass ||
	    option(fd, SOL_SOCKET, SO_PROTOCOL) != IPPROTO_TCP || !is_established(fd))
		return;
	sock = bind_name(fd);
	if (sock >= 0)
		km_sys_close(sock);
	if (sock != -EADDRINUSE)
		return;
	role = km_link_role(fd);
	if (role == KM_ROLE_UNKNOWN)
		return;
	km_file_new(fd, role);
	f = km_file_of(fd);
	if (f)
		f->passed = true;
}
