/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How two ends find each other and move a live connection to a channel.
 *
 * The connector of a connection that has become hot listens on an abstract Unix
 * name made from the connection's addresses (the offer); the acceptor, hot too,
 * connects to the same name, makes the segment and sends it (the hello); the
 * connector attaches, answers (the ack) and marks the segment attached.  Each
 * end proves the other's user id against the owner of the TCP socket.
 */
#ifndef KM_LINK_H
#define KM_LINK_H

#include "base/address.h"
#include "fd/file.h"

/* f is plain and has had enough calls: takes the next step.  Makes system calls,
 * never blocks, never fails visibly. */
void km_link_poke(struct km_file *f, int fd);

/* connect or accept has just made this connection: with KMAP_UPGRADE_AFTER=0, which is
 * for tests, the upgrade is tried before any byte, and the call may wait for it a little.
 */
void km_link_made(int fd, bool wait);

/* The acceptor that sent its hello: has the connector attached, or given up?
 * No direction lock may be held. */
void km_link_advance(struct km_file *f, int fd);

/* Withdraws whatever is under way; the channel itself is left alone.  link_lock
 * held. */
void km_link_cancel(struct km_file *f);

/* f, upgraded or about to be, goes back to the kernel: ends a handshake that was not
 * ready.  For the child of a vfork too.  link_lock held. */
void km_link_withdraw(struct km_file *f);

/* Which end of its connection fd is, by where somebody listens; an error of
 * getsockname makes it unknown. */
enum km_role km_link_role(int fd);

/* Makes f, whose descriptor fd came from another program, a channel without a peer, with
 * rings of that size: the kernel sends, and the caller fills the other ring and sets the
 * mode.  0 or a negative errno value. */
int km_link_alone(struct km_file *f, int fd, uint32_t ring_size);

/* Before fork: completes or abandons what is under way.  link_lock held. */
void km_link_settle(struct km_file *f);

/* Gives a hidden descriptor of an upgrade under way another number. */
void km_link_move(int fd);

/* Another descriptor of f, or -1. */
int km_link_other_fd(struct km_file *f);

/* Both ends of the TCP connection fd.  0 or an error of getsockname or getpeername. */
int km_link_addresses(int fd, struct km_address *local, struct km_address *peer);

/* Of the socket fd, as tools know it; 0 when that cannot be told. */
uint64_t km_link_inode(int fd);

/* -- permit.c: the policy ------------------------------------------------------------- */

/*
 * Do the rules of this process let f, of these addresses, be upgraded?  to is where the
 * connector meant to go, and via the acceptor's own address; via and uid, of the other
 * end, are NULL as long as they are not known: the answer is no then only if it would be
 * no whatever they are.  *names_uid, unless NULL, is whether the rule that lets it is
 * about that uid.  Makes no system call.
 */
bool km_permit(const struct km_file *f, const struct km_address *local,
	       const struct km_address *peer, const struct km_address *to,
	       const struct km_address *via, const uint32_t *uid, bool *names_uid);

/* -- stay.c: connections that stay on the kernel; link_lock held ------------------------ */

/* What an error of a system call of the upgrade means for the connection. */
enum km_reason km_stay_reason(int err);
/* f stays on the kernel: has tools see why. */
void km_stay(struct km_file *f, enum km_reason reason);
/* f is closed. */
void km_stay_forget(struct km_file *f);

/*
 * The user id that owns the TCP socket whose own address is local and whose
 * peer is remote, in this network namespace.  0, -ENOENT (no such socket), or
 * another error of netlink.
 */
int km_diag_owner(const struct km_address *local, const struct km_address *remote,
		  uint32_t *uid);
/* Does somebody in this network namespace listen there? */
bool km_diag_listens(const struct km_address *at);

#endif
