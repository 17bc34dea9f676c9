# SPDX-License-Identifier: Apache-2.0
"""What the library costs a program that has nothing to upgrade, in steady measures.

Instructions and system calls are counted, not time: docs/benchmarking.md has that, and
scripts/forwarding makes it.  The limits leave room for other compilers, not for a
system call or a search more.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from kmap import native
from tests.apps.process import find_program

BENCH = Path(__file__).parents[2] / "core/bench/forwarding.c"
FEW, MANY = 1_000, 3_000
# Instructions that one call may cost more, as the compiler here makes about half.
LIMITS = {
    "read-write-pipe": 110,
    "read-file": 110,
    "write-null": 110,
    "send-recv-unix": 110,
    "fcntl": 110,
    "ioctl": 120,
    "dup-close": 130,
    "recv-tcp": 250,
    "send-tcp": 250,
    "poll": 200,
    "epoll_wait": 200,
}
START_LIMIT = 220_000


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "forwarding"
    command = [find_program("gcc"), "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall"]
    subprocess.run([*command, "-Werror", "-o", path, BENCH], check=True)
    return path


def modes() -> tuple[dict[str, str], dict[str, str]]:
    """Two environments with nothing else in them that could make a difference."""
    plain = {"PATH": os.environ["PATH"]}
    return plain, {**plain, "LD_PRELOAD": str(native.preload_path())}


def instructions(env: Mapping[str, str], *argv: str | Path) -> int:
    command = [find_program("valgrind"), "--tool=callgrind"]
    done = subprocess.run(
        [*command, "--callgrind-out-file=/dev/null", *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    assert done.returncode == 0, done.stderr
    return int(found[1])


@pytest.mark.parametrize("call", LIMITS)
def test_a_forwarded_call_costs_little(bench: Path, call: str) -> None:
    each = []
    for env in modes():
        few, many = (instructions(env, bench, str(n), call) for n in (FEW, MANY))
        each.append((many - few) / (MANY - FEW))
    more = each[1] - each[0]
    # None at all would mean that the library was not there.
    assert 5 < more <= LIMITS[call], f"{each[0]} without, {each[1]} with"


def test_the_start_costs_little() -> None:
    without, with_kmap = (instructions(env, "/bin/true") for env in modes())
    more = with_kmap - without
    assert 1_000 < more <= START_LIMIT, f"{without} without, {with_kmap} with"


def test_the_start_makes_few_system_calls(tmp_path: Path) -> None:
    """The loader maps the library and what it needs; it asks for random bytes once."""
    counts: list[Counter[str]] = []
    for env in modes():
        log = tmp_path / f"strace-{len(counts)}"
        # strace itself is not to be under Kmap.
        given = [f"-E{name}={value}" for name, value in env.items()]
        strace = [find_program("strace"), "-qq", "-o", str(log)]
        subprocess.run([*strace, *given, "/bin/true"], env={}, check=True, timeout=60)
        names = re.findall(r"^(\w+)\(", log.read_text(), flags=re.MULTILINE)
        counts.append(Counter(names))
    more = counts[1] - counts[0]
    assert counts[0] - counts[1] == Counter(), "a call was left out"
    assert more["openat"] == more["close"] > 0, more
    maps = {"openat", "close", "read", "pread64", "mmap", "mprotect", "munmap"}
    maps |= {"fstat", "newfstatat"}
    assert {name for name in more if name not in maps} == {"getrandom"}, more
    assert more["getrandom"] == 1
    assert more.total() <= 26, more
