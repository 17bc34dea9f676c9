# SPDX-License-Identifier: Apache-2.0
"""What a case does, derived from (seed, job, number) and nothing else.

A case is a batch of connections between two workers, side a and side b, with at most
one kind of fault.  The session and both workers derive the same plan, so a case is
named by three numbers and can be run again alone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

from kmap.stress.stream import MAX_READ, MAX_SEND

SIDES = ("a", "b")
MAX_CONNECTIONS = 32

# Loopback segments are of 64 KiB: buffers of less than a few of them make the kernel
# wait for its timers (40 ms and more a turn), which is slow and not what is tested.
SMALL_BUFFER = 262144

# Cases that one pair of workers runs before it is replaced by a pair with other
# settings.
CASES_PER_SETTINGS = 12

BLOCKING_STYLES = ("blocking", "timeout")
EVENT_STYLES = ("poll", "select", "epoll-lt", "epoll-et", "epoll-oneshot")

# Calls that work on a socket in each mode.  A Python socket with a timeout is
# non-blocking underneath, so the os functions would see EAGAIN there, and sendall
# makes no sense where a call must not wait.
SEND_CALLS = ("send", "sendmsg", "write", "writev", "sendfile")
RECV_CALLS = ("recv", "recv_into", "recvmsg_into", "read", "readv", "peek")
TIMEOUT_SEND_CALLS = ("send", "sendall", "sendmsg")
TIMEOUT_RECV_CALLS = ("recv", "recv_into", "recvmsg_into", "peek")

# Settings of a worker besides the seeded ones of a normal one.
NORMAL = "normal"
DISABLED = "disabled"
NO_MEMORY = "no-memory"
HUGE_RINGS = "huge-rings"
TINY_RINGS = "tiny-rings"
PLAIN = "plain"
# Followed by the number of segments that the process may map.
BUDGET = "budget-"

# What an end does to its connection at a byte of its own choice, after which the
# connection cannot carry everything any more.
CUTS = ("reset", "shut-rd", "shut-wr", "shut-rdwr", "close", "dup2")

Gates = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EndPlan:
    """How one end of a connection behaves."""

    style: str
    send_calls: tuple[str, ...]
    send_sizes: tuple[int, ...]
    recv_calls: tuple[str, ...]
    recv_sizes: tuple[int, ...]
    # "early": half-close after the last byte sent, read to the end, close.  "shut": the
    # same, but half-close only when everything has been received too.  "close": close
    # as soon as everything is sent and received.  "wait": read to the end, close.
    finish: str
    # Blocking styles: one thread reads while another writes.
    threads: bool = False
    # Blocking style: "exit" (a child that ends at once), "child" (a child goes on with
    # the connection), "halves" (a child reads, the parent writes) or "flip" (a child
    # changes O_NONBLOCK until the connection is done).
    fork: str = ""
    fork_gate: int = 0
    # Blocking style, at fork_gate: how another program gets the connection and goes on
    # with it, "exec", "vfork", "spawn" or "pass", and whether it is without Kmap.
    heir: str = ""
    heir_plain: bool = False
    # One of CUTS, or "move" (to another number, again and again), once this many bytes
    # have been moved both ways; other threads do what is not "reset" or "move", after
    # this many microseconds.
    act: str = ""
    act_at: int = 0
    act_delay_us: int = 0
    # Writes go through a duplicate of the descriptor.
    dup: bool = False
    # Size of the kernel's buffers, 0 for the system's.
    buffer: int = 0
    nodelay: bool = True
    # Stop reading at this position until told to go on.
    stall_at: int | None = None
    # Event styles: take the descriptor out of the set before closing it.
    unregister: bool = True


@dataclass(frozen=True)
class ConnectionPlan:
    """One connection: who sends how much when, and how each end behaves."""

    number: int
    kind: str
    connector: str
    ipv6: bool
    # By side: (bytes that must have come in, bytes that may then have gone out).
    gates: dict[str, Gates]
    ends: dict[str, EndPlan]

    @property
    def cut(self) -> bool:
        """Whether an end is to do what ends the traffic early."""
        return any(end.act in CUTS for end in self.ends.values())

    def total(self, side: str) -> int:
        """Bytes that side sends."""
        return self.gates[side][-1][1] if self.gates[side] else 0


@dataclass(frozen=True)
class Crash:
    """How a worker dies."""

    victim: str
    # Bytes moved by the pair before it happens.
    after_bytes: int
    # The victim kills itself between two calls; otherwise it is killed from outside,
    # after this many microseconds.
    by_itself: bool
    delay_us: int


@dataclass(frozen=True)
class CasePlan:
    """One batch of connections between two workers."""

    seed: int
    job: int
    number: int
    name: str
    fault: str
    connections: tuple[ConnectionPlan, ...]
    # Kind of worker on each side.
    variants: dict[str, str]
    # Connectors start as soon as they are connected, not when all are accepted.
    eager: bool = False
    crash: Crash | None = None
    # A limit that one side takes on for the case: side -> "nofile" or "address-space".
    limits: dict[str, str] = field(default_factory=dict)
    # Descriptors that "nofile" leaves.
    spare: int = 0
    # Signals: microseconds between two rounds of them; whether with SA_RESTART.
    storm_us: int = 0
    storm_restart: bool = False
    # Milliseconds of each stop; 0: nobody is stopped.
    stop_ms: tuple[int, ...] = ()
    hog: bool = False


def other(side: str) -> str:
    """The side at the other end."""
    return "b" if side == "a" else "a"


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """A whole number of which every order of magnitude is equally likely."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def settings(seed: int, job: int, generation: int, side: str) -> dict[str, str]:
    """Settings of the normal worker of one side and generation."""
    rng = random.Random(f"kmap-stress-settings/{seed}/{job}/{generation}/{side}")
    return {
        "KMAP_UPGRADE_AFTER": str(rng.choice((0, 1, 8))),
        "KMAP_RING_SIZE": str(rng.choice((4096, 16384, 65536, 262144, 1048576))),
    }


@dataclass
class Traffic:
    """Totals and gates of both sides while a pattern is put together."""

    first: str
    sent: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    gates: dict[str, list[tuple[int, int]]] = field(
        default_factory=lambda: {"a": [], "b": []}
    )

    def message(self, side: str, size: int) -> None:
        """Side sends size bytes once it has all that the other was to send so far."""
        self.sent[side] += size
        self.gates[side].append((self.sent[other(side)], self.sent[side]))

    def rounds(self, sizes: list[tuple[int, int]]) -> None:
        for request, reply in sizes:
            self.message(self.first, request)
            self.message(other(self.first), reply)

    def streams(self, sizes: dict[str, int]) -> None:
        """Both sides send at once."""
        before = dict(self.sent)
        for side, size in sizes.items():
            if size:
                self.sent[side] += size
                self.gates[side].append((before[other(side)], self.sent[side]))

    def finished(self) -> dict[str, Gates]:
        return {side: tuple(self.gates[side]) for side in SIDES}


KINDS = ("short", "chatty", "mixed", "stream", "duplex", "huge")
WEIGHTS = (34, 22, 12, 18, 12, 2)


def _traffic(rng: random.Random, kind: str) -> tuple[Traffic, bool]:
    """The traffic of one connection, and whether both sides stream at once."""
    traffic = Traffic(first=rng.choice(SIDES))

    def sizes(rounds: int, high: int) -> list[tuple[int, int]]:
        return [
            (log_uniform(rng, 1, high), log_uniform(rng, 1, high))
            for _ in range(rounds)
        ]

    if kind == "short":
        traffic.rounds(sizes(rng.randint(1, 3), 8192))
        return traffic, False
    if kind == "chatty":
        traffic.rounds(sizes(log_uniform(rng, 10, 300), 2048))
        return traffic, False
    if kind == "mixed":
        traffic.rounds(sizes(rng.randint(4, 24), 262144))
        return traffic, False
    # Most streams come after round trips, as on a connection that is kept; in one that
    # starts at once the cut-over has most bytes in flight.
    if rng.random() < 0.85:
        traffic.rounds(sizes(rng.randint(3, 30), 512))
    if kind == "stream":
        traffic.streams({rng.choice(SIDES): log_uniform(rng, 65536, 8 << 20)})
        return traffic, False
    if kind == "duplex":
        traffic.streams({side: log_uniform(rng, 32768, 4 << 20) for side in SIDES})
        return traffic, True
    traffic.streams({rng.choice(SIDES): MAX_SEND * 2})
    return traffic, False


def _end(
    rng: random.Random, kind: str, gates: Gates, *, duplex: bool, finish: str
) -> EndPlan:
    style = rng.choice((*BLOCKING_STYLES, *EVENT_STYLES, "blocking"))
    threads = style in BLOCKING_STYLES and (duplex or rng.random() < 0.25)
    send_calls: tuple[str, ...] = SEND_CALLS
    recv_calls: tuple[str, ...] = RECV_CALLS
    if style == "timeout":
        send_calls, recv_calls = TIMEOUT_SEND_CALLS, TIMEOUT_RECV_CALLS
    elif style == "blocking":
        send_calls = (*SEND_CALLS, "sendall")
    big = kind in ("stream", "duplex", "huge", "mixed")
    low, high = (256, 131072) if big else (1, 16384)
    # What one call hands to the kernel before the cut-over cannot go by ring any more.
    if big and rng.random() < 0.2:
        high = MAX_SEND
    plan = EndPlan(
        style=style,
        send_calls=tuple(rng.choices(send_calls, k=rng.randint(1, 4))),
        send_sizes=tuple(log_uniform(rng, low, high) for _ in range(rng.randint(1, 5))),
        recv_calls=tuple(rng.choices(recv_calls, k=rng.randint(1, 4))),
        recv_sizes=tuple(
            log_uniform(rng, 512 if big else 1, MAX_READ if big else 65536)
            for _ in range(rng.randint(1, 5))
        ),
        finish=finish,
        threads=threads,
        dup=rng.random() < 0.1,
        buffer=rng.choice((0, 0, 0, SMALL_BUFFER)),
        # Nagle's algorithm costs 40 ms a turn where a message goes out in pieces.
        nodelay=len(gates) > 4 or rng.random() < 0.7,
        unregister=rng.random() < 0.5,
    )
    if style == "blocking" and gates and rng.random() < 0.3:
        if finish in ("shut", "early") and (duplex or rng.random() < 0.4):
            # The halves part at the last gate, where nothing waits for the other; the
            # one that writes does not know what the other has read.
            return replace(
                plan,
                fork="halves",
                fork_gate=len(gates) - 1,
                threads=False,
                finish="early",
            )
        if not threads:
            fork = rng.choice(("exit", "child"))
            return replace(plan, fork=fork, fork_gate=rng.randrange(len(gates)))
    return plan


def make_connection(
    rng: random.Random, number: int, kind: str, connector: str
) -> ConnectionPlan:
    traffic, duplex = _traffic(rng, kind)
    gates = traffic.finished()
    finish = rng.choices(
        (
            ("shut", "shut"),
            ("early", "early"),
            ("shut", "early"),
            ("early", "shut"),
            ("close", "wait"),
            ("wait", "close"),
            ("close", "close"),
        ),
        weights=(44, 6, 5, 5, 15, 15, 10),
    )[0]
    return ConnectionPlan(
        number=number,
        kind=kind,
        connector=connector,
        ipv6=rng.random() < 0.2,
        gates=gates,
        ends={
            side: _end(rng, kind, gates[side], duplex=duplex, finish=mode)
            for side, mode in zip(SIDES, finish, strict=True)
        },
    )


def make_connections(
    rng: random.Random, count: int, *, kinds: tuple[str, ...] = (), connector: str = ""
) -> tuple[ConnectionPlan, ...]:
    return tuple(
        make_connection(
            rng,
            number,
            rng.choice(kinds) if kinds else rng.choices(KINDS, weights=WEIGHTS)[0],
            connector or rng.choice(SIDES),
        )
        for number in range(count)
    )


def without_fork(plan: ConnectionPlan) -> ConnectionPlan:
    """The same connection in which no end forks."""

    def end(before: EndPlan) -> EndPlan:
        if before.fork == "halves":
            return replace(before, fork="", threads=True)
        return replace(before, fork="")

    return replace(plan, ends={side: end(plan.ends[side]) for side in SIDES})
