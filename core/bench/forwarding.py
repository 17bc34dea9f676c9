# SPDX-License-Identifier: Apache-2.0
"""Compares calls that the kernel serves, and the start of a program, with and without.

scripts/forwarding builds what this needs and runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path

TRUE = "/bin/true"
MODES = ("kernel", "kmap")
# Of one call: in the fastest batch, and in the median one.
Times = list[tuple[float, float]]


def environments(library: Path) -> dict[str, dict[str, str]]:
    """Nothing else in them, so that nothing else takes time."""
    plain = {"PATH": os.environ["PATH"]}
    return {"kernel": plain, "kmap": {**plain, "LD_PRELOAD": str(library)}}


def calls(bench: Path, env: dict[str, str], count: int) -> dict[str, tuple[float, ...]]:
    """Nanoseconds of each call."""
    done = subprocess.run(
        [bench, str(count)], env=env, check=True, capture_output=True, text=True
    )
    return {
        name: tuple(map(float, times))
        for name, *times in map(str.split, done.stdout.splitlines())
    }


def start_us(env: dict[str, str]) -> float:
    """Microseconds from the start of a program that does nothing to its end."""
    began = time.perf_counter_ns()
    pid = os.posix_spawn(TRUE, [TRUE], env)
    os.waitpid(pid, 0)
    return (time.perf_counter_ns() - began) / 1000


def instructions(env: dict[str, str]) -> int:
    """Of that program, counted by valgrind, loader and library included."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", TRUE]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--starts", type=int, default=1_000)
    options = parser.parse_args()
    envs = environments(options.library.resolve())

    times: dict[str, dict[str, Times]] = defaultdict(lambda: defaultdict(list))
    for _ in range(options.rounds):
        for mode in MODES:
            for name, (fastest, median) in calls(
                options.bench, envs[mode], options.calls
            ).items():
                times[name][mode].append((fastest, median))
    print("| call | kernel ns | Kmap ns | more ns | median of batches, more ns |")
    print("|---|---|---|---|---|")
    for name, by_mode in times.items():
        best = [min(fastest for fastest, _ in by_mode[mode]) for mode in MODES]
        usual = [statistics.median(m for _, m in by_mode[mode]) for mode in MODES]
        print(
            f"| {name} | {best[0]:.1f} | {best[1]:.1f} | {best[1] - best[0]:.1f} | "
            f"{usual[1] - usual[0]:.1f} |"
        )

    starts: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.starts):
        for mode in MODES:
            starts[mode].append(start_us(envs[mode]))
    print("\n| start of /bin/true | kernel | Kmap | more |")
    print("|---|---|---|---|")
    best = [min(starts[mode]) for mode in MODES]
    usual = [statistics.median(starts[mode]) for mode in MODES]
    counted = [instructions(envs[mode]) for mode in MODES]
    for what, (without, with_kmap) in {
        "fastest, us": best,
        "median, us": usual,
    }.items():
        more = with_kmap - without
        print(f"| {what} | {without:.0f} | {with_kmap:.0f} | {more:.0f} |")
    more_counted = counted[1] - counted[0]
    print(f"| instructions | {counted[0]:,} | {counted[1]:,} | {more_counted:,} |")


if __name__ == "__main__":
    main()
