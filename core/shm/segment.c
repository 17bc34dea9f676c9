/* SPDX-License-Identifier: Apache-2.0 */
#include "shm/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "base/sys.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

size_t km_segment_size(uint32_t ring_size, bool bare)
{
	struct km_ring_geometry geo;

	if (bare)
		return KM_WIRE_HEADER;
	km_ring_geometry_init(&geo, ring_size);
	return KM_WIRE_HEADER + 2 * (size_t)geo.bytes;
}

static bool ring_size_is_valid(uint32_t size, bool bare)
{
	return size >= KM_RING_SIZE_MIN && size <= KM_RING_SIZE_MAX &&
	       (bare || (size & (size - 1)) == 0);
}

int km_segment_create(struct km_segment *seg, uint32_t ring_size, bool bare,
		      int *fd_out)
{
	struct km_wire_segment *wire;
	size_t size;
	int fd, err;

	if (!ring_size_is_valid(ring_size, bare))
		return -EINVAL;
	size = km_segment_size(ring_size, bare);
	fd = km_sys_memfd_create("kmap-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return fd;
	err = km_sys_ftruncate(fd, (int64_t)size);
	if (err == 0)
		err = km_sys_fcntl(fd, F_ADD_SEALS, SEALS);
	if (err < 0) {
		km_sys_close(fd);
		return err;
	}
	wire = km_sys_mmap(size, 0, fd, &err);
	if (!wire) {
		km_sys_close(fd);
		return err;
	}
	wire->magic = KM_WIRE_MAGIC;
	wire->version = KM_WIRE_VERSION;
	wire->header_size = KM_WIRE_HEADER;
	wire->ring_size = ring_size;
	km_sys_getrandom(wire->token, sizeof(wire->token));
	km_store_sync(ATTACH_SET, &wire->state, KM_SEG_HELLO);
	seg->wire = wire;
	seg->size = size;
	seg->ring_size = ring_size;
	seg->bare = bare;
	*fd_out = fd;
	return 0;
}

void km_segment_resize(struct km_segment *seg, uint32_t ring_size)
{
	seg->ring_size = ring_size;
	seg->wire->ring_size = ring_size;
}

int km_segment_attach(struct km_segment *seg, bool bare, int fd)
{
	struct km_wire_segment *wire;
	struct stat st;
	uint32_t ring_size;
	int seals = km_sys_fcntl(fd, F_GET_SEALS, 0);
	int err = 0;

	if (seals == -EINVAL)
		return -EPERM; /* not a memfd: it cannot be sealed */
	if (seals < 0)
		return seals == -EPERM ? -EACCES : seals;
	if ((seals & SEALS) != SEALS || (seals & F_SEAL_WRITE))
		return -EPERM;
	err = km_sys_fstat(fd, &st);
	if (err < 0)
		return err == -EPERM ? -EACCES : err;
	if (st.st_size < (off_t)KM_WIRE_HEADER ||
	    st.st_size > (off_t)km_segment_size(KM_RING_SIZE_MAX, bare))
		return -EPROTO;
	wire = km_sys_mmap((size_t)st.st_size, 0, fd, &err);
	if (!wire)
		return err;
	/* The header is complete before the state says so. */
	if (km_load_sync(ATTACH_SEE, &wire->state) == 0)
		err = -EPROTO;
	/* Volatile: the peer may change it between check and use. */
	ring_size = *(volatile uint32_t *)&wire->ring_size;
	if (err < 0 || wire->magic != KM_WIRE_MAGIC)
		err = -EPROTO;
	else if (wire->version != KM_WIRE_VERSION)
		err = -EPROTONOSUPPORT;
	else if (!ring_size_is_valid(ring_size, bare) ||
		 wire->header_size != KM_WIRE_HEADER ||
		 (size_t)st.st_size != km_segment_size(ring_size, bare))
		err = -EPROTO;
	if (err < 0) {
		munmap(wire, (size_t)st.st_size);
		return err;
	}
	seg->wire = wire;
	seg->size = (size_t)st.st_size;
	seg->ring_size = ring_size;
	seg->bare = bare;
	return 0;
}

void km_segment_unmap(struct km_segment *seg)
{
	if (!seg->wire)
		return;
	munmap(seg->wire, seg->size);
	seg->wire = NULL;
}

void *km_segment_data(const struct km_segment *seg, int ring)
{
	struct km_ring_geometry geo;

	if (seg->bare)
		return NULL;
	km_ring_geometry_init(&geo, seg->ring_size);
	return (uint8_t *)seg->wire + KM_WIRE_HEADER + (size_t)ring * geo.bytes;
}
