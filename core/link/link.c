/* SPDX-License-Identifier: Apache-2.0 */
#include "link/link.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/time.h>
#include <sys/un.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/held.h"
#include "sock/stream.h"
#include "transport/transport.h"

#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h; the same number for IPv6 */
#endif

/* How often each end tries before it leaves a connection to the kernel.  The
 * first tries come with every call, later ones with every doubling: a sender may fill
 * megabytes of socket buffers before its peer has read for the first time. */
#define EAGER_TRIES 8
#define CONNECTOR_TRIES 24
#define ACCEPTOR_TRIES 24

/* Of every hello; those of its transport follow. */
#define HELLO_FDS 3
#define MOST_FDS (HELLO_FDS + KM_TRANSPORT_FDS)

/* With KMAP_UPGRADE_AFTER=0, how long connect and accept wait for the other end. */
#define MADE_PATIENCE_NS 10000000
#define MADE_NAP_NS 1000000

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

/* Where the connector meant to go, before any redirection by the kernel. */
static void original_destination(int fd, const struct km_address *local,
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

/* "\0kmap1:" and both ends in hexadecimal: no two connections share a name. */
static socklen_t rendezvous_name(struct sockaddr_un *un, const struct km_address *from,
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

/* When to look again, and whether to stop looking. */
static void back_off(struct km_file *f, unsigned most, enum km_reason reason)
{
	f->tries++;
	f->reason = (uint8_t)reason;
	f->next_try = f->tries < EAGER_TRIES ? f->calls + 1 : f->calls * 2;
	if (f->tries < most)
		return;
	km_link_cancel(f);
	km_store_seq(&f->mode, KM_MODE_PINNED);
	km_stay(f, reason);
}

static void give_up(struct km_file *f, enum km_reason reason)
{
	f->tries = UINT8_MAX - 1;
	back_off(f, 0, reason);
}

/* A system call of the upgrade failed.  Trying again would fail again, or take from the
 * program what it is short of. */
static void failed(struct km_file *f, const char *call, int err)
{
	km_log(KM_LOG_ERROR, "fd %d stays on the kernel: %s failed (errno %d)", f->fd,
	       call, -err);
	give_up(f, km_stay_reason(err));
}

/* The connection is not made yet, or over, or there is no telling. */
static void no_address(struct km_file *f, int err)
{
	if (err == -ENOTCONN)
		back_off(f, CONNECTOR_TRIES, KM_REASON_HALF_CLOSED);
	else
		failed(f, "getsockname or getpeername", err);
}

/* -- datagrams --------------------------------------------------------------- */

static int send_hello(int sock, const struct km_wire_hello *hello, const int *fds,
		      int nfds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * MOST_FDS)];
	struct iovec iov = {(void *)(uintptr_t)hello, sizeof(*hello)};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (nfds) {
		struct cmsghdr *c;

		memset(control, 0, sizeof(control));
		msg.msg_control = control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
		memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)nfds);
	}
	n = km_sys_sendmsg(sock, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (n < 0)
		return (int)n;
	return n == (ssize_t)sizeof(*hello) ? 0 : -EPROTO;
}

/* Why a datagram could not be sent or received. */
static enum km_reason exchange_reason(int err)
{
	switch (err) {
	case -EPIPE:
	case -ECONNRESET:
	case -ENOTCONN:
		return KM_REASON_PEER_CANCELLED;
	default:
		return km_stay_reason(err);
	}
}

/*
 * Receives the peer's one datagram with up to MOST_FDS descriptors; every
 * descriptor that came is either in fds or closed.  The number of descriptors,
 * -EAGAIN (not there yet), -EPROTO, -EPROTONOSUPPORT (another version),
 * -ECONNRESET (the peer hung up).
 */
static int recv_hello(int sock, struct km_wire_hello *hello, int fds[MOST_FDS])
{
	/* Room for more than is allowed, so that extra ones can be closed. */
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)];
	struct iovec iov = {hello, sizeof(*hello)};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control,
			     .msg_controllen = sizeof(control)};
	ssize_t n = km_sys_recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int count = 0, err = 0;
	bool bad = false;

	if (n < 0)
		return (int)n;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		int got[16];
		size_t room;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		room = KM_MIN(c->cmsg_len - CMSG_LEN(0), sizeof(got));
		memcpy(got, CMSG_DATA(c), room);
		for (size_t i = 0; i < room / sizeof(int); i++) {
			if (count < MOST_FDS) {
				fds[count++] = got[i];
			} else {
				km_sys_close(got[i]);
				bad = true;
			}
		}
	}
	if (n == 0 && count == 0)
		return -ECONNRESET;
	/* All versions begin alike; their length, and what comes with them, may differ. */
	if (n >= (ssize_t)offsetof(struct km_wire_hello, kind) &&
	    hello->magic == KM_HELLO_MAGIC && hello->version != KM_WIRE_VERSION)
		err = -EPROTONOSUPPORT;
	else if (bad || n != (ssize_t)sizeof(*hello) ||
		 hello->magic != KM_HELLO_MAGIC ||
		 (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		err = -EPROTO;
	if (err == 0)
		return count;
	while (count)
		km_sys_close(fds[--count]);
	return err;
}

/* -- the channel ------------------------------------------------------------- */

/* Stops all plain calls on f; false when one is in the kernel just now, where it
 * could sleep through the cut-over. */
static bool switch_begin(struct km_file *f)
{
	if (f->procs && km_load_seq(f->procs) > 1) {
		f->reason = KM_REASON_SHARED;
		return false;
	}
	km_store_seq(&f->mode, KM_MODE_SWITCHING);
	if (km_load_seq(&f->busy) == 0)
		return true;
	km_store_seq(&f->mode, KM_MODE_PLAIN);
	return false;
}

/* Room for one more segment?  What counts is what the rings start with; pages
 * of larger levels are only there once they are used. */
static bool within_budget(void)
{
	uint64_t start = KM_WIRE_HEADER + 2 * KM_RING_FIRST;

	return (km_load_relaxed(&km_proc.channels) + 1) * start <=
	       km_proc.options.memory_limit;
}

uint64_t km_link_inode(int fd)
{
	struct stat st;
	int err = km_sys_fstat(fd, &st);

	/* Another call for the same, where a filter refuses that one. */
	if (err < 0)
		err = (int)KM_SYS(newfstatat, fd, "", &st, 0x1000 /* AT_EMPTY_PATH */,
				  0, 0);
	return err < 0 ? 0 : (uint64_t)st.st_ino;
}

static bool has_timeout(int fd, int option)
{
	struct timeval tv = {0, 0};
	socklen_t len = sizeof(tv);

	return km_sys_getsockopt(fd, SOL_SOCKET, option, &tv, &len) < 0 || tv.tv_sec ||
	       tv.tv_usec;
}

/* Fills a new row and its cursors, and gives it to f. */
static void conn_start(struct km_file *f, int fd, struct km_conn *conn,
		       enum km_transport_id transport, const struct km_address *local,
		       const struct km_address *peer, const struct km_address *original)
{
	int rx = f->role == KM_ROLE_ACCEPTOR ? 0 : 1, tx = 1 - rx;
	struct km_wire_segment *wire = f->seg.wire;
	socklen_t len = sizeof(conn->lowat);
	int flags = km_sys_fcntl(fd, F_GETFL, 0);
	uint32_t conn_flags = flags >= 0 && (flags & O_NONBLOCK) ? KM_CONN_NONBLOCK : 0;

	conn->row.role = f->role;
	conn->row.inode = km_link_inode(fd);
	conn->row.fd = fd;
	conn->row.pid = (uint32_t)km_sys_getpid();
	conn->row.lport = local->port;
	conn->row.pport = peer->port;
	memcpy(conn->row.laddr, local->ip, 16);
	memcpy(conn->row.paddr, peer->ip, 16);
	if (original && !km_same_address(original, local)) {
		conn->row.oport = original->port;
		memcpy(conn->row.oaddr, original->ip, 16);
	}
	conn->row.ring_size = f->seg.ring_size;
	conn->row.transport = transport;
	memcpy(conn->row.token, wire->token, sizeof(wire->token));
	conn->row.segment = (uintptr_t)wire;
	km_producer_init(&conn->tx, &wire->ring[tx], km_segment_data(&f->seg, tx),
			 f->seg.ring_size);
	km_consumer_init(&conn->rx, &wire->ring[rx], km_segment_data(&f->seg, rx),
			 f->seg.ring_size);
	conn->lowat = 1;
	km_sys_getsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &conn->lowat, &len);
	if (has_timeout(fd, SO_RCVTIMEO) || has_timeout(fd, SO_SNDTIMEO))
		conn_flags |= KM_CONN_TIMEOUTS;
	km_store_relaxed(&conn->flags, conn_flags);
	km_store_seq(&conn->refs, f->fds);
	km_store_seq(&conn->procs, 1);
	km_add_seq(&km_proc.memory, f->seg.size);
	km_add_seq(&km_proc.channels, 1);
	f->conn = conn;
}

/* The acceptor's handshake is over, or comes to nothing. */
static void settled(const struct km_file *f)
{
	const struct km_transport *transport = km_transport_of(f->conn);

	if (f->role == KM_ROLE_ACCEPTOR && transport->settled)
		transport->settled(f->conn->row.token);
}

/* The channel will not be used: both directions stay on the kernel for good. */
static void abandon(struct km_file *f, enum km_reason reason)
{
	km_stream_abandon(f);
	settled(f);
	/* In the child of a vfork they are the parent's. */
	if (!km_thread.bypass)
		km_transport_drop(f);
	f->conn->row.state = KM_ROW_KERNEL;
	f->conn->row.reason = reason;
	f->reason = (uint8_t)reason;
	f->link_state = KM_LINK_DONE;
	if (km_proc.reasons)
		km_add_relaxed(&km_proc.reasons[reason], 1);
}

/* What the connection will need once it is on a ring, where it could not go back for
 * want of it: is it let through?  0 or the error. */
static int try_calls(int fd)
{
	struct pollfd pfd = {.fd = fd};
	struct timespec now = {0, 0};
	struct tcp_info info;
	socklen_t len = sizeof(info);
	int unread, err = km_sys_getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len);

	if (err == 0)
		err = km_sys_ioctl(fd, SIOCINQ, &unread);
	if (err == 0)
		err = km_sys_poll(&pfd, 1, &now);
	return KM_MIN(err, 0);
}

/* Undoes conn_start before anybody else could see the channel. */
static void conn_undo(struct km_file *f)
{
	struct km_conn *conn = f->conn;

	settled(f);
	km_transport_drop(f);
	f->conn = NULL;
	km_sub_seq(&km_proc.memory, f->seg.size);
	km_sub_seq(&km_proc.channels, 1);
	km_bell_drop(f);
	km_peer_bell_drop(f);
	memset(&conn->row.ring_rx_bytes, 0, 32);
	km_conn_free(conn);
}

static int bell_fds(const struct km_file *f, int *fds)
{
	fds[0] = f->bell->memfd;
	fds[1] = f->bell->latch;
	return 2;
}

/* -- acceptor ----------------------------------------------------------------- */

static void not_the_owner(const struct km_file *f)
{
	km_log(KM_LOG_ERROR,
	       "fd %d: whoever came to the rendezvous does not own the other end "
	       "of the connection; it stays on the kernel",
	       f->fd);
}

/* The Unix socket's peer must own the other end of the TCP connection.  NONE when it
 * does. */
static enum km_reason prove(const struct km_file *f, int sock,
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

static void close_all(const int *fds, int n)
{
	while (n > 0)
		km_sys_close(fds[--n]);
}

/* What the acceptor keeps none of: the segment, and what its transport sends. */
static void close_sent(const int *fds, const struct km_transport *transport)
{
	km_sys_close(fds[0]);
	close_all(fds + HELLO_FDS, transport->fds);
}

/* What an error of the transport's means for the connection. */
static enum km_reason transport_reason(int err)
{
	switch (err) {
	case -EPROTO:
	case -EMFILE:
	case -ENFILE:
	case -ENOMEM:
		return km_stay_reason(err);
	default:
		return KM_REASON_TRANSPORT_FAILED;
	}
}

/* Gives f the pipes of its transport, if it is made of such: new ones for the acceptor,
 * with sent for the hello, or those that sent stands for. */
static enum km_reason take_pipes(struct km_file *f,
				 const struct km_transport *transport, uint32_t uid,
				 int *sent)
{
	bool attaches = f->role == KM_ROLE_CONNECTOR;
	uint32_t size = f->seg.ring_size;
	int pipes[2] = {-1, -1}, err;
	uint8_t token[16];

	if (!transport->bare)
		return KM_REASON_NONE;
	if (uid != geteuid())
		return KM_REASON_TRANSPORT_USER;
	memcpy(token, f->seg.wire->token, sizeof(token));
	err = attaches ? transport->attach(token, size, sent, pipes)
		       : transport->create(token, &size, pipes, sent);
	/* Ring 0 is the connector's to write. */
	f->tx_pipe = pipes[attaches ? 0 : 1];
	f->rx_pipe = pipes[attaches ? 1 : 0];
	if (err < 0) {
		km_transport_drop(f);
		if (!attaches && transport->settled)
			transport->settled(token);
		return transport_reason(err);
	}
	f->tx_inode = km_transport_inode(f->tx_pipe);
	f->rx_inode = km_transport_inode(f->rx_pipe);
	if (!attaches)
		km_segment_resize(&f->seg, size);
	return KM_REASON_NONE;
}

static enum km_reason make_channel(struct km_file *f, int fd, int sock, uint32_t uid,
				   const struct km_address *local,
				   const struct km_address *peer,
				   const struct km_address *original)
{
	struct km_wire_hello hello = {.magic = KM_HELLO_MAGIC,
				      .version = KM_WIRE_VERSION,
				      .kind = KM_HELLO,
				      .transport = km_proc.transport,
				      .lport = local->port};
	const struct km_transport *transport = km_transports[km_proc.transport];
	enum km_reason reason;
	int fds[MOST_FDS], err;
	struct km_conn *conn;

	err = try_calls(fd);
	if (err < 0)
		return km_stay_reason(err);
	conn = km_conn_new(&reason);
	if (!conn)
		return reason;
	err = km_segment_create(&f->seg, (uint32_t)km_proc.options.ring_size,
				transport->bare, &fds[0]);
	if (err < 0) {
		km_conn_free(conn);
		return km_stay_reason(err);
	}
	KM_FAULT(HELLO_SEGMENT);
	reason = take_pipes(f, transport, uid, fds + HELLO_FDS);
	if (reason != KM_REASON_NONE) {
		km_sys_close(fds[0]);
		km_segment_unmap(&f->seg);
		km_conn_free(conn);
		return reason;
	}
	conn_start(f, fd, conn, km_proc.transport, local, peer, original);
	err = km_bell_take(f, uid);
	if (err == 0)
		err = km_event_attach(f);
	if (err == 0) {
		hello.slot = f->slot;
		memcpy(hello.laddr, local->ip, 16);
		bell_fds(f, fds + 1);
		/* From here on the connector may attach and use its ring. */
		km_store_seq(&f->mode, KM_MODE_CHANNEL);
		KM_FAULT(HELLO_BELL);
		err = send_hello(sock, &hello, fds, HELLO_FDS + transport->fds);
		KM_FAULT(HELLO_SENT);
		if (err < 0) {
			abandon(f, exchange_reason(err));
			close_sent(fds, transport);
			return KM_REASON_NONE;
		}
	}
	close_sent(fds, transport);
	if (err < 0) {
		conn_undo(f);
		km_segment_unmap(&f->seg);
		return km_stay_reason(err);
	}
	f->link_fd = sock;
	f->link_state = KM_LINK_HELLO;
	return KM_REASON_NONE;
}

static void knock(struct km_file *f, int fd)
{
	struct km_address local, peer, original;
	struct sockaddr_un un;
	socklen_t len;
	enum km_reason reason;
	uint32_t uid = 0;
	int sock, err = km_link_addresses(fd, &local, &peer);

	if (err < 0) {
		no_address(f, err);
		return;
	}
	original_destination(fd, &local, &original);
	if (!km_permit(f, &local, &peer, &original, &local, NULL, NULL)) {
		give_up(f, KM_REASON_POLICY);
		return;
	}
	if (!within_budget()) {
		give_up(f, KM_REASON_BUDGET_MEMORY);
		return;
	}
	km_count(KM_COUNT_KNOCKS);
	sock = km_sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock < 0) {
		failed(f, "socket", sock);
		return;
	}
	len = rendezvous_name(&un, &peer, &original);
	KM_FAULT(HELLO_KNOCK);
	err = km_sys_connect(sock, &un, len);
	if (err < 0) {
		km_sys_close(sock);
		if (err == -ECONNREFUSED || err == -EAGAIN)
			back_off(f, ACCEPTOR_TRIES, KM_REASON_PEER_ABSENT);
		else
			failed(f, "connect", err);
		return;
	}
	KM_FAULT(HELLO_INSIDE);
	sock = km_fd_hide(sock);
	if (sock < 0) {
		give_up(f, KM_REASON_BUDGET_FD);
		return;
	}
	reason = prove(f, sock, &peer, &original, &uid);
	if (reason == KM_REASON_NONE &&
	    !km_permit(f, &local, &peer, &original, &local, &uid, NULL))
		reason = KM_REASON_POLICY;
	if (reason != KM_REASON_NONE) {
		km_fd_unhide(sock);
		give_up(f, reason);
		return;
	}
	if (!switch_begin(f)) {
		km_fd_unhide(sock);
		back_off(f, ACCEPTOR_TRIES, (enum km_reason)f->reason);
		return;
	}
	reason = make_channel(f, fd, sock, uid, &local, &peer, &original);
	if (km_load_seq(&f->mode) == KM_MODE_SWITCHING)
		km_store_seq(&f->mode, KM_MODE_PLAIN);
	if (f->link_state != KM_LINK_HELLO)
		km_fd_unhide(sock);
	if (reason != KM_REASON_NONE)
		give_up(f, reason);
}

/* -- connector ----------------------------------------------------------------- */

static void offer(struct km_file *f, int fd)
{
	struct km_address local, peer;
	struct sockaddr_un un;
	int sock, err = km_link_addresses(fd, &local, &peer);

	if (err < 0) {
		no_address(f, err);
		return;
	}
	if (!km_permit(f, &local, &peer, &peer, NULL, NULL, NULL)) {
		give_up(f, KM_REASON_POLICY);
		return;
	}
	if (!within_budget()) {
		give_up(f, KM_REASON_BUDGET_MEMORY);
		return;
	}
	if (f->procs && km_load_seq(f->procs) > 1) {
		back_off(f, CONNECTOR_TRIES, KM_REASON_SHARED);
		return;
	}
	sock = km_sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock < 0) {
		failed(f, "socket", sock);
		return;
	}
	err = km_sys_bind(sock, &un, rendezvous_name(&un, &local, &peer));
	KM_FAULT(OFFER_BOUND);
	if (err == 0)
		err = km_sys_listen(sock, 4);
	KM_FAULT(OFFER_LISTENS);
	if (err < 0) {
		km_sys_close(sock);
		if (err == -EADDRINUSE)
			back_off(f, CONNECTOR_TRIES, KM_REASON_NAME_TAKEN);
		else
			failed(f, "bind or listen", err);
		return;
	}
	km_count(KM_COUNT_OFFERS);
	sock = km_fd_hide(sock);
	if (sock < 0) {
		give_up(f, KM_REASON_BUDGET_FD);
		return;
	}
	f->link_fd = sock;
	f->link_state = KM_LINK_OFFERED;
	f->tries = 0;
	f->next_try = f->calls + 1;
	f->reason = KM_REASON_PEER_ABSENT;
	KM_FAULT(OFFER_MADE);
}

/* Takes what came with the hello; fds are taken over. */
static enum km_reason attach(struct km_file *f, int fd, int sock,
			     const struct km_wire_hello *hello, int fds[MOST_FDS])
{
	const struct km_transport *transport = km_transports[km_proc.transport];
	struct km_wire_hello ack = {
		.magic = KM_HELLO_MAGIC, .version = KM_WIRE_VERSION, .kind = KM_ACK};
	struct km_address local, peer, acceptor;
	uint32_t uid = 0, hello_state = KM_SEG_HELLO;
	bool user_named = false;
	enum km_reason reason;
	struct km_conn *conn;
	int own[2], err;

	err = km_link_addresses(fd, &local, &peer);
	memcpy(acceptor.ip, hello->laddr, 16);
	acceptor.port = hello->lport;
	reason = err < 0	    ? km_stay_reason(err)
		 : !within_budget() ? KM_REASON_BUDGET_MEMORY
				    : prove(f, sock, &acceptor, &local, &uid);
	if (reason == KM_REASON_NONE &&
	    !km_permit(f, &local, &peer, &peer, &acceptor, &uid, &user_named))
		reason = KM_REASON_POLICY;
	/* A redirected connection's acceptor has another address than this end
	 * connected to; that it is ours is then only its own word, which is enough
	 * between processes of one user, and from a user whom a rule names. */
	if (reason == KM_REASON_NONE && !km_same_address(&acceptor, &peer) &&
	    uid != geteuid() && !user_named) {
		km_log(KM_LOG_ERROR,
		       "fd %d is redirected to a process of user %u, which no rule of "
		       "KMAP_POLICY names (uid=%u); it stays on the kernel",
		       f->fd, uid, uid);
		reason = KM_REASON_PEER_UID;
	}
	if (reason == KM_REASON_NONE && (err = try_calls(fd)) < 0)
		reason = km_stay_reason(err);
	if (reason == KM_REASON_NONE) {
		err = km_segment_attach(&f->seg, transport->bare, fds[0]);
		KM_FAULT(ATTACH_MAPPED);
		if (err < 0)
			reason = err == -EPERM ? KM_REASON_PEER_BAD
					       : km_stay_reason(err);
	}
	if (reason == KM_REASON_NONE) {
		reason = take_pipes(f, transport, uid, fds + HELLO_FDS);
		if (reason != KM_REASON_NONE)
			km_segment_unmap(&f->seg);
	}
	km_sys_close(fds[0]);
	close_all(fds + HELLO_FDS, transport->fds);
	if (reason != KM_REASON_NONE) {
		km_sys_close(fds[1]);
		km_sys_close(fds[2]);
		return reason;
	}
	err = km_peer_bell_take(f, fds[1], fds[2], uid, hello->slot);
	if (err < 0) {
		km_transport_drop(f);
		km_segment_unmap(&f->seg);
		return km_stay_reason(err);
	}
	conn = km_conn_new(&reason);
	if (!conn) {
		km_transport_drop(f);
		km_peer_bell_drop(f);
		km_segment_unmap(&f->seg);
		return reason;
	}
	conn_start(f, fd, conn, km_proc.transport, &local, &peer, NULL);
	err = km_bell_take(f, uid);
	if (err == 0)
		err = km_event_attach(f);
	if (err < 0) {
		conn_undo(f);
		km_segment_unmap(&f->seg);
		return km_stay_reason(err);
	}
	ack.slot = f->slot;
	bell_fds(f, own);
	KM_FAULT(ATTACH_BELL);
	err = send_hello(sock, &ack, own, 2);
	KM_FAULT(ATTACH_ACKED);
	km_store_seq(&f->mode, KM_MODE_CHANNEL);
	/* The acceptor may have taken the ack, and said ready, by now. */
	if (err < 0 ||
	    (!km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_ATTACHED) &&
	     hello_state != KM_SEG_READY)) {
		abandon(f, err < 0 ? exchange_reason(err) : KM_REASON_PEER_CANCELLED);
		return KM_REASON_NONE;
	}
	KM_FAULT(ATTACH_DONE);
	conn->row.state = KM_ROW_RING;
	f->reason = KM_REASON_NONE;
	f->link_state = KM_LINK_DONE;
	km_count(KM_COUNT_UPGRADES);
	km_log(KM_LOG_INFO, "fd %d upgraded as connector", fd);
	return KM_REASON_NONE;
}

static void refuse(int sock, enum km_reason reason)
{
	struct km_wire_hello no = {.magic = KM_HELLO_MAGIC,
				   .version = KM_WIRE_VERSION,
				   .kind = KM_REFUSE,
				   .reason = reason};

	send_hello(sock, &no, NULL, 0);
}

static void take_hello(struct km_file *f, int fd)
{
	struct km_wire_hello hello;
	int fds[MOST_FDS], n, sock;
	enum km_reason reason = KM_REASON_NONE;

	if (f->link_state == KM_LINK_OFFERED) {
		sock = km_sys_accept4(f->link_fd, NULL, NULL,
				      SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (sock == -EAGAIN || sock == -ECONNABORTED) {
			back_off(f, CONNECTOR_TRIES, KM_REASON_PEER_ABSENT);
			return;
		}
		if (sock < 0) {
			failed(f, "accept4", sock);
			return;
		}
		KM_FAULT(ATTACH_CAME);
		km_fd_unhide(f->link_fd);
		f->link_fd = km_fd_hide(sock);
		if (f->link_fd < 0) {
			f->link_state = KM_LINK_NONE;
			give_up(f, KM_REASON_BUDGET_FD);
			return;
		}
		f->link_state = KM_LINK_ACCEPTED;
	}
	sock = f->link_fd;
	/* Leave the hello where it is until no plain call is in the kernel. */
	if (!switch_begin(f)) {
		back_off(f, CONNECTOR_TRIES, (enum km_reason)f->reason);
		return;
	}
	n = recv_hello(sock, &hello, fds);
	if (n == -EAGAIN) {
		km_store_seq(&f->mode, KM_MODE_PLAIN);
		back_off(f, CONNECTOR_TRIES, KM_REASON_PEER_CANCELLED);
		return;
	}
	if (n < 0) {
		reason = exchange_reason(n);
	} else if (hello.kind == KM_HELLO && hello.transport != km_proc.transport) {
		close_all(fds, n);
		reason = KM_REASON_TRANSPORT;
	} else if (n != HELLO_FDS + km_transports[km_proc.transport]->fds ||
		   hello.kind != KM_HELLO || hello.slot >= KM_BELL_SLOTS) {
		close_all(fds, n);
		reason = KM_REASON_PEER_BAD;
	} else {
		KM_FAULT(ATTACH_TAKEN);
		reason = attach(f, fd, sock, &hello, fds);
	}
	if (km_load_seq(&f->mode) == KM_MODE_SWITCHING)
		km_store_seq(&f->mode, KM_MODE_PLAIN);
	if (reason != KM_REASON_NONE) {
		refuse(sock, reason);
		give_up(f, reason);
		return;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
}

/* -- either ----------------------------------------------------------------- */

void km_link_poke(struct km_file *f, int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	if (how == KM_LOCK_NESTED)
		return;
	/* With a thread in the kernel there is no switching now, which is no reason
	 * to try less often later. */
	if (km_load_seq(&f->mode) != KM_MODE_PLAIN || f->calls < f->next_try ||
	    km_load_seq(&f->busy) || km_file_of(fd) != f) {
		/* Not now. */
	} else if (!km_fd_spare()) {
		give_up(f, KM_REASON_BUDGET_FD);
	} else {
		switch ((enum km_link_state)f->link_state) {
		case KM_LINK_NONE:
			if (f->passed && !km_held_take(f, fd))
				back_off(f, ACCEPTOR_TRIES, KM_REASON_SHARED);
			else if (f->role == KM_ROLE_CONNECTOR)
				offer(f, fd);
			else if (f->role == KM_ROLE_ACCEPTOR)
				knock(f, fd);
			else
				f->next_try = UINT32_MAX;
			break;
		case KM_LINK_OFFERED:
		case KM_LINK_ACCEPTED:
			take_hello(f, fd);
			break;
		case KM_LINK_HELLO:
		case KM_LINK_DONE:
			break;
		}
	}
	km_unlock(&km_proc.link_lock, how);
}

void km_link_made(int fd, bool wait)
{
	struct km_file *f = km_file_of(fd);
	struct timespec nap = {0, MADE_NAP_NS};
	int64_t end;

	if (km_likely(!f || km_proc.options.upgrade_after))
		return;
	end = km_now_ns() + MADE_PATIENCE_NS;
	do {
		struct pollfd pfd = {.events = POLLIN};

		/* None of these counts as one of the few tries. */
		f->tries = 0;
		f->next_try = 0;
		km_link_poke(f, fd);
		if (km_load_acquire(&f->mode) == KM_MODE_CHANNEL)
			km_link_advance(f, fd);
		if (f->link_state == KM_LINK_DONE ||
		    km_load_acquire(&f->mode) == KM_MODE_PINNED)
			return;
		if (!wait)
			break;
		pfd.fd = f->link_fd;
		km_sys_poll(&pfd, 1, &nap);
	} while (km_now_ns() < end && km_file_of(fd) == f);
	/* The first call that carries bytes goes on. */
	f->next_try = f->calls;
}

/* link_lock held, link_state HELLO. */
static void advance(struct km_file *f)
{
	struct km_wire_hello ack = {0};
	int fds[MOST_FDS], n;
	uint32_t state;
	bool ready = false;
	enum km_reason reason = KM_REASON_PEER_CANCELLED;

	state = km_load_sync(ATTACH_SEE, &f->seg.wire->state);
	/* The ack is sent before the segment says attached.  Before that, a look
	 * at the socket tells of a refusal; a few of them are enough. */
	if (state == KM_SEG_HELLO && f->calls++ < f->next_try)
		return;
	/* The ack brings two descriptors; until there is place the kernel goes on. */
	if (!km_fd_spare())
		return;
	n = recv_hello(f->link_fd, &ack, fds);
	if (n == -EAGAIN && state == KM_SEG_HELLO) {
		f->next_try = f->calls * 2 + 1;
		return;
	}
	if (n == 2 && ack.kind == KM_ACK && ack.slot < KM_BELL_SLOTS) {
		KM_FAULT(ATTACH_ANSWER);
		int err = km_peer_bell_take(f, fds[0], fds[1], f->bell->uid, ack.slot);

		reason = km_stay_reason(err);
		n = 0;
		ready = err == 0;
	} else if (n == 0 && ack.kind == KM_REFUSE && ack.reason < 64) {
		reason = (enum km_reason)ack.reason;
	} else if (n < 0 && n != -EAGAIN) {
		reason = exchange_reason(n);
	}
	close_all(fds, n);
	if (ready) {
		settled(f);
		f->conn->row.state = KM_ROW_RING;
		f->reason = KM_REASON_NONE;
		f->link_state = KM_LINK_DONE;
		km_store_sync(ATTACH_SET, &f->seg.wire->state, KM_SEG_READY);
		KM_FAULT(ATTACH_READY);
		km_count(KM_COUNT_UPGRADES);
		km_log(KM_LOG_INFO, "fd %d upgraded as acceptor", f->fd);
	} else {
		/* The connector uses nothing before it sees ready. */
		km_store_sync(ATTACH_SET, &f->seg.wire->state, KM_SEG_CANCELLED);
		abandon(f, reason);
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
}

void km_link_advance(struct km_file *f, int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	(void)fd;
	if (how == KM_LOCK_NESTED)
		return;
	if (f->link_state == KM_LINK_HELLO && f->conn)
		advance(f);
	km_unlock(&km_proc.link_lock, how);
}

void km_link_cancel(struct km_file *f)
{
	uint32_t hello_state = KM_SEG_HELLO;

	switch ((enum km_link_state)f->link_state) {
	case KM_LINK_NONE:
	case KM_LINK_DONE:
		return;
	case KM_LINK_HELLO:
		if (f->seg.wire)
			km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_CANCELLED);
		if (f->conn)
			settled(f);
		break;
	case KM_LINK_OFFERED:
	case KM_LINK_ACCEPTED:
		break;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
	f->link_state = KM_LINK_NONE;
}

void km_link_settle(struct km_file *f)
{
	uint32_t hello_state = KM_SEG_HELLO;

	switch ((enum km_link_state)f->link_state) {
	case KM_LINK_NONE:
	case KM_LINK_DONE:
		return;
	case KM_LINK_OFFERED:
	case KM_LINK_ACCEPTED:
		km_link_cancel(f);
		f->next_try = f->calls + EAGER_TRIES;
		return;
	case KM_LINK_HELLO:
		if (km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_CANCELLED)) {
			abandon(f, KM_REASON_SHARED);
			km_fd_unhide(f->link_fd);
			f->link_fd = -1;
		} else {
			advance(f);
		}
		return;
	}
}

void km_link_withdraw(struct km_file *f)
{
	uint32_t state = KM_SEG_HELLO;

	if (f->link_state != KM_LINK_HELLO)
		return;
	/* Attached or not, the connector uses nothing before it sees ready. */
	if (!km_cas_seq(&f->seg.wire->state, &state, KM_SEG_CANCELLED) &&
	    state == KM_SEG_ATTACHED)
		km_cas_seq(&f->seg.wire->state, &state, KM_SEG_CANCELLED);
	abandon(f, KM_REASON_HANDED_ON);
	if (km_thread.bypass) {
		/* The descriptor is the parent's, which finds the handshake
		 * cancelled. */
		f->link_state = KM_LINK_HELLO;
		return;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
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

int km_link_alone(struct km_file *f, int fd, uint32_t ring_size)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);
	struct km_address local, peer;
	enum km_reason reason;
	struct km_conn *conn;
	int memfd, err = km_link_addresses(fd, &local, &peer);

	if (err < 0) {
		/* The connection is over; what was unread is still to be had. */
		memset(&local, 0, sizeof(local));
		memset(&peer, 0, sizeof(peer));
	}
	conn = km_conn_new(&reason);
	err = conn ? km_segment_create(&f->seg, ring_size, false, &memfd) : -ENOMEM;
	if (err == 0) {
		km_sys_close(memfd);
		conn_start(f, fd, conn, KM_TRANSPORT_SHM, &local, &peer, NULL);
		err = km_bell_take(f, geteuid());
		if (err < 0) {
			conn_undo(f);
			km_segment_unmap(&f->seg);
		}
	} else if (conn) {
		km_conn_free(conn);
	}
	if (err == 0) {
		km_store_seq(&f->seg.wire->state, KM_SEG_READY);
		conn->tx_phase = KM_PHASE_ENDED;
		conn->row.state = KM_ROW_KERNEL;
		conn->row.reason = KM_REASON_HANDED_ON;
		f->reason = KM_REASON_HANDED_ON;
		f->link_state = KM_LINK_DONE;
	}
	km_unlock(&km_proc.link_lock, how);
	return err;
}

struct find {
	struct km_file *f;
	int fd;
};

static void match(int fd, uint64_t entry, void *arg)
{
	struct find *find = arg;

	if (km_fd_kind(entry) == KM_FD_FILE && km_fd_object(entry) == find->f)
		find->fd = fd;
}

int km_link_other_fd(struct km_file *f)
{
	struct find find = {f, -1};

	km_fd_each(match, &find);
	return find.fd;
}

static void move_link(int fd, uint64_t entry, void *arg)
{
	struct km_file *f = km_fd_object(entry);
	int wanted = *(int *)arg;

	(void)fd;
	if (km_fd_kind(entry) != KM_FD_FILE)
		return;
	if (f->link_fd == wanted)
		f->link_fd = km_fd_hide_copy(wanted);
	if (f->held_fd == wanted)
		f->held_fd = km_fd_hide_copy(wanted);
	if (f->keep_fd == wanted)
		f->keep_fd = km_fd_hide_copy(wanted);
	km_transport_move_pipes(f, wanted);
}

void km_link_move(int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	km_fd_each(move_link, &fd);
	km_unlock(&km_proc.link_lock, how);
}
