/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Readiness: epoll sets that hold upgraded connections, and the bells through
 * which peers wake this process (see struct km_wire_bell).
 *
 * An epoll set stays the kernel's.  A registration of an upgraded connection
 * carries a cookie of the library's in the kernel (the high half is km_proc.magic)
 * and tells only of the kernel side: FIN, reset, bytes before a cut-over.  What
 * the rings have is found in user space, through the set's ready list.
 */
#ifndef KM_EVENT_H
#define KM_EVENT_H

#include "fd/file.h"

/* One descriptor of a tracked socket in one epoll set.  Under the set's lock. */
struct km_reg {
	struct km_set *set;
	struct km_file *file;
	int fd;
	uint32_t index;	 /* in the slab, and in cookies */
	uint32_t events; /* as the program asked */
	epoll_data_t data;
	bool active;   /* the program has it registered */
	bool ours;     /* the kernel's registration carries our cookie */
	bool disarmed; /* EPOLLONESHOT has fired */
	bool listed;   /* in the ready list */
	bool fresh;    /* something happened since it was last reported */
	struct km_reg *ready_next, *ready_prev;
	struct km_reg *next;	 /* of the file; never unlinked while the file lives */
	struct km_reg *set_next; /* of the set; or of the free list */
	uint64_t seen_w; /* for files other processes use too: what was reported */
	bool want_space; /* not writable when last looked at */
	uint32_t told;	 /* ends and errors that the program was told of */
	uint32_t said;	 /* those that the kernel's events have said */
	bool stale;	 /* the kernel's next event may say nothing new */
};

#define KM_SET_BELLS 16
#define KM_SET_STASH 16
#define KM_SET_INNER 8

/* A set inside a set, as the program registered it. */
struct km_inner {
	int fd;
	uint32_t events;
	epoll_data_t data;
};

struct km_set {
	km_a32 lock;
	int epfd;
	uint32_t fds;	 /* descriptors, under table_lock */
	km_a32 rings;	 /* registrations that are ours */
	km_a32 waiters;	 /* threads inside the kernel's epoll_wait, not armed */
	km_a32 sleepers; /* threads asleep in it, armed */
	/* Something looks at the set's own readiness: poll, or an outer epoll set.
	 * Its bells are armed for good, so that the kernel's side of it shows what
	 * the rings have. */
	bool watched;
	struct km_inner inner[KM_SET_INNER]; /* sets inside this one */
	uint32_t inners;
	uint32_t stashed; /* the kernel's events that were taken to find that out */
	struct epoll_event stash[KM_SET_STASH];
	bool edges;	   /* some file of the kernel's is reported once only */
	bool mixed;	   /* some registration was ours once: cookies may still come */
	bool kernel_first; /* whose turn it is when there is room for one */
	bool scan;	   /* some file's news may be taken by another process */
	struct km_reg *regs;
	struct km_reg *ready, *ready_tail;
	struct km_spin spin;
	uint32_t peer_cpu; /* where a peer was that something was reported of last */
	uint32_t quick;	   /* turns in a row that came soon and found only rings */
	int64_t turn_at;   /* when the last turn began */
	int64_t kernel_at; /* when the kernel was last asked */
	km_a32 bells;
	struct km_bell *bell[KM_SET_BELLS]; /* it listens to; its own come first */
	struct km_set *next_free;
};

struct km_bell {
	struct km_wire_bell *wire;
	int memfd, latch;
	uint32_t uid; /* of the peers */
	uint32_t index;
	struct km_set *set; /* NULL: the process's own, for all other waits */
	bool inherited;	    /* made by a parent: takes no new connections */
	km_a32 lock;
	uint32_t used;	     /* slots ever used */
	uint32_t free_slots; /* how many of those are free */
	struct km_file **slot;
};

struct km_peer_bell {
	struct km_wire_bell *wire;
	int latch;
	uint32_t uid, refs;
	uint64_t dev, ino; /* of the memfd: its true identity */
	km_a32 rung;	   /* the sleep it was last rung for */
	struct km_peer_bell *next;
};

/* A bell for peers of that uid, and a slot for f in it; made if need be.
 * 0, -EUSERS, or the error of memfd_create, socket or mmap.  link_lock held. */
int km_bell_take(struct km_file *f, uint32_t uid);
void km_bell_drop(struct km_file *f);
/* Counts a sleeper in or out. */
void km_bell_arm(struct km_bell *bell);
void km_bell_disarm(struct km_bell *bell);
/* Is there something to drain? */
bool km_bell_has_news(const struct km_bell *bell);
/* Passes the news of a bell on to the registrations it is for. */
void km_bell_drain(struct km_bell *bell);
/* Wakes everybody who sleeps on it in this process. */
void km_bell_kick(struct km_bell *bell);
void km_bell_fork_child(void);
/* Gives a hidden descriptor of a bell another number. */
void km_bell_move(int fd);
/* Makes set hear bell; set.lock held.  0, -EUSERS or an error of epoll_ctl. */
int km_set_hear(struct km_set *set, struct km_bell *bell);
/* The set is gone; its bells serve no new connection. */
void km_bell_forget_set(struct km_set *set);

/* Takes over both descriptors, whatever the result.  -EPROTO, or mmap's. */
int km_peer_bell_take(struct km_file *f, int memfd, int latch, uint32_t uid,
		      uint32_t slot);
void km_peer_bell_drop(struct km_file *f);

/* The calling thread was woken by one of these bells and found nothing to report; it takes
 * a nap when that happens too often.  0, or -EINTR as ppoll with that mask. */
int km_idle_wake(struct km_bell *const *bells, uint32_t n, const sigset_t *mask);
/* It found something. */
void km_useful_wake(void);

/* Says that f's peer has news for the slot, and wakes it if it sleeps.  The
 * caller has published and passed a full fence. */
KM_INLINE void km_peer_bell_tell(const struct km_file *f);
void km_peer_bell_ring(struct km_peer_bell *pb, uint32_t seq);

KM_INLINE void km_peer_bell_tell(const struct km_file *f)
{
	struct km_peer_bell *pb = f->peer;
	uint32_t word = f->peer_slot / 64;
	uint64_t bit = 1ULL << (f->peer_slot % 64), bits, sleep;

	/* A bit that is set already was not yet taken: its taker will look at the
	 * ring after it takes the bit. */
	bits = km_load_seq(&pb->wire->news[word]);
	if (!(bits & bit)) {
		km_or_seq(&pb->wire->news[word], bit);
		km_or_seq(&pb->wire->summary[word / 64], 1ULL << (word % 64));
	}
	sleep = km_load_seq(&pb->wire->sleep);
	if ((uint32_t)sleep)
		km_peer_bell_ring(pb, (uint32_t)(sleep >> 32));
}

/* poll bits of f now: what the rings have, and what the kernel is known to have.
 * asks for space notification when EPOLLOUT is wanted and there is none. */
uint32_t km_file_level(struct km_file *f, uint32_t wanted);

/* Something happened on f: its registrations are to be looked at again.  As on the
 * kernel, it is an edge for those that are interested in the cause. */
#define KM_NEWS_DATA (EPOLLIN | EPOLLPRI | EPOLLRDNORM | EPOLLRDBAND)
#define KM_NEWS_SPACE (EPOLLOUT | EPOLLWRNORM | EPOLLWRBAND)
#define KM_NEWS_ANY UINT32_MAX
void km_event_news(struct km_file *f, uint32_t cause);

/* The kernel says once more, because of SO_RCVLOWAT, that the stream of f's peer has
 * ended: no news for registrations that are not interested in data. */
void km_event_ended_again(struct km_file *f);
/* f's peer is to tell when there is space in the ring. */
void km_ask_for_space(struct km_file *f, struct km_conn *conn);
/* f has become a channel: its registrations become ours.  0 or an error, after
 * which nothing has changed.  link_lock held. */
int km_event_attach(struct km_file *f);
/* f is closed: drops its registrations. */
void km_event_detach(struct km_file *f);
/* The set that epfd is, made if need be; NULL when memory is short. */
struct km_set *km_set_for(int epfd);
/* One descriptor of the set is gone. */
void km_set_free(struct km_set *set);
/* The set is about to sleep in the kernel without its bells armed; false when it
 * holds upgraded connections, and must not. */
bool km_set_wait_begin(struct km_set *set);
void km_set_wait_end(struct km_set *set);
/* epfd, a set, is about to be asked whether it is readable, by poll or (for good)
 * by an outer epoll set: makes the kernel's answer right. */
void km_set_watch(struct km_set *set, int epfd);
/* The same for one poll: would a wait find something?  set->mixed only; the kernel
 * knows of all the others. */
bool km_set_look(struct km_set *set, int epfd);
/* The kernel has done an epoll_ctl of a file that is not tracked. */
void km_set_note(int epfd, int op, const struct epoll_event *ev);
/* epoll_ctl of epfd, which is set, for another set fd. */
int km_set_nest(struct km_set *set, int epfd, int op, int fd, struct epoll_event *ev);
/* Takes the library's own events out of evs; the number left. */
int km_set_translate(struct km_set *set, struct epoll_event *evs, int n);
void km_event_fork_child(void);

/* epoll_ctl and epoll_pwait for a descriptor that is or may become ours.
 * Results like the kernel's, errors negative. */
int km_epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev);
int km_epoll_wait(struct km_set *set, int epfd, struct epoll_event *evs, int max,
		  int64_t timeout_ns, const sigset_t *mask);

/* ppoll over descriptors some of which are upgraded. */
int km_poll(struct pollfd *fds, nfds_t n, int64_t timeout_ns, const sigset_t *mask);

/* The calling thread's hidden epoll set, listening to bell; or a negative errno
 * value.  It becomes readable whenever the bell rings. */
int km_thread_listen(struct km_bell *bell);
/* Has the hidden set closed when the calling thread ends. */
void km_thread_cleanup(void);
/* Takes the edges out of it. */
void km_thread_listened(void);

#endif
