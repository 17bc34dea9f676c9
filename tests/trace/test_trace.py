# SPDX-License-Identifier: Apache-2.0
"""``kmap trace`` with real programs: Envoy, nginx, strace, perf and the kernel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kmap import launch, native, procfs
from kmap.results import (
    EXIT_CANNOT_RUN,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CannotRun,
)
from kmap.trace import recording, share, tracefs
from kmap.trace.recording import RING, STACK, WAIT, WAKE_UP, Recording
from kmap.trace.tracefs import Recorder
from tests.trace.test_recording import labels, texts

_TRACE = [sys.executable, "-m", "kmap", "trace"]
_HOPS = {"client-envoy", "envoy-service"}
# Each fetches once, prints nothing, and fails if that fails.
_FETCH = "import sys, urllib.request as u; [u.urlopen(x).read() for x in sys.argv[1:]]"
_SERVE = """
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def recordable() -> None:
    try:
        Recorder(None, ()).close()
    except CannotRun as error:
        pytest.skip(str(error))


@pytest.fixture
def trace_env(kernel_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    root = str(Path(__file__).parents[2])
    return {**kernel_env, "TMPDIR": str(temporary), "PYTHONPATH": root}


@pytest.fixture
def library_copy(tmp_path: Path) -> Path:
    """A directory with libraries of our own: probes in them are in no other program."""
    directory = tmp_path / "lib"
    directory.mkdir()
    for file in (native.library_path(), native.preload_path()):
        shutil.copy2(file, directory)
    return directory


def _run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_TRACE, *arguments], env=env, capture_output=True, text=True, check=False
    )


def _document(done: subprocess.CompletedProcess[str], code: int) -> dict[str, Any]:
    assert done.returncode == code, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["schema"] == "kmap.trace/1"
    assert document["ok"] is (code == EXIT_OK)
    return document


def _left_over(pid: int) -> list[str]:
    """What a recorder has in the kernel."""
    with tracefs.root() as root:
        instances = [each.name for each in (root / "instances").iterdir()]
        probes = (root / "uprobe_events").read_text()
    found = [name for name in instances if name == f"kmap-{pid}"]
    return found + [line for line in probes.splitlines() if f":kmap_{pid}/" in line]


def _names(found: Recording, setup: str, role: str, *kinds: str) -> Counter[str]:
    return Counter(call.name for call in found.side(setup).of(role, *kinds))


@pytest.mark.usefixtures("installed", "recordable")
def test_a_request_through_envoy(trace_env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = _document(
        _run(trace_env, "--json", "--requests=8", f"--out={out}"), EXIT_OK
    )
    assert document["problems"] == []
    found = recording.read(recording.document(out / "recording.json"))
    assert json.loads(json.dumps(found.to_json())) == document["recording"]
    kernel, kmap = found.sides
    assert kernel.roles == kmap.roles == ("client", "envoy", "service")
    # What Envoy, nginx and a blocking client are known to call.
    assert _names(found, "kernel", "client", STACK) == {"sendto": 1, "recvfrom": 1}
    assert _names(found, "kernel", "envoy", STACK) == {"readv": 4, "sendto": 2}
    service = _names(found, "kernel", "service", STACK)
    assert service["recvfrom"] == service["writev"] == service["sendfile"] == 1
    assert _names(found, "kernel", "envoy", WAIT)["epoll_wait"] >= 2
    again = [call.result for call in kernel.of("envoy", STACK) if call.result < 0]
    assert again == [-11, -11]
    assert {call.what for call in kernel.calls if call.kind == STACK} == _HOPS
    # With Kmap nothing of a request enters the stack, and programs are woken.
    assert [call for call in kmap.calls if call.kind == STACK] == []
    assert _names(found, "kmap", "service", RING)["setsockopt"] == 2
    assert _names(found, "kmap", "envoy", RING) == {"readv": 4, "send": 2}
    assert _names(found, "kmap", "client", WAKE_UP)["shutdown"] == 1
    assert kmap.carried == dict(kmap.ring_bytes)
    assert set(kmap.carried) == _HOPS
    assert min(kmap.carried.values()) > 128
    assert kernel.carried == dict(kernel.ring_bytes) == {}
    # In order: a hop's bytes come out after they went in.
    for side, kind in ((kernel, STACK), (kmap, RING)):
        balance = Counter[str]()
        for call in (each for each in side.calls if each.kind == kind):
            step = {"out": call.bytes, "in": -call.bytes, "": 0}[call.way]
            balance[call.what] += step
            assert balance[call.what] >= 0
        assert set(balance.values()) == {0}
    for side in found.sides:
        assert side.strace is not None
        assert side.strace.agree == side.strace.requests == 8
        for role in side.roles:
            row = document["counts"][side.setup][role]
            assert row["agrees"] is True
            assert row["stack"] == row["strace"]["stack"] == len(side.of(role, STACK))
    for number, side in enumerate(found.sides, 1):
        assert texts(out / f"figure{number}.svg") == labels(side)
    # Drawn again from the file: the same figures.
    again_out = tmp_path / "again"
    arguments = (f"--from={out / 'recording.json'}", f"--out={again_out}")
    assert _run(trace_env, *arguments).returncode == EXIT_OK
    for name in ("figure1.svg", "figure2.svg", "figure1.png", "figure2.png"):
        assert (out / name).read_bytes() == (again_out / name).read_bytes()
    assert os.listdir(trace_env["TMPDIR"]) == []


@pytest.mark.usefixtures("installed", "recordable")
def test_a_client_of_the_users(trace_env: dict[str, str]) -> None:
    command = (sys.executable, "-I", "-c", _FETCH, "{url}")
    arguments = ("--json", "--requests=1", "--", *command)
    document = _document(_run(trace_env, *arguments), EXIT_OK)
    for side in document["recording"]["sides"]:
        calls = [c for c in side["calls"] if c["role"] == "client"]
        connects = [c for c in calls if c["name"] == "connect" and c["fd"] >= 0]
        assert "client-envoy" in {c["what"] for c in connects}
        assert side["strace"]["agree"] == 1
        assert [c["bytes"] for c in calls if c["what"] == "client-envoy"].count(0) > 2
    # The client's connection is young, and Envoy's to the service is not.
    kmap = document["recording"]["sides"][1]
    ring = {c["what"] for c in kmap["calls"] if c["kind"] == "ring"}
    assert ring == {"envoy-service"}


@pytest.mark.usefixtures("recordable")
@pytest.mark.parametrize("under", ["kernel", "kmap"])
def test_servers_of_the_users(
    under: str,
    trace_env: dict[str, str],
    library_copy: Path,
    spawn: Any,
    tmp_path: Path,
) -> None:
    trace_env["KMAP_LIB_DIR"] = str(library_copy)
    preload = library_copy / native.PRELOAD_NAME
    kmap_env = launch.environment(trace_env, preload=preload)
    server = spawn(
        [sys.executable, "-I", "-c", _SERVE],
        env=kmap_env if under == "kmap" else trace_env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/"
    command = (sys.executable, "-I", "-c", _FETCH, url)
    arguments = ("--json", "--requests=1", f"--server={server.pid}", "--", *command)
    document = _document(_run(trace_env, *arguments), EXIT_OK)
    comm = procfs.comm(server.pid)
    hop = f"to {comm}"
    for side in document["recording"]["sides"]:
        roles = {process["role"] for process in side["processes"]}
        assert roles == {Path(sys.executable).name, comm} or len(roles) == 1
        assert side["strace"]["agree"] == side["strace"]["requests"] == 1
        moved = [c for c in side["calls"] if c["what"] == hop and c["way"]]
        sent = sum(c["bytes"] for c in moved if c["way"] == "out")
        assert sent == sum(c["bytes"] for c in moved if c["way"] == "in") > 100


@pytest.mark.usefixtures("installed", "recordable")
def test_a_client_that_fails(trace_env: dict[str, str]) -> None:
    done = _run(trace_env, "--json", "--", "false", "{url}")
    assert "false ended with 1" in _document(done, EXIT_FAILED)["error"]
    assert os.listdir(trace_env["TMPDIR"]) == []


@pytest.mark.usefixtures("installed", "recordable")
def test_cpu_of_a_request(trace_env: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("perf") is None:
        pytest.skip("perf is not installed: apt-get install linux-perf")
    out = tmp_path / "out"
    one = ("--rounds=1", f"--out={out}")
    done = _run(trace_env, "--json", "--figure2-cpu", "--seconds=2", *one)
    document = _document(done, EXIT_OK)
    found = share.read(recording.document(out / "figure2-cpu.json"))
    assert json.loads(json.dumps(found.to_json())) == document["cpu"]
    svg = (out / "figure2-cpu.svg").read_text()
    for program in share.PROGRAMS:
        kernel, kmap = (found.bar(program, setup) for setup in recording.SETUPS)
        assert kernel.groups["library"] == 0 < kmap.groups["library"]
        # nginx reads files, and a read of a file is a call that leads there, too.
        if program == "envoy":
            assert kmap.groups["stack"] < kernel.groups["stack"]
        for bar in (kernel, kmap):
            assert bar.samples > 0
            assert bar.groups["program"] > 0
            assert bar.rounds == pytest.approx([bar.total])
            assert f">{bar.total:.1f}<" in svg
    assert _run(trace_env, f"--from={out / 'figure2-cpu.json'}").returncode == EXIT_OK
    assert (out / "figure2-cpu.svg").read_text() == svg


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--requests=-1",), "--requests -1: from 1 to"),
        (("--requests=201",), "--requests 201: from 1 to"),
        (("--body=-1",), "--body -1: from 0 to"),
        (("--cpus=9999",), "--cpus 9999"),
        (("--", "curl", "http://127.0.0.1/"), "--server PID"),
        (("--server=1", "--", "curl", "{url}"), "leave {url} and {port} out"),
        (("--server=1",), "--server is for a CMD"),
        (("--from=x", "--", "curl"), "--from records nothing"),
        (("--from=x", "--figure2-cpu"), "--from records nothing"),
        (("--figure2-cpu", "--", "curl"), "--figure2-cpu has a load of its own"),
        (("--figure2-cpu", "--seconds=0"), "--seconds and --rounds are"),
        (("--out=/proc/none",), "--out /proc/none: "),
    ],
)
@pytest.mark.usefixtures("installed")
def test_usage(
    trace_env: dict[str, str], arguments: tuple[str, ...], said: str
) -> None:
    done = _run(trace_env, *arguments)
    assert done.returncode == EXIT_USAGE
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("installed", "recordable")
def test_a_server_that_is_not_there(trace_env: dict[str, str], spawn: Any) -> None:
    gone = spawn(["true"], env=trace_env)
    gone.wait()
    done = _run(trace_env, f"--server={gone.pid}", "--", "true")
    assert done.returncode == EXIT_USAGE
    assert f"--server {gone.pid}: there is no such process" in done.stderr


@pytest.mark.usefixtures("installed", "recordable")
def test_without_the_right_to_record(trace_env: dict[str, str]) -> None:
    # In a mount namespace where tracefs is nowhere, and without the right to mount it.
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c"),
            "umount -q /sys/kernel/tracing; umount -q /sys/kernel/debug; "
            'exec setpriv --bounding-set=-sys_admin "$@"',
            *("sh", *_TRACE, "--json"),
        ],
        env=trace_env,
        capture_output=True,
        text=True,
        check=False,
    )
    error = _document(done, EXIT_CANNOT_RUN)["error"]
    assert "tracefs" in error
    assert "as root" in error


_HOLD = """
import sys
from pathlib import Path
from kmap.trace.tracefs import Recorder
recorder = Recorder(Path(sys.argv[1]), ("read", "write"))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(
    trace_env: dict[str, str], spawn: Any, library_copy: Path, recordable: None
) -> subprocess.Popen[str]:
    """A process that has a recorder open."""
    process: subprocess.Popen[str] = spawn(
        [sys.executable, "-c", _HOLD, str(library_copy / native.PRELOAD_NAME)],
        env=trace_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_recorder_is_cleaned_up(holder: subprocess.Popen[str]) -> None:
    assert len(_left_over(holder.pid)) == 5
    # Not while it runs.
    Recorder(None, ()).close()
    assert len(_left_over(holder.pid)) == 5
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Recorder(None, ()).close()
    assert _left_over(holder.pid) == []


@pytest.mark.usefixtures("installed", "recordable")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(
    trace_env: dict[str, str], spawn: Any, number: signal.Signals
) -> None:
    process = spawn(
        [*_TRACE, "--requests=200"],
        env=trace_env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family: list[int] = []
    while not _left_over(process.pid) or len(family) < 4:
        assert process.poll() is None
        family = procfs.descendants(process.pid)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert _left_over(process.pid) == []
    assert [pid for pid in family if procfs.exists(pid)] == []
    assert os.listdir(trace_env["TMPDIR"]) == []


def test_offsets_are_those_of_the_loader() -> None:
    offsets = tracefs.function_offsets(
        native.preload_path(), ("read", "__read", "readv", "none")
    )
    # __read is another name of read, or a function of its own.
    assert next(iter(offsets)) == "read"
    assert "none" not in offsets
    content = native.preload_path().read_bytes()
    assert all(0 < offset < len(content) for offset in offsets.values())
    assert len(set(offsets.values())) == len(offsets)
