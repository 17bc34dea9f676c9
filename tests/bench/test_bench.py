# SPDX-License-Identifier: Apache-2.0
"""``kmap bench``: that it measures what it says, sees damage, and judges rightly."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmap import native, procfs
from kmap.bench import apps, compare, goals, plot, session, sockmap, tables
from kmap.bench.compare import Comparison
from kmap.bench.figures import (
    Outcome,
    Row,
    Sample,
    Spread,
    outcome_from_json,
    outcome_json,
    summarize,
)
from kmap.bench.session import BenchResult, Plan, Session
from kmap.bench.workloads import WORKLOADS
from kmap.demo import programs
from kmap.results import CannotRun, CommandFailed, UsageError
from tests.apps.process import find_program

BRIEF = ("--pairs", "2", "--seconds", "0.02")
PINGPONG = "pingpong-64-blocking-1cpu"
STREAM = "stream-16k-1cpu"


def bench(
    *arguments: str, env: Mapping[str, str] | None = None, exits: int = 0
) -> dict[str, Any]:
    """The document of kmap bench."""
    done = subprocess.run(
        [sys.executable, "-m", "kmap", "bench", "--json", *arguments],
        env=None if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == exits, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small result of every kind of workload but idle ones and programs."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    document = bench("--quick", *BRIEF, PINGPONG, STREAM, "pingpong-64-busy-2cpu")
    path.write_text(json.dumps(document))
    return path


def row(path: Path, workload: str, setup: str) -> dict[str, Any]:
    document = json.loads(path.read_text())
    (found,) = (each for each in document["workloads"] if each["workload"] == workload)
    rows = {each["setup"]: each for each in found["rows"]}
    result: dict[str, Any] = rows[setup]
    return result


def test_a_sockmap() -> None:
    """Measured where it is named; what it takes from the host is given back."""
    if os.geteuid() != 0:
        pytest.skip("only root may load eBPF programs")
    find_program("bpftool")
    before = Path("/proc/self/mountinfo").read_text().splitlines()
    workload = "pingpong-64-epoll-1cpu"
    document = bench(*BRIEF, "--setups", "tcp,sockmap,kmap", workload)
    (outcome,) = (w for w in document["workloads"] if w["workload"] == workload)
    rows = {each["setup"]: each for each in outcome["rows"]}
    assert set(rows) == {"tcp", "sockmap", "kmap"}
    # The same calls as without; what they do in the kernel is less.
    assert rows["sockmap"]["calls"]["per_message"] == pytest.approx(6, abs=0.1)
    ratio = rows["sockmap"]["ratios"]["cpu_us_per_message"]["median"]
    assert ratio < 0.95
    goal = "64 B round trip, one CPU, epoll: of a sockmap"
    assert goal in {each["text"] for each in document["goals"]}
    after = Path("/proc/self/mountinfo").read_text().splitlines()
    assert not [line for line in after if " - bpf " in line and line not in before]
    for line in after:
        if " - cgroup2 " in line:
            for group in Path(line.split()[4]).glob("kmap-bench-*"):
                # One of a test that runs beside this one.
                assert procfs.exists(int(group.name.rpartition("-")[2]))


def test_a_sockmap_without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockmap, "_PLACES", "/nowhere")
    with pytest.raises(CannotRun, match="apt-get install clang"):
        with sockmap.group():
            pass


def test_every_set_up_is_measured(measured: Path) -> None:
    document = json.loads(measured.read_text())
    assert document["ok"]
    assert document["problems"] == []
    for outcome in document["workloads"]:
        workload = WORKLOADS[outcome["workload"]]
        assert {each["setup"] for each in outcome["rows"]} == set(workload.setups)
        assert len(outcome["samples"]) == 2 * len(workload.setups)
        for sample in outcome["samples"]:
            assert sample["messages"] > 0
            if sample["setup"] != "line":
                assert sample["bytes"] >= sample["messages"] * workload.size
            assert sample["cpu_s"] > 0
    assert document["machine"]["kernel"] == os.uname().release


def test_transports_stand_side_by_side() -> None:
    """Those that are made of pipes make the pipes' calls, and the others none."""
    setups = ["tcp", "kmap", "kmap-pipe", "kmap-fifo"]
    document = bench("--transports", "--setups", ",".join(setups), *BRIEF, PINGPONG)
    (outcome,) = document["workloads"]
    rows = {each["setup"]: each for each in outcome["rows"]}
    assert list(rows) == setups
    for setup in setups[1:]:
        assert rows[setup]["ring_share"] >= 0.9
    for name in ("read", "write"):
        assert rows["kmap"]["calls"]["by_name"].get(name, 0) < 0.1
        # One at each end, as on the kernel; the rest is sleeping and waking.
        for setup in ("tcp", "kmap-pipe", "kmap-fifo"):
            assert rows[setup]["calls"]["by_name"][name] == pytest.approx(2, abs=0.2)


def test_other_transports_have_to_be_asked_for() -> None:
    document = bench("--setups", "kmap-pipe", *BRIEF, PINGPONG, exits=2)
    assert "kmap-pipe" in document["error"]


def test_under_kmap_the_bytes_go_by_ring_and_calls_are_saved(measured: Path) -> None:
    for workload in (PINGPONG, STREAM):
        assert row(measured, workload, "kmap")["ring_share"] >= 0.9
        assert row(measured, workload, "tcp")["ring_share"] is None
    # A write and a read at each end.
    assert row(measured, PINGPONG, "tcp")["calls"]["per_message"] == pytest.approx(
        4, abs=0.2
    )
    kmap = row(measured, PINGPONG, "kmap")["calls"]
    assert kmap["per_message"] < 3
    assert kmap["by_name"].get("read", 0) < 0.1
    assert kmap["by_name"].get("write", 0) < 0.1


@pytest.mark.parametrize("kind", ["fanin-128-1cpu", "churn-128-1cpu", "idle-1000"])
def test_the_other_kinds_run(kind: str) -> None:
    document = bench("--quick", "--pairs", "1", "--seconds", "0.05", "--no-calls", kind)
    outcome = next(each for each in document["workloads"] if each["workload"] == kind)
    assert [each["setup"] for each in outcome["rows"]] == list(WORKLOADS[kind].setups)
    assert document["calls_note"] == "not asked for"


def test_a_program_that_nobody_here_wrote() -> None:
    document = bench("--quick", "--pairs", "1", "--seconds", "0.05", "redis-get")
    (outcome,) = document["workloads"]
    kernel, kmap = outcome["rows"]
    assert (kernel["setup"], kmap["setup"]) == ("kernel", "kmap")
    assert kmap["ring_share"] == 1
    assert kernel["metrics"]["messages_per_cpu_s"]["median"] > 0


DAMAGE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>

/* Turns one bit in the middle of the stream. */
ssize_t read(int fd, void *buf, size_t len)
{
	static ssize_t (*next)(int, void *, size_t);
	static unsigned long calls;
	ssize_t n;

	if (!next)
		*(void **)&next = dlsym(RTLD_NEXT, "read");
	n = next(fd, buf, len);
	if (n > 16 && ++calls == 50)
		((char *)buf)[n / 2] ^= 1;
	return n;
}
"""


@pytest.mark.parametrize("workload", [PINGPONG, STREAM, "fanin-128-1cpu"])
def test_a_byte_that_differs_fails_the_run(tmp_path: Path, workload: str) -> None:
    source, library = tmp_path / "damage.c", tmp_path / "damage.so"
    source.write_text(DAMAGE)
    subprocess.run(
        [find_program("gcc"), "-shared", "-fPIC", "-o", library, source, "-ldl"],
        check=True,
    )
    plan = Plan(
        workloads=(WORKLOADS[workload],),
        apps=(),
        pairs=1,
        seconds=0.02,
        setups=("tcp",),
        cpus=(min(os.sched_getaffinity(0)),),
        calls=False,
        environment={**os.environ, "LD_PRELOAD": str(library)},
    )
    result = Session(plan, lambda text: None).run()
    assert result.exit_code == 1
    (problem,) = result.problems
    assert re.search(r"byte \d+ is \d+ and not \d+", problem), problem


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_path", lambda name: None)
    plan = Plan(
        workloads=(),
        apps=(apps.APPS["sockperf"],),
        cpus=(min(os.sched_getaffinity(0)),),
        calls=False,
    )
    result = Session(plan, lambda text: None).run()
    assert result.exit_code == 77
    assert "apt-get install sockperf" in (result.outcomes[0].cannot_run or "")


def test_two_cpus_are_asked_for() -> None:
    plan = Plan(workloads=(), apps=(), cpus=(0,))
    with pytest.raises(CannotRun, match="needs 2 CPUs"):
        Session(plan, lambda text: None).workload(WORKLOADS["stream-64-2cpu"])


def sample(setup: str, number: int, *, steal: float = 0.0, **changes: Any) -> Sample:
    return dataclasses.replace(
        Sample(
            setup=setup,
            round=number,
            messages=1000,
            bytes=1_000_000,
            elapsed_s=1.0,
            cpu_s=0.5,
            server_cpu_s=0.25,
            client_cpu_s=0.25,
            sleeps=10,
            p50_us=10.0,
            p99_us=20.0,
            ring_share=1.0 if setup == "kmap" else None,
            steal=steal,
            foreign=0.0,
        ),
        **changes,
    )


def test_rounds_that_the_hypervisor_spoiled_are_made_again() -> None:
    steals = iter([0.0, 0.3, 0.0, 0.1, 0.0, 0.0])
    turns = []

    def once(setup: str, number: int) -> Sample:
        turns.append(setup)
        return sample(setup, number, steal=next(steals))

    plan = Plan(workloads=(), apps=(), pairs=2)
    kept, discarded = session._rounds("x", ["tcp", "kmap"], plan, lambda _: None, once)
    assert discarded == 1
    assert [s.round for s in kept] == [0, 0, 1, 1]
    # Nobody always goes first, not even after a round that was spoiled.
    assert turns == ["tcp", "kmap", "kmap", "tcp", "tcp", "kmap"]
    assert max(s.steal for s in kept) <= 0.2


def test_ratios_are_taken_within_a_round() -> None:
    samples = [
        sample("tcp", 0, p50_us=10.0),
        sample("kmap", 0, p50_us=4.0),
        sample("tcp", 1, p50_us=20.0),
        sample("kmap", 1, p50_us=10.0),
    ]
    tcp, kmap = summarize(samples, ("tcp", "kmap"), {})
    assert tcp.ratios == {}
    assert kmap.ratios["p50_us"] == Spread(0.45, 0.4, 0.5)
    assert kmap.metrics["p50_us"] == Spread(7.0, 4.0, 10.0)


def outcome(workload: str, *samples: Sample) -> Outcome:
    setups = tuple(dict.fromkeys(each.setup for each in samples))
    return Outcome(
        workload=workload,
        title="",
        rows=summarize(samples, setups, {}),
        samples=samples,
    )


@pytest.mark.parametrize(("kmap_us", "reached"), [(3.9, True), (4.1, False)])
def test_a_goal_is_judged(kmap_us: float, reached: bool) -> None:
    measured = outcome(
        "pingpong-64-epoll-1cpu",
        sample("tcp", 0),
        sample("pipe", 0, p50_us=5.0),
        sample("kmap", 0, p50_us=kmap_us),
    )
    judged = {each.text: each for each in goals.judge([measured])}
    of_tcp = judged["64 B round trip, one CPU, epoll: of TCP"]
    assert of_tcp.value == pytest.approx(kmap_us / 10)
    assert of_tcp.reached is reached
    assert judged["64 B round trip, one CPU, epoll: of pipes"].reached
    assert "64 B round trip, one CPU, epoll: of Unix" not in judged


def test_goals_name_workloads_that_exist() -> None:
    known = {*WORKLOADS, *apps.APPS}
    for goal in goals.GOALS:
        assert goal.workload in known, goal
        assert not goal.base_workload or goal.base_workload in known, goal


def written(path: Path, *outcomes: Outcome) -> Path:
    document = {
        "schema": session.SCHEMA,
        "workloads": [outcome_json(each) for each in outcomes],
    }
    path.write_text(json.dumps(document))
    return path


def compared(tmp_path: Path, before: list[float], after: list[float]) -> Comparison:
    paths = []
    for name, values in (("a.json", before), ("b.json", after)):
        samples = [sample("kmap", i, p50_us=value) for i, value in enumerate(values)]
        paths.append(written(tmp_path / name, outcome("pingpong", *samples)))
    return compare.compare(*paths)


def test_compare_sees_what_got_worse(tmp_path: Path) -> None:
    result = compared(tmp_path, [10.0, 10.2, 9.9], [12.0, 11.0, 11.5])
    assert result.exit_code == 1
    (change,) = result.changes
    assert (change.metric, change.verdict) == ("p50_us", "worse")
    assert change.ratio == pytest.approx(1.15)


def test_compare_sees_what_got_better(tmp_path: Path) -> None:
    result = compared(tmp_path, [12.0, 11.0, 11.5], [10.0, 10.2, 9.9])
    assert result.exit_code == 0
    assert [change.verdict for change in result.changes] == ["better"]


def test_compare_leaves_ranges_that_overlap(tmp_path: Path) -> None:
    result = compared(tmp_path, [10.0, 12.0, 11.0], [11.9, 13.0, 14.0])
    assert (result.exit_code, result.changes) == (0, ())


def test_a_result_equals_itself(measured: Path) -> None:
    document = bench("--compare", str(measured), str(measured))
    assert document["ok"]
    assert document["changes"] == []
    assert document["same"] > 10


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "kmap.demo/1"}', "[1]"])
def test_compare_refuses_what_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    document = bench("--compare", str(path), str(path), exits=2)
    assert str(path) in document["error"]


def test_the_picture_shows_every_workload(measured: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.svg"
    plot.draw(compare.load(measured), picture)
    text = picture.read_text()
    assert "<svg" in text
    # Text is drawn as paths, with what it says in a comment.
    for name in (PINGPONG, STREAM, "kmap", "fifo"):
        assert f"<!-- {name} -->" in text


def test_the_tables_are_written(measured: Path) -> None:
    outcomes = compare.load(measured)
    text = tables.markdown(outcomes, goals.judge(outcomes))
    assert f"| `{PINGPONG}` | tcp |" in text
    rows = [line for line in text.splitlines() if line.startswith("|  | kmap | ")]
    assert len(rows) == len(outcomes)
    assert "| 64 B round trip, one CPU, blocking: of TCP | " in text


def test_a_picture_is_asked_for_in_a_format_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg"):
        plot.check(tmp_path / "out.gif")


def test_kmap_without_rings_is_no_measurement() -> None:
    found = session._outcome(
        PINGPONG,
        "",
        [sample("tcp", 0), sample("kmap", 0, ring_share=0.3)],
        0,
        ("tcp", "kmap"),
        {},
        rings=True,
    )
    assert found.problems == ("only 30% of the bytes went by ring",)
    result = BenchResult({}, {}, (found,), (), 1, 0.1, (0,), False, 0.0, None)
    assert result.exit_code == 1


def test_an_unknown_workload_is_named() -> None:
    document = bench("no-such-thing", exits=2)
    assert "no-such-thing" in document["error"]


def test_an_end_that_dies_fails_the_run() -> None:
    # Nothing listens where the client goes: the server cannot bind to CPU 1023.
    argv = [str(native.bench_path()), "pingpong", "--count", "10"]
    done = subprocess.run(
        [*argv, "--server-cpu", "1023"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "sched_setaffinity" in done.stderr
    assert done.stdout == ""


def test_rows_survive_json() -> None:
    found = outcome("pingpong", sample("tcp", 0), sample("kmap", 0))
    row = found.row("kmap")
    assert isinstance(row, Row)
    again = json.loads(json.dumps(outcome_json(found)))
    assert outcome_from_json(again) == found


def test_failures_are_of_one_workload_alone() -> None:
    plan = Plan(workloads=(), apps=(), cpus=(0,), calls=False)

    def fail() -> Outcome:
        raise CommandFailed("it broke")

    found = Session(plan, lambda text: None)._safely("x", "", fail)
    assert found.problems == ("it broke",)
