# SPDX-License-Identifier: Apache-2.0
"""How ends wait: blocking calls and threads, or one of the event interfaces."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

from kmap.stress.end import End
from kmap.stress.flipper import Flipper, flip
from kmap.stress.flow import Flow, Mismatch, Outcome
from kmap.stress.stream import MAX_READ

# Calls that one end may make before the others of its loop have their turn.
_TURN = 8
_TIMEOUT_S = 60.0


class Runner(Protocol):
    """What runs in a thread of its own."""

    def run(self) -> None:
        """Until all its ends are done."""


def configure(end: End) -> None:
    """Puts the socket of an end into the mode of its style."""
    style = end.end.style
    for sock in {end.sock, end.out_sock}:
        if style == "blocking":
            sock.settimeout(None)
        elif style == "timeout":
            # Longer than the session's patience, which reports it better.
            sock.settimeout(_TIMEOUT_S)
        else:
            sock.setblocking(False)


class Blocking:
    """One end with blocking calls, in threads of its own."""

    def __init__(
        self,
        end: Flow,
        others: Callable[[], Sequence[Flow]],
        bequeath: Callable[[End], str] = lambda end: "",
    ) -> None:
        self._end = end
        self._others = others
        # Gives the connection to another program; what that reports.
        self._bequeath = bequeath
        largest = max(min(max(end.end.recv_sizes), MAX_READ), 4096)
        self._buffer = memoryview(bytearray(largest))

    def run(self) -> None:
        end = self._end
        try:
            if end.end.threads:
                self._run_threads()
            else:
                self._run_gates()
        except (OSError, Mismatch, AssertionError) as error:
            end.fail(error)

    def _receive(self) -> None:
        end = self._end
        if end.stalled:
            end.released.wait()
        try:
            end.receive_some(self._buffer)
        except BlockingIOError:
            # Somebody has set O_NONBLOCK, which may also be cleared again by now.
            self._wait(select.POLLIN)

    def _send(self) -> None:
        try:
            self._end.send_some()
        except BlockingIOError:
            self._wait(select.POLLOUT)

    def _wait(self, event: int) -> None:
        end = self._end
        if not isinstance(end, End):
            raise AssertionError("a blocking call on a channel would block")
        poll = select.poll()
        poll.register(end.fd if event == select.POLLIN else end.out_fd, event)
        poll.poll()

    def _run_gates(self) -> None:
        """Turn by turn: reads what the next gate needs, then writes what it allows."""
        end = self._end
        for index, (need, allowed) in enumerate(end.gates):
            while end.received < need and not end.at_eof and not end.reset:
                self._receive()
            if end.at_eof or end.reset:
                break
            if end.end.fork_gate == index and self._part():
                return
            while end.sent < allowed and not end.broken:
                self._send()
        self._read_on()

    def _read_on(self) -> None:
        end = self._end
        while not end.settle():
            self._receive()

    def _run_threads(self) -> None:
        end = self._end
        errors: list[BaseException] = []

        def write() -> None:
            try:
                for need, allowed in end.gates:
                    with end.moved:
                        end.moved.wait_for(functools.partial(end.decided, need))
                    while end.sent < allowed and end.received >= need:
                        if end.broken:
                            return
                        self._send()
                if end.end.finish == "early" and end.sent == end.out_total:
                    end.shut = True
                    end.half_close()
            except (OSError, Mismatch, AssertionError) as error:
                errors.append(error)

        writer = threading.Thread(target=write, name=f"writer-{end.plan.number}")
        writer.daemon = True
        writer.start()
        # These act once everything is there, before the end of the peer's stream.
        acts = end.end.finish in ("close", "shut")
        try:
            while not end.at_eof and not end.reset:
                if acts and end.received == end.in_total:
                    break
                self._receive()
                with end.moved:
                    end.moved.notify_all()
        finally:
            with end.moved:
                end.moved.notify_all()
        writer.join()
        if errors:
            raise errors[0]
        while not end.settle():
            self._receive()

    def _part(self) -> bool:
        """What the plan has for this gate; whether the connection is dealt with."""
        end = self._end
        if end.end.fork == "flip":
            self._start_flipper()
            return False
        if end.end.fork:
            return self._fork()
        if end.end.heir and isinstance(end, End):
            self._take_over(self._bequeath(end), f"the program ({end.end.heir})")
            return True
        return False

    def _start_flipper(self) -> None:
        end = self._end
        assert isinstance(end, End)
        (stopped, stop), (reader, writer) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._close_others()
                rng = random.Random(f"{end.setting.case}/{end.plan.number}/flip")
                flip(end.fd, stopped, writer, rng)
            finally:
                os._exit(0)
        os.close(stopped)
        os.close(writer)
        flipper = Flipper(pid, stop, reader)

        def dismiss() -> None:
            end.outcome.acts += flipper.dismiss()

        end.dismiss = dismiss

    def _close_others(self) -> None:
        """In a child: only this connection is its business."""
        for neighbour in self._others():
            if neighbour is not self._end:
                neighbour.abandon()

    def _fork(self) -> bool:
        """Forks as the plan says; whether the connection is dealt with here."""
        end = self._end
        kind = end.end.fork
        end.outcome.acts += 1
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            # No cleanup of the parent's belongs to this process.
            status = 1
            try:
                os.close(reader)
                status = self._child(kind, writer)
            finally:
                os._exit(status)
        os.close(writer)
        if kind == "child":
            end.close()
        elif kind == "halves":
            while end.sent < end.out_total and not end.broken:
                self._send()
            end.shut = True
            end.half_close()
        with os.fdopen(reader, "rb") as pipe:
            report = pipe.read()
        _, status = os.waitpid(pid, 0)
        if kind == "exit":
            return False
        text = "" if status else report.decode()
        self._take_over(text, f"the forked child (status {status:#x})")
        return True

    def _take_over(self, report: str, who: str) -> None:
        """Makes the outcome of what goes on with the connection this end's own."""
        end = self._end
        if report:
            theirs = Outcome(**json.loads(report))
            if end.end.fork == "halves":
                theirs.sent = end.sent
                theirs.calls += end.outcome.calls
            end.outcome = theirs
        else:
            end.outcome.trouble = f"{who} did not end well"
        end.done = True
        end.close()
        if end.outcome.mismatch or end.outcome.trouble:
            end.failed(end.outcome)

    def _child(self, kind: str, report: int) -> int:
        end = self._end
        if kind == "exit":
            return 0
        # The parent tells what this process found, once it has read the report.
        end.failed = lambda outcome: None
        self._close_others()
        try:
            if kind == "child":
                self._gates_from_fork()
            else:
                while not end.at_eof and not end.reset:
                    self._receive()
                end.finish()
        except (OSError, Mismatch, AssertionError) as error:
            end.fail(error)
        os.write(report, json.dumps(asdict(end.outcome)).encode())
        return 0

    def run_rest(self) -> None:
        """For another program: goes on where this end changed hands."""
        self._gates_from_fork()

    def _gates_from_fork(self) -> None:
        end = self._end
        for need, allowed in end.gates[end.end.fork_gate :]:
            while end.received < need and not end.at_eof and not end.reset:
                self._receive()
            if end.at_eof or end.reset:
                break
            while end.sent < allowed and not end.broken:
                self._send()
        self._read_on()


class Poller(Protocol):
    """An event interface."""

    def watch(self, end: End) -> None:
        """Brings the interest in an end up to date."""

    def forget(self, end: End, *, closed: bool) -> None:
        """Takes an end out; closed says that its descriptor is gone already."""

    def wait(self, busy: bool) -> list[tuple[int, bool, bool]]:
        """(descriptor, readable, writable); does not wait while busy."""

    def close(self) -> None:
        """Frees the interface."""


_READ = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLRDHUP
_WRITE = select.POLLOUT | select.POLLHUP | select.POLLERR


class PollPoller:
    """poll()."""

    def __init__(self, wake: int) -> None:
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        self._masks: dict[int, int] = {}

    def watch(self, end: End) -> None:
        mask = (select.POLLIN if end.wants_read else 0) | (
            select.POLLOUT if end.wants_write else 0
        )
        if self._masks.get(end.fd) != mask:
            self._masks[end.fd] = mask
            # An empty mask would still report a hang-up, again and again.
            if mask:
                self._poll.register(end.fd, mask)
            else:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(end.fd)

    def forget(self, end: End, *, closed: bool) -> None:
        if self._masks.pop(end.fd, 0):
            self._poll.unregister(end.fd)

    def wait(self, busy: bool) -> list[tuple[int, bool, bool]]:
        events = self._poll.poll(0 if busy else None)
        return [(fd, bool(ev & _READ), bool(ev & _WRITE)) for fd, ev in events]

    def close(self) -> None:
        pass


class SelectPoller:
    """select()."""

    def __init__(self, wake: int) -> None:
        self._wake = wake
        self._read: set[int] = set()
        self._write: set[int] = set()

    def watch(self, end: End) -> None:
        (self._read.add if end.wants_read else self._read.discard)(end.fd)
        (self._write.add if end.wants_write else self._write.discard)(end.fd)

    def forget(self, end: End, *, closed: bool) -> None:
        self._read.discard(end.fd)
        self._write.discard(end.fd)

    def wait(self, busy: bool) -> list[tuple[int, bool, bool]]:
        readable, writable, _ = select.select(
            [self._wake, *self._read], list(self._write), [], 0 if busy else None
        )
        both = set(readable) | set(writable)
        return [(fd, fd in readable, fd in writable) for fd in both]

    def close(self) -> None:
        pass


class EpollPoller:
    """epoll, level-triggered, edge-triggered or one-shot."""

    def __init__(self, wake: int, style: str) -> None:
        self._edge = style == "epoll-et"
        self._once = style == "epoll-oneshot"
        self._epoll = select.epoll()
        self._epoll.register(wake, select.EPOLLIN)
        self._masks: dict[int, int] = {}

    def watch(self, end: End) -> None:
        fd = end.fd
        if self._edge:
            if fd not in self._masks:
                mask = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP
                self._masks[fd] = mask
                self._epoll.register(fd, mask | select.EPOLLET)
            return
        mask = (select.EPOLLIN if end.wants_read else 0) | (
            select.EPOLLOUT if end.wants_write else 0
        )
        if self._once and mask:
            mask |= select.EPOLLONESHOT
        before = self._masks.get(fd)
        if mask == before:
            return
        self._masks[fd] = mask
        if before is None:
            self._epoll.register(fd, mask)
        else:
            self._epoll.modify(fd, mask)

    def forget(self, end: End, *, closed: bool) -> None:
        if self._masks.pop(end.fd, None) is not None and not closed:
            self._epoll.unregister(end.fd)

    def wait(self, busy: bool) -> list[tuple[int, bool, bool]]:
        events = self._epoll.poll(0 if busy else None)
        if self._once:
            # Reported descriptors are disarmed until they are watched anew.
            for fd, _ in events:
                if fd in self._masks:
                    self._masks[fd] = 0
        return [(fd, bool(ev & _READ), bool(ev & _WRITE)) for fd, ev in events]

    def close(self) -> None:
        self._epoll.close()


class Loop:
    """Several ends in one event loop.

    The descriptors are made in the constructor, so that a case can lower the limit on
    them before it runs.
    """

    def __init__(self, style: str) -> None:
        self.style = style
        self.ends: list[End] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller: Poller
        if style == "poll":
            self._poller = PollPoller(self._wake)
        elif style == "select":
            self._poller = SelectPoller(self._wake)
        else:
            self._poller = EpollPoller(self._wake, style)
        # What an edge told and no EAGAIN has taken back.
        self._readable: set[int] = set()
        self._writable: set[int] = set()

    def wake(self) -> None:
        """Makes the loop look at its ends again; from any thread."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        size = max((max(end.end.recv_sizes) for end in self.ends), default=0)
        buffer = memoryview(bytearray(max(min(size, MAX_READ), 4096)))
        by_fd = {end.fd: end for end in self.ends}
        for end in self.ends:
            self._turn(end, by_fd, buffer, False, False)
        while by_fd:
            busy = self.style == "epoll-et" and any(
                self._ready(end) for end in by_fd.values()
            )
            told = {fd: (r, w) for fd, r, w in self._poller.wait(busy)}
            if told.pop(self._wake, None):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            for fd, end in list(by_fd.items()):
                readable, writable = told.get(fd, (False, False))
                self._turn(end, by_fd, buffer, readable, writable)
        self._poller.close()
        os.close(self._wake)

    def _ready(self, end: End) -> bool:
        return (end.fd in self._readable and end.wants_read) or (
            end.fd in self._writable and end.wants_write
        )

    def _turn(
        self,
        end: End,
        by_fd: dict[int, End],
        buffer: memoryview,
        readable: bool,
        writable: bool,
    ) -> None:
        fd = end.fd
        edge = self.style == "epoll-et"
        if edge:
            if readable:
                self._readable.add(fd)
            if writable:
                self._writable.add(fd)
            readable, writable = fd in self._readable, fd in self._writable
        try:
            if readable:
                self._receive(end, buffer)
            if writable:
                self._send(end)
            # Before it is closed: a closed descriptor cannot be taken out.
            if not end.advance():
                self._poller.watch(end)
                return
            if end.end.unregister or self.style in ("poll", "select"):
                self._poller.forget(end, closed=False)
                end.finish()
            else:
                end.finish()
                self._poller.forget(end, closed=True)
        except (OSError, Mismatch, AssertionError) as error:
            self._poller.forget(end, closed=False)
            end.fail(error)
        self._readable.discard(fd)
        self._writable.discard(fd)
        del by_fd[fd]

    def _receive(self, end: End, buffer: memoryview) -> None:
        for _ in range(_TURN):
            if not end.wants_read:
                return
            try:
                end.receive_some(buffer)
            except BlockingIOError:
                self._readable.discard(end.fd)
                return
            if end.end.finish == "close" and end.received == end.in_total:
                return

    def _send(self, end: End) -> None:
        for _ in range(_TURN):
            if not end.wants_write:
                return
            try:
                end.send_some()
            except BlockingIOError:
                self._writable.discard(end.fd)
                return
