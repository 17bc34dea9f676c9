# SPDX-License-Identifier: Apache-2.0
"""From the kernel's lines to calls, on lines as the kernel prints them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kmap.trace import assemble
from kmap.trace.assemble import Assembler, Descriptors, Hops
from kmap.trace.recording import (
    ANSWERED,
    OTHER,
    RING,
    STACK,
    WAIT,
    WAKE_UP,
    Call,
)
from kmap.trace.tracefs import Event, parse

HOPS = Hops({8080: "client-envoy", 9090: "envoy-service"})
FUNCTIONS = ("send", "readv", "epoll_wait", "sendfile64")


def test_lines_of_the_kernel() -> None:
    lines = """\
# tracer: nop
#
           <...>-4711    (   4700) [001] ..... 12.000001: sys_readv(fd: 7, vec: 0x7f0, vlen: 8)
   wrk:w main (1)-4711  (   4700) [001] ..... 12.000002: sys_readv -> 0xfffffffffffffff5
          client-9      (-------) [000] ...1. 12.000003: call: (0x7f01) function=1 value=24
          client-9      (      9) [000] ...1. 12.000004: back: (0x7 <- 0x8) function=1 value=-1
          client-9      (      9) [000] ..s2. 12.000005: inet_sock_set_state: family=AF_INET protocol=IPPROTO_TCP sport=0 dport=8080 saddr=127.0.0.1 daddr=127.0.0.1 saddrv6=::ffff:127.0.0.1 daddrv6=::ffff:127.0.0.1 oldstate=TCP_CLOSE newstate=TCP_SYN_SENT
          python-5      (      5) [000] ..... 12.000006: tracing_mark_write: begin
          client-9      (      9) [000] ..... 12.000007: sys_mmap -> 0x7f4a00000000
""".splitlines()  # noqa: E501
    events = list(parse(lines, FUNCTIONS))
    assert [event.kind for event in events] == [
        *("enter", "exit", "call", "back", "dial", "mark", "exit"),
    ]
    assert events[0].arguments == {"fd": 7, "vec": 0x7F0, "vlen": 8}
    assert (events[0].pid, events[0].tid) == (4700, 4711)
    assert events[1].value == -11
    assert (events[2].name, events[2].value, events[2].pid) == ("readv", 24, 9)
    assert events[3].value == -1
    assert events[4].value == 8080
    assert events[5].name == "begin"
    assert events[6].value == 0x7F4A00000000


class _Script:
    """Writes events down, one microsecond after the other, of one thread."""

    def __init__(self, **what: str) -> None:
        self.events: list[Event] = []
        self.known = Descriptors(HOPS)
        self.known.what = {int(fd[2:]): name for fd, name in what.items()}

    def add(
        self, kind: str, name: str, value: int = 0, arguments: Mapping[str, int] = {}
    ) -> None:
        at = 100.0 + len(self.events)
        self.events.append(Event(at, 20, 20, kind, name, value, arguments))

    def mark(self, name: str) -> None:
        self.add("mark", name)

    def call(self, name: str, result: int, **arguments: int) -> None:
        self.add("enter", name, 0, arguments)
        self.add("exit", name, result)

    def requests(self) -> list[list[Call]]:
        return Assembler({20: "envoy"}, {20: self.known}, HOPS, "client").run(
            self.events
        )

    def kinds(self) -> list[tuple[str, str, str]]:
        (calls,) = self.requests()
        return [(call.name, call.kind, call.what) for call in calls]


def test_system_calls_by_kind() -> None:
    script = _Script(fd5="client-envoy", fd6="unix socket", fd7="file", fd8="eventfd")
    script.mark("begin")
    script.call("readv", 39, fd=5, vlen=8)
    script.call("readv", 10, fd=7, vlen=8)
    script.call("epoll_wait", 1, epfd=9)
    script.call("shutdown", 0, fd=6, how=0)
    script.call("shutdown", 0, fd=5, how=1)
    script.call("write", 8, fd=8)
    script.call("futex", 0, uaddr=1)
    script.call("sendfile64", 128, out_fd=5, in_fd=7)
    script.mark("end")
    assert script.kinds() == [
        ("readv", STACK, "client-envoy"),
        ("readv", OTHER, "file"),
        ("epoll_wait", WAIT, ""),
        ("shutdown", WAKE_UP, "latch"),
        ("shutdown", STACK, "client-envoy"),
        ("write", WAKE_UP, "eventfd"),
        ("futex", WAKE_UP, "futex"),
        ("sendfile", STACK, "client-envoy"),
    ]
    (calls,) = script.requests()
    assert [(c.bytes, c.way) for c in calls if c.way] == [
        *((39, "in"), (10, "in"), (8, "out"), (128, "out")),
    ]
    # From the first call that carries.
    assert (calls[0].began_us, calls[0].ended_us) == (0, 1)


def test_calls_that_the_library_answers() -> None:
    script = _Script(fd5="client-envoy", fd7="file")
    script.mark("begin")
    # From the ring, with a latch rung on the way.
    script.add("call", "send", 5)
    script.call("shutdown", 0, fd=901, how=0)
    script.add("back", "send", 39)
    # The kernel is asked, and says what the library says.
    script.add("call", "readv", 5)
    script.call("recvfrom", -11, fd=5)
    script.add("back", "readv", -1)
    # Nothing there, and the ring knows.
    script.add("call", "readv", 5)
    script.add("back", "readv", -1)
    # A file, as ever.
    script.add("call", "readv", 7)
    script.call("readv", 10, fd=7)
    script.add("back", "readv", 10)
    # What is ready is known; and then it is not.
    script.add("call", "epoll_wait", 9)
    script.add("back", "epoll_wait", 1)
    script.add("call", "epoll_wait", 9)
    script.call("epoll_wait", 2, epfd=9)
    script.add("back", "epoll_wait", 1)
    # The kernel's own way back from a recorded function.
    script.call("uretprobe", 0)
    script.add("call", "sendfile64", 5)
    script.call("pread64", 128, fd=7)
    script.add("back", "sendfile64", 128)
    script.mark("end")
    (calls,) = script.requests()
    kinds = [(c.name, c.kind) for c in calls]
    assert kinds == [
        ("send", RING),
        ("shutdown", WAKE_UP),
        ("recvfrom", STACK),
        ("readv", RING),
        ("readv", OTHER),
        ("epoll_wait", ANSWERED),
        ("epoll_wait", WAIT),
        ("sendfile", RING),
        ("pread64", OTHER),
    ]
    ring = [(c.name, c.bytes, c.way) for c in calls if c.kind == RING]
    assert ring == [("send", 39, "out"), ("readv", 0, ""), ("sendfile", 128, "out")]


def test_a_function_that_a_jump_left() -> None:
    script = _Script(fd5="client-envoy")
    script.mark("begin")
    script.add("call", "send", 5)
    script.add("call", "readv", 5)
    script.add("back", "send", 3)
    script.add("back", "readv", 3)
    script.mark("end")
    assert script.kinds() == [("send", RING, "client-envoy")]


def test_which_calls_belong_to_a_request() -> None:
    script = _Script(fd5="client-envoy")
    script.add("enter", "epoll_wait", 0, {"epfd": 3})
    script.mark("begin")
    script.call("readv", 1, fd=5)
    # A timer went off there: it begins anew.
    script.mark("begin")
    script.add("exit", "epoll_wait", 1)
    script.call("readv", 2, fd=5)
    script.add("enter", "epoll_wait", 0, {"epfd": 3})
    script.mark("end")
    script.add("exit", "epoll_wait", 0)
    script.call("readv", 3, fd=5)
    script.mark("begin")
    script.call("readv", 4, fd=5)
    script.mark("end")
    script.mark("undo")
    (calls,) = script.requests()
    assert [(call.name, call.result) for call in calls] == [
        ("epoll_wait", 1),
        ("readv", 2),
    ]
    assert calls[0].began_us < 0


def test_a_call_that_a_tracer_interrupts_is_one() -> None:
    script = _Script()
    script.mark("begin")
    script.add("enter", "poll", 0, {"ufds": 1})
    script.add("exit", "poll", -516)
    script.add("enter", "restart_syscall")
    script.add("exit", "restart_syscall", 1)
    script.mark("end")
    (calls,) = script.requests()
    assert [(c.name, c.kind, c.result) for c in calls] == [("poll", WAIT, 1)]
    assert calls[0].ended_us - calls[0].began_us == 3


@pytest.mark.parametrize("family", [2, 10])
def test_descriptors_are_followed(family: int) -> None:
    script = _Script(fd0="pipe", fd1="file", fd2="file")
    script.mark("begin")
    script.call("socket", 3, family=family)
    script.add("enter", "connect", 0, {"fd": 3})
    script.add("dial", "connect", 8080)
    script.add("exit", "connect", -115)
    script.call("sendto", 5, fd=3)
    script.call("dup", 4, fildes=3)
    script.call("fcntl", 9, fd=3, cmd=1030)
    script.call("close", 0, fd=3)
    script.call("write", 5, fd=4)
    script.call("write", 5, fd=9)
    # A file takes the number.
    script.call("openat", 3, dfd=0)
    script.call("write", 5, fd=3)
    script.call("socketpair", 0, family=1)
    script.call("write", 5, fd=5)
    script.call("write", 5, fd=6)
    # One that came in a message, and then no socket.
    script.call("getsockopt", 0, fd=20)
    script.call("close", 0, fd=20)
    script.call("getsockopt", -88, fd=21)
    script.mark("end")
    assert [each[1:] for each in script.kinds()] == [
        (STACK, "unconnected socket"),
        (STACK, "client-envoy"),
        (STACK, "client-envoy"),
        (OTHER, "client-envoy"),
        (OTHER, "client-envoy"),
        (STACK, "client-envoy"),
        (STACK, "client-envoy"),
        (STACK, "client-envoy"),
        (OTHER, ""),
        (OTHER, "file"),
        (OTHER, ""),
        (STACK, "unix socket"),
        (STACK, "unix socket"),
        (STACK, "passed socket"),
        (STACK, "passed socket"),
        (OTHER, ""),
    ]


def test_the_most_frequent_request() -> None:
    def request(*results: int) -> list[Call]:
        script = _Script(fd5="client-envoy")
        script.mark("begin")
        for result in results:
            script.call("readv", result, fd=5)
        script.mark("end")
        return script.requests()[0]

    requests = [request(1), request(1, 2), request(3), request(1, 2)]
    assert assemble.most_frequent(requests) == (1, 2)
    # None more often than another: the plainest.
    assert assemble.most_frequent([request(1, 2), request(3), request(4)]) == (1, 1)


def test_functions_are_those_of_the_table() -> None:
    names = assemble.functions()
    assert {"read", "send", "readv", "epoll_wait", "poll", "sendfile"} <= set(names)
    assert not {"close", "fork", "getsockopt"} & set(names)
