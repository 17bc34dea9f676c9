# SPDX-License-Identifier: Apache-2.0
"""All of the demo in order: bodies, then loads round by round, then calls."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kmap.demo import cell, cpu, figures
from kmap.demo.children import Child, none_left
from kmap.demo.figures import Bodies, CallsPerRequest, Cell, DemoResult
from kmap.demo.programs import Programs
from kmap.demo.rig import Rig, Setup
from kmap.demo.ringbytes import Collector
from kmap.demo.wrk import Load

BODY_SIZES = (
    0,
    1,
    128,
    4095,
    4096,
    16 << 10,
    65535,
    65537,
    (1 << 20) - 1,
    1 << 20,
    3_000_001,
    8 << 20,
)
_BODIES_S = 90.0
_SEED = 20

# Called with a text when a step begins, and with None when it is done.
Progress = Callable[[str | None], None]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    loads: tuple[Load, ...]
    setups: tuple[Setup, ...]
    rounds: int
    seconds: int
    cpus: frozenset[int] | None
    bodies: bool = True
    calls: bool = True
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def steps(self) -> int:
        """How often progress is told that something is done."""
        cells = len(self.loads) * len(self.setups)
        each = self.rounds + (1 if self.calls else 0)
        return len(self.setups) * (1 + self.bodies) + cells * each


def write_files(root: Path, loads: Sequence[Load]) -> tuple[Path, Path]:
    """The files that nginx serves: those of the loads, and random bodies."""
    served, bodies = root / "served", root / "bodies"
    served.mkdir()
    bodies.mkdir()
    source = random.Random(_SEED)
    for load in loads:
        (served / load.path.lstrip("/")).write_bytes(source.randbytes(load.body_bytes))
    for size in BODY_SIZES:
        body = source.randbytes(size)
        # nginx serves them, and the client compares with copies of its own.
        (served / f"body-{size}").write_bytes(body)
        (bodies / f"body-{size}").write_bytes(body)
    return served, bodies


def compare_bodies(rig: Rig, bodies: Path) -> Bodies:
    """The correctness pass on one set-up."""
    log = rig.directory / "bodies.log"
    client = Child(
        "body client",
        [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("body_client.py")),
            str(rig.http_port),
            str(bodies),
        ],
        env=rig.env,
        log=log,
        take_output=True,
    )
    with client, Collector() as ring:
        before = rig.envoy.traffic()
        ring.look([rig.envoy.child.pid])
        ring_before = ring.ring_bytes()
        if not client.wait(_BODIES_S):
            raise client.failure(f"({rig.setup.value}) did not end in {_BODIES_S:g} s")
        text = client.output.read()
        if client.returncode:
            raise client.failure(f"ended with {client.returncode}")
        ring.look([rig.envoy.child.pid])
        carried = rig.envoy.traffic() - before
        # Envoy is at one end of both hops.
        total = carried.client_hop + carried.service_hop
        found = json.loads(text)
        return Bodies(
            setup=rig.setup.value,
            bodies=found["bodies"],
            bytes=found["bytes"],
            differences=tuple(found["differences"]),
            ring_share=(ring.ring_bytes() - ring_before) / total if total else 0.0,
        )


def _calls_note(programs: Programs, plan: Plan, counted: bool) -> str | None:
    if not plan.calls:
        return "not asked for"
    if programs.strace is None:
        return "strace is not installed: apt-get install strace"
    if not counted:
        return "strace may not trace here: it needs the right to ptrace"
    return None


def run(
    programs: Programs, plan: Plan, directory: Path, progress: Progress
) -> DemoResult:
    """Does everything in plan; directory is private and is left to the caller."""
    served, bodies = write_files(directory, plan.loads)
    cells: list[Cell] = []
    compared: list[Bodies] = []
    calls: dict[tuple[str, str], CallsPerRequest | None] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(none_left())
        stack.enter_context(cpu.out_of_the_way(plan.cpus))
        rigs: list[Rig] = []
        for setup in plan.setups:
            progress(f"{setup.value}: starting Envoy and nginx")
            rig = Rig(
                programs,
                setup,
                directory / setup.value,
                served,
                base_env=plan.environment,
                cpus=plan.cpus,
                echo=plan.bodies,
            )
            stack.callback(rig.close)
            rigs.append(rig)
            progress(None)
        if plan.bodies:
            for rig in rigs:
                progress(f"{rig.setup.value}: bodies of 0 B to 8 MiB")
                compared.append(compare_bodies(rig, bodies))
                progress(None)
        for number in range(plan.rounds):
            for load in plan.loads:
                for rig in rigs:
                    progress(
                        f"round {number + 1}/{plan.rounds}: {load.name}, "
                        f"{rig.setup.value}"
                    )
                    cells.append(
                        cell.measure(
                            programs,
                            rig,
                            load,
                            seconds=plan.seconds,
                            round_number=number,
                        )
                    )
                    progress(None)
        if plan.calls:
            for load in plan.loads:
                for rig in rigs:
                    progress(f"system calls: {load.name}, {rig.setup.value}")
                    key = (load.name, rig.setup.value)
                    of_key = [c for c in cells if (c.load, c.setup) == key]
                    calls[key] = cell.count_calls(programs, rig, load, of_key)
                    progress(None)
        for rig in rigs:
            rig.stop()
    envoy_exit = {rig.setup.value: rig.envoy_exit or 0 for rig in rigs}
    rows = []
    for load in plan.loads:
        by_setup = {
            setup: [c for c in cells if (c.load, c.setup) == (load.name, setup.value)]
            for setup in plan.setups
        }
        for setup in plan.setups:
            rows.append(
                figures.summarize(
                    by_setup[setup],
                    by_setup.get(Setup.KERNEL, []),
                    calls.get((load.name, setup.value)),
                )
            )
    versions = {
        "envoy": programs.envoy.version,
        "nginx": programs.nginx.version,
        "wrk": programs.wrk.version,
    }
    return DemoResult(
        versions=versions,
        cpus=None if plan.cpus is None else tuple(sorted(plan.cpus)),
        rounds=plan.rounds,
        seconds=plan.seconds,
        bodies=tuple(compared),
        rows=tuple(rows),
        cells=tuple(cells),
        envoy_exit=envoy_exit,
        calls_note=_calls_note(programs, plan, any(calls.values())),
        problems=figures.problems(rows, compared, envoy_exit),
    )
