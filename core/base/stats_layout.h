/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layout of the statistics memfd ("kmap-stats"), read by tools through
 * /proc/PID/fd.  All integers are in host byte order; addresses are sixteen
 * bytes, IPv4 as v4-mapped (::ffff:a.b.c.d); ports are in host byte order.
 *
 * The memfd exists from a process's first upgrade on.  It starts with one
 * header of KM_STATS_HEADER bytes, then row_count rows of KM_STATS_ROW bytes.
 * Rows beyond the first used_rows were never used.  Only the first 192 bytes
 * of a row and KM_STATS_TX_LOCK are described here; the rest is private to the process.
 */
#ifndef KM_STATS_LAYOUT_H
#define KM_STATS_LAYOUT_H

#include <stdint.h>

#define KM_STATS_MAGIC 0x535441545350414dULL /* "MAPSTATS" in memory */
#define KM_STATS_VERSION 1u
#define KM_STATS_HEADER 4096u
#define KM_STATS_ROW 512u
#define KM_STATS_COUNTERS_OFFSET 256u /* uint64_t[64], order of counters.def */
#define KM_STATS_REASONS_OFFSET 1024u /* uint64_t[64], order of reasons.def */

struct km_stats_header {
	uint64_t magic;
	uint32_t version;
	uint32_t header_size; /* KM_STATS_HEADER */
	uint32_t row_size;    /* KM_STATS_ROW */
	uint32_t row_count;   /* rows that fit the file */
	uint32_t used_rows;   /* rows ever used */
	uint32_t pid;	      /* creator, in its own PID namespace */
	char comm[16];
};

/* state of a row */
enum km_row_state {
	KM_ROW_FREE = 0,
	KM_ROW_PENDING = 1, /* offered, or hello sent */
	KM_ROW_RING = 2,    /* at least one direction uses a ring */
	KM_ROW_KERNEL = 3,  /* not upgraded, reason says why */
};

enum km_role { KM_ROLE_UNKNOWN = 0, KM_ROLE_CONNECTOR = 1, KM_ROLE_ACCEPTOR = 2 };

struct km_stats_row {
	uint32_t state;		  /*   0 enum km_row_state */
	uint32_t role;		  /*   4 enum km_role */
	uint32_t reason;	  /*   8 index in reasons.def */
	uint32_t transport;	  /*  12 0 = shm */
	uint64_t inode;		  /*  16 of the TCP socket, as in /proc/PID/fd */
	int32_t fd;		  /*  24 descriptor at the time of the upgrade */
	uint32_t pid;		  /*  28 process that upgraded it */
	uint16_t lport;		  /*  32 local port */
	uint16_t pport;		  /*  34 peer port */
	uint16_t oport;		  /*  36 original destination port, 0 if the same */
	uint16_t pad0;		  /*  38 */
	uint8_t laddr[16];	  /*  40 */
	uint8_t paddr[16];	  /*  56 */
	uint8_t oaddr[16];	  /*  72 */
	uint32_t ring_size;	  /*  88 largest size of one ring, bytes */
	uint32_t generation;	  /* 92 increased each time the row is reused */
	uint64_t ring_rx_bytes;	  /*  96 taken from the ring by the program */
	uint64_t ring_tx_bytes;	  /* 104 put into the ring by the program */
	uint64_t kernel_rx_bytes; /* 112 through the kernel, counted at cut-over */
	uint64_t kernel_tx_bytes; /* 120 through the kernel, counted at cut-over */
	uint64_t rx_seen;	  /* 128 producer position last seen when reading */
	uint64_t tx_seen;	  /* 136 consumer position last seen when writing */
	uint8_t token[16];	  /* 144 the same at both ends of a connection */
	uint64_t segment;	  /* 160 its address in the process that upgraded it */
};

/* uint32_t at this place in a row: not 0 while a thread may be writing to the ring. */
#define KM_STATS_TX_LOCK 196u

#endif
