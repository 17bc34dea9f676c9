/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of the program's memory: all sizes, bad ends, and whose a fault is. */
#include "unit.h"

#include <setjmp.h>
#include <signal.h>

#include "base/fault.h"

#define ROOM 8192

static size_t page;
static sigjmp_buf back;
static volatile int handled;
static void *volatile handled_at;

static void on_signal(int sig, siginfo_t *info, void *context)
{
	(void)context;
	handled = sig;
	handled_at = info->si_addr;
	siglongjmp(back, 1);
}

/* Pages between two that cannot be used. */
static uint8_t *pages(size_t count, int protection)
{
	uint8_t *p = mmap(NULL, (count + 2) * page, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	CHECK_IS(mprotect(p + page, count * page, protection), 0);
	return p + page;
}

static void sizes_and_places(bool far)
{
	static uint8_t from[ROOM], to[ROOM];

	for (size_t i = 0; i < ROOM; i++)
		from[i] = (uint8_t)(i * 31 + i / 256);
	for (size_t n = 0; n < ROOM - 256; n += n < 600 ? 1 : 97) {
		const uint8_t *src = from + n % 67;
		uint8_t *dst = to + 1 + n % 131;

		memset(to, 0xee, sizeof(to));
		CHECK_IS(km_user_copy(dst, src, n, far, src), 0);
		CHECK_IS(memcmp(dst, src, n), 0);
		CHECK(dst[-1] == 0xee && dst[n] == 0xee);
	}
}

/* A copy that ends where the memory does works, and one byte further it does not. */
static void ends(bool far)
{
	uint8_t *user = pages(2, PROT_READ | PROT_WRITE);
	uint8_t *end = user + 2 * page;
	static uint8_t own[2 * 65536];

	for (size_t n = 1; n <= 2 * page; n += n < 600 ? 1 : 97) {
		CHECK_IS(km_user_copy(own, end - n, n, far, end - n), 0);
		CHECK_IS(km_user_copy(end - n, own, n, far, end - n), 0);
		CHECK_IS(km_user_copy(own, user, n, far, user), 0);
		CHECK_IS(km_user_copy(own, end - n + 1, n, far, end - n + 1), -EFAULT);
		CHECK_IS(km_user_copy(end - n + 1, own, n, far, end - n + 1), -EFAULT);
		CHECK_IS(km_user_copy(own, user - 1, n, far, user - 1), -EFAULT);
		CHECK_IS(km_user_copy(user - 1, own, n, far, user - 1), -EFAULT);
		CHECK_IS(km_user_probe(end - n, n), 0);
		CHECK_IS(km_user_probe(end - n, n + 1), -EFAULT);
		CHECK_IS(km_user_probe(user - 1, n + 1), -EFAULT);
	}
	CHECK_IS(mprotect(user, 2 * page, PROT_READ), 0);
	CHECK_IS(km_user_copy(own, user, page, far, user), 0);
	CHECK_IS(km_user_copy(user, own, page, far, user), -EFAULT);
}

static void bad_everywhere(void)
{
	static const uintptr_t bad[] = {0,
					8,
					(uintptr_t)1 << 48,
					(uintptr_t)1 << 56,
					(uintptr_t)0xffff8 << 44,
					UINTPTR_MAX - 100,
					UINTPTR_MAX};
	static uint8_t own[ROOM];

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		void *p = (void *)bad[i];

		for (size_t n = 1; n < ROOM; n = n * 2 + 1) {
			CHECK_IS(km_user_copy(own, p, n, false, p), -EFAULT);
			CHECK_IS(km_user_copy(p, own, n, false, p), -EFAULT);
			CHECK_IS(km_user_probe(p, n), -EFAULT);
		}
		CHECK_IS(km_user_copy(own, p, 0, false, p), 0);
		CHECK_IS(km_user_probe(p, 0), 0);
	}
}

static void shrunk_file(void)
{
	FILE *file = tmpfile();
	static uint8_t own[64];
	uint8_t *user;

	CHECK(file);
	CHECK_IS(ftruncate(fileno(file), (off_t)page), 0);
	user = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fileno(file), 0);
	CHECK(user != MAP_FAILED);
	CHECK_IS(km_user_copy(own, user, sizeof(own), false, user), 0);
	CHECK_IS(ftruncate(fileno(file), 0), 0);
	CHECK_IS(km_user_copy(own, user, sizeof(own), false, user), -EFAULT);
	CHECK_IS(km_user_copy(user, own, sizeof(own), false, user), -EFAULT);
	fclose(file);
}

/* A fault at the other end of a copy, or anywhere else, is the program's. */
static void faults_of_others(void)
{
	uint8_t *none = pages(1, PROT_NONE), good[256] = {0};

	handled = 0;
	if (!sigsetjmp(back, 1)) {
		km_user_copy(none + 64, good, sizeof(good), false, good);
		CHECK(!"a fault of the ring's memory was taken for the program's");
	}
	CHECK_IS(handled, SIGSEGV);
	CHECK((uint8_t *)handled_at >= none && (uint8_t *)handled_at < none + page);
	handled = 0;
	if (!sigsetjmp(back, 1)) {
		*(volatile uint8_t *)none = 1;
		CHECK(!"a page without access was written");
	}
	CHECK_IS(handled, SIGSEGV);
	CHECK(handled_at == none);
	CHECK_IS(km_user_copy(none, good, sizeof(good), false, none), -EFAULT);
}

int main(void)
{
	struct sigaction action = {.sa_flags = SA_SIGINFO};
	struct km_action kept;

	unit_watchdog();
	page = (size_t)sysconf(_SC_PAGESIZE);
	action.sa_sigaction = on_signal;
	CHECK_IS(sigaction(SIGSEGV, &action, NULL), 0);
	CHECK(!km_fault_recall(SIGSEGV, &kept));
	sizes_and_places(false);
	sizes_and_places(true);
	km_fault_arm();
	CHECK(km_fault_recall(SIGSEGV, &kept));
	CHECK(!km_fault_recall(SIGUSR1, &kept));
	sizes_and_places(false);
	sizes_and_places(true);
	ends(false);
	ends(true);
	bad_everywhere();
	shrunk_file();
	faults_of_others();
	return 0;
}
