/* SPDX-License-Identifier: Apache-2.0 */
/* The default: bytes lie in the segment itself, and shm/ring.h moves them. */
#include "transport/transport.h"

const struct km_transport km_transport_shm = {.name = "shm"};
