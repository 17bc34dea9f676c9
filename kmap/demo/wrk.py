# SPDX-License-Identifier: Apache-2.0
"""The loads, and wrk as the client that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kmap.demo.children import Child, ChildFailed
from kmap.demo.programs import Programs
from kmap.demo.rig import Rig

_REPORT = Path(__file__).with_name("report.lua")
# What wrk may take beyond its duration: start, and the last answers.
_EXTRA_S = 30.0
_REQUEST_TIMEOUT_S = 10


@dataclass(frozen=True)
class Load:
    """What wrk asks for, over how many connections."""

    name: str
    path: str
    body_bytes: int
    connections: int
    # Through Envoy's HTTP connection manager, or its TCP proxy.
    proxy: str


LOADS = {
    load.name: load
    for load in (
        Load("http-128", "/128", 128, 32, "http"),
        Load("http-16k", "/16k", 16 << 10, 32, "http"),
        Load("http-1m", "/1m", 1 << 20, 8, "http"),
        Load("tcp-128", "/128", 128, 32, "tcp"),
    )
}


@dataclass(frozen=True)
class Report:
    """What wrk found."""

    requests: int
    duration_s: float
    bytes: int
    connect_errors: int
    read_errors: int
    write_errors: int
    status_errors: int
    timeouts: int
    p50_us: float
    p99_us: float

    @property
    def errors(self) -> int:
        """Everything that is not a good answer in time."""
        return (
            self.connect_errors
            + self.read_errors
            + self.write_errors
            + self.status_errors
            + self.timeouts
        )


def start(
    programs: Programs,
    rig: Rig,
    load: Load,
    seconds: int,
    *,
    env: Mapping[str, str] | None = None,
    cpus: Iterable[int] | None = None,
    before: tuple[str, ...] = (),
) -> Child:
    """Starts wrk with one thread; before is a command line that runs it."""
    port = rig.http_port if load.proxy == "http" else rig.tcp_port
    return Child(
        "wrk",
        [
            *before,
            programs.wrk.path,
            "--threads=1",
            f"--connections={load.connections}",
            f"--duration={seconds}s",
            f"--timeout={_REQUEST_TIMEOUT_S}s",
            f"--script={_REPORT}",
            f"http://127.0.0.1:{port}{load.path}",
        ],
        env=rig.env if env is None else env,
        log=rig.directory / "wrk.log",
        cpus=cpus,
        take_output=True,
    )


def report(child: Child, seconds: float) -> Report:
    """What wrk printed, once it has ended."""
    if not child.wait(seconds + _EXTRA_S):
        raise child.failure(f"did not end within {seconds + _EXTRA_S:g} s")
    text = child.output.read().decode(errors="replace")
    if child.returncode:
        raise child.failure(f"ended with {child.returncode}: {text.strip()}")
    for line in text.splitlines():
        if line.startswith("report "):
            fields = line.split()[1:]
            requests, duration_us, received, *errors = map(int, fields[:8])
            return Report(
                requests=requests,
                duration_s=duration_us / 1e6,
                bytes=received,
                connect_errors=errors[0],
                read_errors=errors[1],
                write_errors=errors[2],
                status_errors=errors[3],
                timeouts=errors[4],
                p50_us=float(fields[8]),
                p99_us=float(fields[9]),
            )
    raise ChildFailed(f"wrk printed no report:\n{text.strip()}")
