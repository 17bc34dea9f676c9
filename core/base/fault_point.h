/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fault points: places with a name (faults.def) at which a test can disturb a process.
 * They exist only in builds with KMAP_FAULT_POINTS (preset "faults") and are nothing in
 * all others.  (base/fault.h is about bad pointers.)
 *
 * KMAP_FAULTS=POINT:ACTION[:COUNT] acts once, at the COUNT-th passage of the point:
 *
 *   kill        SIGKILL
 *   stop        SIGSTOP; whoever started the process continues it
 *   fail=ERRNO  the thread's next system call of the library's own fails so
 *   mark        nothing
 *
 * A line on standard error says that it happened.
 */
#ifndef KM_FAULT_POINT_H
#define KM_FAULT_POINT_H

#ifdef KM_FAULT_POINTS

enum km_point {
#define X(id, name, where) KM_POINT_##id,
#include "base/faults.def"
#undef X
	KM_POINTS
};

/* Reads KMAP_FAULTS. */
void km_points_init(void);
void km_point_reached(enum km_point point);

#define KM_FAULTS_INIT() km_points_init()
#define KM_FAULT(id) km_point_reached(KM_POINT_##id)

#else

#define KM_FAULTS_INIT() ((void)0)
#define KM_FAULT(id) ((void)0)

#endif
#endif
