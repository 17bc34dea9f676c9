/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/transport.h"

#include "sock/stream.h"
#include "transport/pipes.h"

const struct km_transport *const km_transports[KM_TRANSPORTS] = {
#define X(id, name, meaning) &km_transport_##name,
#include "base/transports.def"
#undef X
};

void km_transport_start(void)
{
	const struct km_transport *transport = km_transports[km_proc.transport];

	if (transport->start)
		transport->start();
}

uint64_t km_transport_inode(int fd)
{
	struct stat st;

	return km_sys_fstat(fd, &st) < 0 ? 0 : (uint64_t)st.st_ino;
}

bool km_transport_is(int fd, uint64_t inode)
{
	return km_likely(!km_thread.bypass) || km_transport_inode(fd) == inode;
}

void km_transport_drop(struct km_file *f)
{
	km_fd_unhide(f->tx_pipe);
	km_fd_unhide(f->rx_pipe);
	f->tx_pipe = -1;
	f->rx_pipe = -1;
}

/* Gives *pipe, used under that lock, another number.  Whoever moves bytes there now is let
 * out before the number is the program's. */
static void move_pipe(struct km_conn *conn, km_a32 *lock, int *pipe)
{
	enum km_lock_result how = km_lock(lock);

	*pipe = km_fd_hide_copy(*pipe);
	/* Nobody knows what whoever died with it has moved. */
	if (how == KM_LOCK_STOLEN)
		km_stream_reset(conn);
	km_unlock(lock, how);
}

void km_transport_move_pipes(struct km_file *f, int fd)
{
	if (f->conn && f->tx_pipe == fd)
		move_pipe(f->conn, &f->conn->tx_lock, &f->tx_pipe);
	if (f->conn && f->rx_pipe == fd)
		move_pipe(f->conn, &f->conn->rx_lock, &f->rx_pipe);
}

void km_transport_move(int fd)
{
	km_pipes_move(fd);
}
