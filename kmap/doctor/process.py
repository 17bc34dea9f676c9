# SPDX-License-Identifier: Apache-2.0
"""Whether a process that runs is under Kmap, and why not if it is not.

Its files are looked at through /proc/PID/root, as it may be in a container.
"""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import re
import resource
import struct
from dataclasses import dataclass, replace
from functools import cached_property

from kmap import native, procfs, snapshot, wire
from kmap.doctor import elf, envoy, host
from kmap.doctor.check import Check, Subject
from kmap.doctor.elf import Elf, NotElf
from kmap.doctor.libraries import (
    Libraries,
    is_musl_loader,
    preload_for,
    read_all,
)
from kmap.doctor.preloading import closed_part, remedies
from kmap.doctor.program import calls, glibc, linking, malloc
from kmap.native import MUSL_NAME, PRELOAD_NAME, PRELOAD_NAMES
from kmap.policy.rules import INLINE
from kmap.results import CommandFailed
from kmap.snapshot import Connection

# linux/auxvec.h: set where the loader has to distrust the environment.
_AT_SECURE = 23
_IO_URING_LINK = "anon_inode:[io_uring]"
_DELETED = " (deleted)"
# What glibc's loader replaces by the name of its system's directory of libraries.
_LIB = re.compile(r"\$(LIB\b|\{LIB\})")
# The commands that print where a library is.
_PATH = {PRELOAD_NAME: "kmap path", MUSL_NAME: "kmap path --musl"}
_TOP_REASONS = 3
_POLICY_MOST = 64 * 1024 + 1
# A connection with one of these is where it belongs.
_HARMLESS = frozenset({"", "not-hot", "peer-remote", "half-closed"})


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _name(path: str) -> str:
    return os.path.basename(path.removesuffix(_DELETED))


@dataclass(frozen=True)
class Running:
    """What is needed of a process, as it was at one moment."""

    process: procfs.Process
    executable: str
    # Files in its memory that may be programs or libraries, as it names them.
    mapped: tuple[str, ...]
    environment: dict[str, str]
    secure: bool
    status: str

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def user(self) -> int:
        """Its effective user id, as this command sees it."""
        match = re.search(r"^Uid:\s*\d+\s+(\d+)", self.status, re.MULTILINE)
        return int(match[1]) if match else 0

    @property
    def subject(self) -> Subject:
        """How its checks are headed."""
        return Subject(f"{self.process.comm}/{self.pid}")

    def inside(self, path: str) -> str:
        """The name by which we reach a file that it knows as path."""
        return f"/proc/{self.pid}/root{path}"

    @cached_property
    def library_name(self) -> str:
        """What the preload library for its libc is called."""
        loader = self.binary.interpreter
        return MUSL_NAME if loader and is_musl_loader(loader) else PRELOAD_NAME

    @cached_property
    def library(self) -> str | None:
        """The preload library in its memory, as it is named there.

        Of two the one for its libc; the other is there for programs that it starts.
        """
        found = [path for path in self.mapped if _name(path) in PRELOAD_NAMES]
        found.sort(key=lambda path: _name(path) != self.library_name)
        return found[0] if found else None

    @cached_property
    def binary(self) -> Elf:
        """Its program; also one that has been deleted."""
        try:
            binary = elf.read(f"/proc/{self.pid}/exe")
        except NotElf as error:
            raise CommandFailed(str(error)) from None
        return replace(binary, path=self.executable)

    @cached_property
    def libraries(self) -> Libraries:
        """All that is in its memory now, what it loaded as it ran with the rest."""
        root = self.inside("")
        read = read_all(
            [
                root + path
                for path in self.mapped
                if path != self.executable and _name(path) not in PRELOAD_NAMES
            ]
        )
        return Libraries(
            tuple(replace(each, path=each.path[len(root) :]) for each in read.found),
            read.missing,
            read.libc and replace(read.libc, path=read.libc.path[len(root) :]),
        )


def _mapped(pid: int) -> tuple[str, ...]:
    """Files that are mapped executable, each once."""
    found: dict[str, None] = {}
    for line in _read(pid, "maps").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and b"x" in fields[1] and fields[5].startswith(b"/"):
            found[os.fsdecode(fields[5])] = None
    return tuple(found)


def _environment(pid: int) -> dict[str, str]:
    entries = map(os.fsdecode, _read(pid, "environ").split(b"\0"))
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _secure(pid: int) -> bool:
    size = struct.calcsize("@LL")
    raw = _read(pid, "auxv")
    pairs = struct.iter_unpack("@LL", raw[: len(raw) // size * size])
    return any(key == _AT_SECURE and value for key, value in pairs)


def look(pid: int) -> Running:
    """Looks at the process; raises CommandFailed if that cannot be."""
    if not procfs.exists(pid):
        raise CommandFailed(f"there is no process {pid}")
    process = procfs.process(pid)
    try:
        executable = os.readlink(f"/proc/{pid}/exe")
        if process is None:
            raise PermissionError
        return Running(
            process,
            executable,
            _mapped(pid),
            _environment(pid),
            _secure(pid),
            host.own_status(pid),
        )
    except PermissionError:
        raise CommandFailed(
            f"process {pid} may not be looked at: run this as its user or as root"
        ) from None
    except OSError:
        raise CommandFailed(
            f"process {pid} ({procfs.comm(pid)}) has no program: it has ended, or "
            "belongs to the kernel"
        ) from None


def _program(running: Running) -> Check:
    children = procfs.children(running.pid)
    found = f"{running.executable}, user {running.user}"
    if children:
        some = ", ".join(map(str, children[:4])) + (", ..." if children[4:] else "")
        found += f"; its children {some} are processes of their own"
    return running.subject.ok("program", found)


def _place(entry: str, running: Running) -> str:
    """The file that the loader looks for; deploy/init/install.c is about $LIB."""
    if running.library_name == MUSL_NAME:
        return entry
    for part in ("lib64", f"lib/{platform.machine()}-linux-gnu", "lib"):
        path = _LIB.sub(part, entry)
        if os.path.exists(running.inside(path)):
            return path
    return entry


def _preloaded(running: Running) -> list[str]:
    """What of its LD_PRELOAD is the library for its libc, wherever it was to be."""
    entries = re.split(r"[\s:]+", running.environment.get("LD_PRELOAD", ""))
    return [
        _place(entry, running)
        for entry in entries
        if os.path.basename(entry) == running.library_name
        or (_LIB.search(entry) and os.path.basename(entry) in PRELOAD_NAMES)
    ]


def _start_again(found: str, running: Running) -> Check:
    return running.subject.cannot(
        "library",
        found,
        "start it again with kmap run -- CMD, or with "
        f'LD_PRELOAD="$({_PATH[running.library_name]})" in its environment',
    )


def _not_there(running: Running) -> Check:
    """Why a process does not have the library."""
    subject = running.subject
    if running.secure:
        return subject.cannot(
            "library",
            "not loaded: the program is setuid or setgid or has file capabilities, and "
            "the loader distrusts LD_PRELOAD then",
            f"kmap doctor {running.executable} says what to change",
        )
    loader = linking(running.binary, subject)
    if loader.state is not loader.state.OK:
        return subject.cannot("library", f"not loaded: {loader.found}", loader.remedy)
    named = _preloaded(running)
    if not named:
        return _start_again("not loaded: it was started without LD_PRELOAD", running)
    path = named[0]
    if not path.startswith("/"):
        return _start_again(
            f"not loaded: LD_PRELOAD has no whole path, {path}", running
        )
    try:
        library = elf.read(running.inside(path))
    except CommandFailed:
        return subject.cannot(
            "library",
            f"not loaded: there is no {path} in its file system",
            "put the library where its container sees it, and start it again",
        )
    except NotElf as error:
        return _start_again(f"not loaded: {error}", running)
    if library.machine != running.binary.machine:
        return subject.cannot(
            "library",
            f"not loaded: {path} is {library.machine}, the program is "
            f"{running.binary.machine}",
            f"build the library for {running.binary.machine}",
        )
    with contextlib.suppress(OSError):
        root = running.inside("")
        if closed := closed_part(path, root=root, uid=running.user):
            return subject.cannot(
                "library",
                f"not loaded: {path}: user {running.user} cannot reach it, {closed} is "
                "closed to others",
                f"chmod o+rx {closed}, or put the library elsewhere; then start it",
            )
    return _start_again(
        f"not loaded, and LD_PRELOAD names {path}: its standard error has a line of "
        "the loader that says why, or the file came later",
        running,
    )


def _library(running: Running) -> Check:
    path = running.library
    subject = running.subject
    if path is None:
        return _not_there(running)
    loader = linking(running.binary, subject)
    if loader.state is not loader.state.OK:
        return subject.cannot(
            "library", f"loaded: {path}; {loader.found}", loader.remedy
        )
    if _name(path) != running.library_name:
        return _start_again(
            f"loaded: {path}, which forwards every call: it is for another libc than "
            f"{running.binary.interpreter}",
            running,
        )
    if path.endswith(_DELETED):
        return subject.limited(
            "library",
            f"loaded: {path}: the file was replaced or removed since",
            "start it again to get the one that is installed",
        )
    installed = preload_for(running.binary)
    with contextlib.suppress(OSError):
        if installed is not None and not os.path.samefile(
            running.inside(path), installed.path
        ):
            return subject.ok(
                "library",
                f"loaded: {path}, not the one of this command ({installed.path})",
            )
    return subject.ok("library", f"loaded: {path}")


def _policy_fault(running: Running, value: str) -> str | None:
    """What is wrong with the KMAP_POLICY that it was started with."""
    if value.startswith(INLINE):
        raw = os.fsencode(value.removeprefix(INLINE))
    else:
        base = os.path.join(os.readlink(f"/proc/{running.pid}/cwd"), value)
        try:
            with open(running.inside(base), "rb", opener=elf.open_now) as file:
                # More than the library reads, so that it says so.
                raw = file.read(_POLICY_MOST)
        except OSError as error:
            return error.strerror or str(error)
    fault = native.policy_error(raw)
    return None if fault is None else f"line {fault.line}: {fault.message}"


def _settings(running: Running) -> Check:
    policy = running.environment.get("KMAP_POLICY")
    if policy:
        with contextlib.suppress(OSError):
            if fault := _policy_fault(running, policy):
                return running.subject.cannot(
                    "settings",
                    f"KMAP_POLICY: {fault}: no connection is upgraded",
                    "kmap policy --rules FILE checks a file; correct it, and start the "
                    "program again",
                )
    return host.settings(running.environment, running.subject)


def _limits(running: Running) -> Check | None:
    try:
        limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    except OSError:
        return None
    return host.descriptors(limits, running.subject)


def _network(running: Running) -> Check:
    subject, own = running.subject, os.stat("/proc/self/ns/net").st_ino
    name = f"net:[{running.process.network}]"
    if running.process.network == own:
        return subject.ok("network namespace", f"{name}, as this command is in")
    return subject.ok("network namespace", f"{name}, another than this command is in")


def _io_uring(running: Running) -> Check:
    directory = f"/proc/{running.pid}/fd"
    count = 0
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                count += os.readlink(f"{directory}/{name}") == _IO_URING_LINK
    if not count:
        return running.subject.ok("io_uring", "has no instance of it")
    found = f"has {count}: connections that are served by io_uring stay on the kernel"
    # It serves all of its connections so, or none.
    if elf.mentions(f"/proc/{running.pid}/exe", envoy.ENVOY_MARK):
        return running.subject.cannot("io_uring", found, envoy.SWITCH_OFF)
    return running.subject.limited(
        "io_uring", found, "switch it off in the program's settings"
    )


def _statistics(running: Running) -> Check | None:
    """Whether its statistics can be read, and how much went by ring so far."""
    upgrades: int | None = None
    for file in running.process.statistics:
        try:
            statistics = procfs.read_statistics(file)
        except wire.NotStatistics as error:
            return running.subject.limited(
                "statistics",
                f"{error}: its library is of another version than this command",
                "start it again under the library that is installed",
            )
        if statistics is not None:
            names = [counter.name for counter in native.counters()]
            upgrades = dict(zip(names, statistics.counters, strict=False))["upgrades"]
    if upgrades is None:
        return running.subject.ok("statistics", "none: no upgrade was tried so far")
    return running.subject.ok("statistics", f"{upgrades} upgrades so far; kmap stats")


def _summary(subject: Subject, name: str, found: list[Connection]) -> Check:
    """How many connections go which way, and what keeps those on the kernel."""
    if not found:
        return subject.ok(name, "none now")
    on_ring = sum(each.state == "ring" for each in found)
    reasons = collections.Counter(
        each.reason or each.state for each in found if each.state != "ring"
    )
    text = f"{on_ring} on a ring, {len(found) - on_ring} not"
    top = reasons.most_common(_TOP_REASONS)
    if top:
        text += ": " + ", ".join(f"{count} {reason}" for reason, count in top)
    bad = [reason for reason, _ in top if reason not in _HARMLESS]
    if not bad or bad == ["pending"]:
        return subject.ok(name, text)
    meanings = {reason.name: reason.meaning for reason in native.reasons()}
    advice = remedies(bad) or "; ".join(
        f"{reason}: {meanings.get(reason, reason)}" for reason in bad
    )
    return subject.limited(name, text, advice)


def _checks(running: Running, connections: tuple[Connection, ...]) -> list[Check]:
    subject = running.subject
    found: list[Check | None] = [_program(running), _library(running)]
    if not running.binary.static:
        found.append(glibc(running.libraries.libc, subject))
    found.append(calls(running.binary, running.libraries, subject, running=True))
    if not running.binary.static:
        found.append(malloc(running.binary, running.libraries, subject))
    found += [
        host.seccomp(
            running.status, subject, outside=host.filters_of(host.own_status())
        ),
        _limits(running),
        _network(running),
        _io_uring(running),
    ]
    if running.library is not None:
        own = [each for each in connections if each.pid == running.pid]
        found += [
            _settings(running),
            _statistics(running),
            _summary(subject, "connections", own),
        ]
    return [each for each in found if each is not None]


def _transport(running: Running) -> str:
    defaults = {option.env: option.default for option in native.options()}
    return running.environment.get("KMAP_TRANSPORT") or defaults["KMAP_TRANSPORT"]


def _pair(
    one: Running, other: Running, connections: tuple[Connection, ...]
) -> list[Check]:
    """What two processes need of each other."""
    subject = Subject(f"{one.pid} and {other.pid}")
    spaces = [f"net:[{each.process.network}]" for each in (one, other)]
    if spaces[0] != spaces[1]:
        return [
            subject.cannot(
                "network namespace",
                f"{spaces[0]} and {spaces[1]}: they cannot meet",
                "run both in one network namespace: in one pod, with docker "
                "--network container:NAME, or on the host's network",
            )
        ]
    found = [subject.ok("network namespace", f"{spaces[0]}, both")]
    transports = [_transport(each) for each in (one, other)]
    if transports[0] != transports[1]:
        found.append(
            subject.cannot(
                "transport",
                f"{transports[0]} and {transports[1]}",
                "give both the same KMAP_TRANSPORT",
            )
        )
    ends = {(each.peer, each.local) for each in connections if each.pid == other.pid}
    between = [
        each
        for each in connections
        if each.pid == one.pid and (each.local, each.peer) in ends
    ]
    found.append(_summary(subject, "connections", between))
    return found


def check(pid: int, *, peer: int | None = None) -> list[Check]:
    """All checks of a process, and of another that is to be its peer."""
    running = [look(pid)] if peer is None else [look(pid), look(peer)]
    connections: tuple[Connection, ...] = ()
    if any(each.library is not None for each in running):
        pids = {each.pid for each in running}
        connections = snapshot.connections(include_kernel=True, pids=pids)
    found = [check for each in running for check in _checks(each, connections)]
    if len(running) == 2:
        found += _pair(running[0], running[1], connections)
    return found
