/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "base/fault_point.h"
#include "event/set.h"
#include "shm/latch.h"
#include "sock/stream.h"

#define BELLS 1024

/* The set of a bell whose set was closed. */
#define LEFT_BEHIND ((struct km_set *)-1)

static struct km_bell *bells[BELLS];
static uint32_t bell_count;
static struct km_peer_bell *peer_bells;

static void move(int *place, int fd)
{
	if (*place == fd)
		*place = km_fd_hide_copy(fd);
}

void km_bell_move(int fd)
{
	enum km_lock_result how = km_lock(&km_proc.link_lock);

	for (uint32_t i = 0; i < bell_count; i++) {
		move(&bells[i]->memfd, fd);
		move(&bells[i]->latch, fd);
	}
	for (struct km_peer_bell *pb = peer_bells; pb; pb = pb->next)
		move(&pb->latch, fd);
	km_unlock(&km_proc.link_lock, how);
	if (km_thread.epfd == fd)
		move(&km_thread.epfd, fd);
}

/* -- this process's bells ------------------------------------------------------ */

static int bell_open(struct km_bell *bell)
{
	int fd, err;

	fd = km_sys_memfd_create("kmap-bell", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	bell->memfd = km_fd_hide(fd);
	if (bell->memfd < 0)
		return bell->memfd;
	err = km_sys_ftruncate(bell->memfd, KM_BELL_SIZE);
	if (err == 0)
		err = km_sys_fcntl(bell->memfd, F_ADD_SEALS,
				   F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	if (err < 0)
		return err;
	bell->wire = km_sys_mmap(KM_BELL_SIZE, 0, bell->memfd, &err);
	if (!bell->wire)
		return err;
	bell->wire->version = KM_WIRE_VERSION;
	bell->wire->slots = KM_BELL_SLOTS;
	bell->wire->magic = KM_BELL_MAGIC;
	bell->latch = km_fd_hide(km_latch_open());
	return bell->latch < 0 ? bell->latch : 0;
}

/* Makes set hear bell; its lock is held.  0 or an error of epoll_ctl. */
int km_set_hear(struct km_set *set, struct km_bell *bell)
{
	uint32_t n = km_load_seq(&set->bells);
	struct epoll_event ev = {.events = EPOLLIN | EPOLLET};
	int err;

	for (uint32_t i = 0; i < n; i++)
		if (set->bell[i] == bell)
			return 0;
	if (n == KM_SET_BELLS)
		return -EUSERS;
	ev.data.u64 = (uint64_t)km_proc.magic << 32 | KM_BELL_COOKIE | bell->index;
	err = km_sys_epoll_ctl(set->epfd, EPOLL_CTL_ADD, bell->latch, &ev);
	if (err < 0 && err != -EEXIST)
		return err;
	set->bell[n] = bell;
	km_store_seq(&set->bells, n + 1);
	if (set->watched)
		km_bell_arm(bell);
	return 0;
}

static int bell_new(struct km_set *set, uint32_t uid, struct km_bell **out)
{
	struct km_bell *bell;
	int err;

	if (bell_count == BELLS)
		return -EUSERS;
	bell = km_pages(sizeof(*bell) + KM_BELL_SLOTS * sizeof(*bell->slot), false);
	if (!bell)
		return -ENOMEM;
	bell->slot = (struct km_file **)(bell + 1);
	bell->memfd = bell->latch = -1;
	bell->uid = uid;
	bell->set = set;
	bell->index = bell_count;
	err = bell_open(bell);
	if (err < 0) {
		if (bell->wire)
			munmap(bell->wire, KM_BELL_SIZE);
		km_fd_unhide(bell->memfd);
		km_fd_unhide(bell->latch);
		munmap(bell, sizeof(*bell) + KM_BELL_SLOTS * sizeof(*bell->slot));
		return err;
	}
	bells[bell_count] = bell;
	__atomic_store_n(&bell_count, bell_count + 1, __ATOMIC_RELEASE);
	*out = bell;
	return 0;
}

static bool has_room(const struct km_bell *bell)
{
	return bell->used < KM_BELL_SLOTS || bell->free_slots;
}

static uint32_t slot_take(struct km_bell *bell, struct km_file *f)
{
	enum km_lock_result how = km_lock(&bell->lock);
	uint32_t slot = 0;

	if (bell->free_slots) {
		while (bell->slot[slot])
			slot++;
		bell->free_slots--;
	} else {
		slot = bell->used++;
	}
	bell->slot[slot] = f;
	km_unlock(&bell->lock, how);
	return slot;
}

int km_bell_take(struct km_file *f, uint32_t uid)
{
	struct km_set *set = NULL;
	struct km_bell *bell = NULL;
	int err;

	for (struct km_reg *reg = f->regs; reg && !set; reg = reg->next)
		if (reg->active)
			set = reg->set;
	for (uint32_t i = 0; i < bell_count; i++)
		if (bells[i]->set == set && bells[i]->uid == uid &&
		    !bells[i]->inherited && has_room(bells[i]))
			bell = bells[i];
	/* One that a closed set left behind serves as well. */
	for (uint32_t i = 0; i < bell_count && !bell; i++)
		if (bells[i]->set == LEFT_BEHIND && bells[i]->uid == uid &&
		    !bells[i]->inherited && has_room(bells[i])) {
			bell = bells[i];
			bell->set = set;
		}
	if (!bell) {
		err = bell_new(set, uid, &bell);
		if (err < 0)
			return err;
	}
	f->bell = bell;
	f->slot = slot_take(bell, f);
	return 0;
}

void km_bell_drop(struct km_file *f)
{
	struct km_bell *bell = f->bell;
	enum km_lock_result how;

	if (!bell)
		return;
	how = km_lock(&bell->lock);
	if (bell->slot[f->slot] == f) {
		bell->slot[f->slot] = NULL;
		bell->free_slots++;
	}
	f->bell = NULL;
	km_unlock(&bell->lock, how);
}

void km_bell_arm(struct km_bell *bell)
{
	km_add_seq(&bell->wire->sleep, ((uint64_t)1 << 32) + 1);
	km_fence_sync(ARM);
	KM_FAULT(WAKE_ARMED);
}

void km_bell_disarm(struct km_bell *bell)
{
	/* One ring wakes one of several sleepers, so what comes now must ring for
	 * the others: the number of the sleep changes here too. */
	km_add_seq(&bell->wire->sleep, ((uint64_t)1 << 32) - 1);
}

bool km_bell_has_news(const struct km_bell *bell)
{
	const struct km_wire_bell *wire = bell->wire;
	uint64_t any = 0;

	for (uint32_t i = 0; i < KM_COUNT(wire->summary); i++)
		any |= km_load_relaxed(&wire->summary[i]);
	return any;
}

/* A wake-up must not be lost to a system call that fails once. */
static int ring_latch(int latch)
{
	int err = km_latch_ring(latch);

	return err < 0 ? km_latch_ring(latch) : err;
}

void km_bell_kick(struct km_bell *bell)
{
	ring_latch(bell->latch);
}

void km_ask_for_space(struct km_file *f, struct km_conn *conn)
{
	km_or_seq(&conn->tx.wire->prod_wait, KM_WAIT_EVENT);
	km_store_seq(&f->asked, 1);
	km_fence_sync(ASK);
}

/* What has happened since the bell was last drained; the bell's lock is held. */
static uint32_t cause_of(struct km_file *f)
{
	struct km_conn *conn = f->conn;
	uint32_t cause = 0;
	uint64_t w;

	if (!conn || km_stream_left(f))
		return KM_NEWS_ANY;
	w = km_load_sync(OBSERVE, &conn->rx.wire->wpos);
	/* SO_RCVLOWAT: until there is enough nobody is told. */
	if (w != f->news_at &&
	    (conn->lowat <= 1 || w - __atomic_load_n(&conn->rx.r, __ATOMIC_RELAXED) >=
					 (uint64_t)conn->lowat))
		cause |= KM_NEWS_DATA;
	f->news_at = w;
	if (km_load_seq(&f->asked) &&
	    !(km_load_seq(&conn->tx.wire->prod_wait) & KM_WAIT_EVENT)) {
		cause |= KM_NEWS_SPACE;
		km_store_seq(&f->asked, 0);
		/* Asked once more in between: the answer is still to come. */
		if (km_load_seq(&conn->tx.wire->prod_wait) & KM_WAIT_EVENT)
			km_store_seq(&f->asked, 1);
	}
	return cause;
}

static void pass_on(struct km_file *f)
{
	km_event_news(f, cause_of(f));
}

void km_bell_drain(struct km_bell *bell)
{
	struct km_wire_bell *wire = bell->wire;

	for (uint32_t s = 0; s < KM_COUNT(wire->summary); s++) {
		enum km_lock_result how;
		uint64_t words;

		/* Nothing there, and nobody on the way from taking bits to listing
		 * what they stand for: who sees neither may sleep. */
		if (km_likely(km_load_seq(&wire->summary[s]) == 0 &&
			      km_load_seq(&bell->lock) == 0))
			continue;
		how = km_lock(&bell->lock);
		words = km_swap_seq(&wire->summary[s], 0);
		while (words) {
			uint32_t word = s * 64 + (uint32_t)__builtin_ctzll(words);
			uint64_t bits = km_swap_seq(&wire->news[word], 0);

			words &= words - 1;
			KM_FAULT(WAKE_DRAIN);
			while (bits) {
				uint32_t slot =
					word * 64 + (uint32_t)__builtin_ctzll(bits);

				bits &= bits - 1;
				if (bell->slot[slot])
					pass_on(bell->slot[slot]);
			}
		}
		km_unlock(&bell->lock, how);
	}
}

void km_bell_forget_set(struct km_set *set)
{
	for (uint32_t i = 0; i < bell_count; i++)
		if (bells[i]->set == set)
			bells[i]->set = LEFT_BEHIND;
}

void km_bell_fork_child(void)
{
	for (uint32_t i = 0; i < bell_count; i++) {
		bells[i]->inherited = true;
		km_store_seq(&bells[i]->lock, 0);
	}
}

/* -- peers' bells --------------------------------------------------------------- */

static int peer_bell_map(struct km_peer_bell *pb, int memfd, const struct stat *st)
{
	int seals = km_sys_fcntl(memfd, F_GET_SEALS, 0);
	int err;

	if (seals < 0)
		return seals == -EINVAL ? -EPROTO : seals;
	if ((seals & (F_SEAL_SHRINK | F_SEAL_SEAL)) != (F_SEAL_SHRINK | F_SEAL_SEAL) ||
	    st->st_size != KM_BELL_SIZE)
		return -EPROTO;
	pb->wire = km_sys_mmap(KM_BELL_SIZE, 0, memfd, &err);
	return err;
}

static int peer_bell_new(int memfd, int latch, uint32_t uid, const struct stat *st,
			 struct km_peer_bell **out)
{
	struct km_peer_bell *pb = km_pages(sizeof(*pb), false);
	int err;

	if (!pb) {
		km_sys_close(latch);
		return -ENOMEM;
	}
	err = peer_bell_map(pb, memfd, st);
	if (err == 0)
		err = km_latch_check(latch);
	if (err < 0) {
		km_sys_close(latch);
	} else {
		pb->latch = km_fd_hide(latch);
		err = pb->latch < 0 ? pb->latch : 0;
	}
	if (err < 0) {
		if (pb->wire)
			munmap(pb->wire, KM_BELL_SIZE);
		munmap(pb, sizeof(*pb));
		return err;
	}
	pb->uid = uid;
	pb->dev = st->st_dev;
	pb->ino = st->st_ino;
	km_store_seq(&pb->rung, (uint32_t)-1);
	pb->next = peer_bells;
	peer_bells = pb;
	*out = pb;
	return 0;
}

int km_peer_bell_take(struct km_file *f, int memfd, int latch, uint32_t uid,
		      uint32_t slot)
{
	struct km_peer_bell *pb;
	struct stat st;
	int err = km_sys_fstat(memfd, &st);

	if (err < 0) {
		km_sys_close(memfd);
		km_sys_close(latch);
		return err;
	}
	for (pb = peer_bells; pb; pb = pb->next)
		if (pb->dev == st.st_dev && pb->ino == st.st_ino && pb->uid == uid)
			break;
	if (pb)
		km_sys_close(latch);
	else
		err = peer_bell_new(memfd, latch, uid, &st, &pb);
	km_sys_close(memfd);
	if (err < 0)
		return err;
	pb->refs++;
	f->peer_slot = slot;
	f->peer = pb;
	return 0;
}

void km_peer_bell_drop(struct km_file *f)
{
	struct km_peer_bell *pb = f->peer;
	struct km_peer_bell **at = &peer_bells;

	f->peer = NULL;
	if (!pb || --pb->refs)
		return;
	while (*at != pb)
		at = &(*at)->next;
	*at = pb->next;
	km_fd_unhide(pb->latch);
	munmap(pb->wire, KM_BELL_SIZE);
	munmap(pb, sizeof(*pb));
}

void km_peer_bell_ring(struct km_peer_bell *pb, uint32_t seq)
{
	if (km_load_seq(&pb->rung) == seq) {
		km_count(KM_COUNT_BELLS_SUPPRESSED);
		return;
	}
	/* First the ring, then the note: a thread that reads the note may rely on
	 * the ring.  The child of a vfork, whose memory this is too, may have closed
	 * the descriptor for itself. */
	KM_FAULT(WAKE_BELL);
	if (ring_latch(pb->latch) < 0)
		return;
	km_count(KM_COUNT_BELLS_RUNG);
	KM_FAULT(WAKE_RUNG);
	km_store_seq(&pb->rung, seq);
}
