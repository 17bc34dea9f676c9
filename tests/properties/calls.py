# SPDX-License-Identifier: Apache-2.0
"""The calls of a program, made in one process on the ends that it holds.

A host knows nothing of what should come out: it makes the call, with no help of
Python's own socket module, and tells result, errno and a checksum of the bytes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import socket
import struct
import tempfile
import zlib
from typing import Any

from tests.conformance import kit

MOST = 300 * 1024
SETS = 3
SETTLED_BYTES = 160  # of struct tcp_info: up to tcpi_bytes_received
RWF_NOWAIT = 8
SPLICE_F_NONBLOCK = 2
FIONREAD, FIONBIO, TIOCOUTQ = 0x541B, 0x5421, 0x5411
CANARY = b"\xaa" * 16

# What select calls readable, writable and exceptional, in poll's bits.
IN, PRI, OUT = select.POLLIN, select.POLLPRI, select.POLLOUT

Result = list[Any]


def split(size: int, parts: int) -> list[int]:
    """The lengths of a vector with that many parts, one of which is empty."""
    if parts <= 1:
        return [size]
    if parts == 2:
        return [size // 2, size - size // 2]
    return [size // 3, 0, size - size // 3]


class Buffers:
    """A vector to receive into, with a canary behind each part."""

    def __init__(self, sizes: list[int], data: bytes = b"") -> None:
        self.sizes = sizes
        self.parts = [ctypes.create_string_buffer(size + len(CANARY)) for size in sizes]
        at = 0
        for part, size in zip(self.parts, sizes, strict=True):
            ctypes.memmove(ctypes.addressof(part) + size, CANARY, len(CANARY))
            if data:
                ctypes.memmove(part, data[at : at + size], size)
                at += size
        self.vector = kit.iovec(self.parts, sizes)

    def taken(self, count: int) -> bytes:
        """The first count bytes; fails when more than the buffers were written."""
        for part, size in zip(self.parts, self.sizes, strict=True):
            assert part.raw[size:] == CANARY, "written beyond the buffer"
        data = b"".join(
            part.raw[:size] for part, size in zip(self.parts, self.sizes, strict=True)
        )
        assert not any(data[count : count + 64]), "written beyond the count"
        return data[:count]


class Host:
    """One process's ends: their descriptors by slot, and its epoll sets."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        self.sets: list[int] = []
        self.pipe = os.pipe()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(kit.pattern(2 * MOST))
        self.file.flush()
        os.set_blocking(self.pipe[0], False)
        kit.ok("fcntl", self.pipe[1], 1031, 1 << 20)  # F_SETPIPE_SZ

    # -- connections

    def listen(self) -> list[Any]:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        # The window of every connection: what a program leaves unread has to fit.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        self.listener.listen(16)
        return list(self.listener.getsockname())

    def connect(self, address: list[Any]) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        sock.connect(tuple(address))
        kit.no_delay(sock)
        self.slots[0, 0] = sock.detach()

    def accept(self, flags: int) -> None:
        fd = kit.ok("accept4", self.listener.fileno(), None, None, flags)
        self.slots[1, 0] = fd
        kit.ok(
            "setsockopt", fd, socket.IPPROTO_TCP, socket.TCP_NODELAY,
            ctypes.byref(ctypes.c_int(1)), 4,
        )  # fmt: skip

    def fresh_sets(self) -> None:
        self.sets = [kit.ok("epoll_create1", 0) for _ in range(SETS)]

    def finish(self) -> None:
        """Closes all of it, with a reset, so that nothing lingers."""
        for fd in self.slots.values():
            self._no_linger(fd)
            os.close(fd)
        self.slots.clear()
        for fd in self.sets:
            os.close(fd)
        self.sets.clear()
        self._empty_pipe()

    def throw(self, end: int) -> None:
        assert kit.c("send", self.slots[end, 0], b"o", 1, 0) == (1, 0)

    def catch(self, end: int) -> None:
        """The socket may be non-blocking from the start."""
        into = ctypes.create_string_buffer(2)
        kit.readable(self.slots[end, 0])
        assert kit.c("recv", self.slots[end, 0], into, 2, 0) == (1, 0)
        assert into.value == b"o"

    def on_ring(self, end: int) -> bool:
        return kit.UNDER_KMAP and _on_ring(self.slots[end, 0])

    def blocking(self, end: int, on: bool) -> None:
        os.set_blocking(self.slots[end, 0], on)

    # -- looking, without going through what the library answers itself

    def info(self, end: int) -> list[int]:
        """TCP's state, bytes received, bytes sent, bytes not sent yet."""
        fd = next(fd for (e, _), fd in self.slots.items() if e == end)
        raw = bytearray(256)
        buffer = (ctypes.c_char * 256).from_buffer(raw)
        size = ctypes.c_uint32(256)
        kit.ok("getsockopt", fd, socket.IPPROTO_TCP, 11, buffer, ctypes.byref(size))
        received = struct.unpack_from("=Q", raw, 128)[0]
        notsent = struct.unpack_from("=I", raw, 144)[0]
        sent, retransmitted = struct.unpack_from("=QQ", raw, 200)
        return [raw[0], received, sent - retransmitted, notsent]

    def push(self, end: int) -> None:
        """Sends what MSG_MORE holds back."""
        fd = next(fd for (e, _), fd in self.slots.items() if e == end)
        kit.ok(
            "setsockopt", fd, socket.IPPROTO_TCP, socket.TCP_NODELAY,
            ctypes.byref(ctypes.c_int(1)), 4,
        )  # fmt: skip

    # -- bytes

    def give(
        self, end: int, slot: int, call: str, size: int, start: int, flags: int,
        parts: int,
    ) -> Result:  # fmt: skip
        """Sends the pattern from start on; [result, errno]."""
        fd = self.slots[end, slot]
        if call == "splice":
            return self._splice_in(fd, size, start)
        if call == "sendfile":
            offset = ctypes.c_int64(start % 65521)
            source = self.file.fileno()
            told = kit.c("sendfile", fd, source, ctypes.byref(offset), size)
            moved = offset.value - start % 65521
            assert moved == max(told[0], 0), f"the offset moved by {moved}"
            return list(told)
        data = kit.pattern(size, start)
        if call in ("send", "sendto"):
            more = (None, 0) if call == "sendto" else ()
            return list(kit.c(call, fd, data, size, flags, *more))
        if call == "write":
            return list(kit.c(call, fd, data, size))
        lengths = split(size, parts)
        buffers = Buffers(lengths, data)
        if call == "writev":
            return list(kit.c(call, fd, buffers.vector, len(lengths)))
        if call == "pwritev2":
            nowait = RWF_NOWAIT if flags & socket.MSG_DONTWAIT else 0
            return list(kit.c(call, fd, buffers.vector, len(lengths), -1, nowait))
        message = kit.message(buffers.vector)
        if call == "sendmsg":
            return list(kit.c(call, fd, ctypes.byref(message), flags))
        assert call == "sendmmsg"
        half = len(lengths) // 2
        first = kit.MsgHdr(iov=buffers.vector, iovlen=half)
        rest = (kit.IoVec * (len(lengths) - half))(*buffers.vector[half:])
        many = (kit.MMsgHdr * 2)(
            kit.MMsgHdr(first, 0), kit.MMsgHdr(kit.message(rest), 0)
        )
        result, error = kit.c(call, fd, many, 2, flags)
        return [sum(m.len for m in many[: max(result, 0)]), error, result]

    def _splice_in(self, fd: int, size: int, start: int) -> Result:
        """As many splices as it takes: how a splice is cut up is nobody's promise."""
        size = min(size, 1 << 16)
        os.write(self.pipe[1], kit.pattern(size, start))
        done, error, result = 0, 0, 0
        while done < size:
            result, error = kit.c(
                "splice", self.pipe[0], None, fd, None, size - done, SPLICE_F_NONBLOCK
            )
            if result <= 0:
                break
            done += result
        self._empty_pipe()
        return [done, error]

    def _empty_pipe(self) -> bytes:
        data = b""
        while True:
            try:
                data += os.read(self.pipe[0], 1 << 20)
            except BlockingIOError:
                return data

    def take(
        self, end: int, slot: int, call: str, size: int, flags: int, parts: int
    ) -> Result:
        """Receives; [result, errno, checksum of the bytes]."""
        fd = self.slots[end, slot]
        if call == "splice":
            return self._splice_out(fd, size)
        lengths = split(size, parts)
        if call in ("recv", "recvfrom", "read"):
            lengths = [size]
        into = Buffers(lengths)
        extra: Result = []
        if call == "read":
            result, error = kit.c(call, fd, into.parts[0], size)
        elif call == "recv":
            result, error = kit.c(call, fd, into.parts[0], size, flags)
        elif call == "recvfrom":
            address, room = ctypes.create_string_buffer(28), ctypes.c_uint32(28)
            result, error = kit.c(
                call, fd, into.parts[0], size, flags, address, ctypes.byref(room)
            )
            extra = [room.value]
        elif call == "readv":
            result, error = kit.c(call, fd, into.vector, len(lengths))
        elif call == "preadv2":
            nowait = RWF_NOWAIT if flags & socket.MSG_DONTWAIT else 0
            result, error = kit.c(call, fd, into.vector, len(lengths), -1, nowait)
        elif call == "recvmsg":
            message = kit.message(into.vector)
            control = ctypes.create_string_buffer(64)
            message.control, message.controllen = ctypes.addressof(control), 64
            result, error = kit.c(call, fd, ctypes.byref(message), flags)
            if result >= 0:
                extra = [message.flags, message.controllen, message.namelen]
        else:
            assert call == "recvmmsg"
            return self._take_many(fd, size, flags)
        # MSG_TRUNC writes nothing.
        data = into.taken(0 if flags & socket.MSG_TRUNC else max(result, 0))
        return [result, error, zlib.crc32(data), *extra]

    def _take_many(self, fd: int, size: int, flags: int) -> Result:
        lengths = split(size, 2)
        first, second = Buffers(lengths[:1]), Buffers(lengths[1:])
        many = (kit.MMsgHdr * 2)(
            kit.MMsgHdr(kit.message(first.vector), 0),
            kit.MMsgHdr(kit.message(second.vector), 0),
        )
        result, error = kit.c("recvmmsg", fd, many, 2, flags, None)
        taken = [*(m.len for m in many[: max(result, 0)]), 0, 0][:2]
        if flags & socket.MSG_TRUNC:
            return [sum(taken), error, zlib.crc32(b""), result]
        data = first.taken(taken[0]) + second.taken(taken[1])
        return [len(data), error, zlib.crc32(data), result, *taken]

    def _splice_out(self, fd: int, size: int) -> Result:
        size = min(size, 1 << 16)
        data, error, result = b"", 0, 0
        while len(data) < size:
            result, error = kit.c(
                "splice", fd, None, self.pipe[1], None, size - len(data),
                SPLICE_F_NONBLOCK,
            )  # fmt: skip
            if result <= 0:
                break
            data += self._empty_pipe()
        return [len(data), error if not data else 0, zlib.crc32(data)]

    def fill(self, end: int, start: int) -> int:
        """Sends until there is no room for longer than an ACK is delayed."""
        fd = next(fd for (e, _), fd in self.slots.items() if e == end)
        sent, quiet = 0, False
        while True:
            result, _ = kit.c(
                "send", fd, kit.pattern(1 << 16, start + sent), 1 << 16,
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )  # fmt: skip
            if result > 0:
                sent, quiet = sent + result, False
            elif quiet:
                return sent
            else:
                quiet = not kit.poll_one(fd, OUT, kit.QUIET_MS)

    # -- descriptors and options

    def nonblock(self, end: int, slot: int, how: str, on: bool) -> Result:
        fd = self.slots[end, slot]
        if how == "ioctl":
            value = ctypes.c_int(on)
            return list(kit.c("ioctl", fd, FIONBIO, ctypes.byref(value)))
        flags = kit.ok("fcntl", fd, 3, 0)
        wanted = flags | os.O_NONBLOCK if on else flags & ~os.O_NONBLOCK
        return [bool(flags & os.O_NONBLOCK), *kit.c("fcntl", fd, 4, wanted)]

    def shutdown(self, end: int, slot: int, how: int) -> Result:
        return list(kit.c("shutdown", self.slots[end, slot], how))

    def _no_linger(self, fd: int) -> None:
        value = ctypes.create_string_buffer(struct.pack("ii", 1, 0), 8)
        kit.c("setsockopt", fd, socket.SOL_SOCKET, socket.SO_LINGER, value, 8)

    def linger(self, end: int) -> None:
        for (e, _), fd in self.slots.items():
            if e == end:
                self._no_linger(fd)

    def close(self, end: int, slot: int) -> Result:
        return list(kit.c("close", self.slots.pop((end, slot))))

    def dup(self, end: int, slot: int, to: int, how: str) -> Result:
        fd, old = self.slots[end, slot], self.slots.get((end, to))
        if how == "dup2" and old is not None:
            return [kit.ok("dup2", fd, old) == old]
        if old is not None:
            kit.ok("close", old)
        new = kit.ok("dup", fd) if how == "dup" else kit.ok("fcntl", fd, 0, 0)
        self.slots[end, to] = new
        return [True]

    def option(self, end: int, slot: int, what: str, value: int) -> Result:
        fd = self.slots[end, slot]
        number = ctypes.c_int(-1)
        size = ctypes.c_uint32(4)
        if what == "fionread":
            return [*kit.c("ioctl", fd, FIONREAD, ctypes.byref(number)), number.value]
        if what == "outq":
            return [*kit.c("ioctl", fd, TIOCOUTQ, ctypes.byref(number)), number.value]
        if what == "error":
            result = kit.c(
                "getsockopt", fd, socket.SOL_SOCKET, socket.SO_ERROR,
                ctypes.byref(number), ctypes.byref(size),
            )  # fmt: skip
            return [*result, number.value]
        if what == "timeout":
            time = (ctypes.c_long * 2)(0, value * 1000)
            result = kit.c(
                "setsockopt", fd, socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                ctypes.byref(time), 16,
            )  # fmt: skip
            return list(result)
        assert what == "lowat"
        number.value = value
        result = kit.c(
            "setsockopt", fd, socket.SOL_SOCKET, socket.SO_RCVLOWAT,
            ctypes.byref(number), 4,
        )  # fmt: skip
        return list(result)

    # -- readiness

    def poll(self, call: str, end: int | None, events: int, sets: bool) -> Result:
        """What each descriptor of end (of this host, for None) and each set answers."""
        keys = sorted(k for k in self.slots if end is None or k[0] == end)
        fds = [(self.slots[key], events) for key in keys]
        if sets:
            fds += [(fd, IN) for fd in self.sets]
        if call == "select":
            return self._select(keys, fds)
        entries = (kit.PollFd * len(fds))(*(kit.PollFd(f, e, -1) for f, e in fds))
        if call == "poll":
            result = kit.ok("poll", entries, len(fds), 0)
        else:
            result = kit.ok("ppoll", entries, len(fds), kit.timespec(0.001), None)
        masks = [entry.revents & 0xFFFF for entry in entries]
        assert result == sum(1 for mask in masks if mask)
        return _named(keys, masks)

    def _select(
        self, keys: list[tuple[int, int]], fds: list[tuple[int, int]]
    ) -> Result:
        three = [(ctypes.c_uint64 * 16)() for _ in range(3)]
        for fd, events in fds:
            for bit, words in zip((IN, OUT, PRI), three, strict=True):
                if events & bit:
                    words[fd // 64] |= 1 << (fd % 64)
        top = max((fd for fd, _ in fds), default=-1) + 1
        time = (ctypes.c_long * 2)(0, 0)
        result = kit.ok("select", top, *three, time)
        masks = [
            sum(
                bit
                for bit, words in zip((IN, OUT, PRI), three, strict=True)
                if words[fd // 64] >> (fd % 64) & 1
            )
            for fd, _ in fds
        ]
        assert result == sum(bin(mask).count("1") for mask in masks)
        return _named(keys, masks)

    def control(
        self, which: int, op: int, end: int, slot: int, events: int, cookie: int
    ) -> Result:
        event = kit.EpollEvent(events & 0xFFFFFFFF, cookie)
        fd = self.slots[end, slot]
        return list(kit.c("epoll_ctl", self.sets[which], op, fd, ctypes.byref(event)))

    def nest(self, inner: int, op: int, cookie: int) -> Result:
        event = kit.EpollEvent(select.EPOLLIN, cookie)
        arguments = (op, self.sets[inner], ctypes.byref(event))
        return list(kit.c("epoll_ctl", self.sets[SETS - 1], *arguments))

    def wait(self, which: int, call: str, most: int, ms: int) -> list[tuple[int, int]]:
        events = (kit.EpollEvent * most)()
        if call == "epoll_pwait2":
            arguments: tuple[Any, ...] = (kit.timespec(ms / 1000), None)
        elif call == "epoll_pwait":
            arguments = (ms, None)
        else:
            arguments = (ms,)
        count = kit.ok(call, self.sets[which], events, most, *arguments)
        assert count <= most
        return [(events[i].data, events[i].events) for i in range(count)]

    def renew(self, which: int) -> None:
        kit.ok("close", self.sets[which])
        self.sets[which] = kit.ok("epoll_create1", 0)

    # -- a forked child

    def fork(self, call: str, *args: Any) -> Result:
        """Has a child make one of this host's calls; what the child got."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                result = getattr(self, call)(*args)
            except BaseException as error:
                result = [repr(error)]
            os.write(writing, json.dumps(result).encode())
            os._exit(0)
        os.close(writing)
        said = b""
        while part := os.read(reading, 1 << 16):
            said += part
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, f"the child ended with {status}"
        result = json.loads(said)
        assert isinstance(result, list)
        return result


def _named(keys: list[tuple[int, int]], masks: list[int]) -> Result:
    names = ["ab"[end] + str(slot) for end, slot in keys]
    names += [f"set{n}" for n in range(len(masks) - len(keys))]
    return [list(pair) for pair in zip(names, masks, strict=True)]


_HEADER = struct.Struct("=QIIIII")
_ROW = struct.Struct("=IIIIQ")


def _on_ring(fd: int) -> bool:
    """Like kit.on_ring, reading only rows that are used: it is asked often."""
    inode = os.fstat(fd).st_ino
    for path in kit.memfds():
        with open(path, "rb", buffering=0) as file:
            head = _HEADER.unpack(file.read(_HEADER.size))
            file.seek(head[2])
            rows = file.read(head[3] * head[5])
        for offset in range(0, len(rows), head[3]):
            state, _, _, _, number = _ROW.unpack_from(rows, offset)
            received, sent = struct.unpack_from("=QQ", rows, offset + 96)
            if number == inode and state == 2 and received and sent:
                return True
    return False


def error_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))
