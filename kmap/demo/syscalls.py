# SPDX-License-Identifier: Apache-2.0
"""Counts the system calls that enter the network stack, with strace.

A call counts when its first argument is a socket and it moves bytes or changes the
connection.  Waits (epoll_wait, poll, select) and doorbells are counted
beside it: neither goes through the network stack.  A doorbell is rung by shutdown() of
a Unix socket that is shut down already.  sendfile counts for the socket that it writes
to.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap.demo import wrk
from kmap.demo.children import Child, ChildFailed, Deadline
from kmap.demo.programs import Programs
from kmap.demo.rig import Rig
from kmap.demo.wrk import Load

# wrk runs longer than the warm-up, attaching and the window take.
_LOAD_S = 3
_WARM_UP_S = 0.7
_WINDOW_S = 1.0
_ATTACH_S = 10.0
_DETACH_S = 20.0

_DATA = (
    "read",
    "readv",
    "preadv2",
    "recvfrom",
    "recvmsg",
    "recvmmsg",
    "write",
    "writev",
    "pwritev2",
    "sendto",
    "sendmsg",
    "sendmmsg",
    "sendfile",
    "splice",
)
_CONTROL = (
    "socket",
    "connect",
    "accept",
    "accept4",
    "shutdown",
    "getsockopt",
    "setsockopt",
    "getsockname",
    "getpeername",
    "ioctl",
    "bind",
    "listen",
    "close",
)
# Those that enter the network stack if they are about a socket.
STACK = frozenset((*_DATA, *_CONTROL))
WAITS = (
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "poll",
    "ppoll",
    "select",
    "pselect6",
)
_TRACED = ",".join((*_DATA, *_CONTROL, *WAITS, "futex"))

# Such as "123 1700000000.123456 readv(7<socket:[4711]>, ...".  The second half of an
# interrupted call begins with "<..." and is not counted again.
_CALL = re.compile(
    r"^(?P<pid>\d+) +(?P<time>[\d.]+) (?P<name>\w+)\((?:\d+<(?P<file>[^>]*)>)?"
)


_RINGS = re.compile(r", SHUT_RD\b")


@dataclass(frozen=True)
class Calls:
    """System calls of one program."""

    stack: int
    waits: int
    doorbells: int
    futexes: int

    def __add__(self, other: Calls) -> Calls:
        return Calls(
            self.stack + other.stack,
            self.waits + other.waits,
            self.doorbells + other.doorbells,
            self.futexes + other.futexes,
        )


NONE = Calls(0, 0, 0, 0)


def _kind(name: str, file: str, line: str) -> Calls:
    if name in WAITS:
        return Calls(0, 1, 0, 0)
    if name == "futex":
        return Calls(0, 0, 0, 1)
    # No program ends the reading of a TCP connection.  The call may be interrupted by
    # another thread's line.
    if name == "shutdown" and _RINGS.search(line):
        return Calls(0, 0, 1, 0)
    if file.startswith("socket:") or name == "socket":
        return Calls(1, 0, 0, 0)
    return NONE


def count(trace: Iterable[str], began: float, ended: float) -> dict[int, Calls]:
    """The calls in strace's output that began in a span of time, by thread."""
    found: dict[int, Calls] = {}
    for line in trace:
        match = _CALL.match(line)
        if match and began <= float(match["time"]) <= ended:
            pid = int(match["pid"])
            kind = _kind(match["name"], match["file"] or "", line)
            found[pid] = found.get(pid, NONE) + kind
    return found


@dataclass(frozen=True)
class Counted:
    """The calls of all three programs and the requests they served."""

    requests: int
    client: Calls
    envoy: Calls
    service: Calls

    @property
    def total(self) -> Calls:
        """All three together."""
        return self.client + self.envoy + self.service


class Refused(Exception):
    """strace may not trace here."""


def _strace(program: str, output: Path) -> tuple[str, ...]:
    return (
        program,
        "--follow-forks",
        "--quiet=all",
        "--decode-fds=path",
        "--string-limit=0",
        "--absolute-timestamps=format:unix,precision:us",
        f"--trace={_TRACED}",
        f"--output={output}",
    )


def _traced(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            text = (task / "status").read_text()
            if re.search(r"^TracerPid:\s*0$", text, re.MULTILINE):
                return False
        return True
    return False


def tasks(pids: Iterable[int]) -> set[int]:
    """The threads of processes, by number."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.update(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    return found


@contextlib.contextmanager
def attached(
    program: str, pids: Sequence[int], directory: Path, env: Mapping[str, str]
) -> Iterator[Child]:
    """Strace on running processes and what they start; raises Refused if it may not.

    What it wrote is complete, in directory/strace.out, once the block has been left.
    """
    output = directory / "strace.out"
    output.unlink(missing_ok=True)
    tracer = Child(
        "strace",
        [*_strace(program, output), *(f"--attach={pid}" for pid in pids)],
        env=env,
        log=directory / "strace.log",
    )
    with tracer:
        deadline = Deadline(_ATTACH_S, "strace did not attach")
        try:
            while not all(_traced(pid) for pid in pids):
                if tracer.wait(0):
                    raise Refused("strace ended before it had attached")
                deadline.pause()
        except ChildFailed as error:
            raise Refused(str(error)) from error
        yield tracer
        tracer.stop(_DETACH_S, signal.SIGINT)


def run(
    programs: Programs, rig: Rig, load: Load, *, bytes_per_request: float
) -> Counted | None:
    """One short look at a running load; None if strace may not trace here.

    The load is running when strace attaches, so that what is counted is the steady
    state.  Requests are counted by the bytes that Envoy carries for its client.
    """
    assert programs.strace is not None
    envoy = rig.envoy.child.pid
    services = rig.nginx.family()
    with wrk.start(programs, rig, load, _LOAD_S, cpus=rig.cpus) as client:
        if client.wait(_WARM_UP_S):
            raise client.failure("ended early")
        threads = {
            "client": tasks([client.pid]),
            # The first thread of Envoy serves its admin endpoint, which we use.
            "envoy": tasks([envoy]) - {envoy},
            "service": tasks(services),
        }
        pids = [client.pid, envoy, *services]
        strace, where = programs.strace.path, rig.directory
        try:
            with attached(strace, pids, where, rig.plain_env) as tracer:
                before, began = rig.envoy.traffic(), time.time()
                tracer.wait(_WINDOW_S)
                after, ended = rig.envoy.traffic(), time.time()
        except Refused:
            return None
        wrk.report(client, _LOAD_S)
    requests = round((after - before).client_hop / bytes_per_request)
    if not requests:
        return None
    with (where / "strace.out").open(errors="replace") as lines:
        by_task = count(lines, began, ended)

    def of(program: str) -> Calls:
        return sum((by_task.get(task, NONE) for task in threads[program]), NONE)

    return Counted(requests, of("client"), of("envoy"), of("service"))
