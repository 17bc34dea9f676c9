/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of a tracked socket.  Results are counts or negative errno values;
 * KM_RETRY says that the descriptor is not (or no longer) an upgraded
 * connection, and that the caller must look it up again.
 */
#ifndef KM_STREAM_H
#define KM_STREAM_H

#include "fd/file.h"

#define KM_RETRY (-4096)

enum km_direction { KM_IN = 1, KM_OUT = 2 };

/* A call that the kernel serves while the file is plain. */
struct km_plain {
	struct km_file *f; /* NULL: nothing to end */
	uint32_t generation;
};

/* True: make the kernel's call, then km_plain_end.  False: f is a channel. */
bool km_plain_begin(struct km_file *f, int fd, struct km_plain *call);
void km_plain_end(const struct km_plain *call, enum km_direction direction, ssize_t n);

/* recv and send for upgraded connections, all flags and blocking included. */
ssize_t km_recv(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags);
ssize_t km_send(struct km_file *f, int fd, const struct iovec *iov, int iovcnt,
		int flags);

/*
 * Reads up to count bytes of in, at *offset or at its own position, straight into
 * the ring, and moves *offset on.  Never blocks on the socket.  The count, 0 at the
 * end of the file, an error of read, or KM_RETRY: not on a ring, or no space.
 */
ssize_t km_send_from(struct km_file *f, int fd, int in, off64_t *offset, size_t count);

/*
 * Bytes from a regular file (or anything read(2) takes) straight into the ring:
 * offset NULL reads at the descriptor's own position.
 */
ssize_t km_sendfile(struct km_file *f, int fd, int in, off64_t *offset, size_t count);
/* splice(2) with the socket as source or destination, a pipe at the other end. */
ssize_t km_splice_out(struct km_file *f, int fd, int pipe, size_t count,
		      unsigned flags);
ssize_t km_splice_in(struct km_file *f, int fd, int pipe, size_t count, unsigned flags);

/* Have both directions gone back to the kernel? */
KM_INLINE bool km_stream_by_kernel(const struct km_file *f)
{
	const struct km_conn *conn = f->conn;

	return km_unlikely(conn && conn->rx_phase == KM_PHASE_ENDED) &&
	       conn->tx_phase == KM_PHASE_ENDED;
}

/* Does the program's own call do all that is to be done?  What was left in the ring may
 * have to be read there after all, when its producer dies.  Under a filter of its own the
 * program's calls are the only ones that are sure to be let through: km_stream_rest looks
 * behind them. */
KM_INLINE bool km_stream_ended(const struct km_file *f)
{
	const struct km_conn *conn = f->conn;

	return km_stream_by_kernel(f) &&
	       (km_load_relaxed(&conn->rx.wire->wpos) ==
			__atomic_load_n(&conn->rx.r, __ATOMIC_RELAXED) ||
		(km_load_relaxed(&conn->rx.wire->pflags) & KM_P_RESENT) ||
		km_proc.filtered) &&
	       !(km_load_relaxed(&conn->flags) & KM_CONN_RESET);
}

/* A call on a stream that has ended, in km_stream_ended's sense, returned n: is there
 * something left in the ring that the kernel knows nothing of?  It is read there now.
 * Leaves errno as it is. */
bool km_stream_rest(struct km_file *f, int fd, ssize_t n);

/* Are there bytes of the ring still to be read before those of the kernel? */
bool km_stream_behind(struct km_file *f, int fd);

/* Has the peer taken back what it wrote, unnoticed yet? */
KM_INLINE bool km_stream_taken_back(const struct km_conn *conn)
{
	return km_unlikely(!conn->rx_begun) &&
	       (conn->rx_phase == KM_PHASE_RING || conn->rx_phase == KM_PHASE_DRAIN) &&
	       km_load_relaxed(&conn->rx.wire->left) == KM_LEFT_TAKEN_BACK;
}

/* The peer's cut-over may have been seen by nobody yet: works out whether its next
 * byte is in the kernel or in the ring, so that readiness can be told. */
void km_stream_settle(struct km_file *f, int fd);

/* Does the kernel's socket hold an error that nobody was told of? */
bool km_stream_failed(int fd);
/* Has the peer ended its stream, as far as that is known after a reset? */
bool km_stream_finished(const struct km_file *f, int fd);
/* Has the peer left the ring that f writes, so that km_stream_look has work? */
bool km_stream_left(const struct km_file *f);
/* FIONREAD and SIOCOUTQ. */
int km_stream_inq(struct km_file *f, int fd, int *bytes);
int km_stream_outq(struct km_file *f, int fd, int *bytes);
int km_stream_shutdown(struct km_file *f, int fd, int how);

/* TCP_CORK, of which a ring takes no notice: 0, it is kept here as long as the stream goes
 * by the ring; KM_RETRY: it is the kernel's; or the kernel's error. */
int km_stream_cork(struct km_file *f, int fd, bool on);
/* Before the kernel is asked for it. */
void km_stream_cork_read(struct km_file *f, int fd);

/*
 * The connection goes back to the kernel, because its descriptor is given to another
 * program or an option needs it.  May be called by the child of a vfork.  0; -EBUSY:
 * unread bytes are in the ring that the peer cannot send again, and the reading direction
 * stays where it was.  take: what is unread stays in the ring for this end, instead of
 * being sent again by the peer.  -EAGAIN: a signal handler interrupted a copy.  link_lock held.
 */
int km_stream_retreat(struct km_file *f, int fd, enum km_reason reason, bool take);

/* Bytes in conn's ring that this end is still to read; *before: after so many by the
 * kernel. */
uint64_t km_stream_unread(struct km_conn *conn, uint64_t *before);

/* f is upgraded: does what a peer that has gone back to the kernel asks for. */
void km_stream_look(struct km_file *f, int fd);

/* The process ends without having closed f: what a peer that has gone back to the kernel
 * asks for is done before. */
void km_stream_finish(struct km_file *f, int fd);

/* Both directions go on by the kernel for good; used before any byte went by a
 * ring. */
void km_stream_abandon(struct km_file *f);
/* The peer broke the protocol: calls answer ECONNRESET from now on. */
void km_stream_reset(struct km_conn *conn);
/* The last descriptor of all processes is about to be closed (fd still open). */
void km_stream_closing(struct km_file *f, int fd);
/* It has been closed: wakes a peer that sleeps on the rings. */
void km_stream_goodbye(struct km_file *f, struct km_conn *conn);

#endif
