# SPDX-License-Identifier: Apache-2.0
"""Envoy's life under traffic: drain, end, hot restart, and an upstream that dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kmap import snapshot
from kmap.demo import config, programs
from kmap.demo.children import Child, Deadline
from kmap.demo.programs import Programs
from kmap.demo.rig import Envoy, start_nginx
from kmap.demo.ringbytes import Collector
from kmap.results import CannotRun

pytestmark = pytest.mark.timeout(60)

_TRAFFIC = Path(__file__).with_name("envoy_traffic.py")
_WAIT_S = 20.0
_CONNECTIONS = 4
# One nginx write each, up to several ring sizes.
_SIZES = (0, 128, 16 << 10, 300_000)


@pytest.fixture(scope="module")
def found() -> Programs:
    try:
        # wrk is not needed here, so its absence must not skip these tests.
        return Programs(programs.find_envoy(), programs.find_nginx(), None, None)  # type: ignore[arg-type]
    except CannotRun as error:
        pytest.skip(str(error))


@pytest.fixture
def served(tmp_path: Path) -> Path:
    root = tmp_path / "served"
    root.mkdir()
    source = random.Random(7)
    for size in _SIZES:
        (root / f"file-{size}").write_bytes(source.randbytes(size))
    return root


class Traffic:
    """The clients of envoy_traffic.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def counts(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("counts\n")
        self._process.stdin.flush()
        document: dict[str, Any] = json.loads(self._process.stdout.readline())
        return document

    def wait_for_good(self, more: int, what: str) -> dict[str, Any]:
        """Waits until so many more requests have succeeded."""
        start = self.counts()["good"]
        deadline = Deadline(_WAIT_S, f"{what}: no {more} good answers")
        while (now := self.counts())["good"] < start + more:
            deadline.pause()
        return now

    def finish(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=_WAIT_S)
        assert self._process.returncode == 0
        document: dict[str, Any] = json.loads(out.splitlines()[-1])
        return document


@dataclass
class Stack:
    """What a test of this file runs."""

    found: Programs
    directory: Path
    root: Path
    env: Mapping[str, str]
    mode: str
    nginx: Child
    nginx_port: int
    spawn: Any
    exits: contextlib.ExitStack

    def start_envoy(
        self,
        *arguments: str,
        name: str = "envoy",
        ports: Mapping[str, int] | None = None,
    ) -> Envoy:
        envoy = Envoy(
            self.found,
            self.directory,
            config.envoy(config.Upstream(port=self.nginx_port), ports=ports),
            env=self.env,
            arguments=arguments or ("--disable-hot-restart",),
            name=name,
        )
        self.exits.callback(envoy.child.close)
        return envoy

    def restart_nginx(self) -> None:
        self.nginx, _ = start_nginx(
            self.found, self.directory, self.root, env=self.env, port=self.nginx_port
        )
        self.exits.callback(self.nginx.close)

    def start_traffic(self, port: int) -> Traffic:
        process = self.spawn(
            [sys.executable, "-I", str(_TRAFFIC), str(port), str(self.root)],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return Traffic(process)

    def assert_on_ring(self, child: Child) -> None:
        """Under Kmap the program carries bytes by ring; on the kernel it has none."""
        with Collector() as ring:
            deadline = Deadline(_WAIT_S, f"{child.name}: nothing went by ring")
            while self.mode == "kmap":
                ring.look(child.family())
                if ring.ring_bytes() > 100_000:
                    return
                deadline.pause()
            ring.look(child.family())
            assert ring.ring_bytes() == 0


@pytest.fixture
def stack(
    found: Programs,
    served: Path,
    tmp_path: Path,
    mode: str,
    mode_env: dict[str, str],
    spawn: Any,
) -> Iterator[Stack]:
    with contextlib.ExitStack() as exits:
        nginx, port = start_nginx(found, tmp_path, served, env=mode_env)
        exits.callback(nginx.close)
        yield Stack(found, tmp_path, served, mode_env, mode, nginx, port, spawn, exits)


def _rows(pids: Iterable[int]) -> list[snapshot.Connection]:
    wanted = set(pids)
    return [
        row for row in snapshot.connections(include_kernel=True) if row.pid in wanted
    ]


def _pipes(pid: int) -> int:
    """Pipes and FIFOs of transports that a process has open."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            # Its own pipes have low numbers.
            found += int(fd.name) >= 256 and stat.S_ISFIFO(fd.stat().st_mode)
    return found


@pytest.mark.parametrize("transport", ["pipe", "fifo"])
def test_hops_by_pipes(
    transport: str,
    found: Programs,
    served: Path,
    tmp_path: Path,
    kmap_env: dict[str, str],
    spawn: Any,
) -> None:
    """The hop to the client and that to the service, and what is left of them."""
    fifos = tmp_path / "fifos"
    env = {
        **kmap_env,
        "KMAP_TRANSPORT": transport,
        "KMAP_FIFO_DIR": str(fifos),
    }
    with contextlib.ExitStack() as exits:
        nginx, port = start_nginx(found, tmp_path, served, env=env)
        exits.callback(nginx.close)
        stack = Stack(found, tmp_path, served, env, "kmap", nginx, port, spawn, exits)
        envoy = stack.start_envoy()
        traffic = stack.start_traffic(envoy.ports["http"])
        traffic.wait_for_good(400, "by pipes")
        stack.assert_on_ring(envoy.child)
        stack.assert_on_ring(nginx)
        both = (*envoy.child.family(), *nginx.family())
        deadline = Deadline(_WAIT_S, "the hops are not on their rings")
        while True:
            rows = [row for row in _rows(both) if row.state == "ring"]
            if {row.role for row in rows if row.pid in envoy.child.family()} == {
                "acceptor",
                "connector",
            }:
                break
            deadline.pause()
        assert {row.transport for row in rows} == {transport}
        assert all(_pipes(row.pid) >= 3 for row in rows)
        assert not fifos.exists()
        _assert_no_failure(traffic.finish())
        assert envoy.child.stop(_WAIT_S, signal.SIGTERM) == 0
        deadline = Deadline(_WAIT_S, "nginx still has pipes")
        while any(_pipes(pid) > 1 for pid in nginx.family()):
            deadline.pause()
        assert not fifos.exists()


def _assert_no_failure(counts: dict[str, Any]) -> None:
    assert counts["errors"] == []
    assert counts["wrong_bodies"] == []
    assert set(counts["statuses"]) == {"200"}


def test_graceful_drain_then_sigterm(stack: Stack) -> None:
    """What a sidecar's supervisor does: drain, wait for the clients, end."""
    envoy = stack.start_envoy(
        "--disable-hot-restart", "--drain-time-s", "1", "--drain-strategy", "immediate"
    )
    traffic = stack.start_traffic(envoy.ports["http"])
    traffic.wait_for_good(200, "before the drain")
    stack.assert_on_ring(envoy.child)
    stack.assert_on_ring(stack.nginx)
    before = traffic.counts()["closes"]
    envoy.admin("/drain_listeners?graceful&skip_exit", "POST")
    deadline = Deadline(_WAIT_S, "no client was asked to close")
    while traffic.counts()["closes"] < before + _CONNECTIONS:
        deadline.pause()
    _assert_no_failure(traffic.finish())
    assert envoy.child.stop(_WAIT_S, signal.SIGTERM) == 0


def test_sigterm_under_load(stack: Stack) -> None:
    """Envoy ends with 0 at once; its clients see their connections end."""
    envoy = stack.start_envoy()
    traffic = stack.start_traffic(envoy.ports["http"])
    traffic.wait_for_good(200, "before the signal")
    stack.assert_on_ring(envoy.child)
    assert envoy.child.stop(_WAIT_S, signal.SIGTERM) == 0
    deadline = Deadline(_WAIT_S, "not every client saw the end")
    while len(traffic.counts()["errors"]) < _CONNECTIONS:
        deadline.pause()
    counts = traffic.finish()
    assert counts["wrong_bodies"] == []
    assert set(counts["statuses"]) <= {"200", "503"}
    stack.nginx.check()


def test_hot_restart(stack: Stack) -> None:
    """The new process takes the listeners over while requests go on."""
    times = (
        "--drain-time-s",
        "1",
        "--parent-shutdown-time-s",
        "3",
        "--drain-strategy",
        "immediate",
    )
    base_file = stack.directory / "base-id"
    old = stack.start_envoy(
        "--use-dynamic-base-id", "--base-id-path", str(base_file), *times, name="old"
    )
    base_id = base_file.read_text().strip()
    stack.exits.callback(
        lambda: Path(f"/dev/shm/envoy_shared_memory_{int(base_id) * 10}").unlink(
            missing_ok=True
        )
    )
    traffic = stack.start_traffic(old.ports["http"])
    traffic.wait_for_good(200, "before the restart")
    stack.assert_on_ring(old.child)
    new = stack.start_envoy(
        "--base-id",
        base_id,
        "--restart-epoch",
        "1",
        *times,
        name="new",
        ports=old.ports,
    )
    assert new.ports == old.ports
    if not old.child.wait(_WAIT_S):
        raise old.child.failure("did not end after the restart")
    assert old.child.returncode == 0
    # From here on only the new process can have answered.
    traffic.wait_for_good(200, "after the restart")
    stack.assert_on_ring(new.child)
    _assert_no_failure(traffic.finish())
    assert new.child.stop(_WAIT_S, signal.SIGTERM) == 0


def test_upstream_killed_and_restarted(stack: Stack) -> None:
    """Clients see 503 while the upstream is gone, and good answers again after."""
    envoy = stack.start_envoy()
    traffic = stack.start_traffic(envoy.ports["http"])
    traffic.wait_for_good(200, "before the kill")
    stack.assert_on_ring(stack.nginx)
    # The whole group at one instant: a master would start new workers.
    os.killpg(stack.nginx.pid, signal.SIGKILL)
    assert stack.nginx.wait(_WAIT_S)
    deadline = Deadline(_WAIT_S, "not every client saw 503")
    while (gone := traffic.counts())["refused"] < _CONNECTIONS:
        deadline.pause()
    # An answer that was half sent when the upstream died cannot be completed.
    assert len(gone["errors"]) <= _CONNECTIONS, gone["errors"]
    assert envoy.live()
    stack.restart_nginx()
    traffic.wait_for_good(200, "after the restart")
    stack.assert_on_ring(stack.nginx)
    counts = traffic.finish()
    assert counts["wrong_bodies"] == []
    assert set(counts["statuses"]) == {"200", "503"}
    assert counts["errors"] == gone["errors"]
    assert envoy.child.stop(_WAIT_S, signal.SIGTERM) == 0
