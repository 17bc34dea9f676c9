# SPDX-License-Identifier: Apache-2.0
"""Whether the installed library can be preloaded, and then does its work."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from kmap import launch, native, procfs, wire
from kmap.doctor import trial as trial_program
from kmap.doctor.check import Check, Subject
from kmap.results import CannotRun
from kmap.wire import RowState

_TIMEOUT_S = 30

# What to do about a reason; of the others the meaning says enough.
_REMEDIES = {
    "budget-fd": "raise the hard limit of descriptors: ulimit -Hn",
    "budget-memory": "raise KMAP_MEMORY_LIMIT, ulimit -v or vm.max_map_count",
    "disabled": "start it without KMAP_DISABLE",
    "peer-absent": "start the other end with kmap run -- CMD, too",
    "peer-uid": "docs/policy.md, In an Istio pod",
    "peer-version": "start both ends under one version of the library",
    "policy": "kmap policy --rules FILE says what the rules let through",
    "seccomp": "docs/limits.md, System calls that fail",
    "syscall-failed": "let the calls through that docs/limits.md lists",
    "transport": "give both ends the same KMAP_TRANSPORT",
}


def remedies(reasons: Iterable[str]) -> str:
    """What to do about the reasons that something can be done about."""
    return "; ".join(_REMEDIES[name] for name in reasons if name in _REMEDIES)


def closed_part(path: str, *, root: str = "", uid: int | None = None) -> str | None:
    """The first part of path, below root, that uid may not pass or read.

    Without uid, that some user may not.  Groups are left out of account.
    """
    whole = Path(path)
    for part in [*reversed(whole.parents), whole]:
        status = os.stat(f"{root}{part}")
        bit = stat.S_IROTH if part == whole else stat.S_IXOTH
        if uid == status.st_uid:
            bit <<= 6
        if not status.st_mode & bit and uid != 0:
            return str(part)
    return None


def installed(subject: Subject) -> Check:
    """Whether the library is there and a loader takes it."""
    name = "library"
    try:
        path = native.preload_path()
        native.library()
        env = launch.environment(launch.without_kmap(os.environ))
    except CannotRun as error:
        return subject.cannot(name, str(error), "pip install . in the source tree")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", "print(open('/proc/self/maps').read())"],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return subject.cannot(
            name,
            f"{sys.executable} did not end in {_TIMEOUT_S} s with {path}",
            "report it, with the output of kmap run --log debug -- python3 -c pass",
        )
    if str(path) not in done.stdout:
        said = done.stderr.strip().splitlines()
        return subject.cannot(
            name,
            f"{path} is not loaded into {sys.executable}"
            + (f": {said[0]}" if said else ""),
            "kmap doctor "
            + sys.executable
            + " says more; install the package with the "
            "compiler and the libc of this system",
        )
    closed = closed_part(str(path))
    if closed is not None:
        return subject.limited(
            name,
            f"{path}: other users cannot reach it, {closed} is closed to them",
            f"chmod o+rx {closed}, or install it where all can read, such as /opt",
        )
    return subject.ok(name, str(path))


def _verdict(pid: int, subject: Subject) -> Check:
    """What became of the trial's connection."""
    name = "trial"
    process = procfs.process(pid)
    rows: list[wire.Row] = []
    counted: tuple[int, ...] = ()
    for file in process.statistics if process is not None else ():
        statistics = procfs.read_statistics(file)
        if statistics is not None:
            rows.extend(statistics.rows)
            counted = statistics.reasons
    on_ring = [row for row in rows if row.state is RowState.RING]
    if len(on_ring) == 2:
        total = sum(row.ring_rx_bytes for row in on_ring)
        return subject.ok(
            name, f"a connection moved to a ring, {total} bytes went by it"
        )
    reasons = native.reasons()
    numbers = {row.reason for row in rows} | {
        n for n, count in enumerate(counted) if count
    }
    why = [reasons[n] for n in sorted(numbers) if 0 < n < len(reasons)]
    if not why and process is not None and process.cannot_hide:
        # Without a descriptor of its own the library cannot say so itself.
        why = [reason for reason in reasons if reason.name == "budget-fd"]
    if not why:
        return subject.cannot(
            name,
            "a connection stayed on the kernel, and no reason is known",
            "kmap run --log debug -- CMD shows what the library decides",
        )
    return subject.cannot(
        name,
        "a connection stayed on the kernel: "
        + ", ".join(f"{each.name} ({each.meaning})" for each in why),
        remedies(each.name for each in why) or "docs/protocol.md, fallback reasons",
    )


def trial(subject: Subject) -> Check:
    """Runs a small program under Kmap and looks where its bytes went."""
    with subprocess.Popen(
        [sys.executable, "-I", str(Path(trial_program.__file__).resolve())],
        env=launch.environment(launch.without_kmap(os.environ)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # The program's own timeouts end it, so that this line comes or never.
        if process.stdout.readline() == "ready\n":
            verdict = _verdict(process.pid, subject)
            process.stdin.close()
            process.wait()
            return verdict
        said = process.stderr.read().strip().splitlines()
        return subject.cannot(
            "trial",
            f"a test program failed: {said[-1] if said else process.wait()}",
            "run it again with KMAP_DISABLE=1; report it if it works then",
        )
