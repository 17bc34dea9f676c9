# SPDX-License-Identifier: Apache-2.0
"""Each case on the kernel, which vouches for it, and under Kmap."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance import runner

# Python 3.10 has tomllib under the name of the package it came from.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

CASES = runner.all_cases()
MOST_DEVIATIONS = 3


@dataclass(frozen=True)
class Deviation:
    """A case that differs under Kmap, why, and what its failure says."""

    case: str
    reason: str
    shows: str


def _deviations() -> dict[str, Deviation]:
    text = Path(__file__).with_name("deviations.toml").read_text()
    entries = [Deviation(**entry) for entry in tomllib.loads(text).get("deviation", [])]
    return {entry.case: entry for entry in entries}


DEVIATIONS = _deviations()


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str) -> None:
    _judge(runner.run_case(CASES[name], "kernel"))


@pytest.mark.parametrize("name", CASES)
def test_kmap(name: str) -> None:
    _test_under_kmap(name, "kmap")


@pytest.mark.parametrize("name", CASES)
def test_pipe(name: str) -> None:
    _test_under_kmap(name, "pipe")


@pytest.mark.parametrize("name", CASES)
def test_fifo(name: str) -> None:
    _test_under_kmap(name, "fifo")


def _test_under_kmap(name: str, mode: str) -> None:
    outcome = runner.run_case(CASES[name], mode)
    deviation = DEVIATIONS.get(name)
    if deviation is None:
        _judge(outcome)
        return
    if outcome.passed:
        pytest.fail(f"{name} does not differ any more: delete its deviation")
    if outcome.code != 1 or deviation.shows not in outcome.output:
        pytest.fail(f"differs in another way than it may:\n{outcome.output}")


def _judge(outcome: runner.Outcome) -> None:
    if outcome.skipped:
        pytest.skip(outcome.output.strip())
    if not outcome.passed:
        pytest.fail(outcome.output, pytrace=False)


def test_deviations_are_few_and_explained() -> None:
    assert len(DEVIATIONS) <= MOST_DEVIATIONS
    for deviation in DEVIATIONS.values():
        assert deviation.case in CASES
        assert len(deviation.reason.split()) > 5
        assert deviation.shows


def test_runner_tells_failure_from_success() -> None:
    """The judge itself: a wrong assertion, a hang-up and an unknown name are seen."""

    def wrong() -> None:
        raise AssertionError

    name = "bystander.switched_off"
    assert runner.run_case(CASES[name], "kernel").passed
    broken = runner.Case("bystander.no_such_case", wrong)
    assert runner.run_case(broken, "kernel").code == 1
