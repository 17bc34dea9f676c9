/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault.h"

#include <errno.h>
#include <ucontext.h>

#include "base/proc.h"

extern const char km_user_begin[], km_user_end[], km_user_fault[];

/* A program has nothing from here on that it did not ask for specially: it is the
 * kernel's half, or what lies between the halves. */
#if defined(__x86_64__)
#define BEYOND_USER 47
#elif defined(__aarch64__)
#define BEYOND_USER 48
#endif

/* The address reported may be anywhere in the page, or huge page, that is missing; the
 * ring, the other end of a copy, is never as near as this to the program's memory. */
#define PAGE_MOST 4095u

bool km_fault_armed;

/*
 * A mask that the kernel reads before it finds that it is asked to do nothing with it.
 * A page that was there the last time is not asked for again: this is for poll and the
 * like, on sockets that the kernel serves, and an answer that is a little old costs
 * what there is to lose without any.
 */
bool km_readable_by_kernel(const void *user, size_t n)
{
	uintptr_t at = (uintptr_t)user, end = at + n;

	if (n == 0)
		return true;
	if (at <= PAGE_MOST || km_kernel_pointer(user, n))
		return false;
	for (at &= ~(uintptr_t)PAGE_MOST; at < end; at += PAGE_MOST + 1) {
		if (at == km_thread.seen_page)
			continue;
		if (KM_SYS(rt_sigprocmask, -1, at, NULL, KM_SIGSET_SIZE, 0, 0) ==
		    -EFAULT)
			return false;
		km_thread.seen_page = at;
	}
	return true;
}

/* -- the program's actions --------------------------------------------------------- */

/*
 * Without a lock, since a handler reads them: each change goes to the next place, and
 * a reader who was overtaken by all of them reads again.
 */
#define PLACES 64

static struct km_action kept[2][PLACES];
static km_a32 claimed[2], newest[2];

static int index_of(int sig)
{
	return sig == SIGSEGV ? 0 : sig == SIGBUS ? 1 : -1;
}

static void keep(int i, const struct km_action *action)
{
	uint32_t n = km_add_seq(&claimed[i], 1) + 1;

	kept[i][n % PLACES] = *action;
	km_store_seq(&newest[i], n);
}

static void recall(int i, struct km_action *out)
{
	uint32_t n;

	do {
		n = km_load_seq(&newest[i]);
		*out = kept[i][n % PLACES];
		km_fence_seq();
	} while (km_load_seq(&claimed[i]) - n >= PLACES);
}

static int kernel_action(int sig, const struct km_action *act, struct km_action *old)
{
	return (int)KM_SYS(rt_sigaction, sig, act, old, KM_SIGSET_SIZE, 0, 0);
}

/* -- the handler ------------------------------------------------------------------- */

static bool in_range(uintptr_t at, uintptr_t start, size_t n)
{
#if defined(__aarch64__)
	/* The top byte is a tag and not part of the address. */
	start &= UINTPTR_MAX >> 8;
	at &= UINTPTR_MAX >> 8;
#endif
	return (at | PAGE_MOST) >= start && (at & ~(uintptr_t)PAGE_MOST) < start + n;
}

static bool beyond_user(uintptr_t start, size_t n)
{
#if defined(__aarch64__)
	/* The top byte is a tag, where it is not the kernel's. */
	if (!(start >> 55 & 1))
		start &= UINTPTR_MAX >> 8;
#endif
	return start >> BEYOND_USER || (start + n) >> BEYOND_USER;
}

/* True when the fault was in a copy, at the program's end of it: the copy is over. */
static bool recover(const siginfo_t *info, ucontext_t *context)
{
#if defined(__x86_64__)
	greg_t *r = context->uc_mcontext.gregs;
	uintptr_t pc = (uintptr_t)r[REG_RIP], start = (uintptr_t)r[REG_R8];
	size_t n = (size_t)r[REG_RDX];
#elif defined(__aarch64__)
	uintptr_t pc = context->uc_mcontext.pc, start = context->uc_mcontext.regs[3];
	size_t n = context->uc_mcontext.regs[2];
#endif

	if (pc < (uintptr_t)km_user_begin || pc >= (uintptr_t)km_user_end)
		return false;
	/* Of an address between the halves it is not said which it was. */
	if (!in_range((uintptr_t)info->si_addr, start, n) && !beyond_user(start, n))
		return false;
#if defined(__x86_64__)
	r[REG_RIP] = (greg_t)(uintptr_t)km_user_fault;
#elif defined(__aarch64__)
	context->uc_mcontext.pc = (uintptr_t)km_user_fault;
#endif
	return true;
}

/*
 * The default action, which the kernel takes when this handler returns: the signal is
 * sent once more with all it carried, so that the wait status, the core dump and its
 * program counter are those of the first.
 */
static void die(int sig, siginfo_t *info)
{
	struct km_action plain = {.handler = (void *)SIG_DFL};

	kernel_action(sig, &plain, NULL);
	/* Where that is forbidden, a fault repeats itself. */
	if (KM_SYS(rt_tgsigqueueinfo, km_sys_getpid(), km_sys_gettid(), sig, info, 0,
		   0) < 0 &&
	    info->si_code <= 0)
		KM_SYS(tgkill, km_sys_getpid(), km_sys_gettid(), sig, 0, 0, 0);
}

static void pass_on(int sig, siginfo_t *info, void *context)
{
	struct km_action action;

	recall(index_of(sig), &action);
	if (action.handler == (void *)SIG_DFL) {
		die(sig, info);
		return;
	}
	if (action.flags & SA_RESETHAND) {
		struct km_action next = action;

		next.handler = (void *)SIG_DFL;
		keep(index_of(sig), &next);
	}
	/* Mask, stack and the rest are as the program asked: the kernel has them. */
	((void (*)(int, siginfo_t *, void *))action.handler)(sig, info, context);
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	if (info->si_code > 0 && recover(info, context))
		return;
	pass_on(sig, info, context);
}

/* -- installing it ----------------------------------------------------------------- */

#if defined(__x86_64__)
#define KERNEL_RESTORER 0x04000000u
extern const char km_fault_return[];

/* Whether the copies may use registers of 32 bytes. */
extern uint8_t km_user_wide;
uint8_t km_user_wide;
#endif

/* Puts ours in the place of the program's action.  One that ignores the signal stays,
 * because exec hands it on; a bad pointer then ends the program. */
static void wrap(int sig)
{
	struct km_action now, ours, was;

	for (;;) {
		if (kernel_action(sig, NULL, &now) < 0 ||
		    now.handler == (void *)on_fault || now.handler == (void *)SIG_IGN)
			return;
		keep(index_of(sig), &now);
		ours = now;
		ours.handler = (void *)on_fault;
		ours.flags = (now.flags & ~(unsigned long)SA_RESETHAND) | SA_SIGINFO;
		/* Nobody else's handler runs: any stack will do, and none needs to be
		 * interrupted. */
		if (now.handler == (void *)SIG_DFL)
			ours.flags = SA_SIGINFO | SA_ONSTACK;
#if defined(__x86_64__)
		if (!(ours.flags & KERNEL_RESTORER)) {
			ours.flags |= KERNEL_RESTORER;
			ours.restorer = (void *)(uintptr_t)km_fault_return;
		}
#endif
		if (kernel_action(sig, &ours, &was) < 0 ||
		    memcmp(&was, &now, sizeof(was)) == 0)
			return;
		/* Another thread set one in between: that one is it. */
		if (kernel_action(sig, &was, NULL) < 0)
			return;
	}
}

void km_fault_arm(void)
{
	if (__atomic_exchange_n(&km_fault_armed, true, __ATOMIC_SEQ_CST))
		return;
#if defined(__x86_64__)
	__builtin_cpu_init();
	km_user_wide = __builtin_cpu_supports("avx2") != 0;
#endif
	wrap(SIGSEGV);
	wrap(SIGBUS);
}

void km_fault_changed(int sig)
{
	/* A vfork child's actions are its own, but this memory is its parent's. */
	if (index_of(sig) >= 0 && __atomic_load_n(&km_fault_armed, __ATOMIC_ACQUIRE) &&
	    !km_thread.bypass)
		wrap(sig);
}

bool km_fault_recall(int sig, struct km_action *out)
{
	int i = index_of(sig);

	if (i < 0 || !__atomic_load_n(&km_fault_armed, __ATOMIC_ACQUIRE))
		return false;
	recall(i, out);
	return true;
}

bool km_fault_is_ours(const void *handler)
{
	return handler == (const void *)(uintptr_t)on_fault;
}
