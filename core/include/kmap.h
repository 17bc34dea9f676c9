/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C ABI of libkmap: a channel between two processes on one host, and what
 * tools need to know about the library.  The interposer (libkmap_preload) uses
 * the same rings.
 *
 * Every function that can fail returns a negative errno value and leaves errno
 * alone.  A channel may be read by one thread and written by another at the
 * same time; two threads must not read it, or write it, at once.
 */
#ifndef KMAP_H
#define KMAP_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The libraries are built with hidden visibility; this is what they export. */
#pragma GCC visibility push(default)

#define KMAP_ABI_VERSION 1
#define KMAP_CHANNEL_FDS 5

typedef struct kmap_channel kmap_channel;

/* Number of the ABI described here. */
int kmap_abi_version(void);
/* Version of the wire layout (segments and hello); ends must agree. */
int kmap_wire_version(void);

/*
 * Makes a channel: one sealed memfd with two rings that grow up to ring_size
 * bytes each (rounded up to a power of two, 4 KiB to 16 MiB), and four doorbells
 * (Unix sockets).  The caller is side 0.
 * Errors: -EINVAL (size), -ENOMEM, -EMFILE, -ENFILE, -ENOSYS.
 */
int kmap_channel_create(size_t ring_size, kmap_channel **out);

/*
 * The descriptors to send to the other process by SCM_RIGHTS, in order: the
 * memfd and the four doorbells.  They stay owned by the channel.
 */
int kmap_channel_fds(const kmap_channel *ch, int fds[KMAP_CHANNEL_FDS]);

/*
 * Attaches to a channel as side 1.  Duplicates nothing: on success the channel
 * owns fds, on failure the caller keeps them.  Verifies seals, size and header.
 * Errors: -EBADF, -EPERM (not sealed), -EPROTO (malformed), -EPROTONOSUPPORT
 * (version), -ENOMEM.
 */
int kmap_channel_attach(const int fds[KMAP_CHANNEL_FDS], kmap_channel **out);

/*
 * Names a connected Unix socket whose hang-up means that the peer is gone.  It
 * stays the caller's.  Without one a dead peer is never noticed.
 */
int kmap_channel_set_liveness(kmap_channel *ch, int sock);

/*
 * Reads at least 1 and at most len bytes.  timeout_ms: 0 does not wait, a
 * negative value waits for ever.  Returns the count, 0 at the end of the
 * peer's stream, or -EAGAIN (timeout 0), -ETIMEDOUT, -EINTR (signal),
 * -ECONNRESET (the peer died without ending its stream; all it published has
 * been read), -EPROTO (the peer broke the protocol), -EPIPE (closed here).
 */
ssize_t kmap_channel_read(kmap_channel *ch, void *buf, size_t len, int timeout_ms);

/*
 * Writes at least 1 and at most len bytes; with timeout 0 what fits, otherwise
 * waits for space for the first byte.  Returns the count or -EAGAIN,
 * -ETIMEDOUT, -EINTR, -EPIPE (shut down here, or the peer closed),
 * -ECONNRESET (the peer died), -EPROTO.
 */
ssize_t kmap_channel_write(kmap_channel *ch, const void *buf, size_t len,
			   int timeout_ms);

/* Ends this side's stream; the peer reads what is left, then 0. */
int kmap_channel_shutdown(kmap_channel *ch);

/* Bytes waiting to be read, and bytes the peer has not read yet. */
size_t kmap_channel_readable(kmap_channel *ch);
size_t kmap_channel_unread(kmap_channel *ch);

/* Ends the stream, tells the peer, unmaps and frees; ch may be NULL. */
void kmap_channel_close(kmap_channel *ch);

/* Counts since the channel was made: futex wakes sent, futex sleeps, doorbells
 * rung, sleeps on a doorbell, ring growths. */
struct kmap_channel_stats {
	uint64_t futex_wakes, futex_sleeps, bells_rung, bell_sleeps, grows;
};
void kmap_channel_get_stats(const kmap_channel *ch, struct kmap_channel_stats *out);

/* Tables, for tools: NULL beyond the last index. */
const char *kmap_reason_name(unsigned index);
const char *kmap_reason_meaning(unsigned index);
const char *kmap_transport_name(unsigned index);
const char *kmap_transport_meaning(unsigned index);
const char *kmap_counter_name(unsigned index);
const char *kmap_counter_meaning(unsigned index);
/* Interposed symbols in table order. */
const char *kmap_symbol_name(unsigned index);
/* The same with what becomes of the call, in the words of symbols.def. */
struct kmap_symbol {
	const char *name, *subject, *class_name, *text;
};
/* 0, or -ENOENT beyond the last index. */
int kmap_symbol_get(unsigned index, struct kmap_symbol *out);

struct kmap_option {
	const char *env, *type, *default_text, *help;
	uint64_t min, max;
};
/* 0, or -ENOENT beyond the last index. */
int kmap_option_get(unsigned index, struct kmap_option *out);

/*
 * Checks the text of a policy, length bytes (docs/policy.md).  0, or -EINVAL: then *line
 * is the line with the error, counted from 1, or 0 where it is not one line's, and error,
 * of KMAP_POLICY_ERROR bytes, says in words what it is.
 */
#define KMAP_POLICY_ERROR 256
int kmap_policy_check(const char *text, size_t length, unsigned *line, char *error);

/* Compiled layout of the wire and statistics structures. */
struct kmap_layout {
	const char *structure, *field;
	uint32_t offset, size;
};
int kmap_layout_get(unsigned index, struct kmap_layout *out);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
