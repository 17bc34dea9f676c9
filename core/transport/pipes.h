/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes in kernel pipes, for the transports that are made of such.
 *
 * Each end holds a pipe by one descriptor, open for reading and writing: so neither end of
 * file nor SIGPIPE is possible (the control page tells the end), and a producer can look
 * at what its consumer left.  Each end opens the pipe for itself, so that the other one
 * cannot change O_NONBLOCK of its description.
 *
 * A pipe holds pages, not bytes: what does not fit behind the newest bytes begins a new
 * one.  So half of its size is what a pipe always takes, and an end never puts in more.
 */
#ifndef KM_PIPES_H
#define KM_PIPES_H

#include "transport/transport.h"

/* -- making them; link_lock held.  Results: 0 or a descriptor, or a negative errno value */

/* This end's own hidden descriptor of the pipe that is open as fd.  Errors of openat(2)
 * on /proc, -EMFILE. */
int km_pipes_open(int fd);
/*
 * Makes the pipes fit for rings of *ring_size bytes, as far as the system allows
 * (pipe-max-size and pipe-user-pages-soft, see pipe(7)), and lowers *ring_size to what they
 * take.  -ENOSPC: less than KM_RING_SIZE_MIN.
 */
int km_pipes_fit(const int pipes[2], uint32_t *ring_size);
/* Are they pipes that always take ring_size bytes, and can this process copy so much?
 * -EPROTO: no. */
int km_pipes_check(const int pipes[2], uint32_t ring_size);
/* Tells the log why a connection stays on the kernel; the result is err. */
int km_pipes_failed(const char *transport, const char *what, int err);

/* -- moving bytes: see struct km_transport ---------------------------------------------- */

ssize_t km_pipes_put(struct km_producer *p, int pipe, const struct iovec *iov,
		     int iovcnt, size_t most);
ssize_t km_pipes_get(struct km_consumer *c, int pipe, const struct iovec *iov,
		     int iovcnt, unsigned how);
ssize_t km_pipes_replay(const struct km_producer *p, int pipe, uint64_t at, void *buf,
			size_t room);

/* Gives the hidden descriptor behind MSG_PEEK another number, if it is fd. */
void km_pipes_move(int fd);

#endif
