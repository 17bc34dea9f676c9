# SPDX-License-Identifier: Apache-2.0
"""docs/paper.md is what its template and the measurements beside it make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.paper import ends, make

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_made_of_its_template_and_the_measurements() -> None:
    assert make.PAGE.read_text() == make.render(), "run scripts/paper --render"


def test_the_figures_it_shows_are_there() -> None:
    text = make.PAGE.read_text()
    shown = [part.split(")")[0] for part in text.split("![")[1:]]
    names = [part.split("(")[1] for part in shown]
    assert names == [f"figures/{n}.svg" for n in ("figure1", "figure2", "figure2-cpu")]
    for name in names:
        assert (ROOT / "docs" / name).stat().st_size > 1000


def test_what_is_kept_of_a_measurement_is_what_the_page_needs() -> None:
    row = {"setup": "tcp", "metrics": {"p50_us": {"median": 9.5}, "sleeps": None}}
    document = {
        "machine": {"cpu": "x"},
        "pairs": 5,
        "workloads": [{"workload": "pingpong", "rows": [row]}],
    }
    kept = make.bench_rows(document)
    assert kept["workloads"] == {"pingpong": {"tcp": {"p50_us": 9.5}}}


def test_each_workload_has_each_setup() -> None:
    bench = json.loads((make.HERE / "bench.json").read_text())
    for name in make.WORKLOADS:
        if name.startswith("churn"):
            continue
        setups = bench["workloads"][name].keys()
        assert setups >= {"tcp", "unix", "kmap", "kmap-pipe", "kmap-fifo"}, name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (12345.6, "12,346"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert make.number(value) == text


def test_what_an_end_costs_by_transport(kmap_env: dict[str, str]) -> None:
    kernel, shm, pipe = (ends.cost(name) for name in ("kernel", "shm", "pipe"))
    # One statistics memfd and the like for the process, and nothing for a connection.
    assert 0 <= shm["descriptors"] - kernel["descriptors"] < 0.5
    assert 2 <= pipe["descriptors"] - kernel["descriptors"] < 2.5
