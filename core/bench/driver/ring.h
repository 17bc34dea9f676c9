/* SPDX-License-Identifier: Apache-2.0 */
/* The transport ring: a channel of libkmap, without the socket API above it. */
#ifndef KMAP_BENCH_RING_H
#define KMAP_BENCH_RING_H

#include "bench.h"

void ring_prepare(void);
void *ring_open(enum side side);
void ring_close(void *channel);
/* As end_read and end_write; in mode BUSY they never sleep. */
ssize_t ring_read(void *channel, void *buf, size_t len);
ssize_t ring_write(void *channel, const void *buf, size_t len);

#endif
