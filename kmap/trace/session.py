# SPDX-License-Identifier: Apache-2.0
"""Runs the request: on the kernel, under Kmap, and both again under strace."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap import native, procfs, wire
from kmap.demo import cpu, syscalls
from kmap.demo.children import Deadline
from kmap.demo.programs import Programs, find_path
from kmap.demo.rig import Rig, Setup
from kmap.demo.syscalls import Calls
from kmap.progress import Progress
from kmap.results import CannotRun, CommandFailed, UsageError
from kmap.trace import assemble
from kmap.trace.assemble import Assembler, Descriptors, Hops
from kmap.trace.clients import PATH, Client, Command, OwnClient, asleep, switches
from kmap.trace.recording import (
    SETUPS,
    Call,
    Checked,
    Process,
    Recording,
    Side,
    counted,
    spread,
)
from kmap.trace.tracefs import Recorder

CLIENT, ENVOY, SERVICE = ROLES = ("client", "envoy", "service")
CLIENT_HOP, SERVICE_HOP = "client-envoy", "envoy-service"
# More than enough of them for each connection to be upgraded.
_WARM_UP = 50
_QUIET_S = 60.0
_NOISY = "no request began and ended in quiet"
# What CMD may ask for, in place of the address of the rig's Envoy.
URL, PORT = "{url}", "{port}"


@dataclass(frozen=True)
class Plan:
    """What to record."""

    # Without a command, the client of this package.
    command: tuple[str, ...]
    # Processes that run already and serve the command; empty for the rig.
    servers: tuple[int, ...]
    body_bytes: int
    requests: int
    cpus: frozenset[int] | None
    strace: bool = True

    @property
    def uses_rig(self) -> bool:
        """Whether Envoy and nginx are started for this."""
        return not self.command or any(
            mark in word for word in self.command for mark in (URL, PORT)
        )

    @property
    def steps(self) -> int:
        """How often progress is told that something is done."""
        return len(SETUPS) * (2 if self.strace else 1)


@dataclass
class _Stage:
    """One set-up, up and warm."""

    setup: Setup
    directory: Path
    # Who is watched beside the client, by role.
    servers: Mapping[str, Sequence[int]]
    client: Client
    client_role: str
    hops: Hops
    # Whose functions are recorded.
    library: Path | None
    plain_env: Mapping[str, str]

    @property
    def server_pids(self) -> list[int]:
        return [pid for pids in self.servers.values() for pid in pids]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.client_role, *self.servers]))

    def pids(self) -> list[int]:
        return [*self.client.pids(), *self.server_pids]

    def role_of(self) -> dict[int, str]:
        found = {pid: role for role, pids in self.servers.items() for pid in pids}
        return {**dict.fromkeys(self.client.pids(), self.client_role), **found}

    def rest(self) -> int:
        """Waits until nobody has anything to do; asleep() says what is returned."""
        return asleep(self.pids())

    def still_rests(self, since: int) -> bool:
        """Whether nobody has done anything since."""
        return switches(self.pids()) == since


def _ring_bytes(pids: Iterable[int], hops: Hops) -> Counter[str]:
    """Bytes that went into rings so far, by hop; closed connections are not there."""
    found: Counter[str] = Counter()
    seen = set()
    for pid in pids:
        for file in procfs.open_statistics(pid):
            if file.identity in seen:
                continue
            seen.add(file.identity)
            with contextlib.suppress(wire.NotStatistics):
                statistics = procfs.read_statistics(file)
                for row in statistics.rows if statistics else ():
                    hop = hops.name(row.peer.port, row.local.port)
                    found[hop] += row.ring_tx_bytes
    return found


class _Watch:
    """Makes requests while a recorder records them."""

    def __init__(self, stage: _Stage, recorder: Recorder) -> None:
        self._stage = stage
        self._recorder = recorder
        self._known = {pid: Descriptors(stage.hops, pid) for pid in stage.server_pids}
        self._roles: dict[int, str] = {}
        # Bytes that the library counted into rings in each request, by hop.
        self.ring_bytes: list[dict[str, int]] = []
        # Of each request, by the clock of strace.
        self.windows: list[tuple[float, float]] = []
        recorder.follow(syscalls.tasks(stage.server_pids))

    def prepare(self) -> None:
        """The client comes to where its request begins."""
        self._stage.client.prepare()
        for pid in self._stage.client.pids():
            if pid not in self._known:
                self._known[pid] = Descriptors(self._stage.hops, pid)
                self._recorder.follow(syscalls.tasks([pid]))
        self._roles.update(self._stage.role_of())

    def request(self, *, kept: bool = True) -> bool:
        """Exactly one request, from rest to rest; whether it counts.

        A timer of Envoy may go off just when the request begins or ends.  Then it is
        not certain on which side of the mark a call is, and the request does not count.
        """
        stage, recorder = self._stage, self._recorder
        resting = stage.rest()
        before = _ring_bytes(stage.pids(), stage.hops)
        began = time.time()
        recorder.mark("begin")
        quiet = stage.still_rests(resting)
        stage.client.request()
        resting = stage.rest()
        recorder.mark("end")
        ended = time.time()
        quiet = quiet and stage.still_rests(resting)
        carried = _ring_bytes(stage.pids(), stage.hops) - before
        if quiet and kept:
            self.ring_bytes.append(dict(sorted(carried.items())))
            self.windows.append((began, ended))
        else:
            recorder.mark("undo")
        return quiet and kept

    def calls(self) -> list[list[Call]]:
        """The calls of each request."""
        stage = self._stage
        events = self._recorder.stop()
        made = Assembler(self._roles, self._known, stage.hops, stage.client_role)
        requests = made.run(events)
        whole = len([calls for calls in requests if calls])
        if whole != len(self.windows):
            raise CommandFailed(
                f"the kernel recorded {whole} of {len(self.windows)} requests: another "
                "tracer may have changed its settings meanwhile"
            )
        return requests


def _record(stage: _Stage, plan: Plan) -> tuple[list[list[Call]], list[dict[str, int]]]:
    """The calls of each request, and the bytes that it put into rings."""
    with Recorder(stage.library, assemble.functions()) as recorder:
        watch = _Watch(stage, recorder)
        recorder.start()
        # The first one is not kept: of the calls that it ends, the beginning was not
        # recorded.
        watch.prepare()
        watch.request(kept=False)
        deadline = Deadline(_QUIET_S, _NOISY)
        while len(watch.windows) < plan.requests:
            deadline.pause(0)
            watch.prepare()
            watch.request()
        return watch.calls(), watch.ring_bytes


def _check(stage: _Stage, plan: Plan, program: str) -> Checked | None:
    """Requests under strace and the recorder at once; None if strace may not trace."""
    found: list[dict[int, Calls]] = []
    # Its client stays; a command is started for each request, and traced from there.
    stays = isinstance(stage.client, OwnClient)
    deadline = Deadline(_QUIET_S, _NOISY)
    with Recorder(None, ()) as recorder:
        watch = _Watch(stage, recorder)
        recorder.start()
        try:
            while len(watch.windows) < plan.requests:
                watch.prepare()
                first = len(watch.windows)
                where, env = stage.directory, stage.plain_env
                with syscalls.attached(program, stage.pids(), where, env):
                    watch.request(kept=not stays)
                    while stays and len(watch.windows) < plan.requests:
                        deadline.pause(0)
                        watch.request()
                found += _read(stage, watch, first)
                deadline.pause(0)
        except syscalls.Refused:
            return None
        requests = watch.calls()
    agree = 0
    counts: list[tuple[Calls, ...]] = []
    for by_thread, calls in zip(found, requests, strict=True):
        # strace knows threads alone; whose they are is in the recording.
        role_of = {call.tid: call.role for call in calls}
        there = dict.fromkeys(stage.roles, syscalls.NONE)
        for thread, each in by_thread.items():
            there[role_of.get(thread, stage.client_role)] += each
        agree += all(
            there[role] == counted(call for call in calls if call.role == role)
            for role in stage.roles
        )
        counts.append(tuple(there.values()))
    usual = Counter(counts).most_common(1)[0][0]
    return Checked(len(found), agree, dict(zip(stage.roles, usual, strict=True)))


def _read(stage: _Stage, watch: _Watch, first: int) -> Iterator[dict[int, Calls]]:
    """What strace counted in each request from the first on, by thread."""
    for began, ended in watch.windows[first:]:
        with (stage.directory / "strace.out").open(errors="replace") as lines:
            yield syscalls.count(lines, began, ended)


def _side(stage: _Stage, plan: Plan, program: str | None, progress: Progress) -> Side:
    requests, carried = _record(stage, plan)
    progress(None)
    number, alike = assemble.most_frequent(requests)
    calls = requests[number]
    strace = None
    if program is not None:
        progress(f"under strace, {stage.setup.value}")
        strace = _check(stage, plan, program)
        progress(None)
    return Side(
        setup=stage.setup.value,
        processes=_processes(stage, calls),
        calls=tuple(calls),
        spread=spread(requests, alike),
        ring_bytes=carried[number],
        strace=strace,
    )


def _processes(stage: _Stage, calls: Sequence[Call]) -> tuple[Process, ...]:
    found = []
    for role in stage.roles:
        pids = dict.fromkeys(call.pid for call in calls if call.role == role)
        for pid in pids or stage.servers.get(role, ()):
            # A command has ended by now.
            found.append(Process(role, pid, procfs.comm(pid) or role))
    return tuple(found)


@contextlib.contextmanager
def _rig_stage(
    programs: Programs, setup: Setup, directory: Path, plan: Plan
) -> Iterator[_Stage]:
    root = directory / "root"
    root.mkdir(parents=True)
    (root / PATH.lstrip("/")).write_bytes(b"x" * plan.body_bytes)
    library = None
    if setup is Setup.KMAP:
        # A probe is in a file, and slows down every program that uses the file.
        library = Path(shutil.copy2(native.preload_path(), directory))
    with contextlib.ExitStack() as stack:
        where = directory / "rig"
        rig = Rig(programs, setup, where, root, cpus=plan.cpus, preload=library)
        stack.callback(rig.close)
        own = OwnClient(rig, plan.body_bytes)
        stack.callback(own.child.close)
        for _ in range(_WARM_UP):
            own.request()
        client: Client = own
        if plan.command:
            own.child.close()
            words = [
                word.replace(URL, f"http://127.0.0.1:{rig.http_port}{PATH}").replace(
                    PORT, str(rig.http_port)
                )
                for word in plan.command
            ]
            client = command = Command(words, rig.env, directory / "cmd.log", plan.cpus)
            stack.callback(command.close)
        yield _Stage(
            setup=setup,
            directory=directory,
            servers={ENVOY: [rig.envoy.child.pid], SERVICE: rig.nginx.family()},
            client=client,
            client_role=CLIENT,
            hops=Hops({rig.http_port: CLIENT_HOP, rig.nginx_port: SERVICE_HOP}),
            library=library,
            plain_env=rig.plain_env,
        )


@contextlib.contextmanager
def _command_stage(setup: Setup, directory: Path, plan: Plan) -> Iterator[_Stage]:
    """CMD and processes that run already, by their names."""
    directory.mkdir(parents=True)
    servers: dict[str, list[int]] = {}
    ports: dict[int, str] = {}
    for pid in plan.servers:
        process = procfs.process(pid)
        if process is None:
            raise UsageError(f"--server {pid}: there is no such process")
        servers.setdefault(process.comm, []).append(pid)
        for tcp in procfs.tcp_sockets(pid) or ():
            if tcp.state == procfs.LISTEN and tcp.inode in process.sockets:
                ports[tcp.local.port] = f"to {process.comm}"
    env = setup.environment(os.environ)
    client = Command(plan.command, env, directory / "cmd.log", plan.cpus)
    with contextlib.closing(client):
        yield _Stage(
            setup=setup,
            directory=directory,
            servers=servers,
            client=client,
            client_role=Path(plan.command[0]).name,
            hops=Hops(ports),
            # Other programs that use it are slower while it is recorded.
            library=native.preload_path() if setup is Setup.KMAP else None,
            plain_env=Setup.KERNEL.environment(os.environ),
        )


def run(
    programs: Programs | None, plan: Plan, directory: Path, progress: Progress
) -> Recording:
    """Records the request in both set-ups."""
    versions = {"kernel": platform.release()}
    program = find_path("strace") if plan.strace else None
    if plan.strace and program is None:
        raise CannotRun(
            "strace is not installed: apt-get install strace, or use --no-strace"
        )
    # Before anything is started.
    Recorder(None, ()).close()
    if programs is not None:
        versions["envoy"] = programs.envoy.version
        versions["nginx"] = programs.nginx.version
    sides = []
    with cpu.out_of_the_way(plan.cpus):
        for setup in (Setup.KERNEL, Setup.KMAP):
            progress(f"recording, {setup.value}")
            where = directory / setup.value
            with (
                _rig_stage(programs, setup, where, plan)
                if programs is not None
                else _command_stage(setup, where, plan)
            ) as stage:
                sides.append(_side(stage, plan, program, progress))
    return Recording(plan.command, versions, tuple(sides))
