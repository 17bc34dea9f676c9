# SPDX-License-Identifier: Apache-2.0
"""System calls that fail: the program goes on by the kernel, and kmap ss says why.

A seccomp filter refuses one call of the library's, and none of the program's own: most
rules look at an argument that only the library passes.  What a call is refused with is
what it can fail with: errors of resources, of filters, and of kernels that lack it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kmap import snapshot
from tests.limits.crowd import activity

Spawn = Callable[..., "subprocess.Popen[str]"]
PROGRAM = Path(__file__).parent / "programs" / "endpoint.py"

AF_UNIX, AF_NETLINK = 1, 16
HIDDEN = (0, ">=", 256)
WATCH_S = 0.5
SHAPES = ("blocking", "epoll", "poll")


@dataclass(frozen=True)
class Call:
    """A call that is refused, and what becomes of the connection."""

    name: str
    errors: tuple[str, ...]
    # Ends at which the upgrade makes the call.
    ends: str = "client server"
    where: tuple[tuple[int, str, int], ...] = ()
    reason: str = "syscall-failed"
    # It may be refused from the start: the program makes no such call of its own.
    whole_life: bool = False


FILTERED = ("EPERM", "ENOSYS")
FEW = ("EMFILE", "ENFILE")

# Without these there is no upgrade.
NEEDED = (
    Call("memfd_create", (*FILTERED, "ENOMEM", *FEW), whole_life=True),
    Call("ftruncate", (*FILTERED, "ENOSPC"), where=((1, ">=", 4096),), whole_life=True),
    Call("mmap", ("ENOMEM", "EPERM", "EAGAIN"), where=((3, "==", 1),)),
    Call(
        "socket",
        (*FILTERED, "ENOMEM", "ENOBUFS", "EAFNOSUPPORT", *FEW),
        where=((0, "==", AF_UNIX),),
        whole_life=True,
    ),
    Call(
        "socket",
        (*FILTERED, "EPROTONOSUPPORT", *FEW),
        where=((0, "==", AF_NETLINK),),
        whole_life=True,
    ),
    Call("sendto", (*FILTERED, "ENOBUFS"), where=((5, "==", 12),), whole_life=True),
    Call("recvfrom", FILTERED, where=((3, "==", 0x40),), whole_life=True),
    Call("sendmsg", (*FILTERED, "ENOMEM", "ENOBUFS"), whole_life=True),
    Call("recvmsg", (*FILTERED, "ENOMEM"), whole_life=True),
    Call("bind", (*FILTERED, "ENOMEM"), ends="client"),
    Call("listen", FILTERED, ends="client"),
    Call("accept4", (*FILTERED, "ENOMEM", *FEW), ends="client"),
    Call("connect", (*FILTERED, "EINTR"), ends="server"),
    Call("getsockname", (*FILTERED, "ENOBUFS")),
    Call("getpeername", FILTERED),
    Call("getsockopt", FILTERED, where=((1, "==", 6), (2, "==", 11))),
    Call("getsockopt", FILTERED, where=((1, "==", 1), (2, "==", 17))),
    Call("ioctl", FILTERED, where=((1, "==", 0x541B),)),
    Call("fcntl", (*FILTERED, "EBUSY"), where=((1, "==", 1033),), whole_life=True),
    Call("fcntl", FILTERED, where=((1, "==", 1034),), ends="client", whole_life=True),
    Call("fstat", (*FILTERED, "ENOMEM")),
    Call("shutdown", (*FILTERED, "ENOBUFS"), whole_life=True),
    Call("epoll_ctl", (*FILTERED, "ENOMEM", "ENOSPC")),
)
# Without this there is no place for the statistics either, and so nobody to say why.
UNTOLD = (
    Call("fcntl", ("EMFILE", *FILTERED), where=((1, "==", 1030),), whole_life=True),
)
# Without these there is another way.
REPLACED = (
    Call("prlimit64", FILTERED, reason="budget-fd", whole_life=True),
    Call("getsockopt", FILTERED, where=((2, "==", 80),), whole_life=True),
    Call("futex", FILTERED, where=((1, "==", 0),), whole_life=True),
    Call("futex", FILTERED, where=((1, "==", 1),), whole_life=True),
    Call("ppoll", FILTERED, whole_life=True),
    Call("epoll_create1", (*FILTERED, *FEW, "ENOMEM")),
    Call("epoll_pwait", FILTERED, whole_life=True),
    Call("munmap", FILTERED, where=((1, ">=", 100000),)),
    Call("close", (*FILTERED, "EIO", "EINTR"), where=(HIDDEN,), whole_life=True),
    Call("getrandom", FILTERED, where=((1, "==", 16),)),
    Call("kill", FILTERED, whole_life=True),
)

BY_ERRNO = {
    "EMFILE": "budget-fd",
    "ENFILE": "budget-fd",
    "ENOMEM": "budget-memory",
}


@dataclass(frozen=True)
class Case:
    """One call, refused with one error at one end."""

    call: Call
    error: str
    end: str
    shape: str
    stage: str

    def __str__(self) -> str:
        detail = "".join(f"-{value}" for _, _, value in self.call.where[-1:])
        turn = f"{self.end}-{self.shape}-{self.stage}"
        return f"{self.call.name}{detail}-{self.error}-{turn}"

    def filters(self) -> list[dict[str, Any]]:
        rule = [self.call.name, self.error, list(self.call.where)]
        return [{"stage": self.stage, "seen": False, "rules": [rule]}]


def cases(calls: tuple[Call, ...]) -> list[Case]:
    """Each error of each call, the ends and shapes taken in turns."""
    found = []
    for number, call in enumerate(calls):
        ends = call.ends.split()
        stages = ("start", "before") if call.whole_life else ("before",)
        for turn in range(max(len(call.errors), len(ends))):
            found.append(
                Case(
                    call,
                    call.errors[turn % len(call.errors)],
                    ends[turn % len(ends)],
                    # Only an epoll set has registrations to change.
                    "epoll"
                    if call.name == "epoll_ctl"
                    else SHAPES[(number + turn) % len(SHAPES)],
                    stages[turn // 2 % len(stages)],
                )
            )
    return found


def take_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@dataclass(frozen=True)
class Outcome:
    """What kmap ss says of both ends, and what they had left afterwards."""

    states: dict[str, tuple[str, str]]
    left: dict[str, list[str]]
    # Ticks of CPU that the waiting server used while it was watched.
    busy: int


def run(
    spawn: Spawn,
    env: Mapping[str, str],
    shape: str,
    filters: Mapping[str, list[dict[str, Any]]],
    watch: float = 0.0,
) -> Outcome:
    """Lets the traffic pass; what the programs found wrong fails the test."""

    def start(end: str, port: int) -> subprocess.Popen[str]:
        spec = {"port": port, "shape": shape, "filters": filters.get(end, [])}
        return spawn(
            [sys.executable, "-W", "error", str(PROGRAM), json.dumps(spec)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    server = start("server", 0)
    client = start("client", int(take_line(server)))
    assert take_line(client) == "done\n"
    before = activity(server.pid)
    time.sleep(watch)
    busy = activity(server.pid).ticks - before.ticks
    names = {server.pid: "server", client.pid: "client"}
    states = {
        names[each.pid]: (each.state, each.reason)
        for each in snapshot.connections(include_kernel=True)
        if each.pid in names
    }
    tell(client)
    left = {"client": json.loads(take_line(client))}
    left["server"] = json.loads(take_line(server))
    for process in (client, server):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    return Outcome(states, left, busy)


@pytest.mark.parametrize("case", cases(NEEDED), ids=str)
def test_a_needed_call_fails(
    spawn: Spawn, kmap_env: dict[str, str], case: Case
) -> None:
    """The connection stays on the kernel, and the reason is there to be seen."""
    outcome = run(spawn, kmap_env, case.shape, {case.end: case.filters()})
    other = "server" if case.end == "client" else "client"
    assert outcome.states[case.end] == (
        "kernel",
        BY_ERRNO.get(case.error, case.call.reason),
    )
    state, reason = outcome.states[other]
    assert state == "kernel"
    assert reason
    assert outcome.left == {"client": [], "server": []}


@pytest.mark.parametrize("case", cases(UNTOLD), ids=str)
def test_nothing_can_be_hidden(
    spawn: Spawn, kmap_env: dict[str, str], case: Case
) -> None:
    """The library takes none of the program's numbers instead."""
    outcome = run(spawn, kmap_env, case.shape, {case.end: case.filters()})
    assert {state for state, _ in outcome.states.values()} == {"kernel"}
    assert outcome.left == {"client": [], "server": []}


@pytest.mark.parametrize("case", cases(REPLACED), ids=str)
def test_a_call_fails_that_can_be_done_without(
    spawn: Spawn, kmap_env: dict[str, str], case: Case
) -> None:
    """Whatever carries the bytes, they arrive."""
    outcome = run(spawn, kmap_env, case.shape, {case.end: case.filters()})
    assert set(outcome.states) == {"client", "server"}
    if case.call.name == "prlimit64":
        assert outcome.states[case.end][0] == "kernel"
    else:
        assert {state for state, _ in outcome.states.values()} == {"ring"}
    # What may not be closed or unmapped stays.
    if case.call.name not in ("close", "munmap"):
        assert outcome.left == {"client": [], "server": []}


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_fails(spawn: Spawn, kmap_env: dict[str, str], shape: str) -> None:
    """Without a filter the same programs are on a ring: the table can fail."""
    outcome = run(spawn, kmap_env, shape, {})
    assert outcome.states == {"client": ("ring", ""), "server": ("ring", "")}
    assert outcome.left == {"client": [], "server": []}


def midway(rules: list[Any], *, seen: bool) -> list[dict[str, Any]]:
    return [{"stage": "during", "seen": seen, "rules": rules}]


# After the upgrade the program's own calls are recv and send, and those of its shape.
LATE = (
    ["futex", [[1, "==", 0]]],
    ["futex", [[1, "==", 1]]],
    ["ppoll", []],
    ["epoll_pwait", []],
    ["epoll_pwait2", []],
    ["epoll_create1", []],
    ["sendmsg", []],
    ["recvmsg", []],
    ["munmap", [[1, ">=", 100000]]],
    ["fcntl", []],
    ["prlimit64", []],
    ["getsockopt", []],
    ["close", [HIDDEN]],
)


@pytest.mark.parametrize("error", FILTERED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["client", "server"])
def test_calls_fail_after_the_upgrade(
    spawn: Spawn, kmap_env: dict[str, str], end: str, shape: str, error: str
) -> None:
    """A filter that the library did not see coming."""
    rules = [[call, error, where] for call, where in LATE]
    filters = {end: midway(rules, seen=False)}
    outcome = run(spawn, kmap_env, shape, filters, watch=WATCH_S)
    assert {state for state, _ in outcome.states.values()} == {"ring"}
    # A loop that never sleeps uses 100 in a second; one look in a millisecond, a few.
    assert outcome.busy < 25 * WATCH_S


@pytest.mark.parametrize("error", [*FILTERED, "KILL"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["client", "server"])
def test_a_program_puts_itself_under_a_filter(
    spawn: Spawn, kmap_env: dict[str, str], end: str, shape: str, error: str
) -> None:
    """The connection goes back to the kernel before anything can be refused."""
    rules = [[call, error, where] for call, where in LATE if call != "close"]
    if error != "KILL":
        rules.append(["shutdown", error, []])
    else:
        # Those that libc itself, or the end of a process, cannot do without.
        rules = [rule for rule in rules if rule[0] not in ("futex", "munmap")]
    rules.extend([call, error, []] for call in ("memfd_create", "socket", "bind"))
    outcome = run(spawn, kmap_env, shape, {end: midway(rules, seen=True)})
    assert outcome.states[end] == ("kernel", "seccomp")


def test_after_its_own_filter_a_program_stays_on_the_kernel(
    spawn: Spawn, kmap_env: dict[str, str]
) -> None:
    """Also with connections that it makes later, and whatever the filter lets pass."""
    rules = [["memfd_create", "EPERM", [[1, ">=", 1 << 20]]]]
    filters = {"client": [{"stage": "start", "seen": True, "rules": rules}]}
    outcome = run(spawn, kmap_env, "epoll", filters)
    assert {state for state, _ in outcome.states.values()} == {"kernel"}
