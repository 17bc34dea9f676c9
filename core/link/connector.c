/* SPDX-License-Identifier: Apache-2.0 */
/* The connector's part of the handshake: it makes the offer and attaches to what comes. */
#include <errno.h>
#include <string.h>
#include <sys/un.h>

#include "base/fault_point.h"
#include "event/event.h"
#include "link/internal.h"

void km_link_offer(struct km_file *f, int fd)
{
	struct km_address local, peer;
	struct sockaddr_un un;
	int sock, err = km_link_addresses(fd, &local, &peer);

	if (err < 0) {
		km_link_no_address(f, err);
		return;
	}
	if (!km_permit(f, &local, &peer, &peer, NULL, NULL, NULL)) {
		km_link_give_up(f, KM_REASON_POLICY);
		return;
	}
	if (!km_link_within_budget()) {
		km_link_give_up(f, KM_REASON_BUDGET_MEMORY);
		return;
	}
	if (f->procs && km_load_seq(f->procs) > 1) {
		km_link_back_off(f, KM_CONNECTOR_TRIES, KM_REASON_SHARED);
		return;
	}
	sock = km_sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock < 0) {
		km_link_failed(f, "socket", sock);
		return;
	}
	err = km_sys_bind(sock, &un, km_link_rendezvous_name(&un, &local, &peer));
	KM_FAULT(OFFER_BOUND);
	if (err == 0)
		err = km_sys_listen(sock, 4);
	KM_FAULT(OFFER_LISTENS);
	if (err < 0) {
		km_sys_close(sock);
		if (err == -EADDRINUSE)
			km_link_back_off(f, KM_CONNECTOR_TRIES, KM_REASON_NAME_TAKEN);
		else
			km_link_failed(f, "bind or listen", err);
		return;
	}
	km_count(KM_COUNT_OFFERS);
	sock = km_fd_hide(sock);
	if (sock < 0) {
		km_link_give_up(f, KM_REASON_BUDGET_FD);
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
			     const struct km_wire_hello *hello, int fds[KM_MOST_FDS])
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
	reason = err < 0 ? km_stay_reason(err)
		 : !km_link_within_budget()
			 ? KM_REASON_BUDGET_MEMORY
			 : km_link_prove(f, sock, &acceptor, &local, &uid);
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
	if (reason == KM_REASON_NONE && (err = km_link_try_calls(fd)) < 0)
		reason = km_stay_reason(err);
	if (reason == KM_REASON_NONE) {
		err = km_segment_attach(&f->seg, transport->bare, fds[0]);
		KM_FAULT(ATTACH_MAPPED);
		if (err < 0)
			reason = err == -EPERM ? KM_REASON_PEER_BAD
					       : km_stay_reason(err);
	}
	if (reason == KM_REASON_NONE) {
		reason = km_link_take_pipes(f, transport, uid, fds + KM_HELLO_FDS);
		if (reason != KM_REASON_NONE)
			km_segment_unmap(&f->seg);
	}
	km_sys_close(fds[0]);
	km_link_close_all(fds + KM_HELLO_FDS, transport->fds);
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
	km_link_conn_start(f, fd, conn, km_proc.transport, &local, &peer, NULL);
	err = km_bell_take(f, uid);
	if (err == 0)
		err = km_event_attach(f);
	if (err < 0) {
		km_link_conn_undo(f);
		km_segment_unmap(&f->seg);
		return km_stay_reason(err);
	}
	ack.slot = f->slot;
	km_link_bell_fds(f, own);
	KM_FAULT(ATTACH_BELL);
	err = km_link_send_hello(sock, &ack, own, 2);
	KM_FAULT(ATTACH_ACKED);
	km_store_seq(&f->mode, KM_MODE_CHANNEL);
	/* The acceptor may have taken the ack, and said ready, by now. */
	if (err < 0 ||
	    (!km_cas_seq(&f->seg.wire->state, &hello_state, KM_SEG_ATTACHED) &&
	     hello_state != KM_SEG_READY)) {
		km_link_abandon(f, err < 0 ? km_link_exchange_reason(err)
					   : KM_REASON_PEER_CANCELLED);
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

	km_link_send_hello(sock, &no, NULL, 0);
}

void km_link_take_hello(struct km_file *f, int fd)
{
	struct km_wire_hello hello;
	int fds[KM_MOST_FDS], n, sock;
	enum km_reason reason = KM_REASON_NONE;

	if (f->link_state == KM_LINK_OFFERED) {
		sock = km_sys_accept4(f->link_fd, NULL, NULL,
				      SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (sock == -EAGAIN || sock == -ECONNABORTED) {
			km_link_back_off(f, KM_CONNECTOR_TRIES, KM_REASON_PEER_ABSENT);
			return;
		}
		if (sock < 0) {
			km_link_failed(f, "accept4", sock);
			return;
		}
		KM_FAULT(ATTACH_CAME);
		km_fd_unhide(f->link_fd);
		f->link_fd = km_fd_hide(sock);
		if (f->link_fd < 0) {
			f->link_state = KM_LINK_NONE;
			km_link_give_up(f, KM_REASON_BUDGET_FD);
			return;
		}
		f->link_state = KM_LINK_ACCEPTED;
	}
	sock = f->link_fd;
	/* Leave the hello where it is until no plain call is in the kernel. */
	if (!km_link_switch_begin(f)) {
		km_link_back_off(f, KM_CONNECTOR_TRIES, (enum km_reason)f->reason);
		return;
	}
	n = km_link_recv_hello(sock, &hello, fds);
	if (n == -EAGAIN) {
		km_store_seq(&f->mode, KM_MODE_PLAIN);
		km_link_back_off(f, KM_CONNECTOR_TRIES, KM_REASON_PEER_CANCELLED);
		return;
	}
	if (n < 0) {
		reason = km_link_exchange_reason(n);
	} else if (hello.kind == KM_HELLO && hello.transport != km_proc.transport) {
		km_link_close_all(fds, n);
		reason = KM_REASON_TRANSPORT;
	} else if (n != KM_HELLO_FDS + km_transports[km_proc.transport]->fds ||
		   hello.kind != KM_HELLO || hello.slot >= KM_BELL_SLOTS) {
		km_link_close_all(fds, n);
		reason = KM_REASON_PEER_BAD;
	} else {
		KM_FAULT(ATTACH_TAKEN);
		reason = attach(f, fd, sock, &hello, fds);
	}
	if (km_load_seq(&f->mode) == KM_MODE_SWITCHING)
		km_store_seq(&f->mode, KM_MODE_PLAIN);
	if (reason != KM_REASON_NONE) {
		refuse(sock, reason);
		km_link_give_up(f, reason);
		return;
	}
	km_fd_unhide(f->link_fd);
	f->link_fd = -1;
}
