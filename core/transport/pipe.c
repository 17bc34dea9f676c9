/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transport pipe: unnamed pipes, which the hello carries.
 *
 * The connector opens what it was sent anew through /proc, which the system allows to the
 * pipe's owner alone.
 */
#include "transport/pipes.h"

static void close_both(const int *sent)
{
	for (int i = 0; i < 2; i++)
		if (sent[i] >= 0)
			km_sys_close(sent[i]);
}

static int make(int pipes[2], int *sent)
{
	int fds[2], err = 0;

	for (int i = 0; i < 2; i++) {
		int made = km_sys_pipe2(fds, O_CLOEXEC | O_NONBLOCK);

		pipes[i] = made < 0 ? made : km_pipes_open(fds[0]);
		sent[i] = made < 0 ? made : fds[0];
		if (made == 0)
			km_sys_close(fds[1]);
		err = KM_MIN(err, pipes[i]);
	}
	return err;
}

static int create(const uint8_t token[16], uint32_t *ring_size, int pipes[2], int *sent)
{
	int err = make(pipes, sent);

	(void)token;
	if (err < 0) {
		km_pipes_failed("pipe", "a pipe cannot be made or opened", err);
	} else {
		err = km_pipes_fit(pipes, ring_size);
		if (err < 0)
			km_pipes_failed("pipe", "pipes are too small", err);
	}
	if (err < 0)
		close_both(sent);
	return err;
}

static int attach(const uint8_t token[16], uint32_t ring_size, const int *sent,
		  int pipes[2])
{
	int err = km_pipes_check(sent, ring_size);

	(void)token;
	if (err == -EPROTO)
		return err;
	if (err < 0)
		return km_pipes_failed("pipe", "pipes are too small", err);
	for (int i = 0; i < 2; i++) {
		pipes[i] = km_pipes_open(sent[i]);
		err = KM_MIN(err, pipes[i]);
	}
	return err < 0 ? km_pipes_failed("pipe", "a pipe cannot be opened", err) : 0;
}

const struct km_transport km_transport_pipe = {
	.name = "pipe",
	.bare = true,
	.fds = 2,
	.create = create,
	.attach = attach,
	.put = km_pipes_put,
	.get = km_pipes_get,
	.replay = km_pipes_replay,
};
