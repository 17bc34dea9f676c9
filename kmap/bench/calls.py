# SPDX-License-Identifier: Apache-2.0
"""System calls per message: strace counts a run, and one with more messages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kmap.bench import driver, machine
from kmap.bench.driver import Place
from kmap.bench.figures import Calls
from kmap.bench.workloads import BOUND, Workload
from kmap.results import CommandFailed

_TIMEOUT_S = 120
_WARM = 100
# Such as "  5.00    0.000001           1       123         4 read".
_LINE = re.compile(
    r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE
)
# Fewer than this for each message are how the two ends met, and no rule.
_LEAST = 0.0005


def unavailable() -> str | None:
    """Why calls cannot be counted here, if they cannot."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    done = subprocess.run(
        ["strace", "-o", "/dev/null", "/bin/true"], capture_output=True, text=True
    )
    if done.returncode:
        return f"strace may not trace here: {done.stderr.strip()}"
    return None


def count(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    base_env: Mapping[str, str],
    group: Path | None = None,
) -> Counter[str]:
    """How often a program and its children make each call."""
    # strace itself is not to be under Kmap.
    given = [f"-E{name}={value}" for name, value in env.items()]
    with tempfile.NamedTemporaryFile() as output:
        strace = ["strace", "-f", "-c", "-qq", "-o", output.name, *given]
        done = subprocess.run(
            machine.inside(group, [*strace, *argv]),
            env=dict(base_env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if done.returncode:
            raise CommandFailed(
                f"{' '.join(argv)} ended with {done.returncode} under strace: "
                + done.stderr.strip()
            )
        text = Path(output.name).read_text()
    found = Counter({name: int(calls) for calls, name in _LINE.findall(text)})
    found.pop("total", None)
    return found


def per_message(workload: Workload, setup: str, place: Place) -> Calls | None:
    """What more messages add; start, connections and warm-up cancel out."""
    if not workload.traced or setup == BOUND:
        return None
    # Few messages of warm-up: they cancel out only as far as the ends meet alike.
    warm = ("--warm", str(min(workload.warm, _WARM)))
    base = [*driver.command(workload, setup, place), *warm]
    counts = [
        count(
            [*base, "--count", str(number)],
            place.environments[setup],
            base_env=place.environments["kernel"],
            group=place.group_of(setup),
        )
        for number in (workload.traced // 4, workload.traced // 4 + workload.traced)
    ]
    counts[1].subtract(counts[0])
    each = {name: calls / workload.traced for name, calls in counts[1].items()}
    return Calls(
        per_message=max(0.0, sum(each.values())),
        by_name={
            name: round(calls, 4)
            for name, calls in sorted(each.items(), key=lambda item: -item[1])
            if calls > _LEAST
        },
    )
