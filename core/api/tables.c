/* SPDX-License-Identifier: Apache-2.0 */
/* The tables of the .def files and the compiled layout, for tools and tests. */
#include <errno.h>
#include <stddef.h>

#include "base/compiler.h"
#include "base/stats_layout.h"
#include "kmap.h"
#include "shm/wire.h"

struct name {
	const char *name, *meaning;
};

static const struct name reasons[] = {
#define X(id, name, meaning) {name, meaning},
#include "base/reasons.def"
#undef X
};

static const struct name transports[] = {
#define X(id, name, meaning) {#name, meaning},
#include "base/transports.def"
#undef X
};

static const struct name counters[] = {
#define X(id, name, meaning) {name, meaning},
#include "base/counters.def"
#undef X
};

static const struct kmap_symbol symbols[] = {
#define X(name, subject, class, text) {#name, #subject, #class, text},
#include "base/symbols.def"
#undef X
};

static const struct kmap_option options[] = {
#define BOOL "bool"
#define UINT "uint"
#define SIZE "size"
#define STR "str"
#define X(field, env, type, min, max, fallback, help)                                  \
	{env, type, #fallback, help, min, max},
#include "base/options.def"
#undef X
#undef BOOL
#undef UINT
#undef SIZE
#undef STR
};

#define F(structure, field)                                                            \
	{                                                                              \
#structure, #field, offsetof(struct structure, field),                 \
			sizeof(((struct structure *)0)->field)                         \
	}

static const struct kmap_layout layout[] = {
	F(km_wire_segment, magic),
	F(km_wire_segment, version),
	F(km_wire_segment, header_size),
	F(km_wire_segment, ring_size),
	F(km_wire_segment, state),
	F(km_wire_segment, token),
	F(km_wire_segment, ring),
	F(km_wire_ring, wpos),
	F(km_wire_ring, grow_at),
	F(km_wire_ring, cut),
	F(km_wire_ring, end),
	F(km_wire_ring, pflags),
	F(km_wire_ring, pcpu),
	F(km_wire_ring, torn),
	F(km_wire_ring, rpos),
	F(km_wire_ring, stop),
	F(km_wire_ring, ccpu),
	F(km_wire_ring, cons_wait),
	F(km_wire_ring, prod_wait),
	F(km_wire_ring, left),
	F(km_wire_bell, magic),
	F(km_wire_bell, version),
	F(km_wire_bell, slots),
	F(km_wire_bell, sleep),
	F(km_wire_bell, summary),
	F(km_wire_bell, news),
	F(km_wire_hello, magic),
	F(km_wire_hello, version),
	F(km_wire_hello, kind),
	F(km_wire_hello, slot),
	F(km_wire_hello, reason),
	F(km_wire_hello, transport),
	F(km_wire_hello, laddr),
	F(km_wire_hello, lport),
	F(km_stats_header, magic),
	F(km_stats_header, version),
	F(km_stats_header, header_size),
	F(km_stats_header, row_size),
	F(km_stats_header, row_count),
	F(km_stats_header, used_rows),
	F(km_stats_header, pid),
	F(km_stats_header, comm),
	F(km_stats_row, state),
	F(km_stats_row, role),
	F(km_stats_row, reason),
	F(km_stats_row, transport),
	F(km_stats_row, inode),
	F(km_stats_row, fd),
	F(km_stats_row, pid),
	F(km_stats_row, lport),
	F(km_stats_row, pport),
	F(km_stats_row, oport),
	F(km_stats_row, laddr),
	F(km_stats_row, paddr),
	F(km_stats_row, oaddr),
	F(km_stats_row, ring_size),
	F(km_stats_row, generation),
	F(km_stats_row, ring_rx_bytes),
	F(km_stats_row, ring_tx_bytes),
	F(km_stats_row, kernel_rx_bytes),
	F(km_stats_row, kernel_tx_bytes),
	F(km_stats_row, rx_seen),
	F(km_stats_row, tx_seen),
	F(km_stats_row, token),
	F(km_stats_row, segment),
};

const char *kmap_reason_name(unsigned index)
{
	return index < KM_COUNT(reasons) ? reasons[index].name : NULL;
}

const char *kmap_reason_meaning(unsigned index)
{
	return index < KM_COUNT(reasons) ? reasons[index].meaning : NULL;
}

const char *kmap_transport_name(unsigned index)
{
	return index < KM_COUNT(transports) ? transports[index].name : NULL;
}

const char *kmap_transport_meaning(unsigned index)
{
	return index < KM_COUNT(transports) ? transports[index].meaning : NULL;
}

const char *kmap_counter_name(unsigned index)
{
	return index < KM_COUNT(counters) ? counters[index].name : NULL;
}

const char *kmap_counter_meaning(unsigned index)
{
	return index < KM_COUNT(counters) ? counters[index].meaning : NULL;
}

const char *kmap_symbol_name(unsigned index)
{
	return index < KM_COUNT(symbols) ? symbols[index].name : NULL;
}

int kmap_symbol_get(unsigned index, struct kmap_symbol *out)
{
	if (index >= KM_COUNT(symbols))
		return -ENOENT;
	*out = symbols[index];
	return 0;
}

int kmap_option_get(unsigned index, struct kmap_option *out)
{
	if (index >= KM_COUNT(options))
		return -ENOENT;
	*out = options[index];
	return 0;
}

int kmap_layout_get(unsigned index, struct kmap_layout *out)
{
	if (index >= KM_COUNT(layout))
		return -ENOENT;
	*out = layout[index];
	return 0;
}
