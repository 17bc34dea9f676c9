# SPDX-License-Identifier: Apache-2.0
"""Random programs answer the same on the kernel and under Kmap.

HYPOTHESIS_PROFILE selects how many: ``ci`` (200, always the same ones) or
``nightly`` (2,000, other ones each time; ``scripts/properties``).  A program that
differs is made smaller by tests/properties/shrink.py, and belongs into examples/ once
it turned out to be a fault of the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests import modes
from tests.properties import programs
from tests.properties.compare import Executor, Judge, Program

EXAMPLES = sorted(Path(__file__).parent.glob("examples/*.json"))
PROFILES = {"ci": 200, "nightly": 2000}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
TOTAL = int(os.environ.get("PROPERTIES_EXAMPLES", PROFILES[PROFILE]))


def _settings(share: int) -> settings:
    return settings(
        max_examples=TOTAL * share // 100,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", params=list(modes.MODES)[1:])
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    made = Judge(request.param)
    yield made
    made.close()


# A nightly run takes what it takes; the executors have watchdogs of their own.
pytestmark = pytest.mark.timeout(120 if PROFILE == "ci" else 0)


@_settings(40)
@given(program=programs.programs("one"))
def test_both_ends_in_one_process(judge: Judge, program: dict[str, Any]) -> None:
    judge.check(program)


@_settings(30)
@given(program=programs.programs("two"))
def test_ends_in_two_processes(judge: Judge, program: dict[str, Any]) -> None:
    judge.check(program)


@_settings(30)
@given(program=programs.programs("midway"))
def test_upgraded_in_the_middle(judge: Judge, program: dict[str, Any]) -> None:
    judge.check(program)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_kept_example(judge: Judge, file: Path) -> None:
    """Programs that differed once."""
    judge.check(json.loads(file.read_text()))


class _Stub(Executor):
    """Answers from a list instead of running anything."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__("stub")
        self.answers = answers

    def run(self, program: Program) -> list[Any]:
        return [self.answers.get(op["op"]) for op in program["ops"]]


def test_a_difference_is_found_and_made_small() -> None:
    judge = Judge()
    judge.kernel, judge.kmap = _Stub({"give": [1, 0]}), _Stub({"give": [2, 0]})
    give = {"op": "give", "size": 40000, "call": "writev", "parts": 3}
    ops = [{"op": "poll"}, give, {"op": "poll"}, {"op": "wait"}]
    program = {"variant": "two", "nonblock": [True, True], "ops": ops}
    with pytest.raises(AssertionError, match=r"kernel: \[1, 0\]") as caught:
        judge.check(program)
    small = {"op": "give", "size": 0, "call": "send", "parts": 1}
    want = {"variant": "one", "nonblock": [True, True], "ops": [small]}
    assert f"program: {want!r}" in str(caught.value)


def test_only_the_upgrade_may_add_an_edge() -> None:
    judge = Judge()
    judge.kernel = _Stub({"wait": [[1, 4]]})
    judge.kmap = _Stub({"wait": [[1, 4], [2, 4]]})
    program = {"variant": "midway", "nonblock": [True, True], "ops": [{"op": "wait"}]}
    assert judge.difference(program) is None
    assert judge.difference({**program, "variant": "one"})
    judge.kmap = _Stub({"wait": []})
    assert judge.difference(program)


def test_a_program_that_does_not_run_is_reported() -> None:
    judge = Judge()
    judge.kernel, judge.kmap = _Stub({}), _Stub({"poll": {"hang": "no answer"}})
    program = {"variant": "one", "nonblock": [True, True], "ops": [{"op": "poll"}]}
    assert "no answer" in str(judge.difference(program))
