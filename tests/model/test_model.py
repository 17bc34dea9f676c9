# SPDX-License-Identifier: Apache-2.0
"""The protocol holds in every interleaving, and each of its parts is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.model import protocol
from tests.model.engine import End, Search, Thread, explore, load, store

Made = tuple[list[Thread], dict[str, Any]]
NOTHING: protocol.Without = frozenset()
MESSAGES = 2


def _all_return(search: Search) -> list[End]:
    return [end for end in search.ends if end.stuck]


def _lost(search: Search) -> list[End]:
    """Ends in which a message is missing, there twice, or out of order."""
    whole = tuple(range(MESSAGES))
    bad = []
    for end in search.ends:
        kernel, ring = end.results
        if end.stuck or ring + kernel != whole:
            bad.append(end)
    return bad


Judge = Callable[[Search], list[End]]
LEAVING = (
    (False, "looks"),
    (False, "ends"),
    (True, "looks"),
    (True, "ends"),
    (True, "silent"),
)


def _leave(without: protocol.Without, take: bool, then: str) -> Made:
    return protocol.leave(without, take=take, then=then, messages=MESSAGES)


def _check(made: Made, judge: Judge) -> None:
    search = explore(*made)
    assert search.ends
    bad = judge(search)
    assert not bad, "\n".join([*bad[0].steps, str(bad[0].results)])


@pytest.mark.parametrize("make", [protocol.sleep, protocol.bell, protocol.sleepers])
def test_nobody_sleeps_for_ever(make: Callable[[protocol.Without], Made]) -> None:
    _check(make(NOTHING), _all_return)


@pytest.mark.parametrize(("take", "then"), LEAVING)
def test_no_byte_is_lost_when_a_ring_is_left(take: bool, then: str) -> None:
    _check(_leave(NOTHING, take, then), _lost)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        *((protocol.sleep, part) for part in protocol.SLEEP_PARTS),
        *((protocol.bell, part) for part in protocol.BELL_PARTS),
        *((protocol.sleepers, part) for part in protocol.SLEEPERS_PARTS),
    ],
)
def test_each_part_is_needed(
    make: Callable[[protocol.Without], Made], part: str
) -> None:
    assert _all_return(explore(*make(frozenset({part}))))


@pytest.mark.parametrize("part", protocol.LEAVE_PARTS)
def test_each_part_of_leaving_is_needed(part: str) -> None:
    broken = frozenset({part})
    assert any(_lost(explore(*_leave(broken, *how))) for how in LEAVING)


def test_the_search_sees_store_buffers() -> None:
    """Dekker without fences: both may read the old value; with both stored, none."""

    def one(mine: str, other: str) -> Thread:
        def thread() -> protocol.Steps:
            yield store(mine, 1)
            return (yield load(other))

        return thread

    search = explore([one("x", "y"), one("y", "x")], {"x": 0, "y": 0})
    assert {end.results for end in search.ends} == {(0, 0), (0, 1), (1, 0), (1, 1)}
