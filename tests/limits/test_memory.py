# SPDX-License-Identifier: Apache-2.0
"""KMAP_MEMORY_LIMIT, and memory that is not to be had."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kmap import snapshot
from tests.limits.crowd import Spawn

PROGRAM = Path(__file__).parent / "programs" / "memory.py"
# What the limit counts for a connection: a header and the rings as they start.
START = 4096 + 2 * 16384


class Program:
    """Has both ends of its connections; see programs/memory.py."""

    def __init__(self, spawn: Spawn, env: Mapping[str, str]) -> None:
        self.process: subprocess.Popen[str] = spawn(
            [sys.executable, "-W", "error", str(PROGRAM)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def do(self, *words: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def states(self, end: int) -> list[tuple[str, str]]:
        """Of the connecting ends (0) or the accepting ones, in the order of making."""
        shown = {
            each.fd: (each.state, each.reason)
            for each in snapshot.connections(include_kernel=True)
            if each.pid == self.process.pid
        }
        return [shown[ends[end]] for ends in self.do("numbers")]

    def finish(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait()


def test_the_budget_of_memory(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    """New connections stay on the kernel, old ones go on, closed ones make room."""
    # Both ends are this process's.
    env = kmap_env | {"KMAP_MEMORY_LIMIT": str(6 * START)}
    program = Program(spawn, env)
    ring, kernel = ("ring", ""), ("kernel", "budget-memory")
    program.do("open", 5)
    assert program.states(0) == [ring] * 3 + [kernel] * 2
    # What there is may grow and goes on, and what is on the kernel stays there.
    program.do("talk", 200_000)
    assert program.states(0) == [ring] * 3 + [kernel] * 2
    program.do("close", 0)
    program.do("close", 0)
    program.do("open", 3)
    program.do("talk", 1000)
    assert program.states(0) == [ring] + [kernel] * 2 + [ring] * 2 + [kernel]
    assert program.finish() == 0


def test_address_space_runs_out(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    """A segment that cannot be mapped leaves its connection on the kernel."""
    program = Program(spawn, kmap_env)
    program.do("open", 2)
    used = int(Path(f"/proc/{program.process.pid}/statm").read_text().split()[0])
    # Enough for the program, and for no segment.
    limit = used * resource.getpagesize() + 500_000
    resource.prlimit(program.process.pid, resource.RLIMIT_AS, (limit, limit))
    program.do("open", 2)
    program.do("talk", 1000)
    ring, kernel = ("ring", ""), ("kernel", "budget-memory")
    assert program.states(1) == [ring] * 2 + [kernel] * 2
    assert [state for state, _ in program.states(0)] == ["ring"] * 2 + ["kernel"] * 2
    assert program.finish() == 0
