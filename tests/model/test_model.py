# SPDX-License-Identifier: Apache-2.0
"""The protocol holds in every interleaving, and each of its parts is needed."""

from __future__ import annotations

import pytest

from tests.model import protocol
from tests.model.engine import Thread, choose, explore, load, store
from tests.model.protocol import SITUATIONS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SITUATIONS)
def test_it_holds_in_every_interleaving(name: str) -> None:
    _, bad = SITUATIONS[name].search()
    assert bad is None, "\n".join([*bad.steps, str(bad.results)])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (name, part)
        for name, situation in SITUATIONS.items()
        for part in situation.parts
    ],
)
def test_each_part_is_needed(name: str, part: str) -> None:
    _, bad = SITUATIONS[name].search(part)
    assert bad is not None


def test_the_search_sees_store_buffers() -> None:
    """Dekker without fences: both may read the old value; with both stored, none."""

    def one(mine: str, other: str) -> Thread:
        def thread() -> protocol.Steps:
            yield store(mine, 1)
            return (yield load(other))

        return thread

    search = explore([one("x", "y"), one("y", "x")], {"x": 0, "y": 0})
    assert {end.results for end in search.ends} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_search_takes_every_choice() -> None:
    def thread() -> protocol.Steps:
        return ((yield choose(1, 2)), (yield choose(3, 3)))

    assert {end.results for end in explore([thread], {}).ends} == {((1, 3),), ((2, 3),)}
