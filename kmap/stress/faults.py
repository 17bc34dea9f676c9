# SPDX-License-Identifier: Apache-2.0
"""The kinds of fault, once: names, what each does, and what a count of it counts."""

from __future__ import annotations

from dataclasses import dataclass

PEER_CRASH = "peer-crash"
PEER_STOP = "peer-stop"
SIGNALS = "signals"
CPU_HOG = "cpu-hog"
CLOSE_UNDER = "close-under"
SHUTDOWN = "shutdown"
RESET = "reset"
FORK = "fork"
EXEC = "exec"
HAND_OVER = "hand-over"
DUP = "dup"
NONBLOCK = "nonblock"
BUFFER_FULL = "buffer-full"
SMALL_RINGS = "small-rings"
MEMORY_BUDGET = "memory-budget"
FEW_DESCRIPTORS = "few-descriptors"
ATTACH_REFUSED = "attach-refused"
ONE_SIDE_DISABLED = "one-side-disabled"
ONE_SIDE_WITHOUT = "one-side-without"


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    meaning: str
    # What one in the count of this kind is.
    counts: str
    # Whether the rings without sockets have it, too.
    ring: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            PEER_CRASH,
            "one end's process dies by SIGKILL, between two calls or within one",
            "processes that died",
            ring=True,
        ),
        Kind(
            PEER_STOP,
            "SIGSTOP, and after 1 to 50 ms SIGCONT, again and again, either end",
            "stops",
            ring=True,
        ),
        Kind(
            SIGNALS,
            "signals with a handler, with SA_RESTART or without, to every thread that "
            "moves bytes",
            "signals",
            ring=True,
        ),
        Kind(
            CPU_HOG,
            "both ends on one CPU, beside a program that never sleeps",
            "cases",
            ring=True,
        ),
        Kind(
            CLOSE_UNDER,
            "close, or dup2 of another socket over it, while a thread is in a blocking "
            "call on the descriptor",
            "descriptors",
        ),
        Kind(
            SHUTDOWN,
            "shutdown of either direction or both by another thread, at any byte",
            "shutdowns",
        ),
        Kind(RESET, "close with SO_LINGER 0 at any byte", "connections"),
        Kind(
            FORK,
            "fork in mid-stream: the child goes on, or has one direction, or just ends",
            "forks",
        ),
        Kind(
            EXEC,
            "in mid-stream another program goes on with the descriptor, by fork and "
            "exec, vfork and exec, or posix_spawn; it is under Kmap, or is not",
            "programs",
        ),
        Kind(
            HAND_OVER,
            "in mid-stream another program gets the descriptor by SCM_RIGHTS and goes "
            "on; it is under Kmap, or is not",
            "programs",
        ),
        Kind(
            DUP,
            "the connection moves to other numbers in mid-stream, by dup, F_DUPFD, "
            "dup2 and dup3 over another socket, and ends by a dup2 over it",
            "moves",
        ),
        Kind(
            NONBLOCK,
            "another process sets and clears O_NONBLOCK while blocking calls are made",
            "changes",
        ),
        Kind(
            BUFFER_FULL,
            "the reader stops until the writer is stuck, then goes on",
            "writers that were stuck",
            ring=True,
        ),
        Kind(
            SMALL_RINGS,
            "rings of 4 KiB, the smallest, under streams and large messages",
            "connections",
        ),
        Kind(
            MEMORY_BUDGET,
            "one side may map a few segments (KMAP_MEMORY_LIMIT), fewer than there are "
            "connections",
            "connections that stayed on the kernel",
        ),
        Kind(
            FEW_DESCRIPTORS,
            "one side has few descriptors left (RLIMIT_NOFILE), too few for every part "
            "of an upgrade or just enough",
            "connections that stayed on the kernel",
        ),
        Kind(
            ATTACH_REFUSED,
            "one side can make no segment or map none: KMAP_MEMORY_LIMIT=0, no "
            "descriptor left, no address space left; rings: an unsealed segment",
            "connections that stayed on the kernel",
            ring=True,
        ),
        Kind(
            ONE_SIDE_DISABLED,
            "one side runs with KMAP_DISABLE=1",
            "connections that stayed on the kernel",
        ),
        Kind(
            ONE_SIDE_WITHOUT,
            "one side runs without the library",
            "connections that stayed on the kernel",
        ),
    )
}
FAULTS = tuple(KINDS)
# Has no divisor in common with their number, and is about a third of it.
_SEED_STEP = 7


def fault_of(
    seed: int, job: int, number: int, faults: tuple[str, ...], *, ring: bool = False
) -> str:
    """Two of three cases have a fault, each kind in turn.

    Seeds and jobs start at different kinds, so that short runs see all of them.
    """
    possible = [kind for kind in faults if KINDS[kind].ring or not ring]
    if number % 3 == 0 or not possible:
        return ""
    turn = number - number // 3 - 1
    first = seed * _SEED_STEP + job * (len(possible) // 2)
    return possible[(first + turn) % len(possible)]
