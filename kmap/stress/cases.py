# SPDX-License-Identifier: Apache-2.0
"""The seeded cases: what each kind of fault makes of a batch of connections."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from kmap.stress import faults
from kmap.stress.plan import (
    BUDGET,
    DISABLED,
    HUGE_RINGS,
    KINDS,
    NO_MEMORY,
    NORMAL,
    PLAIN,
    SIDES,
    SMALL_BUFFER,
    TINY_RINGS,
    WEIGHTS,
    CasePlan,
    ConnectionPlan,
    Crash,
    EndPlan,
    Traffic,
    log_uniform,
    make_connection,
    make_connections,
    other,
    without_fork,
)
from kmap.stress.stream import MAX_READ, MAX_SEND

# Kinds of connection that go on for long enough to meet what happens in mid-stream.
_LASTING = ("chatty", "mixed", "stream", "duplex")
_NOFILE = "nofile"
_ADDRESS_SPACE = "address-space"


def _unforked(
    rng: random.Random,
    count: int,
    *,
    kinds: tuple[str, ...] = _LASTING,
    connector: str = "",
) -> tuple[ConnectionPlan, ...]:
    made = make_connections(rng, count, kinds=kinds, connector=connector)
    return tuple(without_fork(connection) for connection in made)


def _with_end(plan: ConnectionPlan, side: str, end: EndPlan) -> ConnectionPlan:
    return replace(plan, ends={**plan.ends, side: end})


def _counted(end: EndPlan) -> EndPlan:
    """The same end without the call that does not say how much it has sent."""
    calls = tuple("send" if call == "sendall" else call for call in end.send_calls)
    return replace(end, send_calls=calls)


def _blocking(end: EndPlan) -> EndPlan:
    """The same end as one thread that makes blocking calls."""
    return replace(
        _counted(end),
        style="blocking",
        threads=False,
        fork="",
        dup=False,
        stall_at=None,
    )


def _crash(rng: random.Random, connections: Iterable[ConnectionPlan]) -> Crash:
    volume = sum(c.total(side) for c in connections for side in SIDES)
    return Crash(
        victim=rng.choice(SIDES),
        after_bytes=log_uniform(rng, 1, max(2, volume * 3 // 4)),
        by_itself=rng.random() < 0.5,
        delay_us=log_uniform(rng, 1, 3000),
    )


def _peer_crash(rng: random.Random, plan: CasePlan) -> CasePlan:
    kinds = (*_LASTING, "stream")
    connections = _unforked(rng, rng.choice((1, 2, 4, 8)), kinds=kinds)
    crash = _crash(rng, connections)
    return replace(plan, connections=connections, crash=crash, eager=False)


def _stops(rng: random.Random) -> tuple[int, ...]:
    return tuple(log_uniform(rng, 1, 50) for _ in range(8))


def _peer_stop(rng: random.Random, plan: CasePlan) -> CasePlan:
    connections = make_connections(rng, rng.choice((1, 2, 4, 8)), kinds=_LASTING)
    return replace(plan, connections=connections, stop_ms=_stops(rng))


def _signals(rng: random.Random, plan: CasePlan) -> CasePlan:
    return replace(
        plan,
        connections=_unforked(rng, rng.choice((1, 2, 4, 8))),
        storm_us=log_uniform(rng, 100, 5000),
        storm_restart=rng.random() < 0.5,
    )


def _cpu_hog(rng: random.Random, plan: CasePlan) -> CasePlan:
    connections = make_connections(rng, rng.choice((1, 2, 4, 8)))
    return replace(plan, connections=connections, hog=True)


def _cut(rng: random.Random, connection: ConnectionPlan, act: str) -> ConnectionPlan:
    """The connection with an end that does this at some byte."""
    side = rng.choice(SIDES)
    end = _counted(connection.ends[side])
    if act in ("close", "dup2"):
        end = _blocking(end)
    elif act == "reset":
        # One thread does it while another waits for what will never come.
        end = replace(end, threads=False)
    volume = sum(connection.total(each) for each in SIDES)
    end = replace(
        end,
        act=act,
        act_at=log_uniform(rng, 1, max(2, volume * 3 // 4)),
        act_delay_us=log_uniform(rng, 1, 5000),
    )
    peer = _counted(connection.ends[other(side)])
    return _with_end(_with_end(connection, side, end), other(side), peer)


def _close_under(rng: random.Random, plan: CasePlan) -> CasePlan:
    act = rng.choice(("close", "dup2"))
    # A number that was closed is given out again; here nobody else may get it.
    count = 1 if act == "close" else rng.choice((1, 2, 4))
    # One thread that waits for bytes and one that waits for room would each keep the
    # other's connection open, and so wait for ever.
    kinds = ("chatty", "mixed", "stream")
    connections = tuple(_cut(rng, c, act) for c in _unforked(rng, count, kinds=kinds))
    return replace(plan, connections=connections, eager=False)


def _shutdown(rng: random.Random, plan: CasePlan) -> CasePlan:
    connections = tuple(
        _cut(rng, c, rng.choice(("shut-rd", "shut-wr", "shut-wr", "shut-rdwr")))
        for c in _unforked(rng, rng.choice((1, 2, 4, 8)))
    )
    return replace(plan, connections=connections)


def _reset(rng: random.Random, plan: CasePlan) -> CasePlan:
    made = _unforked(rng, rng.choice((1, 2, 4, 8)))
    return replace(plan, connections=tuple(_cut(rng, c, "reset") for c in made))


def _changed_hands(
    rng: random.Random,
    connection: ConnectionPlan,
    change: Callable[[EndPlan, int], EndPlan],
) -> ConnectionPlan:
    """The connection with an end that something happens to at one of its gates.

    change gets the end, and the number of its last gate.
    """
    side = rng.choice([side for side in SIDES if connection.gates[side]])
    last = len(connection.gates[side]) - 1
    end = replace(_blocking(connection.ends[side]), fork_gate=rng.randint(0, last))
    peer = connection.ends[other(side)]
    # When the peer has ended its stream, unread bytes of it cannot be handed on.  The
    # other ways to finish wait for what this end has still to send.
    if peer.finish == "early":
        peer = replace(peer, finish="shut")
    changed = _with_end(connection, side, change(end, last))
    return _with_end(changed, other(side), peer)


def _fork(rng: random.Random, plan: CasePlan) -> CasePlan:
    def change(end: EndPlan, last: int) -> EndPlan:
        fork = rng.choice(("exit", "child", "child", "halves"))
        if fork != "halves":
            return replace(end, fork=fork)
        # The halves part at the last gate, where nothing waits for the other; the one
        # that writes does not know what the other has read.
        return replace(end, fork=fork, fork_gate=last, finish="early")

    made = _unforked(rng, rng.choice((1, 2, 4)))
    changed = tuple(_changed_hands(rng, c, change) for c in made)
    return replace(plan, connections=changed)


def _another_program(
    rng: random.Random, plan: CasePlan, heirs: tuple[str, ...]
) -> CasePlan:
    def change(end: EndPlan, last: int) -> EndPlan:
        return replace(end, heir=rng.choice(heirs), heir_plain=rng.random() < 0.5)

    made = _unforked(rng, rng.choice((1, 1, 2)))
    changed = tuple(_changed_hands(rng, c, change) for c in made)
    return replace(plan, connections=changed)


def _exec(rng: random.Random, plan: CasePlan) -> CasePlan:
    return _another_program(rng, plan, ("exec", "vfork", "spawn"))


def _hand_over(rng: random.Random, plan: CasePlan) -> CasePlan:
    return _another_program(rng, plan, ("pass",))


def _dup(rng: random.Random, plan: CasePlan) -> CasePlan:
    def one(connection: ConnectionPlan) -> ConnectionPlan:
        side = rng.choice(SIDES)
        volume = sum(connection.total(each) for each in SIDES)
        step = log_uniform(rng, max(1, volume // 50), max(2, volume * 3 // 4))
        end = _blocking(connection.ends[side])
        return _with_end(connection, side, replace(end, act="move", act_at=step))

    made = _unforked(rng, rng.choice((1, 2, 4)))
    return replace(plan, connections=tuple(one(c) for c in made))


def _nonblock(rng: random.Random, plan: CasePlan) -> CasePlan:
    made = _unforked(rng, rng.choice((1, 2)))
    return replace(
        plan,
        connections=tuple(
            _changed_hands(rng, c, lambda end, last: replace(end, fork="flip"))
            for c in made
        ),
    )


def stalled(
    rng: random.Random, plan: ConnectionPlan, writer: str, size: int, warm: int
) -> ConnectionPlan:
    """The connection as a stream whose reader stalls until the writer is stuck."""
    traffic = Traffic(first=other(writer))
    traffic.rounds([(log_uniform(rng, 1, 512), 64) for _ in range(warm)])
    before = traffic.sent[writer]
    traffic.streams({writer: size})
    ends = dict(plan.ends)
    ends[writer] = replace(ends[writer], finish="shut")
    ends[other(writer)] = replace(
        ends[other(writer)], finish="shut", stall_at=before + 1, threads=False
    )
    return replace(plan, kind="stalled", gates=traffic.finished(), ends=ends)


def _buffer_full(rng: random.Random, plan: CasePlan) -> CasePlan:
    connections = []
    for number in range(rng.choice((1, 2, 3))):
        made = make_connection(rng, number, "stream", rng.choice(SIDES))
        base = without_fork(made)
        # Small kernel buffers keep the volume down; now and then the kernel's own
        # sizes are the ones to fill.
        small = rng.random() < 0.8
        most = rng.choice((65536, 262144, MAX_SEND))
        ends = {
            side: replace(
                base.ends[side],
                buffer=SMALL_BUFFER if small else 0,
                send_sizes=tuple(log_uniform(rng, 4096, most) for _ in range(3)),
                recv_sizes=tuple(log_uniform(rng, 4096, MAX_READ) for _ in range(3)),
            )
            for side in SIDES
        }
        connections.append(
            stalled(
                rng,
                replace(base, ends=ends),
                writer=rng.choice(SIDES),
                size=(4 << 20) if small else (14 << 20),
                warm=rng.choice((0, 4, 12, 12)),
            )
        )
    return replace(plan, connections=tuple(connections))


def _small_rings(rng: random.Random, plan: CasePlan) -> CasePlan:
    connections = make_connections(rng, rng.choice((1, 2, 4)), kinds=_LASTING)
    variants = dict.fromkeys(SIDES, TINY_RINGS)
    return replace(plan, connections=connections, variants=variants)


def _memory_budget(rng: random.Random, plan: CasePlan) -> CasePlan:
    side = rng.choice(SIDES)
    connections = _unforked(rng, rng.choice((4, 6, 8)), kinds=("chatty", "mixed"))
    variants = {**plan.variants, side: BUDGET + rng.choice(("1", "2"))}
    # All at once, or those that come first leave room for the rest.
    return replace(plan, connections=connections, variants=variants, eager=False)


def _few_descriptors(rng: random.Random, plan: CasePlan) -> CasePlan:
    side = rng.choice(SIDES)
    made = _unforked(rng, rng.choice((2, 4)), kinds=("chatty", "mixed"), connector=side)
    limited = refuse(replace(plan, connections=made), side, _NOFILE)
    return replace(limited, spare=rng.randint(1, 6))


def _attach_refused(rng: random.Random, plan: CasePlan) -> CasePlan:
    side = rng.choice(SIDES)
    how = rng.choice((NO_MEMORY, _NOFILE, _ADDRESS_SPACE))
    connector = rng.choice((side, side, other(side)))
    connections = _unforked(
        rng, rng.choice((1, 2, 4)), kinds=("chatty", "mixed"), connector=connector
    )
    return refuse(replace(plan, connections=connections), side, how)


def refuse(plan: CasePlan, side: str, how: str) -> CasePlan:
    """The case with a side that cannot complete an attach."""
    if how == NO_MEMORY:
        return replace(plan, variants={**plan.variants, side: NO_MEMORY})
    if how == _ADDRESS_SPACE:
        # A segment of the largest rings does not fit the room that is left; the
        # interpreter's own small allocations do.
        variants = dict.fromkeys(SIDES, HUGE_RINGS)
        return replace(plan, variants=variants, limits={side: how}, eager=False)
    connections = tuple(
        replace(
            connection,
            ends={s: replace(connection.ends[s], dup=False) for s in SIDES},
        )
        for connection in plan.connections
    )
    return replace(plan, connections=connections, limits={side: how}, eager=False)


def _one_side(rng: random.Random, plan: CasePlan, variant: str) -> CasePlan:
    kinds = ("short", "chatty", "mixed")
    connections = make_connections(rng, rng.choice((1, 2, 4)), kinds=kinds)
    variants = {**plan.variants, rng.choice(SIDES): variant}
    return replace(plan, connections=connections, variants=variants)


def _one_side_disabled(rng: random.Random, plan: CasePlan) -> CasePlan:
    return _one_side(rng, plan, DISABLED)


def _one_side_without(rng: random.Random, plan: CasePlan) -> CasePlan:
    return _one_side(rng, plan, PLAIN)


def _without_fault(rng: random.Random, plan: CasePlan) -> CasePlan:
    count = rng.choice((1, 2, 4, 8, 12, 16, 24))
    return replace(plan, connections=make_connections(rng, count))


_BUILDERS: dict[str, Callable[[random.Random, CasePlan], CasePlan]] = {
    "": _without_fault,
    faults.PEER_CRASH: _peer_crash,
    faults.PEER_STOP: _peer_stop,
    faults.SIGNALS: _signals,
    faults.CPU_HOG: _cpu_hog,
    faults.CLOSE_UNDER: _close_under,
    faults.SHUTDOWN: _shutdown,
    faults.RESET: _reset,
    faults.FORK: _fork,
    faults.EXEC: _exec,
    faults.HAND_OVER: _hand_over,
    faults.DUP: _dup,
    faults.NONBLOCK: _nonblock,
    faults.BUFFER_FULL: _buffer_full,
    faults.SMALL_RINGS: _small_rings,
    faults.MEMORY_BUDGET: _memory_budget,
    faults.FEW_DESCRIPTORS: _few_descriptors,
    faults.ATTACH_REFUSED: _attach_refused,
    faults.ONE_SIDE_DISABLED: _one_side_disabled,
    faults.ONE_SIDE_WITHOUT: _one_side_without,
}
assert set(_BUILDERS) == {"", *faults.FAULTS}


def case_plan(seed: int, job: int, number: int, kinds: tuple[str, ...]) -> CasePlan:
    """The plan of one case of a session with these kinds of fault."""
    rng = random.Random(f"kmap-stress/{seed}/{job}/{number}")
    plan = CasePlan(
        seed=seed,
        job=job,
        number=number,
        name=f"{job}:{number}",
        fault=faults.fault_of(seed, job, number, kinds),
        connections=(),
        variants=dict.fromkeys(SIDES, NORMAL),
        eager=rng.random() < 0.5,
    )
    return _BUILDERS[plan.fault](rng, plan)


RING_CALLS = ("wait", "poll", "timed", "all")


def _ring_connection(
    rng: random.Random, number: int, kind: str, *, stall: bool = False
) -> ConnectionPlan:
    plan = make_connection(rng, number, kind, rng.choice(SIDES))
    if stall:
        writer = rng.choice(SIDES)
        plan = stalled(rng, plan, writer, size=4 << 20, warm=rng.choice((0, 3)))
    duplex = kind == "duplex" and not stall

    def end(before: EndPlan) -> EndPlan:
        return replace(
            before,
            style="ring",
            send_calls=tuple(rng.choices(RING_CALLS, k=rng.randint(1, 3))),
            recv_calls=tuple(rng.choices(RING_CALLS[:3], k=rng.randint(1, 3))),
            threads=before.stall_at is None and (duplex or rng.random() < 0.3),
            fork="",
            dup=False,
        )

    return replace(plan, ends={side: end(plan.ends[side]) for side in SIDES})


def ring_case_plan(
    seed: int, job: int, number: int, kinds: tuple[str, ...]
) -> CasePlan:
    """The plan of one case of the ring level."""
    rng = random.Random(f"kmap-stress-ring/{seed}/{job}/{number}")
    fault = faults.fault_of(seed, job, number, kinds, ring=True)
    full = fault == faults.BUFFER_FULL
    connections = tuple(
        _ring_connection(
            rng,
            index,
            "stream" if full else rng.choices(KINDS, weights=WEIGHTS)[0],
            stall=full,
        )
        for index in range(rng.choice((1, 1, 2, 4)))
    )
    plan = CasePlan(
        seed=seed,
        job=job,
        number=number,
        name=f"{job}:{number}",
        fault=fault,
        connections=connections,
        variants=dict.fromkeys(SIDES, NORMAL),
    )
    if fault == faults.PEER_CRASH:
        return replace(plan, crash=_crash(rng, connections))
    if fault == faults.PEER_STOP:
        return replace(plan, stop_ms=_stops(rng))
    if fault == faults.SIGNALS:
        return replace(plan, storm_us=log_uniform(rng, 100, 5000))
    if fault == faults.CPU_HOG:
        return replace(plan, hog=True)
    return plan
