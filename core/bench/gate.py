# SPDX-License-Identifier: Apache-2.0
"""Compares instructions and system calls of fixed runs with the recorded ones.

scripts/bench-gate builds what this needs and runs it.  The runs are those of
core/bench/lockstep.c under Kmap.  Each is made twice, the second time with more
messages, so that start and upgrade cancel out; what is left is the same in every run on
one compiler, however busy the machine is.
Nobody waits in them: what a sleep and a wake-up cost is for kmap bench to say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

RUNS = (
    "pingpong",
    "epoll",
    "stream",
    "fanin",
    "vectors",
    "nothing",
    "poll",
    "forwarded",
)
# Multiples of the connections of fanin, and of anything done every so many messages.
FEW, MANY = 1280, 3840
GROWTH = 0.05
# So much less than a call for every message is no growth where there were none.
CALLS_LEAST = 0.002
RECORDED = Path(__file__).with_name("gate.json")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Counts:
    """Of one message: a round trip, a write and its read, or a read of nothing."""

    instructions: float
    calls: float


def _run(argv: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(
        argv, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        sys.exit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    return done.stderr


def instructions(program: Path, library: Path, name: str, messages: int) -> int:
    """In user space, as valgrind counts them."""
    env = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(library)}
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    text = _run([*valgrind, str(program), name, str(messages)], env)
    found = re.search(r"Collected : (\d+)", text)
    if found is None:
        sys.exit(f"valgrind printed no count: {text}")
    return int(found[1])


def system_calls(program: Path, library: Path, name: str, messages: int) -> int:
    """All of them, as strace counts them."""
    with tempfile.NamedTemporaryFile() as output:
        strace = ["strace", "-f", "-c", "-qq", "-o", output.name]
        # strace itself is not to be under Kmap.
        strace.append(f"-ELD_PRELOAD={library}")
        env = {"PATH": os.environ["PATH"]}
        _run([*strace, str(program), name, str(messages)], env)
        text = Path(output.name).read_text()
    found = re.search(r"^ *100\.00 +\S+ +\S+ +(\d+) .*total$", text, re.MULTILINE)
    if found is None:
        sys.exit(f"strace printed no total: {text}")
    return int(found[1])


def measure(program: Path, library: Path, name: str) -> Counts:
    """What one more message costs."""

    def each(counter: object) -> float:
        assert callable(counter)
        few, many = (counter(program, library, name, n) for n in (FEW, MANY))
        return float(many - few) / (MANY - FEW)

    return Counts(round(each(instructions), 1), round(each(system_calls), 4))


def compiler() -> str:
    """The first line that the compiler says about itself."""
    done = subprocess.run(
        ["gcc", "--version"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[0]


def grown(before: float, now: float, least: float = 0.0) -> bool:
    """By more than is allowed."""
    return now > before * (1 + GROWTH) + least


def _judge(recorded: dict[str, dict[str, float]], found: dict[str, Counts]) -> bool:
    ok, shrunk = True, False
    print(
        f"{'run':<12}{'instructions':>14}{'recorded':>10}{'calls':>10}{'recorded':>10}"
    )
    for name, now in found.items():
        before = Counts(**recorded[name]) if name in recorded else None
        if before is None:
            print(
                f"{name:<12}{now.instructions:>14}{'':>10}{now.calls:>10}  NOT RECORDED"
            )
            ok = False
            continue
        bad = [
            what
            for what, is_bad in (
                ("INSTRUCTIONS", grown(before.instructions, now.instructions)),
                ("CALLS", grown(before.calls, now.calls, CALLS_LEAST)),
            )
            if is_bad
        ]
        ok = ok and not bad
        shrunk = shrunk or grown(now.instructions, before.instructions)
        shrunk = shrunk or grown(now.calls, before.calls, CALLS_LEAST)
        print(
            f"{name:<12}{now.instructions:>14}{before.instructions:>10}"
            f"{now.calls:>10}{before.calls:>10}"
            + (f"  GREW: {', '.join(bad)}" if bad else "")
        )
    if shrunk:
        print("something became cheaper: keep it so with scripts/bench-gate --record")
    return ok


def main() -> None:
    """Measures, and judges or records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument(
        "--record", action="store_true", help="take what is found as the new measure"
    )
    options = parser.parse_args()
    library = options.library.resolve()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(lambda name: measure(options.program, library, name), RUNS)
        found = dict(zip(RUNS, counts, strict=True))
    if options.record:
        document = {
            "compiler": compiler(),
            "messages": {name: asdict(each) for name, each in found.items()},
        }
        RECORDED.write_text(json.dumps(document, indent=2) + "\n")
        print(f"recorded in {RECORDED}")
        return
    document = json.loads(RECORDED.read_text())
    if document["compiler"] != compiler():
        print(f"recorded with {document['compiler']}, this is {compiler()}")
    if not _judge(document["messages"], found):
        sys.exit(
            f"more than {GROWTH:.0%} above what is recorded; find out why, and if it "
            "is worth it record the new counts: scripts/bench-gate --record"
        )


if __name__ == "__main__":
    main()
