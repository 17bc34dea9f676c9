# SPDX-License-Identifier: Apache-2.0
"""The machine: its facts, who else uses it, and cgroups with a quota."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kmap.results import CannotRun

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PERIOD_US = 100_000


def facts() -> dict[str, str]:
    """What figures depend on."""
    found = {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "cpus": str(len(os.sched_getaffinity(0))),
    }
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if model := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
            found["cpu"] = model[1]
        found["virtual"] = str(" hypervisor" in text).lower()
    with contextlib.suppress(OSError):
        path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
        found["tcp_congestion_control"] = path.read_text().strip()
    return found


def process_cpu_s(pids: Iterable[int]) -> float:
    """User and system time of processes that are alive."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    return total / 1e9


def tree_cpu_s(pids: Iterable[int]) -> float:
    """The same with the children that they have waited for, in clock ticks."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text()
            total += sum(map(int, text.rpartition(")")[2].split()[11:15]))
    return total * _TICK_S


def _controllers() -> Iterator[tuple[str, Path]]:
    """Where cgroups with the CPU controller are: their version and the mount."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            mount = Path(before.split()[4])
            if kind == "cgroup" and "cpu" in options.split(","):
                yield "v1", mount
            elif kind == "cgroup2":
                with contextlib.suppress(OSError):
                    names = (mount / "cgroup.controllers").read_text().split()
                    if "cpu" in names:
                        yield "v2", mount


def _refused(error: OSError, path: Path) -> CannotRun:
    return CannotRun(
        f"{error.filename or path}: {error.strerror}: run this as root, where cgroups "
        "may be made"
    )


@contextlib.contextmanager
def _made(mount: Path) -> Iterator[Path]:
    """A cgroup of this process's own, for as long as it is needed."""
    group = mount / f"kmap-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise _refused(error, group) from error
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@contextlib.contextmanager
def quota_of_one_cpu() -> Iterator[Path]:
    """A new cgroup that may use one CPU; the file that moves a process into it."""
    found = next(_controllers(), None)
    if found is None:
        raise CannotRun(
            "no cgroup hierarchy with the cpu controller is mounted; mount one, for "
            "example with: mount -t cgroup2 none /sys/fs/cgroup"
        )
    version, mount = found
    try:
        if version == "v2":
            (mount / "cgroup.subtree_control").write_text("+cpu")
    except OSError as error:
        raise _refused(error, mount) from error
    with _made(mount) as group:
        try:
            if version == "v2":
                (group / "cpu.max").write_text(f"{_PERIOD_US} {_PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(_PERIOD_US))
        except OSError as error:
            raise CannotRun(
                f"{error.filename or group}: {error.strerror}: the quota of a cgroup "
                "cannot be set here; run this as root outside of a container"
            ) from error
        yield group / "cgroup.procs"


@contextlib.contextmanager
def new_group() -> Iterator[Path]:
    """A new cgroup of version 2 without any limit."""
    with open("/proc/self/mountinfo") as file:
        mounts = [Path(line.split()[4]) for line in file if " - cgroup2 " in line]
    if not mounts:
        raise CannotRun(
            "no cgroup hierarchy of version 2 is mounted; mount one, for example with: "
            "mount -t cgroup2 none /sys/fs/cgroup"
        )
    with _made(mounts[0]) as group:
        yield group


def inside(group: Path | None, argv: Sequence[str]) -> list[str]:
    """The command line that starts argv in a cgroup."""
    if group is None:
        return list(argv)
    return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group), *argv]
