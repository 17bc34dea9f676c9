# SPDX-License-Identifier: Apache-2.0
"""A process of the socket level: runs its side of one case after another.

It is started with the library preloaded (or without, for the oracle), is told what to
do over a Unix socket, and is the program whose socket calls are under test.  It ends
when that socket does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import queue
import resource
import select
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from kmap.stress.drive import Blocking, Loop, Runner, configure
from kmap.stress.end import End
from kmap.stress.flow import BREAK_VARIABLE, Flow, Fuse, Outcome, Progress, Setting
from kmap.stress.heir import bequeath
from kmap.stress.plan import (
    EVENT_STYLES,
    MAX_CONNECTIONS,
    CasePlan,
    ConnectionPlan,
    other,
)
from kmap.stress.scenarios import CaseId, find_case
from kmap.stress.storm import Storm, quiet_handlers
from kmap.stress.stream import Pattern
from kmap.stress.traces import dump_on_request

# A blocking writer that has not moved for this long is taken to be stuck.
_STUCK_S = 0.05
# Room that the address-space limit leaves: enough for the interpreter, too little for
# a segment of the largest rings.
_SPARE_BYTES = 8 << 20
_MESSAGE = 1 << 20

Message = dict[str, Any]


def _listener(family: int, address: str) -> socket.socket | None:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
    except OSError:
        # A host without IPv6.
        sock.close()
        return None
    sock.listen(256)
    return sock


def open_fds() -> list[str]:
    """What the descriptors of this process are, without the numbers of inodes."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}").split(":[")[0])
    return links


class Case:
    """One side of one case while it runs; what both levels have in common."""

    def __init__(self, worker: Worker, plan: CasePlan, identity: CaseId) -> None:
        self.worker = worker
        self.plan = plan
        self.side = worker.side
        self.plans = {plan.number: plan for plan in plan.connections}
        self.started = False
        self._flows: dict[int, Flow] = {}
        self._released: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._running = 0
        self._watched: dict[int, tuple[int, float]] = {}
        self._storm = Storm(plan.storm_us, plan.storm_restart)
        crash = plan.crash
        self._setting = Setting(
            seed=plan.seed,
            case=plan.name,
            identity=identity,
            side=worker.side,
            pattern=worker.pattern,
            progress=worker.progress,
            fuse=Fuse(crash.after_bytes)
            if crash and crash.by_itself and crash.victim == worker.side
            else None,
            breakage=worker.breakage,
        )

    def connect(self, peer: Message, fds: list[int]) -> dict[str, int]:
        """Phase 1: connectors connect; returns what the other side needs to know."""
        raise NotImplementedError

    def go(self, ports: dict[str, int]) -> None:
        """Phase 2: acceptors accept, and everybody starts."""
        raise NotImplementedError

    def restore(self) -> None:
        """Takes back what the case changed in this process."""

    def add(self, flow: Flow) -> None:
        """Takes on an end."""
        number = flow.plan.number
        if flow.plan.ends[other(self.side)].stall_at is not None:
            flow.stuck = lambda: self.worker.send({"op": "stuck", "connection": number})
        flow.failed = self._failed
        # The writer may have been stuck before this end was there.
        if number in self._released:
            flow.released.set()
        self._flows[number] = flow
        if self.worker.breakage == "leak":
            os.dup(0)

    def _failed(self, outcome: Outcome) -> None:
        self.worker.send({"op": "failed", "end": asdict(outcome)})

    def flows(self) -> list[Flow]:
        """All ends so far."""
        return list(self._flows.values())

    def launch(self, runner: Runner, start: threading.Event | None = None) -> None:
        """Runs it in a thread, once start is set."""

        def guard() -> None:
            if start is not None:
                start.wait()
            try:
                runner.run()
            except BaseException as error:
                # A bug of this tool must not look like a hang.
                self.worker.send({"op": "broken", "error": repr(error)})
                raise
            finally:
                with self._lock:
                    self._running -= 1
                self.worker.wake()

        thread = threading.Thread(target=guard, daemon=True)
        self._threads.append(thread)
        with self._lock:
            self._running += 1
        thread.start()

    def begin(self) -> None:
        """Everything is there: from now on the case may be over."""
        self.started = True
        self._storm.start()

    def release(self, number: int) -> None:
        """Lets a stalled reader go on."""
        self._released.add(number)
        if number in self._flows:
            self._flows[number].released.set()
            self._flows[number].wake_loop()

    def look_for_stuck(self) -> bool:
        """Whether there are writers to watch; reports those that are stuck."""
        watched = False
        now = time.monotonic()
        for flow in self.flows():
            if flow.stuck is None or flow.stuck_reported or flow.done:
                continue
            number = flow.plan.number
            if flow.sent == flow.out_total:
                # It all fitted, so nothing will ever be stuck.
                flow.stuck_reported = True
                self.worker.send({"op": "fitted", "connection": number})
                continue
            watched = True
            # A blocked write says nothing, and a loop may wait for room without having
            # met EAGAIN; a position that stays says it for both.
            sent, since = self._watched.get(number, (-1, now))
            if sent != flow.sent or not flow.wants_write:
                self._watched[number] = (flow.sent, now)
            elif now - since >= _STUCK_S:
                flow.report_stuck()
        return watched

    @property
    def signals(self) -> int:
        """Signals that threads of this process got."""
        return self._storm.count

    def finished(self) -> bool:
        """Whether every end is done."""
        with self._lock:
            return self.started and self._running == 0

    def report(self) -> list[Message]:
        """Outcomes, after everything of this case has been given back."""
        for thread in self._threads:
            thread.join()
        self._storm.stop()
        self.restore()
        return [asdict(flow.outcome) for flow in self.flows()]


class SocketCase(Case):
    """One side of a case with TCP connections."""

    def __init__(self, worker: Worker, plan: CasePlan, identity: CaseId) -> None:
        super().__init__(worker, plan, identity)
        self._sockets: dict[int, socket.socket] = {}
        self._loops: dict[str, Loop] = {}
        self._limits: tuple[int, tuple[int, int]] | None = None

    def connect(self, peer: Message, fds: list[int]) -> dict[str, int]:
        side = self.side
        for plan in self.plan.connections:
            style = plan.ends[side].style
            if style in EVENT_STYLES and style not in self._loops:
                self._loops[style] = Loop(style)
        mine = [plan for plan in self.plan.connections if plan.connector == side]
        for plan in mine:
            family = socket.AF_INET6 if plan.ipv6 and peer["6"] else socket.AF_INET
            self._sockets[plan.number] = socket.socket(family, socket.SOCK_STREAM)
        limit = self.plan.limits.get(side)
        if mine and limit == "nofile":
            self._limit_descriptors()
        ports = {}
        for plan in mine:
            sock = self._sockets[plan.number]
            if sock.family == socket.AF_INET6:
                target: Any = ("::1", peer["6"])
            else:
                target = ("127.0.0.1", peer["4"])
            self._prepare(plan, sock)
            if plan.ends[side].style in EVENT_STYLES:
                sock.setblocking(False)
                code = sock.connect_ex(target)
                if code not in (0, errno.EINPROGRESS):
                    raise OSError(code, os.strerror(code))
            else:
                sock.connect(target)
            ports[str(plan.number)] = sock.getsockname()[1]
        if self.plan.eager:
            self._begin([plan.number for plan in mine], None)
        return ports

    def _six(self, plan: ConnectionPlan) -> bool:
        """Whether a connection that this side accepts comes by IPv6."""
        return plan.ipv6 and self.worker.listener6 is not None

    def _prepare(self, plan: ConnectionPlan, sock: socket.socket) -> None:
        end = plan.ends[self.side]
        if end.buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, end.buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, end.buffer)
        if end.nodelay:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def go(self, ports: dict[str, int]) -> None:
        side = self.side
        # IPv4 and IPv6 give out the same port numbers.
        by_port = {
            (self._six(self.plans[int(number)]), port): self.plans[int(number)]
            for number, port in ports.items()
        }
        assert len(by_port) == len(ports)
        for expected in by_port.values():
            six = self._six(expected)
            listener = self.worker.listener6 if six else self.worker.listener
            assert listener is not None
            sock, address = listener.accept()
            plan = by_port[six, address[1]]
            self._prepare(plan, sock)
            self._sockets[plan.number] = sock
        limit = self.plan.limits.get(side)
        if by_port and limit == "nofile":
            self._limit_descriptors()
        start = threading.Event()
        self._begin([n for n in sorted(self._sockets) if n not in self._flows], start)
        if limit == "address-space":
            self._limit_memory()
        self.begin()
        start.set()

    def _begin(self, numbers: list[int], start: threading.Event | None) -> None:
        """Starts ends.  No end joins a loop that runs: it has another loop."""
        runners: list[Runner] = []
        loops: dict[str, Loop] = {}
        for number in numbers:
            plan = self.plans[number]
            end = End(plan, self._setting, self._sockets[number])
            configure(end)
            self.add(end)
            if end.acts_later:
                later = threading.Thread(target=end.act_later, daemon=True)
                self._threads.append(later)
                later.start()
            style = end.end.style
            if style not in EVENT_STYLES:
                runners.append(Blocking(end, self.flows, bequeath))
                continue
            if style not in loops:
                loop = self._loops.pop(style) if style in self._loops else Loop(style)
                loops[style] = loop
                runners.append(loops[style])
            loops[style].ends.append(end)
            end.wake_loop = loops[style].wake
        for runner in runners:
            self.launch(runner, start)

    def _limit_descriptors(self) -> None:
        # Descriptors are given out from the bottom, so none is left below the first
        # free ones.
        free = [os.dup(0) for _ in range(self.plan.spare + 1)]
        for fd in free:
            os.close(fd)
        self._limit(resource.RLIMIT_NOFILE, free[-1])

    def _limit_memory(self) -> None:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        self._limit(resource.RLIMIT_AS, pages * mmap.PAGESIZE + _SPARE_BYTES)

    def _limit(self, kind: int, value: int) -> None:
        before = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, before[1]))
        self._limits = (kind, before)

    def restore(self) -> None:
        if self._limits is not None:
            resource.setrlimit(*self._limits)


class Worker:
    """The process."""

    def __init__(self, side: str, control: int, progress: int, pattern: int) -> None:
        self.side = side
        self.breakage = os.environ.get(BREAK_VARIABLE, "")
        self._control = socket.socket(fileno=control)
        self.pattern = Pattern(pattern)
        words = mmap.mmap(progress, 0)
        self.progress = Progress(
            progress, memoryview(words).cast("Q"), side, MAX_CONNECTIONS
        )
        listener = _listener(socket.AF_INET, "127.0.0.1")
        assert listener is not None
        self.listener = listener
        self.listener6 = _listener(socket.AF_INET6, "::1")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._outgoing: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def wake(self) -> None:
        """Makes the main thread look again; from any thread."""
        os.eventfd_write(self._wake, 1)

    def send(self, message: Message) -> None:
        """Tells the session; from any thread."""
        self._outgoing.put(message)
        self.wake()

    def case(self, plan: CasePlan, identity: CaseId) -> Case:
        """Its side of a case."""
        return SocketCase(self, plan, identity)

    def _flush(self) -> None:
        while not self._outgoing.empty():
            self._control.send(json.dumps(self._outgoing.get()).encode())

    def run(self) -> None:
        """Serves the session until it closes its end."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        six = self.listener6.getsockname()[1] if self.listener6 else 0
        port = self.listener.getsockname()[1]
        self.send({"op": "hello", "listen": {"4": port, "6": six}, "fds": open_fds()})
        case: Case | None = None
        while True:
            self._flush()
            watching = case is not None and case.look_for_stuck()
            events = dict(poll.poll(10 if watching else None))
            if self._wake in events:
                os.eventfd_read(self._wake)
            if self._control.fileno() in events:
                raw, fds, _, _ = socket.recv_fds(
                    self._control, _MESSAGE, MAX_CONNECTIONS
                )
                if not raw:
                    return
                message = json.loads(raw)
                if message["op"] == "case":
                    case = self.case(find_case(message["id"]), message["id"])
                    ports = case.connect(message["peer"], fds)
                    self.send({"op": "connected", "ports": ports})
                elif message["op"] == "go" and case is not None:
                    case.go(message["ports"])
                elif message["op"] == "release" and case is not None:
                    case.release(message["connection"])
            if case is not None and case.finished():
                self._flush()
                ends, signals = case.report(), case.signals
                case = None
                self.send(
                    {"op": "done", "ends": ends, "fds": open_fds(), "signals": signals}
                )


def serve(kind: type[Worker]) -> None:
    """Runs the worker that the arguments describe."""
    control, side, progress, pattern = sys.argv[1:]
    # A hang is examined by asking every thread where it is.
    dump_on_request()
    quiet_handlers()
    # The default of 8 MiB would not fit an address-space limit.
    threading.stack_size(512 << 10)
    kind(side, int(control), int(progress), int(pattern)).run()


if __name__ == "__main__":
    serve(Worker)
