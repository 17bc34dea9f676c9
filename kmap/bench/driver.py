# SPDX-License-Identifier: Apache-2.0
"""Runs kmap-bench once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmap import launch, native, procfs
from kmap.bench import machine
from kmap.bench.figures import Sample
from kmap.bench.workloads import (
    BOUND,
    SETUPS,
    SOCKMAP,
    Workload,
    other_setups,
    program_of,
    transport_of,
)
from kmap.demo.cpu import HostTime
from kmap.demo.ringbytes import Collector
from kmap.results import CommandFailed

# What a run may take beyond its measured time; others may be using the machine.
_EXTRA_S = 60.0
_WARNING = "kmap["


@dataclass(frozen=True)
class Place:
    """Where a run happens."""

    # Of the server and of the client.
    cpus: tuple[int, int]
    environments: Mapping[str, Mapping[str, str]]
    # The file that moves a process into a cgroup.
    group: Path | None = None
    # The same of the set-up sockmap.
    joined: Path | None = None

    @property
    def used(self) -> frozenset[int]:
        """The CPUs of both ends."""
        return frozenset(self.cpus)

    def group_of(self, setup: str) -> Path | None:
        """The cgroup of a set-up."""
        return self.joined if setup == SOCKMAP else self.group


def environments(base: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The environment of the programs in each set-up."""
    plain = launch.without_kmap(base)
    # Settings such as KMAP_RING_SIZE hold for what is measured under Kmap.
    found = dict.fromkeys((*SETUPS, SOCKMAP, "kernel"), plain)
    found["kmap"] = launch.environment(base)
    for setup in other_setups():
        options = {"KMAP_TRANSPORT": transport_of(setup) or ""}
        found[setup] = launch.environment(base, options=options)
    return found


def command(workload: Workload, setup: str, place: Place) -> list[str]:
    """The command line of kmap-bench, without how much it is to do."""
    transport = program_of(setup)
    where = ("--server-cpu", str(place.cpus[0]), "--client-cpu", str(place.cpus[1]))
    if setup == BOUND:
        return [str(native.bench_path()), "line", *where]
    argv = [
        *(str(native.bench_path()), *workload.arguments),
        *("--transport", transport, *where),
    ]
    if setup == "ring":
        argv += ["--library", str(native.library_path())]
    return argv


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of standard output, or what there is when it ends or time is up."""
    assert process.stdout is not None
    fd, text, end = process.stdout.fileno(), b"", time.monotonic() + seconds
    while not text.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, 4096)
        if not piece:
            break
        text += piece
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@dataclass(frozen=True)
class Ran:
    """The line of results, the CPU time of the whole run and the bytes by ring."""

    result: dict[str, Any]
    cpu_s: float
    ring_bytes: int


def run(
    argv: Sequence[str], env: Mapping[str, str], group: Path | None, seconds: float
) -> Ran:
    """Runs it and reads what its processes did while they are still there."""
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            machine.inside(group, [*argv, "--hold"]),
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        stack.callback(_end, process)
        line = _read_line(process, seconds + _EXTRA_S)
        ring = stack.enter_context(Collector())
        if line.endswith(b"\n"):
            ring.look(procfs.descendants(process.pid))
        ring_bytes = ring.ring_bytes()
        assert process.stdin is not None
        process.stdin.close()
        if line.endswith(b"\n"):
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
        if process.returncode != 0 or not line.endswith(b"\n") or _WARNING in said:
            raise CommandFailed(
                f"{' '.join(argv)} "
                + (
                    f"ended with {process.returncode}"
                    if process.returncode is not None
                    else f"did not end within {seconds + _EXTRA_S:g} s"
                )
                + (f": {said}" if said else "")
            )
        return Ran(json.loads(line), used.ru_utime + used.ru_stime, ring_bytes)


def _ring_share(ran: Ran) -> float:
    """Of the measured bytes.

    Each byte is counted where it is written and where it is read, and a connection
    begins on the kernel and stays on its ring: what went before the upgrade was part of
    the warm-up if all the measured bytes can have gone by ring.
    """
    return min(1.0, ran.ring_bytes / 2 / max(1, int(ran.result["bytes"])))


def measure(
    workload: Workload, setup: str, place: Place, *, seconds: float, number: int
) -> Sample:
    """One timed run."""
    argv = command(workload, setup, place)
    seconds *= workload.longer
    if workload.count:
        argv += ["--count", str(workload.count)]
    else:
        argv += ["--seconds", f"{seconds:g}"]
    with _hogs(workload, place) as hogs:
        before = HostTime.read(place.used)
        hogs_before = machine.process_cpu_s(hogs)
        ran = run(argv, place.environments[setup], place.group_of(setup), seconds)
        host = HostTime.read(place.used) - before
        own = ran.cpu_s + machine.process_cpu_s(hogs) - hogs_before
    result = ran.result
    server, client = result["server"], result["client"]
    has_rtt = result["rtt_ns"]["count"] > 0
    sleeps = server["voluntary"] + client["voluntary"]
    if workload.kind == "idle":
        # Each end falls asleep once, when it begins to wait.
        sleeps -= 2
    return Sample(
        setup=setup,
        round=number,
        messages=result["messages"],
        bytes=result["bytes"],
        elapsed_s=result["elapsed_s"],
        cpu_s=server["cpu_s"] + client["cpu_s"],
        server_cpu_s=server["cpu_s"],
        client_cpu_s=client["cpu_s"],
        sleeps=sleeps,
        p50_us=result["rtt_ns"]["p50"] / 1000 if has_rtt else None,
        p99_us=result["rtt_ns"]["p99"] / 1000 if has_rtt else None,
        ring_share=_ring_share(ran) if transport_of(setup) else None,
        steal=host.steal_share,
        foreign=host.foreign_share(own),
    )


@contextlib.contextmanager
def companions(kind: str, cpus: Sequence[int]) -> Iterator[list[int]]:
    """A program on each CPU that computes: hog, or spin in the idle class."""
    started: list[subprocess.Popen[bytes]] = []
    env = launch.without_kmap(os.environ)
    try:
        for cpu in cpus:
            argv = [str(native.bench_path()), kind, str(cpu)]
            started.append(subprocess.Popen(argv, env=env, start_new_session=True))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _hogs(workload: Workload, place: Place) -> Iterator[list[int]]:
    if not workload.hog:
        yield []
        return
    with companions("hog", sorted(place.used)) as pids:
        yield pids


def verify(workload: Workload, setup: str, place: Place) -> None:
    """Looks at every byte of a short run; raises CommandFailed when one differs."""
    if setup == BOUND:
        return
    argv = [*command(workload, setup, place), "--verify"]
    if workload.kind == "idle":
        # It looks at every byte anyway.
        argv += ["--seconds", "0.01"]
    else:
        argv += ["--count", str(workload.traced)]
    run(argv, place.environments[setup], place.group_of(setup), 0)


def copying(place: Place) -> dict[str, float]:
    """Bytes that one CPU copies in a second: what no transport can beat."""
    found = {}
    for name, size in (("64k", 64 << 10), ("16m", 16 << 20)):
        argv = [str(native.bench_path()), "copy", "--size", str(size)]
        argv += ["--seconds", "0.2", "--client-cpu", str(place.cpus[1])]
        result = run(argv, place.environments["kernel"], None, 1).result
        # By CPU time: others may be using the machine.
        found[f"copy_{name}_bytes_per_cpu_s"] = (
            result["bytes"] / result["client"]["cpu_s"]
        )
    return found
