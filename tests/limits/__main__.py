# SPDX-License-Identifier: Apache-2.0
"""What many connections cost, on the kernel and under Kmap.

scripts/limits [COUNT] makes that many (10,000) between two processes, in both modes,
and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from kmap import launch
from tests.limits import crowd

IDLE_S = 10.0


@contextlib.contextmanager
def spawner() -> Iterator[crowd.Spawn]:
    """Ends what was started, by number."""
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(argv, text=True, **options))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(mode: str, env: Mapping[str, str], count: int) -> dict[str, str]:
    """The figures of one mode, by name."""
    with spawner() as spawn:
        many = crowd.gather(spawn, env, count)
        usage = [crowd.memory(pid) for pid in many.pids]
        segments = crowd.segment_bytes(many.client.pid)
        idle = many.idle(IDLE_S)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        shown = subprocess.run(
            [sys.executable, "-m", "kmap", "ss", "--json"],
            env=launch.without_kmap(os.environ),
            capture_output=True,
            check=True,
        )
        elapsed = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        rings = sum(
            row["pid"] in many.pids for row in json.loads(shown.stdout)["connections"]
        )
        ends = 2 * count
        pss = sum(each["Pss"] for each in usage) / ends / 1024
        private = sum(each["Private_Dirty"] for each in usage) / ends / 1024
        figures = {
            "ends on a ring": f"{rings:,}",
            f"{crowd.TURNS} round trips of each": f"{many.first[0]:.1f} s",
            "CPU of both for them": f"{many.first[1]:.1f} s",
            "one more of each": f"{many.more[0]:.2f} s",
            "CPU of both for it": f"{many.more[1]:.2f} s",
            "descriptors, client": f"{len(crowd.descriptors(many.client.pid)):,}",
            "descriptors, server": f"{len(crowd.descriptors(many.server.pid)):,}",
            "Pss of an end": f"{pss:.1f} KiB",
            "of that private": f"{private:.1f} KiB",
            "segment of a connection": f"{segments / count / 1024:.1f} KiB",
            f"idle {IDLE_S:.0f} s, CPU ticks": str(idle.ticks),
            f"idle {IDLE_S:.0f} s, context switches": str(idle.switches),
            "kmap ss": f"{elapsed:.2f} s",
            "kmap ss, CPU": f"{took:.2f} s",
        }
        if many.finish() != (0, 0):
            raise SystemExit(f"{mode}: a program failed")
    return figures


def main() -> None:
    """Both modes side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    count = parser.parse_args().count
    plain = launch.without_kmap(os.environ)
    kernel = measure("kernel", plain, count)
    kmap = measure("kmap", launch.environment(plain), count)
    print(f"| {count:,} connections | kernel | Kmap |\n|---|---|---|")
    for name, value in kernel.items():
        print(f"| {name} | {value} | {kmap[name]} |")


main()
