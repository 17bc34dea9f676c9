/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where two ends of a connection meet, and whether whoever comes there is the other end.
 *
 * The name is made from the addresses that the connector knows, so the acceptor of a
 * redirected connection asks the kernel where it was meant to go.  Anybody can bind a name
 * or connect to it: what counts is who owns the other end of the TCP connection.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>

#include "link/internal.h"

#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h; the same number for IPv6 */
#endif

static int address_of(const struct sockaddr_storage *ss, struct km_address *out)
{
	static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

	if (ss->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const struct sockaddr_in *)ss;

		memcpy(out->ip, prefix, sizeof(prefix));
		memcpy(out->ip + 12, &in->sin_addr, 4);
		out->port = ntohs(in->sin_port);
		return 0;
	}
	if (ss->ss_family == AF_INET6) {
		const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)ss;

		memcpy(out->ip, &in6->sin6_addr, 16);
		out->port = ntohs(in6->sin6_port);
		return 0;
	}
	return -EAFNOSUPPORT;
}

int km_link_addresses(int fd, struct km_address *local, struct km_address *peer)
{
	struct sockaddr_storage ss;
	socklen_t len = sizeof(ss);
	int err = km_sys_getsockname(fd, &ss, &len);

	if (err == 0)
		err = address_of(&ss, local);
	len = sizeof(ss);
	if (err == 0)
		err = km_sys_getpeername(fd, &ss, &len);
	return err == 0 ? address_of(&ss, peer) : err;
}

enum km_role km_link_role(int fd)
{
	struct km_address local, peer;

	if (km_link_addresses(fd, &local, &peer) < 0)
		return KM_ROLE_UNKNOWN;
	/* Most of what is passed on was accepted. */
	return !km_diag_listens(&local) && km_diag_listens(&peer) ? KM_ROLE_CONNECTOR
								  : KM_ROLE_ACCEPTOR;
}

void km_link_original_destination(int fd, const struct km_address *local,
				  struct km_address *out)
{
	struct sockaddr_storage ss;
	socklen_t len = sizeof(ss);

	*out = *local;
	memset(&ss, 0, sizeof(ss));
	if (km_sys_getsockopt(fd, IPPROTO_IP, SO_ORIGINAL_DST, &ss, &len) == 0 &&
	    address_of(&ss, out) == 0)
		return;
	len = sizeof(ss);
	if (km_sys_getsockopt(fd, IPPROTO_IPV6, SO_ORIGINAL_DST, &ss, &len) == 0 &&
	    address_of(&ss, out) == 0)
		return;
	*out = *local;
}

socklen_t km_link_rendezvous_name(struct sockaddr_un *un, const struct km_address *from,
				  const struct km_address *to)
{
	static const char digits[] = "0123456789abcdef", prefix[] = "kmap1:";
	const struct km_address *ends[] = {from, to};
	char *at = un->sun_path;

	memset(un, 0, sizeof(*un));
	un->sun_family = AF_UNIX;
	*at++ = '\0';
	memcpy(at, prefix, sizeof(prefix) - 1);
	at += sizeof(prefix) - 1;
	for (int i = 0; i < 2; i++) {
		uint8_t bytes[18];

		memcpy(bytes, ends[i]->ip, 16);
		bytes[16] = (uint8_t)(ends[i]->port >> 8);
		bytes[17] = (uint8_t)ends[i]->port;
		for (int k = 0; k < 18; k++) {
			*at++ = digits[bytes[k] >> 4];
			*at++ = digits[bytes[k] & 15];
		}
	}
	return (socklen_t)(at - (char *)un);
}

static void not_the_owner(const struct km_file *f)
{
	km_log(KM_LOG_ERROR,
	       "fd %d: whoever came to the rendezvous does not own the other end "
	       "of the connection; it stays on the kernel",
	       f->fd);
}

enum km_reason km_link_prove(const struct km_file *f, int sock,
			     const struct km_address *local,
			     const struct km_address *remote, uint32_t *uid)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);
	uint32_t owner;
	int err = km_sys_getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len);

	if (err == 0)
		err = km_diag_owner(local, remote, &owner);
	if (err < 0 && err != -ENOENT) {
		km_log(KM_LOG_ERROR,
		       "fd %d: sock_diag cannot say who owns the other end (errno %d); "
		       "it stays on the kernel",
		       f->fd, -err);
		return err == -EPROTO || err == -EPROTONOSUPPORT ? KM_REASON_SYSCALL
								 : km_stay_reason(err);
	}
	*uid = cred.uid;
	if (err == 0 && owner == cred.uid)
		return KM_REASON_NONE;
	not_the_owner(f);
	return KM_REASON_PEER_UID;
}
