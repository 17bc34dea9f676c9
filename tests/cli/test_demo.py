# SPDX-License-Identifier: Apache-2.0
"""``kmap demo``: its JSON, its verdict, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kmap import procfs
from kmap.demo import figures, programs, syscalls
from kmap.demo.figures import Bodies, Cell, CpuPerRequest, Row, SocketStates
from kmap.render import render
from kmap.results import EXIT_CANNOT_RUN, EXIT_OK, EXIT_USAGE, CannotRun
from tests.cli.peers import wait_until

_DEMO = [sys.executable, "-m", "kmap", "demo"]
_WAIT_S = 30.0


@pytest.fixture
def demo_env(kernel_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**kernel_env, "TMPDIR": str(tmp_path), "PYTHONPATH": root}


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("installed")
def test_short_run(demo_env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "figures"
    done = subprocess.run(
        [
            *_DEMO,
            "--json",
            "--duration=1",
            "--rounds=1",
            "--loads=http-128",
            f"--out={out}",
        ],
        env=demo_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    # Progress is for terminals.
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["schema"] == "kmap.demo/1"
    assert document["ok"] is True
    assert document["envoy"] == "1.40.0"
    assert document["problems"] == []
    assert document["envoy_exit"] == {"kernel": 0, "unix": 0, "kmap": 0}
    rows = {row["setup"]: row for row in document["loads"]}
    assert list(rows) == ["kernel", "unix", "kmap"]
    for row in rows.values():
        assert row["name"] == "http-128"
        assert row["requests"] > 0
        assert row["errors"] == 0
        assert row["rps"] > 0
        assert 0 < row["p50_us"] <= row["p99_us"]
        cpu = row["cpu_us_per_request"]
        assert set(cpu) == {"client", "envoy", "service", "total"}
        parts = cpu["client"] + cpu["envoy"] + cpu["service"]
        assert cpu["total"] == pytest.approx(parts, rel=0.01)
        assert min(cpu.values()) > 0
        assert 0 <= row["ring_share"] <= 1
    assert rows["kernel"]["ring_share"] == rows["unix"]["ring_share"] == 0
    assert rows["kmap"]["ring_share"] > 0.5
    assert rows["kmap"]["kmap_ss"]["ring"] > 0
    if rows["kernel"]["stack_calls_per_request"] is not None:
        # Six of Envoy's, two of wrk's and at least two of nginx's.
        assert rows["kernel"]["stack_calls_per_request"] > 9
        assert (
            rows["kmap"]["stack_calls_per_request"]
            < rows["kernel"]["stack_calls_per_request"] / 2
        )
    for each in document["bodies"]:
        assert each["bodies"] > 100
        assert each["differences"] == []
    assert json.loads((out / "demo.json").read_text())["loads"] == document["loads"]
    assert "http-128" in (out / "demo.md").read_text()
    picture = (out / "demo.svg").read_text()
    assert "http-128" in picture
    assert "font-face" not in picture


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_leaves_nothing(
    demo_env: dict[str, str],
    spawn: Any,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    process = spawn(
        [*_DEMO, "--duration=30", "--setups=kernel", "--loads=tcp-128", "--no-bodies"],
        env=demo_env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family: list[int] = []

    def loaded() -> bool:
        family[:] = procfs.descendants(process.pid)
        return {procfs.comm(pid) for pid in family} >= {"envoy", "nginx", "wrk"}

    wait_until(loaded, "no load was started")
    process.send_signal(number)
    assert process.wait(_WAIT_S) == code
    assert [pid for pid in family if procfs.exists(pid)] == []
    assert os.listdir(tmp_path) == []


def _run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_DEMO, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "argument",
    ["--loads=http-129", "--setups=", "--cpus=x", "--cpus=9999", "--rounds=0"],
)
def test_usage(demo_env: dict[str, str], argument: str) -> None:
    done = _run(demo_env, argument)
    assert done.returncode == EXIT_USAGE
    assert argument.split("=")[0] in done.stderr


def test_missing_program_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kmap import cli

    def missing() -> programs.Programs:
        raise CannotRun("wrk is not installed: apt-get install wrk")

    monkeypatch.setattr(programs, "find_all", missing)
    assert cli.main(["demo"]) == EXIT_CANNOT_RUN
    assert "apt-get install wrk" in capsys.readouterr().err


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_path", lambda name: None)
    with pytest.raises(CannotRun, match="apt-get install nginx-light"):
        programs.find_nginx()


_CELL = Cell(
    load="http-128",
    setup="kmap",
    round=0,
    duration_s=5.0,
    requests=1000,
    errors=0,
    rps=200.0,
    p50_us=10.0,
    p99_us=20.0,
    cpu=CpuPerRequest(1, 2, 3, 6),
    steal=0.0,
    client_hop_bytes=1000,
    client_hop_ring_bytes=1000,
    service_hop_bytes=1000,
    service_hop_ring_bytes=1000,
    sockets=SocketStates(ring=4, pending=0, kernel=0),
)
_KERNEL = dataclasses.replace(
    _CELL,
    setup="kernel",
    cpu=CpuPerRequest(2, 4, 6, 12),
    client_hop_ring_bytes=0,
    service_hop_ring_bytes=0,
)


def _row(**changes: Any) -> Row:
    cell = dataclasses.replace(_CELL, **changes)
    return figures.summarize([cell], [_KERNEL], None)


def test_good_row_has_no_problem() -> None:
    row = _row()
    assert row.gain == 2
    assert row.ring_share == 1
    assert figures.problems([row], [], {"kmap": 0}) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"errors": 1}, "1 requests failed"),
        ({"requests": 0}, "no request was answered"),
        ({"client_hop_ring_bytes": 980}, "client to Envoy"),
        ({"service_hop_ring_bytes": 980}, "Envoy to service"),
        ({"cpu": CpuPerRequest(3, 4, 6, 13)}, "1.08 times kernel TCP's"),
        ({"sockets": SocketStates(0, 0, 4)}, "no connection as ring"),
    ],
)
def test_verdict(changes: dict[str, Any], said: str) -> None:
    (problem,) = figures.problems([_row(**changes)], [], {})
    assert said in problem


@pytest.mark.parametrize("width", [80, 200])
def test_table_fits(width: int) -> None:
    result = figures.DemoResult(
        versions={"envoy": "1.40.0"},
        cpus=(0,),
        rounds=1,
        seconds=5,
        bodies=(),
        rows=(_row(),),
        cells=(),
        envoy_exit={},
        calls_note=None,
        problems=(),
    )
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    render(result, console)
    shown = text.getvalue()
    assert "\u2026" not in shown
    for word in ("requests/s", "kernel / this", "by ring", "100.00%", "2.00x"):
        assert word in shown


def test_short_rows_are_not_judged_by_share() -> None:
    row = _row(duration_s=1.0, client_hop_ring_bytes=0)
    assert figures.problems([row], [], {}) == ()


def test_verdict_on_bodies_and_exit() -> None:
    different = Bodies("kmap", 10, 10, ("GET /x: status 500",), 1.0)
    none = Bodies("unix", 0, 0, (), 0.0)
    kernel = Bodies("kmap", 10, 10, (), 0.25)
    found = figures.problems([], [different, none, kernel], {"kernel": 0, "kmap": -11})
    assert found == (
        "bodies, kmap: GET /x: status 500",
        "bodies, unix: none was compared",
        "bodies, kmap: only 25.0% of the bytes went by ring, so that they are equal "
        "says little",
        "Envoy in set-up kmap ended with -11 on SIGTERM, not 0",
    )


def test_rounds_with_steal_are_left_out() -> None:
    cells = [
        dataclasses.replace(_CELL, round=number, steal=steal, cpu=cpu)
        for number, steal, cpu in (
            (0, 0.0, CpuPerRequest(1, 2, 3, 6)),
            (1, 0.5, CpuPerRequest(9, 9, 9, 27)),
        )
    ]
    kernel = [dataclasses.replace(_KERNEL, round=number) for number in (0, 1)]
    row = figures.summarize(cells, kernel, None)
    assert row.gain == 2
    assert row.left_out == 1


def test_strace_lines() -> None:
    trace = """\
7 10.0 readv(5<socket:[1]>, [{iov_base=""..., iov_len=16384}], 8) = 100
7 11.0 readv(5<socket:[1]>, 0x1, 8) = -1 EAGAIN (Resource temporarily unavailable)
7 12.0 epoll_wait(3<anon_inode:[eventpoll]>,  <unfinished ...>
8 12.1 shutdown(9<socket:[9]>, SHUT_RD <unfinished ...>
7 12.2 <... epoll_wait resumed>[{events=EPOLLIN, data=0x5}], 64, -1) = 1
8 12.3 sendfile(6<socket:[2]>, 4</srv/file>, [0], 128) = 128
8 12.4 read(4</srv/file>, ""..., 10) = 10
8 12.5 futex(0x7f00, FUTEX_WAKE_PRIVATE, 1) = 0
8 99.0 write(6<socket:[2]>, ""..., 8) = 8
""".splitlines()
    found = syscalls.count(trace, 10.0, 20.0)
    assert found == {
        7: syscalls.Calls(stack=2, waits=1, doorbells=0, futexes=0),
        8: syscalls.Calls(stack=1, waits=0, doorbells=1, futexes=1),
    }
