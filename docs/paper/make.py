# SPDX-License-Identifier: Apache-2.0
"""Measures what docs/paper.md says, and writes it.

scripts/paper runs it: everything is measured again, the results are kept beside this
file (bench.json, demo.json, ends.json; the figures in docs/figures), and docs/paper.md
is made of template.md and these.  With --render nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from docs.paper import ends

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "paper.md"
FIGURES = HERE.parent / "figures"
TEMPLATE = HERE / "template.md"
TRACING = HERE.parent / "tracing.md"

TRANSPORTS = ("shm", "pipe", "fifo")
SETUPS = ("tcp", "unix", "pipe", "fifo", "kmap")
WORKLOADS = (
    "pingpong-64-blocking-1cpu",
    "pingpong-64-epoll-1cpu",
    "pingpong-64-blocking-2cpu",
    "pingpong-64-epoll-2cpu",
    "stream-64-2cpu",
    "stream-1k-2cpu",
    "stream-16k-2cpu",
    "stream-64k-2cpu",
    "stream-1m-2cpu",
    "stream-16k-1cpu",
    "fanin-128-1cpu",
    "churn-128-1cpu",
)
METRICS = (
    "p50_us",
    "p99_us",
    "bytes_per_s",
    "messages_per_s",
    "cpu_us_per_message",
    "cpu_s_per_gb",
    "calls_per_message",
    "wakeups_per_mb",
)
# Loads of the demo that are run with each transport.
CARRIED = "http-128,http-1m,tcp-128"


def _json(argv: Sequence[str], **environment: str) -> dict[str, Any]:
    """What a command prints with --json."""
    print("+", *(f"{key}={value}" for key, value in environment.items()), *argv)
    done = subprocess.run(
        [sys.executable, "-m", "kmap", *argv, "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    if done.returncode not in (0, 1):
        sys.exit(f"kmap {' '.join(argv)} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    # A round that did not count is left out, and said; the page needs every figure.
    for problem in found.get("problems", ()):
        print(f"kmap {argv[0]}: {problem}", file=sys.stderr)
    return found


def bench_rows(document: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a document of kmap bench that the page needs."""
    return {
        "machine": document["machine"],
        "pairs": document["pairs"],
        "workloads": {
            workload["workload"]: {
                row["setup"]: {
                    name: value["median"]
                    for name, value in row["metrics"].items()
                    if name in METRICS and value
                }
                for row in workload["rows"]
            }
            for workload in document["workloads"]
        },
    }


def _demo_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            key: row[key]
            for key in (
                "name",
                "setup",
                "rps",
                "p50_us",
                "p99_us",
                "cpu_us_per_request",
            )
        }
        | {"gain": row["cpu_gain"], "ring": row["ring_share"]}
        for row in document["loads"]
    ]


def _measure_bench(quick: bool) -> None:
    rounds = ("--pairs", "2", "--seconds", "0.2") if quick else ("--pairs", "3")
    setups = ",".join((*SETUPS, *(f"kmap-{name}" for name in TRANSPORTS[1:])))
    bench = _json(["bench", *WORKLOADS, *rounds, "--transports", "--setups", setups])
    _write("bench", bench_rows(bench))


def _measure_demo(quick: bool) -> None:
    length = ("--duration", "1", "--rounds", "1") if quick else ()
    demo = _json(["demo", *length])
    short = ("--duration", "1", "--rounds", "1") if quick else ("--duration", "2")
    carried = {
        name: _demo_rows(
            _json(
                ["demo", "--loads", CARRIED, "--setups", "kernel,kmap", *short],
                KMAP_TRANSPORT=name,
            )
        )
        for name in TRANSPORTS
    }
    _write(
        "demo",
        {
            "versions": demo["versions"],
            "rounds": demo["rounds"],
            "seconds": demo["seconds_per_round"],
            "loads": _demo_rows(demo),
            "transports": carried,
        },
    )


def _measure_ends(quick: bool) -> None:
    del quick
    _write("ends", {name: ends.cost(name) for name in ("kernel", *TRANSPORTS)})


def _measure_trace(quick: bool) -> None:
    rounds = ("--rounds", "1") if quick else ()
    _json(["trace", "--out", str(FIGURES)])
    _json(["trace", "--figure2-cpu", "--out", str(FIGURES), *rounds])
    # The tables of these figures stand in the page about them.
    splice("counts", FIGURES / "trace.md")
    splice("cpu", FIGURES / "figure2-cpu.md")


PARTS: dict[str, Callable[[bool], None]] = {
    "ends": _measure_ends,
    "bench": _measure_bench,
    "demo": _measure_demo,
    "trace": _measure_trace,
}


def splice(name: str, table: Path) -> None:
    """Moves a table to its place in docs/tracing.md."""
    text = TRACING.read_text()
    start = text.index(f"<!-- {name} -->\n") + len(f"<!-- {name} -->\n")
    end = text.index("<!-- end -->", start)
    TRACING.write_text(text[:start] + table.read_text().strip() + "\n" + text[end:])
    table.unlink()


def _write(name: str, content: object) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, with thousands marked; nothing is a dash."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _load(path: Path) -> Any:
    return json.loads(path.read_text())


def render() -> str:
    """The page."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["number"] = number
    page = environment.from_string(TEMPLATE.read_text()).render(
        bench=_load(HERE / "bench.json"),
        demo=_load(HERE / "demo.json"),
        ends=_load(HERE / "ends.json"),
        recording=_load(FIGURES / "recording.json"),
        cpu=_load(FIGURES / "figure2-cpu.json"),
        transports=TRANSPORTS,
    )
    return page


def main() -> None:
    """Measures, unless told otherwise, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; write the page anew"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short runs: to see that it works"
    )
    parser.add_argument(
        "--only",
        choices=tuple(PARTS),
        action="append",
        help="measure this part again, and leave the others as they are",
    )
    args = parser.parse_args()
    for name in () if args.render else args.only or PARTS:
        PARTS[name](args.quick)
    PAGE.write_text(render())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
