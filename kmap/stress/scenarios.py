# SPDX-License-Identifier: Apache-2.0
"""Cases by name: the seeded ones, and the fixed scenarios of ``--verify-fallback``.

A scenario is a situation whose outcome the kernel decides alone, so that the same
scenario with and without Kmap must end in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kmap.stress.cases import case_plan, refuse, ring_case_plan, stalled
from kmap.stress.faults import (
    ATTACH_REFUSED,
    BUFFER_FULL,
    ONE_SIDE_DISABLED,
    PEER_CRASH,
)
from kmap.stress.plan import (
    DISABLED,
    EVENT_STYLES,
    NO_MEMORY,
    NORMAL,
    SIDES,
    SMALL_BUFFER,
    CasePlan,
    ConnectionPlan,
    Crash,
    EndPlan,
    Gates,
)

CaseId = list[Any]

# One style per repetition of a scenario, so that every way of waiting is compared.
STYLES = ("blocking", "timeout", *EVENT_STYLES)
# Round trips that come first, so that the connection has been upgraded when the fault
# comes.
_WARM = 12
_REQUEST = 100
_REPLY = 300


def case_id(
    level: str, seed: int, job: int, number: int, faults: tuple[str, ...]
) -> CaseId:
    """Names a seeded case, in a form that JSON keeps."""
    return [level, seed, job, number, list(faults)]


def scenario_id(seed: int, scenario: str, number: int) -> CaseId:
    """Names one repetition of a scenario."""
    return ["fallback", seed, scenario, number]


def find_case(identity: CaseId) -> CasePlan:
    """The plan that an identity names."""
    if identity[0] != "fallback":
        level, seed, job, number, faults = identity
        make = ring_case_plan if level == "ring" else case_plan
        return make(seed, job, number, tuple(faults))
    _, seed, name, number = identity
    return SCENARIOS[name].build(seed, number)


@dataclass(frozen=True)
class Scenario:
    """One situation."""

    name: str
    fault: str
    meaning: str
    # Whether the connection must have been on a ring under Kmap, or must not.
    upgraded: bool
    build: Callable[[int, int], CasePlan]


def _end(style: str, finish: str = "shut", size: int = 65536) -> EndPlan:
    return EndPlan(
        style=style,
        send_calls=("send",),
        send_sizes=(size,),
        recv_calls=("recv_into",),
        recv_sizes=(65536,),
        finish=finish,
    )


def _rounds(count: int) -> dict[str, list[tuple[int, int]]]:
    a = [(i * _REPLY, (i + 1) * _REQUEST) for i in range(count)]
    b = [((i + 1) * _REQUEST, (i + 1) * _REPLY) for i in range(count)]
    return {"a": a, "b": b}


def _case(
    seed: int, name: str, fault: str, number: int, gates: dict[str, Gates]
) -> CasePlan:
    style = STYLES[number % len(STYLES)]
    connection = ConnectionPlan(
        number=0,
        kind=name,
        # Not the same side for the same style in the second round of styles.
        connector=SIDES[(number + number // len(STYLES)) % 2],
        ipv6=False,
        gates=gates,
        ends={side: _end(style) for side in SIDES},
    )
    return CasePlan(
        seed=seed,
        job=0,
        number=number,
        name=f"{name}:{number}",
        fault=fault,
        connections=(connection,),
        variants=dict.fromkeys(SIDES, NORMAL),
    )


def _stream_after_rounds(sender: str, size: int) -> dict[str, Gates]:
    gates = _rounds(_WARM)
    sent = {"a": _WARM * _REQUEST, "b": _WARM * _REPLY}
    receiver = "b" if sender == "a" else "a"
    gates[sender].append((sent[receiver], sent[sender] + size))
    return {side: tuple(gates[side]) for side in SIDES}


_WARM_BYTES = _WARM * (_REQUEST + _REPLY)


def _sender_dies(seed: int, number: int) -> CasePlan:
    gates = _stream_after_rounds("b", 4 << 20)
    plan = _case(seed, "sender-dies", PEER_CRASH, number, gates)
    crash = Crash("b", _WARM_BYTES + 1_000_000, by_itself=True, delay_us=0)
    return replace(plan, crash=crash)


def _with_end(plan: CasePlan, side: str, end: EndPlan) -> CasePlan:
    connection = plan.connections[0]
    ends = {**connection.ends, side: end}
    return replace(plan, connections=(replace(connection, ends=ends),))


def _reply_cut_short(seed: int, number: int) -> CasePlan:
    gates = {side: tuple(steps) for side, steps in _rounds(_WARM).items()}
    plan = _case(seed, "reply-cut-short", PEER_CRASH, number, gates)
    # A third of the last reply is out.
    plan = _with_end(
        plan, "b", replace(plan.connections[0].ends["b"], send_sizes=(_REPLY // 3,))
    )
    crash = Crash("b", _WARM_BYTES - _REPLY * 2 // 3, by_itself=True, delay_us=0)
    return replace(plan, crash=crash)


def _request_unread(seed: int, number: int) -> CasePlan:
    gates = {side: tuple(steps) for side, steps in _rounds(_WARM).items()}
    plan = _case(seed, "request-unread", PEER_CRASH, number, gates)
    # Half of the last request has been read, and the other half waits.
    plan = _with_end(
        plan, "b", replace(plan.connections[0].ends["b"], recv_sizes=(_REQUEST // 2,))
    )
    crash = Crash("b", _WARM_BYTES - _REPLY - _REQUEST // 2, by_itself=True, delay_us=0)
    return replace(plan, crash=crash)


def _silent_peer_dies(seed: int, number: int) -> CasePlan:
    gates = {side: tuple(steps) for side, steps in _rounds(_WARM).items()}
    plan = _case(seed, "silent-peer-dies", PEER_CRASH, number, gates)
    # Right after it has read the last request.
    crash = Crash("b", _WARM_BYTES - _REPLY, by_itself=True, delay_us=0)
    return replace(plan, crash=crash)


def _reader_dies(seed: int, number: int) -> CasePlan:
    gates = _stream_after_rounds("a", 32 << 20)
    plan = _case(seed, "reader-dies", PEER_CRASH, number, gates)
    crash = Crash("b", _WARM_BYTES + 1_000_000, by_itself=True, delay_us=0)
    return replace(plan, crash=crash)


def _reader_stalls(seed: int, number: int) -> CasePlan:
    plan = _case(seed, "reader-stalls", BUFFER_FULL, number, {"a": (), "b": ()})
    connection = plan.connections[0]
    ends = {
        side: replace(end, buffer=SMALL_BUFFER) for side, end in connection.ends.items()
    }
    full = stalled(
        random.Random(number),
        replace(connection, ends=ends),
        writer="a",
        size=4 << 20,
        warm=_WARM,
    )
    return replace(plan, connections=(full,))


def _plain(seed: int, name: str, fault: str, number: int) -> CasePlan:
    return _case(seed, name, fault, number, _stream_after_rounds("a", 1 << 20))


def _no_memory(seed: int, number: int) -> CasePlan:
    plan = _plain(seed, "no-memory", ATTACH_REFUSED, number)
    return refuse(plan, SIDES[number % 2], NO_MEMORY)


def _no_descriptors(seed: int, number: int) -> CasePlan:
    plan = _plain(seed, "no-descriptors", ATTACH_REFUSED, number)
    return refuse(plan, plan.connections[0].connector, "nofile")


def _no_room(seed: int, number: int) -> CasePlan:
    plan = _plain(seed, "no-address-space", ATTACH_REFUSED, number)
    return refuse(plan, SIDES[number % 2], "address-space")


def _disabled(seed: int, number: int) -> CasePlan:
    plan = _plain(seed, "disabled", ONE_SIDE_DISABLED, number)
    return replace(plan, variants={**plan.variants, SIDES[number % 2]: DISABLED})


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "sender-dies",
            PEER_CRASH,
            "the sender of a stream is killed: what it sent arrives, then the end",
            True,
            _sender_dies,
        ),
        Scenario(
            "reader-dies",
            PEER_CRASH,
            "the reader of a stream is killed: the sender's calls fail",
            True,
            _reader_dies,
        ),
        Scenario(
            "reply-cut-short",
            PEER_CRASH,
            "the peer is killed within its reply: the part arrives, then the end",
            True,
            _reply_cut_short,
        ),
        Scenario(
            "request-unread",
            PEER_CRASH,
            "the peer is killed with half a request unread: a reset",
            True,
            _request_unread,
        ),
        Scenario(
            "silent-peer-dies",
            PEER_CRASH,
            "the peer is killed after it read a request, before its reply",
            True,
            _silent_peer_dies,
        ),
        Scenario(
            "reader-stalls",
            BUFFER_FULL,
            "the reader stops until the sender is stuck, then goes on",
            True,
            _reader_stalls,
        ),
        Scenario(
            "no-memory",
            ATTACH_REFUSED,
            "one side may map no segment (KMAP_MEMORY_LIMIT=0)",
            False,
            _no_memory,
        ),
        Scenario(
            "no-descriptors",
            ATTACH_REFUSED,
            "the connector has no free descriptor (RLIMIT_NOFILE)",
            False,
            _no_descriptors,
        ),
        Scenario(
            "no-address-space",
            ATTACH_REFUSED,
            "one side cannot map a segment (RLIMIT_AS)",
            False,
            _no_room,
        ),
        Scenario(
            "disabled",
            ONE_SIDE_DISABLED,
            "one side runs with KMAP_DISABLE=1",
            False,
            _disabled,
        ),
    )
}
