/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KM_ADDRESS_H
#define KM_ADDRESS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* An end of a TCP connection; IPv4 as v4-mapped, port in host byte order. */
struct km_address {
	uint8_t ip[16];
	uint16_t port;
};

static inline bool km_same_address(const struct km_address *a,
				   const struct km_address *b)
{
	return a->port == b->port && memcmp(a->ip, b->ip, sizeof(a->ip)) == 0;
}

#endif
