# SPDX-License-Identifier: Apache-2.0
"""One end of a connection: what it may send, what it expects, and the calls it makes.

Nothing here waits.  :mod:`kmap.stress.drive` decides when to call ``send_some`` and
``receive_some``; both let BlockingIOError through.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kmap.stress.plan import ConnectionPlan, other
from kmap.stress.stream import MAX_SEND, Pattern, stream_key

# Breaks the tool itself, so that the tests can see it notice: "flip" (a sender changes
# one byte), "stall" (a reader stops for ever), "leak" (a descriptor per connection).
BREAK_VARIABLE = "KMAP_STRESS_BREAK"

# What the kernel answers when the peer is gone ...
GONE = frozenset({errno.ECONNRESET, errno.EPIPE})
# ... and when the descriptor is, or has become an unconnected socket.
_CLOSED_HERE = frozenset({errno.EBADF, errno.ENOTCONN})


class Mismatch(Exception):
    """A byte that arrived is not the byte that was sent."""


class Progress:
    """Positions of every connection, in memory that outlives this process.

    Two words per connection and side: bytes sent and bytes received.
    """

    WORDS_PER_END = 2

    def __init__(self, fd: int, words: memoryview, side: str, limit: int) -> None:
        self.fd = fd
        self.words = words
        self._base = 0 if side == "a" else limit * self.WORDS_PER_END

    def slot(self, number: int) -> int:
        return self._base + number * self.WORDS_PER_END


class Fuse:
    """Ends this process by itself once enough bytes have been moved."""

    def __init__(self, after_bytes: int) -> None:
        self._left = after_bytes
        self._lock = threading.Lock()

    def burn(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Outcome:
    """How an end ended, as it is reported."""

    number: int
    sent: int = 0
    received: int = 0
    # "eof", "closed" (here, with everything done), or the name of an errno.
    end: str = ""
    mismatch: str = ""
    # A call that failed in a way that no peer can cause.
    trouble: str = ""
    calls: int = 0
    # Faults that this end was to bring about, and has.
    acts: int = 0


@dataclass(frozen=True)
class Setting:
    """What all ends of one side of a case share."""

    seed: int
    case: str
    # The case's name in a form that another process finds its plan by.
    identity: list[Any]
    side: str
    pattern: Pattern
    progress: Progress
    fuse: Fuse | None
    breakage: str


class Flow:
    """State of one end, of a socket or of a channel."""

    def __init__(self, plan: ConnectionPlan, setting: Setting) -> None:
        side = setting.side
        self.plan = plan
        self.setting = setting
        self.end = plan.ends[side]
        self.gates = plan.gates[side]
        self.out_total = plan.total(side)
        self.in_total = plan.total(other(side))
        self.outcome = Outcome(plan.number)
        self.sent = 0
        self.received = 0
        self.at_eof = False
        self.shut = False
        # Bytes moved both ways when the next act is due.
        self._act_at = self.end.act_at
        # The descriptor was closed under this end, or is another socket.
        self.gone = False
        # Set when a write failed because the peer is gone: what is left is to read.
        self.broken = False
        self.reset = False
        self.done = False
        self.released = threading.Event()
        self.moved = threading.Condition()
        self.stuck_reported = False
        self.stuck: Callable[[], None] | None = None
        # Called at once when this end meets what must not be.
        self.failed: Callable[[Outcome], None] = lambda outcome: None
        keys = (setting.seed, setting.case, plan.number)
        self._out_key = stream_key(*keys, side)
        self._in_key = stream_key(*keys, other(side))
        self._pattern = setting.pattern
        self._words = setting.progress.words
        self._slot = setting.progress.slot(plan.number)
        self._fuse = setting.fuse
        self._breakage = setting.breakage
        # Set by a loop, so that it looks again at an end that was released.
        self.wake_loop: Callable[[], None] = lambda: None
        self._send_call: Iterator[str] = itertools.cycle(self.end.send_calls)
        self._send_size = itertools.cycle(self.end.send_sizes)
        self._recv_call: Iterator[str] = itertools.cycle(self.end.recv_calls)
        self._recv_size = itertools.cycle(self.end.recv_sizes)
        # The call and size of a write that met EAGAIN are kept, as programs do.
        self._pending: tuple[str, int] | None = None

    # What a socket or a channel does.

    def half_close(self) -> None:
        """Ends the outgoing stream; the peer may be gone by now, as any peer may."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what this process holds of the connection."""
        raise NotImplementedError

    def abandon(self) -> None:
        """In a forked child: gives back what it has of a connection of its parent's.

        Takes no lock: a thread that is not there may hold it.
        """
        self.close()

    def act(self) -> None:
        """Brings about what the plan has for this end."""

    def _send(self, call: str, size: int) -> int:
        raise NotImplementedError

    def _receive(self, call: str, buffer: memoryview) -> int:
        """Receives and verifies."""
        raise NotImplementedError

    # What may be done now.

    def allowed(self) -> int:
        """How many bytes may have gone out, given what came in."""
        limit = 0
        for need, allowed in self.gates:
            if need > self.received:
                break
            limit = allowed
        return limit

    def decided(self, need: int) -> bool:
        """Whether need bytes are there, or it is known that they will never be."""
        return self.received >= need or self.at_eof or self.reset

    @property
    def stalled(self) -> bool:
        at = self.end.stall_at
        return at is not None and self.received >= at and not self.released.is_set()

    @property
    def wants_write(self) -> bool:
        return not self.broken and not self.shut and self.sent < self.allowed()

    @property
    def wants_read(self) -> bool:
        return not self.at_eof and not self.reset and not self.stalled

    def advance(self) -> bool:
        """Half-closes when it is time; whether it is time to close."""
        sent_all = self.broken or self.sent == self.out_total
        received_all = self.received == self.in_total
        finish = self.end.finish
        due = finish == "early" or (finish == "shut" and received_all)
        if due and sent_all and not self.broken and not self.shut:
            self.shut = True
            self.half_close()
        if self.at_eof or self.reset:
            # Nothing more can come, so a gate that is still shut never opens.
            return sent_all or not self.wants_write
        return finish == "close" and sent_all and received_all

    def settle(self) -> bool:
        """Half-closes or closes when it is time; whether the end is done."""
        if not self.done and self.advance():
            self.finish()
        return self.done

    def finish(self) -> None:
        """Closes; the outcome is final."""
        if self.done:
            return
        self.done = True
        if not self.outcome.end:
            self.outcome.end = "eof" if self.at_eof else "closed"
        self.outcome.sent, self.outcome.received = self.sent, self.received
        self.close()

    def fail(self, error: BaseException) -> None:
        """Ends with an error."""
        if isinstance(error, Mismatch):
            self.outcome.mismatch = str(error)
        elif isinstance(error, OSError) and self._is_gone(error):
            self.outcome.end = errno.errorcode[error.errno or 0]
        else:
            self.outcome.trouble = f"{type(error).__name__}: {error}"
        self.finish()
        if self.outcome.mismatch or self.outcome.trouble:
            self.failed(self.outcome)

    def _is_gone(self, error: OSError) -> bool:
        return error.errno in GONE or (self.gone and error.errno in _CLOSED_HERE)

    # Moving bytes.

    def _moved(self, count: int) -> None:
        if self._fuse is not None:
            self._fuse.burn(count)
        if self.end.act and self.sent + self.received >= self._act_at:
            self._act_at += max(self.end.act_at, 1)
            self.act()

    def send_some(self) -> None:
        """Sends one piece of what may go out; a peer that is gone ends the sending."""
        room = self.allowed() - self.sent
        if room <= 0:
            return
        call, size = self._pending or (next(self._send_call), next(self._send_size))
        self._pending = (call, size)
        try:
            count = self._send(call, min(size, room, MAX_SEND))
        except BlockingIOError:
            self.report_stuck()
            raise
        except OSError as error:
            if not self._is_gone(error):
                raise
            self._note_end(error)
            self.broken = True
            self.reset = self.reset or self.gone
            return
        self._pending = None
        self.outcome.calls += 1
        self.sent += count
        self._words[self._slot] = self.sent
        self._moved(count)

    def _note_end(self, error: OSError) -> None:
        self.outcome.end = self.outcome.end or errno.errorcode[error.errno or 0]

    def report_stuck(self) -> None:
        """Tells the session once that there is no room for more."""
        if self.stuck is not None and not self.stuck_reported:
            self.stuck_reported = True
            self.stuck()

    def receive_some(self, buffer: memoryview) -> None:
        """Receives and verifies one piece."""
        size = min(next(self._recv_size), len(buffer))
        if self.end.stall_at is not None and not self.released.is_set():
            # A read must not take what the writer is to be stuck on.
            size = min(size, 65536)
        try:
            count = self._receive(next(self._recv_call), buffer[:size])
        except BlockingIOError:
            raise
        except OSError as error:
            if not self._is_gone(error):
                raise
            self._note_end(error)
            self.reset = True
            self.broken = self.broken or self.gone
            return
        self.outcome.calls += 1
        if count == 0:
            self.at_eof = True
            return
        if self.received + count > self.in_total:
            raise Mismatch(
                f"{self.received + count - self.in_total} bytes more than the "
                f"{self.in_total} that were sent"
            )
        self.received += count
        self._words[self._slot + 1] = self.received
        if self._breakage == "stall" and self.received >= 1000:
            threading.Event().wait()
        self._moved(count)

    def _verify(self, data: memoryview | bytes) -> None:
        if not self._pattern.matches(self._in_key, self.received, data):
            raise Mismatch(self._pattern.difference(self._in_key, self.received, data))

    def _piece(self, size: int) -> memoryview | bytearray:
        piece = self._pattern.slice(self._out_key, self.sent, size)
        if self._breakage == "flip" and self.sent <= 1000 < self.sent + size:
            broken = bytearray(piece)
            broken[1000 - self.sent] ^= 1
            return broken
        return piece

    def _pieces(self, size: int) -> list[memoryview]:
        """The next bytes in several parts, one of them empty, as writev takes them."""
        whole = memoryview(self._piece(size))
        cuts = sorted({0, size // 7, size // 3, size // 2, size})
        parts = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        return [*parts[:1], whole[:0], *parts[1:]]
