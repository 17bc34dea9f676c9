/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections that stay on the kernel, and why.
 *
 * Tools can find out by themselves that a connection is not hot, or that the library is
 * not at its other end.  Other reasons only this process knows: it puts them into a row
 * of the statistics, which has no channel behind it.
 */
#include <errno.h>
#include <string.h>

#include "link/link.h"

enum km_reason km_stay_reason(int err)
{
	switch (err) {
	case -EMFILE:
	case -ENFILE:
		return KM_REASON_BUDGET_FD;
	case -ENOMEM:
		return KM_REASON_BUDGET_MEMORY;
	case -EUSERS:
		return KM_REASON_BUDGET_CONNECTIONS;
	case -EPROTO:
		return KM_REASON_PEER_BAD;
	case -EPROTONOSUPPORT:
		return KM_REASON_PEER_VERSION;
	default:
		return KM_REASON_SYSCALL;
	}
}

static bool shows_by_itself(enum km_reason reason)
{
	return reason == KM_REASON_NONE || reason == KM_REASON_NOT_HOT ||
	       reason == KM_REASON_PEER_ABSENT;
}

static void note(struct km_file *f, enum km_reason reason)
{
	struct km_address local = {.port = 0}, peer = {.port = 0};
	struct km_stats_row row = {.role = f->role,
				   .reason = reason,
				   .inode = km_link_inode(f->fd),
				   .fd = f->fd,
				   .pid = (uint32_t)km_sys_getpid(),
				   .state = KM_ROW_KERNEL};

	/* Of a connection that is over nobody asks. */
	if (row.inode == 0 || km_link_addresses(f->fd, &local, &peer) == -ENOTCONN)
		return;
	row.lport = local.port;
	row.pport = peer.port;
	memcpy(row.laddr, local.ip, 16);
	memcpy(row.paddr, peer.ip, 16);
	f->note = km_conn_note(&row);
}

void km_stay(struct km_file *f, enum km_reason reason)
{
	km_log(KM_LOG_DEBUG, "fd %d stays on the kernel: %s", f->fd,
	       km_reason_name(reason));
	if (!f->note && !f->conn && !shows_by_itself(reason))
		note(f, reason);
	if (km_proc.reasons)
		km_add_relaxed(&km_proc.reasons[reason], 1);
}

void km_stay_forget(struct km_file *f)
{
	if (f->note)
		km_conn_free(f->note);
	f->note = NULL;
}
