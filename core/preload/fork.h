/* SPDX-License-Identifier: Apache-2.0 */
/* What is done around every fork, in the order of pthread_atfork's handlers. */
#ifndef KM_FORK_H
#define KM_FORK_H

void km_fork_prepare(void);
void km_fork_parent(void);
void km_fork_child(void);

#endif
