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

from tests.properties import programs
from tests.properties.compare import Judge

EXAMPLES = sorted(Path(__file__).parent.glob("examples/*.json"))
PROFILES = {"ci": 200, "nightly": 2000}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
TOTAL = int(os.environ.get("PROPERTIES_EXAMPLES", PROFILES[PROFILE]))


def _settings(share: int) -> settings:
    return settings(
        max_examples=TOTAL * share // 100,
        deadline=None,
        derandomize=PROFILE == "ci",
        database=None,
        print_blob=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    made = Judge()
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
