/* SPDX-License-Identifier: Apache-2.0 */
/* The acceptor's part of the handshake: it makes the channel and sends the hello. */
#include <errno.h>
#include <string.h>
#include <sys/un.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/internal.h"

/* What the acceptor keeps none of: the segment, and what its transport sends. */
static void close_sent(const int *fds, const struct km_transport *transport)
{
	km_sys_close(fds[0]);
	km_link_close_all(fds + KM_HELLO_FDS, transport->fds);
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
	int fds[KM_MOST_FDS], err;
	struct km_conn *conn;

	err = km_link_try_calls(fd);
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
	reason = km_link_take_pipes(f, transport, uid, fds + KM_HELLO_FDS);
	if (reason != KM_REASON_NONE) {
		km_sys_close(fds[0]);
		km_segment_unmap(&f->seg);
		km_conn_free(conn);
		return reason;
	}
	km_link_conn_start(f, fd, conn, km_proc.transport, local, peer, original);
	err = km_bell_take(f, uid);
	if (err == 0)
		err = km_event_attach(f);
	if (err == 0) {
		hello.slot = f->slot;
		memcpy(hello.laddr, local->ip, 16);
		km_link_bell_fds(f, fds + 1);
		/* From here on the connector may attach and use its ring. */
		km_store_seq(&f->mode, KM_MODE_CHANNEL);
		KM_FAULT(HELLO_BELL);
		err = km_link_send_hello(sock, &hello, fds,
					 KM_HELLO_FDS + transport->fds);
		KM_FAULT(HELLO_SENT);
		if (err < 0) {
			km_link_abandon(f, km_link_exchange_reason(err));
			close_sent(fds, transport);
			return KM_REASON_NONE;
		}
	}
	close_sent(fds, transport);
	if (err < 0) {
		km_link_conn_undo(f);
		km_segment_unmap(&f->seg);
		return km_stay_reason(err);
	}
	f->link_fd = sock;
	f->link_state = KM_LINK_HELLO;
	return KM_REASON_NONE;
}

void km_link_knock(struct km_file *f, int fd)
{
	struct km_address local, peer, original;
	struct sockaddr_un un;
	socklen_t len;
	enum km_reason reason;
	uint32_t uid = 0;
	int sock, err = km_link_addresses(fd, &local, &peer);

	if (err < 0) {
		km_link_no_address(f, err);
		return;
	}
	km_link_original_destination(fd, &local, &original);
	if (!km_permit(f, &local, &peer, &original, &local, NULL, NULL)) {
		km_link_give_up(f, KM_REASON_POLICY);
		return;
	}
	if (!km_link_within_budget()) {
		km_link_give_up(f, KM_REASON_BUDGET_MEMORY);
		return;
	}
	km_count(KM_COUNT_KNOCKS);
	sock = km_sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock < 0) {
		km_link_failed(f, "socket", sock);
		return;
	}
	len = km_link_rendezvous_name(&un, &peer, &original);
	KM_FAULT(HELLO_KNOCK);
	err = km_sys_connect(sock, &un, len);
	if (err < 0) {
		km_sys_close(sock);
		if (err == -ECONNREFUSED || err == -EAGAIN)
			km_link_back_off(f, KM_ACCEPTOR_TRIES, KM_REASON_PEER_ABSENT);
		else
			km_link_failed(f, "connect", err);
		return;
	}
	KM_FAULT(HELLO_INSIDE);
	sock = km_fd_hide(sock);
	if (sock < 0) {
		km_link_give_up(f, KM_REASON_BUDGET_FD);
		return;
	}
	reason = km_link_prove(f, sock, &peer, &original, &uid);
	if (reason == KM_REASON_NONE &&
	    !km_permit(f, &local, &peer, &original, &local, &uid, NULL))
		reason = KM_REASON_POLICY;
	if (reason != KM_REASON_NONE) {
		km_fd_unhide(sock);
		km_link_give_up(f, reason);
		return;
	}
	if (!km_link_switch_begin(f)) {
		km_fd_unhide(sock);
		km_link_back_off(f, KM_ACCEPTOR_TRIES, (enum km_reason)f->reason);
		return;
	}
	reason = make_channel(f, fd, sock, uid, &local, &peer, &original);
	if (km_load_seq(&f->mode) == KM_MODE_SWITCHING)
		km_store_seq(&f->mode, KM_MODE_PLAIN);
	if (f->link_state != KM_LINK_HELLO)
		km_fd_unhide(sock);
	if (reason != KM_REASON_NONE)
		km_link_give_up(f, reason);
}

void km_link_take_ack(struct km_file *f)
{
	struct km_wire_hello ack = {0};
	int fds[KM_MOST_FDS], n;
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
	n = km_link_recv_hello(f->link_fd, &ack, fds);
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
		reason = km_link_exchange_reason(n);
	}
	km_link_close_all(fds, n);
	if (ready) {
		km_link_transport_settled(f);
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
		km_link_abandon(f, reason);
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
}
