# SPDX-License-Identifier: Apache-2.0
"""Starts two ends of a connection, disturbs one of them, and says what happened."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "programs" / "end.py"
Spawn = Callable[..., "subprocess.Popen[str]"]
SHAPES = ("recv", "poll", "select", "epoll", "edge")
SIDES = ("connector", "acceptor")
PATIENCE = 30.0
SENT, TRIED, TAKEN, DONE, LOOPS = range(1, 6)
_MARK = re.compile(r"kmap: fault point (\S+): (\w+) \[(\d+)\]")


@dataclass
class End:
    """One of the two processes, its page and what it said."""

    role: str
    process: subprocess.Popen[str]
    page: mmap.mmap
    output: Path
    errors: Path
    control: socket.socket | None = None

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self.page, index * 8)[0])

    @property
    def pid(self) -> int:
        return self.process.pid

    def report(self) -> dict[str, Any]:
        text = self.output.read_text()
        assert text, f"the {self.role} said nothing:\n{self.errors.read_text()}"
        found: dict[str, Any] = json.loads(text)
        return found

    def mark(self) -> re.Match[str] | None:
        """The library's line at the fault point."""
        return _MARK.search(self.errors.read_text())


@dataclass(frozen=True)
class Plan:
    """What is to be run: who is disturbed, how, and how the other one waits."""

    scenario: str
    victim: str
    # The victim is the one that the scenario is about.
    actor: bool
    shape: str
    victim_shape: str = "recv"
    faults: str = ""
    # On the kernel: the step at which the victim ends itself.
    die: str = ""
    # These send only to a sleeper.
    patient: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def survivor(self) -> str:
        return SIDES[1 - SIDES.index(self.victim)]


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Looks again and again until condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        select.select([], [], [], 0.001)


def state(pid: int) -> str:
    """The letter of /proc/PID/stat; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2][1:2].decode()
    except OSError:
        return ""


def switches(pid: int) -> int:
    """How often the process went to sleep or was put off the CPU."""
    with open(f"/proc/{pid}/status") as file:
        lines = [line for line in file if "ctxt_switches" in line]
    return sum(int(line.split()[1]) for line in lines)


def is_idle(pid: int) -> bool:
    """Asleep, and not once awake within 20 ms."""
    before = switches(pid)
    if state(pid) != "S":
        return False
    select.select([], [], [], 0.02)
    return state(pid) == "S" and switches(pid) == before


def names_of(port: int) -> list[str]:
    """Abstract names of the library that belong to connections to that port."""
    text = Path("/proc/net/unix").read_text()
    found = re.findall(r"@(kmap1:[0-9a-f]{72})", text)
    return [name for name in found if name.endswith(f"{port:04x}")]


class Run:
    """Both processes, from their start to what they left behind."""

    def __init__(
        self,
        plan: Plan,
        spawn: Spawn,
        env: Mapping[str, str],
        directory: Path,
    ) -> None:
        self.plan = plan
        self._directory = directory
        listener = socket.create_server(("127.0.0.1", 0))
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            listener.setsockopt(socket.SOL_SOCKET, option, 65536)
        self.port: int = listener.getsockname()[1]
        pages = {side: os.memfd_create(side) for side in SIDES}
        for fd in pages.values():
            os.ftruncate(fd, 4096)
        with listener:
            ends = {
                side: self._start(side, spawn, env, pages, listener) for side in SIDES
            }
        for fd in pages.values():
            os.close(fd)
        self.victim = ends[plan.victim]
        self.survivor = ends[plan.survivor]

    def _start(
        self,
        side: str,
        spawn: Spawn,
        env: Mapping[str, str],
        pages: dict[str, int],
        listener: socket.socket,
    ) -> End:
        plan = self.plan
        is_victim = side == plan.victim
        other = SIDES[1 - SIDES.index(side)]
        told: dict[str, Any] = {
            "role": side,
            "port": self.port,
            "listener": listener.fileno(),
            "my_page": pages[side],
            "other_page": pages[other],
            "scenario": plan.scenario,
            "actor": is_victim == plan.actor,
            "shape": plan.victim_shape if is_victim else plan.shape,
            "survivor": not is_victim,
            "patient": ("victim" if is_victim else "survivor") in plan.patient,
            **plan.extra,
        }
        inherited = [pages[side], pages[other]]
        if side == "acceptor":
            inherited.append(listener.fileno())
        control = None
        mine = dict(env)
        if is_victim:
            told["die"] = plan.die
            if plan.faults:
                mine["KMAP_FAULTS"] = plan.faults
        else:
            control, theirs = socket.socketpair()
            inherited.append(theirs.fileno())
            told["control"] = theirs.fileno()
        output = self._directory / f"{side}.out"
        errors = self._directory / f"{side}.err"
        with output.open("w") as out, errors.open("w") as err:
            process = spawn(
                [
                    *(sys.executable, "-S", "-E", "-X", "faulthandler"),
                    *(str(PROGRAM), json.dumps(told)),
                ],
                env=mine,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
            )
        if control is not None:
            theirs.close()
        return End(side, process, mmap.mmap(pages[side], 4096), output, errors, control)

    def close(self) -> None:
        """Lets go of the pages and the control socket."""
        for end in (self.victim, self.survivor):
            end.page.close()
            if end.control is not None:
                end.control.close()

    def wait(self, end: End, seconds: float = PATIENCE) -> int:
        """The exit code; an end that does not come shows where it hangs."""
        try:
            return end.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.describe()) from None

    def describe(self) -> str:
        """How far both are; one that still runs ends, and shows where it was."""
        lines = [str(self.plan)]
        for end in (self.victim, self.survivor):
            lines.append(
                f"{end.role} {end.pid}: state {state(end.pid)!r}, sent {end[SENT]} "
                f"of {end[TRIED]}, taken {end[TAKEN]}, done {end[DONE]}"
            )
            for name in ("wchan", "syscall"):
                with contextlib.suppress(OSError):
                    lines.append(Path(f"/proc/{end.pid}/{name}").read_text())
            if end.process.poll() is None:
                # It shows where it is.
                end.process.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    end.process.wait(5)
            lines.append(end.errors.read_text())
        return "\n".join(lines)

    def ask(self, seconds: float = PATIENCE) -> None:
        """Has the survivor's event loop make a round trip on another connection."""
        control = self.survivor.control
        assert control is not None
        control.settimeout(seconds)
        control.send(b"?")
        try:
            assert control.recv(1) == b"!"
        except TimeoutError:
            raise AssertionError(self.describe()) from None

    def stopped(self) -> int:
        """Waits for the stop at the fault point; the pid that is stopped."""

        def come() -> bool:
            mark = self.victim.mark()
            return bool(mark and state(int(mark[3])) == "T") or (
                self.victim.process.poll() is not None
            )

        until(come, f"{self.plan.faults}")
        mark = self.victim.mark()
        assert mark, f"{self.plan.faults} was not reached\n{self.describe()}"
        return int(mark[3])

    def go_on(self, pid: int) -> None:
        """Continues what was stopped."""
        os.kill(pid, signal.SIGCONT)

    def nothing_is_left(self) -> None:
        """No name; no descriptor and no mapping in the survivor."""
        report = self.survivor.report()
        assert report["fds"] == [], report["fds"]
        assert report["maps"] == [], report["maps"]
        until(lambda: not names_of(self.port), "the names are gone", 5)

    def while_stopped(self) -> None:
        """The survivor sleeps, or serves its other connection, and never spins."""
        survivor = self.survivor
        if self.plan.scenario == "taken":
            # It looks at a page, and is in no call of the library's.
            return

        def rests() -> bool:
            return survivor.process.poll() is not None or is_idle(survivor.pid)

        until(rests, "the survivor rests")
        if survivor.process.poll() is not None or self.plan.shape == "recv":
            return
        passes = survivor[LOOPS]
        for _ in range(3):
            self.ask()
        assert survivor[LOOPS] - passes < 50, "the event loop spins"
        until(rests, "the survivor rests again")
