/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Binds references to old glibc symbol versions.  CMake includes this file in
 * front of every source, except under sanitizers.
 *
 * glibc 2.34 gave libdl's and libpthread's functions a new version when it moved
 * them into libc, so that a library built on Debian 12 would not load in an older
 * container although nothing about the functions changed.  The old versions are
 * still there for old programs; we ask for those.  tests/spec holds the built
 * libraries to GLIBC_2.28.
 *
 * A function that appears here must not be one that the library interposes.
 */
#ifndef KM_GLIBC_COMPAT_H
#define KM_GLIBC_COMPAT_H

#ifndef __ASSEMBLER__
#include <features.h>

#ifdef __GLIBC__
#if defined(__x86_64__)
#define KM_BIND(name, x86_64) __asm__(".symver " #name "," #name "@GLIBC_" x86_64)
#define KM_BIND_AS(name, old) __asm__(".symver " #name "," #old "@GLIBC_2.2.5")
#elif defined(__aarch64__)
/* The first glibc of this architecture, and so the version of all of these. */
#define KM_BIND(name, x86_64) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#define KM_BIND_AS(name, old) __asm__(".symver " #name "," #old "@GLIBC_2.17")
#endif
#endif

#ifdef KM_BIND
KM_BIND(dladdr, "2.2.5");
KM_BIND(dlclose, "2.2.5");
KM_BIND(dlerror, "2.2.5");
KM_BIND(dlopen, "2.2.5");
KM_BIND(dlsym, "2.2.5");
KM_BIND(dlvsym, "2.2.5");
KM_BIND(pthread_create, "2.2.5");
KM_BIND(pthread_detach, "2.2.5");
KM_BIND(pthread_getspecific, "2.2.5");
KM_BIND(pthread_join, "2.2.5");
KM_BIND(pthread_key_create, "2.2.5");
KM_BIND(pthread_key_delete, "2.2.5");
KM_BIND(pthread_kill, "2.2.5");
KM_BIND(pthread_mutex_consistent, "2.12");
KM_BIND(pthread_mutex_timedlock, "2.2.5");
KM_BIND(pthread_mutex_trylock, "2.2.5");
KM_BIND(pthread_mutexattr_destroy, "2.2.5");
KM_BIND(pthread_mutexattr_init, "2.2.5");
KM_BIND(pthread_mutexattr_setpshared, "2.2.5");
KM_BIND(pthread_mutexattr_setrobust, "2.12");
KM_BIND(pthread_mutexattr_settype, "2.2.5");
KM_BIND(pthread_once, "2.2.5");
KM_BIND(pthread_rwlock_destroy, "2.2.5");
KM_BIND(pthread_rwlock_init, "2.2.5");
KM_BIND(pthread_rwlock_rdlock, "2.2.5");
KM_BIND(pthread_rwlock_tryrdlock, "2.2.5");
KM_BIND(pthread_rwlock_trywrlock, "2.2.5");
KM_BIND(pthread_rwlock_unlock, "2.2.5");
KM_BIND(pthread_rwlock_wrlock, "2.2.5");
KM_BIND(pthread_setspecific, "2.2.5");
KM_BIND(pthread_sigmask, "2.2.5");
/* On glibc 2.38 and later, C11 with _GNU_SOURCE reads numbers by these names. */
KM_BIND_AS(__isoc23_strtol, strtol);
KM_BIND_AS(__isoc23_strtoul, strtoul);
KM_BIND_AS(__isoc23_strtoll, strtoll);
KM_BIND_AS(__isoc23_strtoull, strtoull);

/*
 * Before 2.33 stat and fstat were inline functions over __xstat and __fxstat,
 * which are what an old glibc exports.
 */
#include <sys/stat.h>
#if __GLIBC_PREREQ(2, 33)
#ifdef __x86_64__
#define KM_STAT_VERSION 1
#else
#define KM_STAT_VERSION 0
#endif
extern int __fxstat(int version, int fd, struct stat *st);
extern int __xstat(int version, const char *path, struct stat *st);
KM_BIND(__fxstat, "2.2.5");
KM_BIND(__xstat, "2.2.5");
#define fstat(fd, st) __fxstat(KM_STAT_VERSION, (fd), (st))
#define stat(path, st) __xstat(KM_STAT_VERSION, (path), (st))
#endif
#endif /* KM_BIND */
#endif /* __ASSEMBLER__ */

#endif
