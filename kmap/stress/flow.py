# SPDX-License-Identifier: Apache-2.0
"""One end of a connection: what it may send, what it expects, and the calls it makes.

Nothing here waits.  :mod:`kmap.stress.drive` decides when to call ``send_some`` and
``receive_some``; both let BlockingIOError through.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kmap.stress.plan import ConnectionPlan, other
from kmap.stress.stream import MAX_SEND, Pattern, stream_key

# Breaks the tool itself, so that the tests can see it notice: "flip" (a sender changes
# one byte), "stall" (a reader stops for ever), "leak" (a descriptor per connection).
BREAK_VARIABLE = "KMAP_STRESS_BREAK"

# What the kernel answers when the peer is gone.
GONE = frozenset({errno.ECONNRESET, errno.EPIPE})


class Mismatch(Exception):
    """A byte that arrived is not the byte that was sent."""


class Progress:
    """Positions of every connection, in memory that outlives this process.

    Two words per connection and side: bytes sent and bytes received.
    """

    WORDS_PER_END = 2

    def __init__(self, words: memoryview, side: str, limit: int) -> None:
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


@dataclass(frozen=True)
class Setting:
    """What all ends of one side of a case share."""

    seed: int
    case: str
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
        self.end = plan.ends[side]
        self.gates = plan.gates[side]
        self.out_total = plan.total(side)
        self.in_total = plan.total(other(side))
        self.outcome = Outcome(plan.number)
        self.sent = 0
        self.received = 0
        self.at_eof = False
        self.shut = False
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
        elif isinstance(error, OSError) and error.errno in GONE:
            self.outcome.end = errno.errorcode[error.errno or 0]
        else:
            self.outcome.trouble = f"{type(error).__name__}: {error}"
        self.finish()
        if self.outcome.mismatch or self.outcome.trouble:
            self.failed(self.outcome)

    # Moving bytes.

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
            if error.errno not in GONE:
                raise
            self.outcome.end = self.outcome.end or errno.errorcode[error.errno]
            self.broken = True
            return
        self._pending = None
        self.outcome.calls += 1
        self.sent += count
        self._words[self._slot] = self.sent
        if self._fuse is not None:
            self._fuse.burn(count)

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
            if error.errno not in GONE:
                raise
            self.outcome.end = self.outcome.end or errno.errorcode[error.errno]
            self.reset = True
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
        if self._fuse is not None:
            self._fuse.burn(count)

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


class End(Flow):
    """One end of a TCP connection."""

    def __init__(
        self, plan: ConnectionPlan, setting: Setting, sock: socket.socket
    ) -> None:
        super().__init__(plan, setting)
        self.sock = sock
        self.fd = sock.fileno()
        self.out_fd = os.dup(self.fd) if self.end.dup else self.fd
        self.out_sock = socket.socket(fileno=self.out_fd) if self.end.dup else self.sock
        self._senders: dict[str, Callable[[int], int]] = {
            "send": self._do_send,
            "sendall": self._do_sendall,
            "sendmsg": self._do_sendmsg,
            "write": self._do_write,
            "writev": self._do_writev,
            "sendfile": self._do_sendfile,
        }
        self._receivers: dict[str, Callable[[memoryview], int]] = {
            "recv": self._do_recv,
            "recv_into": self._do_recv_into,
            "recvmsg_into": self._do_recvmsg_into,
            "read": self._do_read,
            "readv": self._do_readv,
            "peek": self._do_peek,
        }

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if self.end.dup:
            self.out_sock.close()
        self.sock.close()

    def _send(self, call: str, size: int) -> int:
        return self._senders[call](size)

    def _receive(self, call: str, buffer: memoryview) -> int:
        return self._receivers[call](buffer)

    def _do_send(self, size: int) -> int:
        return self.out_sock.send(self._piece(size))

    def _do_sendall(self, size: int) -> int:
        self.out_sock.sendall(self._piece(size))
        return size

    def _do_sendmsg(self, size: int) -> int:
        return self.out_sock.sendmsg(self._pieces(size))

    def _do_write(self, size: int) -> int:
        return os.write(self.out_fd, self._piece(size))

    def _do_writev(self, size: int) -> int:
        return os.writev(self.out_fd, self._pieces(size))

    def _do_sendfile(self, size: int) -> int:
        offset = self._pattern.offset(self._out_key, self.sent)
        return os.sendfile(self.out_fd, self._pattern.fd, offset, size)

    def _do_recv(self, buffer: memoryview) -> int:
        data = self.sock.recv(len(buffer))
        self._verify(data)
        return len(data)

    def _do_recv_into(self, buffer: memoryview) -> int:
        count = self.sock.recv_into(buffer)
        self._verify(buffer[:count])
        return count

    def _do_recvmsg_into(self, buffer: memoryview) -> int:
        third = len(buffer) // 3
        count = self.sock.recvmsg_into([buffer[:third], buffer[third:]])[0]
        self._verify(buffer[:count])
        return count

    def _do_read(self, buffer: memoryview) -> int:
        data = os.read(self.fd, len(buffer))
        self._verify(data)
        return len(data)

    def _do_readv(self, buffer: memoryview) -> int:
        half = len(buffer) // 2
        count = os.readv(self.fd, [buffer[:half], buffer[half:]])
        self._verify(buffer[:count])
        return count

    def _do_peek(self, buffer: memoryview) -> int:
        """Looks, then takes: at least what was seen must be there."""
        size = min(len(buffer), 4096)
        seen = self.sock.recv(size, socket.MSG_PEEK)
        if not seen:
            return 0
        self._verify(seen)
        data = self.sock.recv(size)
        if len(data) < len(seen):
            raise Mismatch(
                f"a peek at {self.received} saw {len(seen)} bytes, and the read after "
                f"it got {len(data)}"
            )
        self._verify(data)
        return len(data)
