/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets that were passed in a message: see held.c. */
#ifndef KM_HELD_H
#define KM_HELD_H

#include "fd/file.h"

/* The name for f's socket is this process's; false while it is another's, or when there
 * is no descriptor for it.  link_lock held. */
bool km_held_take(struct km_file *f, int fd);
void km_held_drop(struct km_file *f);

/* fd has arrived in a message: tracked if it may be upgraded here. */
void km_held_received(int fd);

#endif
