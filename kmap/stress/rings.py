# SPDX-License-Identifier: Apache-2.0
"""The ring level's worker: its side of cases, over channels of :mod:`kmap.ring`."""

from __future__ import annotations

import os
import random
import socket

from kmap.ring import Channel
from kmap.stress.drive import Blocking
from kmap.stress.faults import ATTACH_REFUSED
from kmap.stress.flow import Flow, Setting
from kmap.stress.plan import CasePlan, ConnectionPlan
from kmap.stress.scenarios import CaseId
from kmap.stress.worker import Case, Message, Worker, serve

_RING_SIZES = (4096, 16384, 65536, 262144, 1048576)


class ChannelEnd(Flow):
    """One end of a channel.

    Every call looks like a blocking one from outside: a call that would block, or that
    runs into its timeout, is made again until it has moved something.
    """

    def __init__(
        self,
        plan: ConnectionPlan,
        setting: Setting,
        channel: Channel,
        sock: socket.socket,
    ) -> None:
        super().__init__(plan, setting)
        self._channel = channel
        self._sock = sock
        self._timeouts = random.Random(f"{setting.case}/{plan.number}/{setting.side}")

    def half_close(self) -> None:
        self._channel.shutdown()

    def close(self) -> None:
        self._channel.close()
        self._sock.close()

    def _timeout(self, call: str) -> float | None:
        if call == "poll":
            return 0
        if call == "timed":
            return self._timeouts.choice((0.0001, 0.002, 0.05, 1.0))
        return None

    def _send(self, call: str, size: int) -> int:
        piece = self._piece(size)
        if call == "all":
            self._channel.write_all(piece)
            return size
        while True:
            try:
                return self._channel.write(piece, self._timeout(call))
            except (BlockingIOError, TimeoutError):
                self.report_stuck()
                # What cannot be had at once is waited for next.
                call = "timed"

    def _receive(self, call: str, buffer: memoryview) -> int:
        while True:
            try:
                count = self._channel.readinto(buffer, self._timeout(call))
            except (BlockingIOError, TimeoutError):
                call = "timed"
                continue
            self._verify(buffer[:count])
            return count


def _unsealed(size: int) -> int:
    fd = os.memfd_create("kmap-stress-unsealed", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _refused(size: int) -> str:
    """Attaches to memory that must be refused; what is wrong if it is not."""
    fds = [_unsealed(size), *(os.eventfd(0) for _ in range(4))]
    try:
        Channel.attach_fds(fds)
    except OSError:
        return ""
    else:
        return f"an unsealed memfd of {size} bytes was attached"
    finally:
        for fd in fds:
            os.close(fd)


class RingCase(Case):
    """One side of a case with channels."""

    def __init__(self, worker: Worker, plan: CasePlan, identity: CaseId) -> None:
        super().__init__(worker, plan, identity)
        self._sockets: dict[int, socket.socket] = {}
        self._channels: dict[int, Channel] = {}

    def connect(self, peer: Message, fds: list[int]) -> dict[str, int]:
        for plan, fd in zip(self.plan.connections, fds, strict=True):
            sock = socket.socket(fileno=fd)
            self._sockets[plan.number] = sock
            if plan.connector == self.side:
                size = random.Random(f"{self.plan.name}/{plan.number}").choice(
                    _RING_SIZES
                )
                self._channels[plan.number] = Channel.create(sock, ring_size=size)
        return {str(number): 0 for number in self._channels}

    def go(self, ports: dict[str, int]) -> None:
        for plan in self.plan.connections:
            number = plan.number
            sock = self._sockets[number]
            trouble = ""
            if plan.connector != self.side:
                if self.plan.fault == ATTACH_REFUSED:
                    trouble = _refused(0) or _refused(1 << 20)
                self._channels[number] = Channel.attach(sock)
            end = ChannelEnd(plan, self._setting, self._channels[number], sock)
            self.add(end)
            if trouble:
                end.fail(AssertionError(trouble))
                continue
            self.launch(Blocking(end, self.flows))
        self.begin()


class RingWorker(Worker):
    """A process of the ring level."""

    def case(self, plan: CasePlan, identity: CaseId) -> Case:
        return RingCase(self, plan, identity)


if __name__ == "__main__":
    serve(RingWorker)
