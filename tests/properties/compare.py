# SPDX-License-Identifier: Apache-2.0
"""Runs a program on the kernel and under Kmap, and says where they differ."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import modes
from tests.properties.shrink import shrink

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds for one operation
SHRINKING = 400  # runs
EXECUTOR = Path(__file__).with_name("executor.py")

Program = dict[str, Any]
Results = list[Any]


class Executor:
    """A process that runs programs, one after the other; a new one when it dies."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def _start(self) -> subprocess.Popen[bytes]:
        self._rest = b""
        return subprocess.Popen(
            [sys.executable, str(EXECUTOR)],
            env=modes.environment(self.mode, KMAP_UPGRADE_AFTER="0"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _line(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        end = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return {"hang": f"no answer in {PATIENCE:.0f} s"}
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return {"death": f"exit status {process.wait()}"}
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def run(self, program: Program) -> Results:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        process.stdin.write(json.dumps(program).encode() + b"\n")
        process.stdin.flush()
        results: Results = []
        while True:
            result = self._line(process)
            if isinstance(result, dict):
                if result.get("done"):
                    return results
                results.append(result)
                if "fault" not in result:
                    self.close()
                    return results
            else:
                results.append(result)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Judge:
    """One executor on the kernel and one under Kmap."""

    def __init__(self, mode: str = "kmap") -> None:
        self.mode = mode
        self.kernel, self.kmap = Executor("kernel"), Executor(mode)

    def close(self) -> None:
        self.kernel.close()
        self.kmap.close()

    def difference(self, program: Program) -> str | None:
        """Where Kmap answers otherwise than the kernel, to be shown; or None."""
        wanted, got = self.kernel.run(program), self.kmap.run(program)
        for number in range(max(len(wanted), len(got))):
            one = wanted[number] if number < len(wanted) else "nothing"
            other = got[number] if number < len(got) else "nothing"
            if isinstance(one, dict):
                return f"operation {number} fails on the kernel: {_shown(one)}"
            if isinstance(other, list) and other[:1] in (["WRONG BYTES"], ["STUCK"]):
                return f"operation {number} under Kmap: {other}"
            if not _same(program, number, one, other):
                return (
                    f"operation {number}, {program['ops'][number : number + 1]}:\n"
                    f"  kernel: {_shown(one)}\n  Kmap:   {_shown(other)}"
                )
        return None

    def check(self, program: Program) -> None:
        difference = self.difference(program)
        if difference is None:
            return
        small = shrink(program, self._fails_like(difference), SHRINKING)
        difference = self.difference(small) or f"not every time: {difference}"
        text = text_of(small)
        name = f"program-{zlib.crc32(text.encode()):08x}.json"
        file = Path(tempfile.gettempdir(), name)
        file.write_text(text)
        raise AssertionError(
            f"{difference}\nprogram: {small!r}\n"
            f"again:   python -m tests.properties.replay --mode {self.mode} {file}"
        )

    def _fails_like(self, difference: str) -> Callable[[Program], bool]:
        """A smaller program must not fail because it is no program at all."""
        broken = "on the kernel" in difference

        def fails(program: Program) -> bool:
            other = self.difference(program)
            return other is not None and ("on the kernel" in other) == broken

        return fails


def text_of(program: Program) -> str:
    """JSON with a line for each operation, as it is kept."""
    ops = ",\n  ".join(json.dumps(op) for op in program["ops"])
    head = json.dumps({key: program[key] for key in ("variant", "nonblock")})
    return f'{head[:-1]}, "ops": [\n  {ops}\n]}}\n'


def _shown(result: Any) -> str:
    return (
        str(result["fault"])
        if isinstance(result, dict) and "fault" in result
        else (repr(result))
    )


def _same(program: Program, number: int, one: Any, other: Any) -> bool:
    if one == other:
        return True
    if number >= len(program["ops"]) or program["variant"] != "midway":
        return False
    # The upgrade itself may look like one more edge: a registration that moves to
    # the rings reports once more what is true.
    if isinstance(one, (str, dict)) or isinstance(other, (str, dict)):
        return False
    match program["ops"][number]["op"]:
        case "wait":
            return not Counter(map(tuple, one)) - Counter(map(tuple, other))
        case "poll":
            return all(
                left == right or (left[0].startswith("set") and right == [left[0], 1])
                for left, right in zip(one, other, strict=True)
            )
    return False
