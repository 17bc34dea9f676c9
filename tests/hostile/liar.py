# SPDX-License-Identifier: Apache-2.0
"""A hostile end of a connection, written from docs/protocol.md alone."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

VERSION = 4
HEADER = 4096
RING_SIZE = 65536
# Levels of 16 KiB, 64 KiB and, for rings beyond that, the rest.
AREA = 16384 + 65536
BELL_SIZE = 4096
HELLO, ACK, REFUSAL = 1, 2, 3
SHM, PIPE, FIFO = 0, 1, 2
IN_HELLO, ATTACHED, READY, CANCELLED = 1, 2, 3, 4
CUT, END, FIN, CLOSED = 1, 2, 4, 8
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
DEADLINE_S = 30.0

# magic, version, kind, slot, reason, transport, lport, laddr, and a hole at the end
_MESSAGE = struct.Struct("=IIIIIIH16s2x")
_SEGMENT = struct.Struct("=QIIII16s")
_SEGMENT_MAGIC = int.from_bytes(b"KAMPSEG1", "little")
_BELL_MAGIC = 0x314C45425041474B
_MAGIC = int.from_bytes(b"HLLO", "little")

# Offsets in km_wire_ring, docs/protocol.md section 4.
FIELDS = {
    "wpos": (0, 8),
    "grow_at": (8, 8),
    "cut": (32, 8),
    "end": (40, 8),
    "pflags": (48, 4),
    "rpos": (128, 8),
    "stop": (136, 8),
    "cons_wait": (256, 4),
    "prod_wait": (260, 4),
    "left": (264, 4),
}


def until(what: str, condition: Callable[[], bool]) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        os.sched_yield()


def memfd(size: int, seals: int = SEALS, content: bytes = b"") -> int:
    """A memfd of that size."""
    fd = os.memfd_create("liar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def segment_header(ring_size: int = RING_SIZE, version: int = VERSION) -> bytes:
    """The header of a fresh segment."""
    return _SEGMENT.pack(
        _SEGMENT_MAGIC, version, HEADER, ring_size, IN_HELLO, secrets.token_bytes(16)
    )


def segment(seals: int = SEALS) -> int:
    """A proper segment."""
    return memfd(HEADER + 2 * AREA, seals, segment_header())


def latch() -> int:
    """A Unix datagram socket that is shut down for reading."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    ring(sock)
    return sock.detach()


def ring(sock: socket.socket) -> None:
    """Rings a latch."""
    sock.shutdown(socket.SHUT_RD)


def bell() -> tuple[int, int]:
    """A bell of one's own: memfd and latch."""
    head = struct.pack("=QII", _BELL_MAGIC, VERSION, 16384)
    return memfd(BELL_SIZE, SEALS, head), latch()


def _half(sock_name: tuple[str, int]) -> str:
    host, port = sock_name
    raw = b"\0" * 10 + b"\xff\xff" + socket.inet_aton(host)
    return (raw + port.to_bytes(2, "big")).hex()


class Liar:
    """One end of a TCP connection to the victim, and its rendezvous."""

    transport = SHM

    def __init__(self, tcp: socket.socket, *, connects: bool) -> None:
        self.tcp = tcp
        self.connects = connects
        tcp.settimeout(DEADLINE_S)
        ends = [_half(tcp.getsockname()), _half(tcp.getpeername())]
        if not connects:
            ends.reverse()
        self.name = b"\0kmap1:" + "".join(ends).encode()
        self.hello: socket.socket | None = None
        self.listener: socket.socket | None = None
        self.memory: mmap.mmap | None = None
        self.bell: mmap.mmap | None = None
        self.latch: socket.socket | None = None
        self.own = bell()

    def close(self) -> None:
        """Gives all back."""
        for sock in (self.tcp, self.hello, self.listener, self.latch):
            if sock is not None:
                sock.close()
        for memory in (self.memory, self.bell):
            if memory is not None:
                memory.close()
        for fd in self.own:
            os.close(fd)

    # -- by the kernel

    def ping(self, times: int = 1) -> None:
        """A byte there and back by the kernel."""
        for _ in range(times):
            self.tcp.sendall(b"p")
            assert self.tcp.recv(1) == b"p"

    def gone(self) -> bool:
        """Whether the victim has closed this connection."""
        self.tcp.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            try:
                return self.tcp.recv(4096) == b""
            except ConnectionError:
                return True
        return False

    # -- the rendezvous

    def listen(self) -> None:
        """As the connector: binds the name."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.name)
        self.listener.listen(4)

    def meet(self) -> None:
        """Pings until the victim has come to the rendezvous."""
        if self.connects:
            if self.listener is None:
                self.listen()
            assert self.listener is not None
            self.listener.setblocking(False)
            for _ in range(10):
                self.ping()
                with contextlib.suppress(BlockingIOError):
                    self.hello, _ = self.listener.accept()
                    self.hello.setblocking(True)
                    return
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(10):
                self.ping()
                with contextlib.suppress(ConnectionRefusedError):
                    sock.connect(self.name)
                    self.hello = sock
                    return
        raise AssertionError("the victim does not come to the rendezvous")

    def send(self, message: bytes, fds: Sequence[int]) -> None:
        """One datagram on the rendezvous."""
        assert self.hello is not None
        socket.send_fds(self.hello, [message], list(fds))

    def receive(self) -> tuple[int, list[int]]:
        """The victim's answer: its kind (0 for a hang-up) and its descriptors."""
        assert self.hello is not None
        self.hello.settimeout(DEADLINE_S)
        message, fds, _, _ = socket.recv_fds(self.hello, 64, 8)
        if not message:
            return 0, fds
        return _MESSAGE.unpack(message)[2], fds

    def message(
        self,
        *,
        magic: int = _MAGIC,
        version: int = VERSION,
        kind: int | None = None,
        slot: int = 0,
        transport: int | None = None,
    ) -> bytes:
        """A proper message of this role, except for what is said."""
        host, port = self.tcp.getsockname()
        if transport is None:
            transport = self.transport
        if kind is None:
            kind = ACK if self.connects else HELLO
        address = b"\0" * 10 + b"\xff\xff" + socket.inet_aton(host)
        return _MESSAGE.pack(magic, version, kind, slot, 0, transport, port, address)

    def _map(self, fd: int) -> mmap.mmap:
        memory = mmap.mmap(fd, os.fstat(fd).st_size)
        os.close(fd)
        return memory

    def offered(self) -> list[int]:
        """As the acceptor: the descriptors of a proper hello, but for the bell's."""
        return [segment()]

    def came(self, fds: list[int]) -> None:
        """As the connector: what the hello brought behind the bell's descriptors."""
        assert not fds

    def upgrade(self) -> None:
        """The whole handshake, as the protocol has it."""
        self.meet()
        if self.connects:
            kind, fds = self.receive()
            assert kind == HELLO
            self.memory = self._map(fds[0])
            theirs = fds[1:3]
            self.came(fds[3:])
            self.send(self.message(), self.own)
            self.state(ATTACHED)
        else:
            fd, *more = self.offered()
            self.send(self.message(), [fd, *self.own, *more])
            self.memory = self._map(fd)
            self.ping()
            kind, theirs = self.receive()
            assert (kind, len(theirs)) == (ACK, 2)
            self.state(READY)
        self.bell = self._map(theirs[0])
        self.latch = socket.socket(fileno=theirs[1])
        self.ping_until_cut()

    def ping_until_cut(self) -> None:
        """The victim's answers come by its ring from some byte on."""
        for _ in range(10):
            self.tcp.sendall(b"p")
            until("an answer", self._answered)
            if self.get(self.rx, "wpos"):
                self.take(self.get(self.rx, "wpos"))
                return
            assert self.tcp.recv(1) == b"p"
        raise AssertionError("the victim does not cut over")

    def take(self, upto: int) -> None:
        """Reads the victim's ring up to that position."""
        self.put(self.rx, "rpos", upto)

    def _answered(self) -> bool:
        readable, _, _ = select.select([self.tcp], [], [], 0)
        return bool(readable) or self.get(self.rx, "wpos") != 0

    # -- the shared memory

    @property
    def tx(self) -> int:
        """The ring that this end writes."""
        return 0 if self.connects else 1

    @property
    def rx(self) -> int:
        """The ring that this end reads."""
        return 1 - self.tx

    def state(self, value: int) -> None:
        """Writes the segment's state."""
        assert self.memory is not None
        struct.pack_into("=I", self.memory, 20, value)

    def get(self, ring_: int, field: str) -> int:
        """A field of a ring."""
        assert self.memory is not None
        offset, size = FIELDS[field]
        at = 128 + 384 * ring_ + offset
        return int.from_bytes(self.memory[at : at + size], "little")

    def put(self, ring_: int, field: str, value: int) -> None:
        """Writes a field of a ring."""
        assert self.memory is not None
        offset, size = FIELDS[field]
        form = "=Q" if size == 8 else "=I"
        struct.pack_into(form, self.memory, 128 + 384 * ring_ + offset, value)

    def cut_over(self, off_by: int = 0) -> None:
        """This end's stream moves to its ring at the present byte."""
        sent = struct.unpack_from(
            "=Q", self.tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200
        )[0]
        self.put(self.tx, "cut", (sent + off_by) % 2**64)
        self.put(self.tx, "pflags", self.get(self.tx, "pflags") | CUT)

    def write(self, data: bytes) -> None:
        """Puts bytes into the ring and wakes the victim."""
        assert self.memory is not None
        wpos = self.get(self.tx, "wpos")
        base = HEADER + self.tx * AREA
        at = wpos % 16384
        first = data[: 16384 - at]
        self.memory[base + at : base + at + len(first)] = first
        self.memory[base : base + len(data) - len(first)] = data[len(first) :]
        self.put(self.tx, "wpos", wpos + len(data))
        self.nudge()

    def nudge(self) -> None:
        """Says that every connection of the victim's bell has news, and rings.

        A sleeper on the futex looks again by itself, soon.
        """
        assert self.bell is not None
        assert self.latch is not None
        for at in (*range(384, 384 + 2048, 8), *range(256, 288, 8)):
            struct.pack_into("=Q", self.bell, at, 2**64 - 1)
        ring(self.latch)
