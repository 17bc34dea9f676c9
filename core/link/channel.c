/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The channel that an upgrade makes: what has to be so before it, its row and its pipes,
 * and how it is given up again.
 */
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/time.h>

#include "event/event.h"
#include "link/internal.h"
#include "sock/stream.h"

bool km_link_switch_begin(struct km_file *f)
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

bool km_link_within_budget(void)
{
	uint64_t start = KM_WIRE_HEADER + 2 * KM_RING_FIRST;

	return (km_load_relaxed(&km_proc.channels) + 1) * start <=
	       km_proc.options.memory_limit;
}

int km_link_try_calls(int fd)
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

void km_link_conn_start(struct km_file *f, int fd, struct km_conn *conn,
			enum km_transport_id transport, const struct km_address *local,
			const struct km_address *peer,
			const struct km_address *original)
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

void km_link_transport_settled(const struct km_file *f)
{
	const struct km_transport *transport = km_transport_of(f->conn);

	if (f->role == KM_ROLE_ACCEPTOR && transport->settled)
		transport->settled(f->conn->row.token);
}

void km_link_conn_undo(struct km_file *f)
{
	struct km_conn *conn = f->conn;

	km_link_transport_settled(f);
	km_transport_drop(f);
	f->conn = NULL;
	km_sub_seq(&km_proc.memory, f->seg.size);
	km_sub_seq(&km_proc.channels, 1);
	km_bell_drop(f);
	km_peer_bell_drop(f);
	memset(&conn->row.ring_rx_bytes, 0, 32);
	km_conn_free(conn);
}

void km_link_abandon(struct km_file *f, enum km_reason reason)
{
	km_stream_abandon(f);
	km_link_transport_settled(f);
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

int km_link_bell_fds(const struct km_file *f, int *fds)
{
	fds[0] = f->bell->memfd;
	fds[1] = f->bell->latch;
	return 2;
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

enum km_reason km_link_take_pipes(struct km_file *f,
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
		km_link_conn_start(f, fd, conn, KM_TRANSPORT_SHM, &local, &peer, NULL);
		err = km_bell_take(f, geteuid());
		if (err < 0) {
			km_link_conn_undo(f);
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
