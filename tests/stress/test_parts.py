# SPDX-License-Identifier: Apache-2.0
"""The parts of the stress tool that everything else rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kmap.stress.cases import case_plan, ring_case_plan
from kmap.stress.faults import BUFFER_FULL, FAULTS, KINDS
from kmap.stress.flow import Outcome
from kmap.stress.judge import judge, outcome_class
from kmap.stress.plan import MAX_CONNECTIONS, SIDES, CasePlan, other
from kmap.stress.scenarios import SCENARIOS, case_id, find_case, scenario_id
from kmap.stress.stream import MAX_SEND, PERIOD, Pattern, stream_key


@pytest.fixture(scope="module")
def pattern() -> Iterator[Pattern]:
    made = Pattern.create(3)
    yield made
    made.close()


@pytest.mark.parametrize("position", [0, 1, 4095, PERIOD - 1, PERIOD, 10 * PERIOD + 7])
def test_a_stream_is_what_its_position_says(pattern: Pattern, position: int) -> None:
    key = stream_key(3, "0:0", 1, "a")
    data = bytes(pattern.slice(key, position, 5000))
    assert len(data) == 5000
    assert pattern.matches(key, position, data)
    assert pattern.matches(key, position + 1, data[1:])
    # Lost, doubled, changed, or another stream's.
    assert not pattern.matches(key, position + 1, data)
    assert not pattern.matches(key, position, data[1:])
    assert not pattern.matches(key, position, data[:4999] + bytes([data[4999] ^ 1]))
    assert not pattern.matches(stream_key(3, "0:0", 1, "b"), position, data)


def test_the_largest_send_is_one_slice(pattern: Pattern) -> None:
    key = PERIOD - 1
    assert len(pattern.slice(key, 0, MAX_SEND)) == MAX_SEND


def test_a_difference_says_where_and_from_where(pattern: Pattern) -> None:
    data = bytearray(pattern.slice(5, 1000, 300))
    data[17] ^= 0x80
    assert pattern.difference(5, 1000, data).startswith("byte 1017 is ")
    moved = bytes(pattern.slice(5, 1200, 300))
    assert "belong +200 from here" in pattern.difference(5, 1000, moved)


def test_a_seed_has_its_own_block(pattern: Pattern) -> None:
    again, others = Pattern.create(3), Pattern.create(4)
    try:
        assert bytes(again.slice(0, 0, 100)) == bytes(pattern.slice(0, 0, 100))
        assert bytes(others.slice(0, 0, 100)) != bytes(pattern.slice(0, 0, 100))
    finally:
        again.close()
        others.close()


def _plans() -> Iterator[CasePlan]:
    for seed in (1, 2):
        for number in range(64):
            yield case_plan(seed, 0, number, FAULTS)
            yield ring_case_plan(seed, 1, number, FAULTS)


def test_plans_can_be_carried_out() -> None:
    seen = set()
    for plan in _plans():
        seen.add(plan.fault)
        assert 1 <= len(plan.connections) <= MAX_CONNECTIONS
        for connection in plan.connections:
            for side in SIDES:
                gates = connection.gates[side]
                # A gate opens after the one before it, and can be reached.
                assert list(gates) == sorted(gates)
                assert all(need <= connection.total(other(side)) for need, _ in gates)
            if plan.fault == BUFFER_FULL:
                stalls = [end.stall_at for end in connection.ends.values()]
                assert sum(at is not None for at in stalls) == 1
    assert seen == {"", *FAULTS}


def test_gates_never_wait_for_each_other() -> None:
    for plan in _plans():
        for connection in plan.connections:
            sent = dict.fromkeys(SIDES, 0)
            moved = True
            while moved:
                moved = False
                for side in SIDES:
                    for need, allowed in connection.gates[side]:
                        if need <= sent[other(side)] and allowed > sent[side]:
                            sent[side] = allowed
                            moved = True
            assert sent == {side: connection.total(side) for side in SIDES}


def test_a_name_is_a_plan() -> None:
    identity = case_id("socket", 9, 1, 33, FAULTS)
    assert find_case(json.loads(json.dumps(identity))) == case_plan(9, 1, 33, FAULTS)
    assert case_plan(9, 1, 33, FAULTS) != case_plan(9, 1, 34, FAULTS)
    for name in SCENARIOS:
        assert find_case(scenario_id(1, name, 0)).name == f"{name}:0"


def _outcomes(plan: CasePlan) -> dict[str, list[Outcome]]:
    return {
        side: [
            Outcome(c.number, c.total(side), c.total(other(side)), "eof")
            for c in plan.connections
        ]
        for side in SIDES
    }


def test_judgement_without_a_fault() -> None:
    plan = case_plan(1, 0, 0, ())
    outcomes = _outcomes(plan)
    assert judge(plan, outcomes, None, {}, ring=False) == []
    assert outcome_class(plan, outcomes, None) == "all bytes, then the end"

    outcomes["a"][0].received -= 1
    (finding,) = judge(plan, outcomes, None, {}, ring=False)
    assert finding.kind == "incomplete"

    outcomes = _outcomes(plan)
    outcomes["b"][1].end = "ECONNRESET"
    (finding,) = judge(plan, outcomes, None, {}, ring=False)
    assert finding.kind == "incomplete"

    outcomes["b"][1].mismatch = "byte 7"
    (finding,) = judge(plan, outcomes, None, {}, ring=False)
    assert finding.kind == "mismatch"


def _cut_plan(act: str) -> CasePlan:
    """A case in which side a does this to each connection."""
    plan = case_plan(1, 0, 0, ())
    return replace(
        plan,
        connections=tuple(
            replace(
                connection,
                ends={
                    "a": replace(connection.ends["a"], act=act),
                    "b": connection.ends["b"],
                },
            )
            for connection in plan.connections
        ),
    )


@pytest.mark.parametrize("act", ["shut-wr", "reset", "shut-rdwr", "close"])
def test_judgement_of_a_connection_that_was_cut_short(act: str) -> None:
    plan = _cut_plan(act)
    outcomes = _outcomes(plan)
    outcomes["b"][0].received -= 1
    # It has not been done, so everything must have arrived.
    (finding,) = judge(plan, outcomes, None, {}, ring=False)
    assert finding.kind == "incomplete"
    # What was sent before the stream was shut down arrives; before a reset it may not.
    outcomes["a"][0].acts = 1
    findings = judge(plan, outcomes, None, {}, ring=False)
    assert [f.kind for f in findings] == (["lost"] if act == "shut-wr" else [])
    outcomes["b"][0].end = "ECONNRESET"
    assert judge(plan, outcomes, None, {}, ring=False) == []
    outcomes["b"][0].mismatch = "byte 7"
    (finding,) = judge(plan, outcomes, None, {}, ring=False)
    assert finding.kind == "mismatch"


def test_every_kind_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "stress.md").read_text()
    kinds = text.partition("## Kinds of fault")[2].partition("\n## ")[0]
    rows = [line for line in kinds.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{kind.name}` | {kind.meaning} | {kind.counts} "
        f"| {'yes' if kind.ring else ''} |"
        for kind in KINDS.values()
    ]


@pytest.mark.parametrize(
    ("end", "sent_by_dead", "taken_by_dead", "ring", "kinds"),
    [
        ("eof", 500, 100, False, []),
        ("ECONNRESET", 500, 100, False, []),
        # It had taken everything, so it left by FIN, behind all that it had sent.
        ("eof", 501, 100, False, ["lost"]),
        # It had not, so its RST may have overtaken what it had sent ...
        ("ECONNRESET", 501, 99, False, []),
        # ... but not what it had put into a ring.
        ("ECONNRESET", 501, 99, True, ["lost"]),
    ],
)
def test_judgement_of_a_survivor(
    end: str, sent_by_dead: int, taken_by_dead: int, ring: bool, kinds: list[str]
) -> None:
    plan = find_case(scenario_id(1, "sender-dies", 0))
    outcomes = {"a": [Outcome(0, sent=100, received=500, end=end)]}
    positions = {0: (sent_by_dead, taken_by_dead)}
    findings = judge(plan, outcomes, "b", positions, ring=ring)
    assert [finding.kind for finding in findings] == kinds
