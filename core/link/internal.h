/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the handshake share.  link_lock is held in all of them.  A reason is
 * why the connection stays on the kernel, NONE if it does not.
 */
#ifndef KM_LINK_INTERNAL_H
#define KM_LINK_INTERNAL_H

#include <sys/un.h>

#include "link/link.h"
#include "transport/transport.h"

/* How often each end tries before it leaves a connection to the kernel. */
#define KM_CONNECTOR_TRIES 24
#define KM_ACCEPTOR_TRIES 24

/* Of every hello; those of its transport follow. */
#define KM_HELLO_FDS 3
#define KM_MOST_FDS (KM_HELLO_FDS + KM_TRANSPORT_FDS)

/* -- link.c: what became of a try ---------------------------------------------------- */

/* When to look again, and whether to stop looking. */
void km_link_back_off(struct km_file *f, unsigned most, enum km_reason reason);
/* f stays on the kernel from now on. */
void km_link_give_up(struct km_file *f, enum km_reason reason);
/* A system call of the upgrade failed.  Trying again would fail again, or take from the
 * program what it is short of. */
void km_link_failed(struct km_file *f, const char *call, int err);
/* The connection is not made yet, or over, or there is no telling. */
void km_link_no_address(struct km_file *f, int err);

/* -- rendezvous.c --------------------------------------------------------------------- */

/* Where the connector meant to go, before any redirection by the kernel. */
void km_link_original_destination(int fd, const struct km_address *local,
				  struct km_address *out);
/* "\0kmap1:" and both ends in hexadecimal: no two connections share a name. */
socklen_t km_link_rendezvous_name(struct sockaddr_un *un, const struct km_address *from,
				  const struct km_address *to);
/* The Unix socket's peer must own the other end of the TCP connection.  NONE when it
 * does. */
enum km_reason km_link_prove(const struct km_file *f, int sock,
			     const struct km_address *local,
			     const struct km_address *remote, uint32_t *uid);

/* -- hello.c -------------------------------------------------------------------------- */

/* 0 or a negative errno value. */
int km_link_send_hello(int sock, const struct km_wire_hello *hello, const int *fds,
		       int nfds);
/*
 * Receives the peer's one datagram with up to KM_MOST_FDS descriptors; every
 * descriptor that came is either in fds or closed.  The number of descriptors,
 * -EAGAIN (not there yet), -EPROTO, -EPROTONOSUPPORT (another version),
 * -ECONNRESET (the peer hung up).
 */
int km_link_recv_hello(int sock, struct km_wire_hello *hello, int fds[KM_MOST_FDS]);
/* Why a datagram could not be sent or received. */
enum km_reason km_link_exchange_reason(int err);
void km_link_close_all(const int *fds, int n);

/* -- channel.c ------------------------------------------------------------------------ */

/* Stops all plain calls on f; false when one is in the kernel just now, where it
 * could sleep through the cut-over. */
bool km_link_switch_begin(struct km_file *f);
/* Room for one more segment?  What counts is what the rings start with; pages
 * of larger levels are only there once they are used. */
bool km_link_within_budget(void);
/* What the connection will need once it is on a ring, where it could not go back for
 * want of it: is it let through?  0 or the error. */
int km_link_try_calls(int fd);
/* Fills a new row and its cursors, and gives it to f. */
void km_link_conn_start(struct km_file *f, int fd, struct km_conn *conn,
			enum km_transport_id transport, const struct km_address *local,
			const struct km_address *peer,
			const struct km_address *original);
/* Undoes km_link_conn_start before anybody else could see the channel. */
void km_link_conn_undo(struct km_file *f);
/* The acceptor's handshake is over, or comes to nothing. */
void km_link_transport_settled(const struct km_file *f);
/* The channel will not be used: both directions stay on the kernel for good. */
void km_link_abandon(struct km_file *f, enum km_reason reason);
/* The two descriptors of f's bell. */
int km_link_bell_fds(const struct km_file *f, int *fds);
/* Gives f the pipes of its transport, if it is made of such: new ones for the acceptor,
 * with sent for the hello, or those that sent stands for. */
enum km_reason km_link_take_pipes(struct km_file *f,
				  const struct km_transport *transport, uint32_t uid,
				  int *sent);

/* -- acceptor.c, connector.c: the steps ------------------------------------------------ */

void km_link_knock(struct km_file *f, int fd);
/* Looks for the answer to the hello; link_state HELLO. */
void km_link_take_ack(struct km_file *f);
void km_link_offer(struct km_file *f, int fd);
void km_link_take_hello(struct km_file *f, int fd);

#endif
