/* SPDX-License-Identifier: Apache-2.0 */
/* Who owns a TCP socket: one exact lookup through sock_diag(7). */
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <string.h>

#include "link/link.h"

static bool is_v4(const struct km_address *a)
{
	static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

	return memcmp(a->ip, prefix, sizeof(prefix)) == 0;
}

static int ask(int fd, const struct km_address *local, const struct km_address *remote,
	       uint32_t *uid)
{
	struct {
		struct nlmsghdr nl;
		struct inet_diag_req_v2 req;
	} ask;
	_Alignas(struct nlmsghdr) char reply[1024];
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	const struct nlmsghdr *nl = (const struct nlmsghdr *)(const void *)reply;
	bool v4 = is_v4(local) && is_v4(remote);
	ssize_t n;

	memset(&ask, 0, sizeof(ask));
	ask.nl.nlmsg_len = sizeof(ask);
	ask.nl.nlmsg_type = SOCK_DIAG_BY_FAMILY;
	ask.nl.nlmsg_flags = NLM_F_REQUEST;
	ask.req.sdiag_family = v4 ? AF_INET : AF_INET6;
	ask.req.sdiag_protocol = IPPROTO_TCP;
	ask.req.idiag_states = (uint32_t)-1;
	ask.req.id.idiag_sport = htons(local->port);
	ask.req.id.idiag_dport = htons(remote->port);
	memcpy(ask.req.id.idiag_src, v4 ? local->ip + 12 : local->ip, v4 ? 4 : 16);
	memcpy(ask.req.id.idiag_dst, v4 ? remote->ip + 12 : remote->ip, v4 ? 4 : 16);
	ask.req.id.idiag_cookie[0] = INET_DIAG_NOCOOKIE;
	ask.req.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
	n = km_sys_sendto(fd, &ask, sizeof(ask), 0, &kernel, sizeof(kernel));
	if (n < 0)
		return (int)n;
	/* sock_diag answers before sendto returns: there is nothing to wait for. */
	n = km_sys_recvfrom(fd, reply, sizeof(reply), MSG_DONTWAIT);
	if (n < 0)
		return (int)n;
	if (!NLMSG_OK(nl, (size_t)n))
		return -EPROTO;
	if (nl->nlmsg_type == NLMSG_ERROR) {
		const struct nlmsgerr *err = NLMSG_DATA(nl);

		return err->error ? err->error : -EPROTO;
	}
	if (nl->nlmsg_type != SOCK_DIAG_BY_FAMILY ||
	    nl->nlmsg_len < NLMSG_LENGTH(sizeof(struct inet_diag_msg)))
		return -EPROTO;
	const struct inet_diag_msg *msg = NLMSG_DATA(nl);

	/* The lookup falls back to a listener on the same port. */
	if (msg->id.idiag_dport != htons(remote->port))
		return -ENOENT;
	*uid = msg->idiag_uid;
	return 0;
}

int km_diag_owner(const struct km_address *local, const struct km_address *remote,
		  uint32_t *uid)
{
	int fd = km_sys_socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	int err;

	if (fd < 0)
		return fd;
	err = ask(fd, local, remote, uid);
	km_sys_close(fd);
	return err;
}

bool km_diag_listens(const struct km_address *at)
{
	struct km_address nobody;
	uint32_t uid;

	memset(&nobody, 0, sizeof(nobody));
	if (is_v4(at))
		memset(nobody.ip + 10, 0xff, 2);
	return km_diag_owner(at, &nobody, &uid) == 0;
}
