/* SPDX-License-Identifier: Apache-2.0 */
/* What is unread in a ring when the process becomes another program: see inherit.c. */
#ifndef KM_INHERIT_H
#define KM_INHERIT_H

#include "fd/file.h"

/* Will the library be in the program that file names, as execvp finds it? */
bool km_inherit_possible(const char *file, char *const env[]);

/* Copies f's unread bytes for the new image, where it is fd; *memfd is made by the first.
 * They stay in the ring, for an exec that fails.  Direction lock of f held, or nobody
 * else there.  0 or a negative errno value. */
int km_inherit_add(struct km_file *f, int fd, int *memfd);

/* env with a word about memfd; pages of its own, or NULL. */
char **km_inherit_environment(char *const env[], int memfd);

/* In the new image, before anything else: takes over what is there. */
void km_inherit_start(void);

#endif
