# SPDX-License-Identifier: Apache-2.0
"""A channel between two processes on one host, without sockets on the data path.

One process makes the channel and sends it over a connected Unix socket, the other
attaches::

    with Channel.create(sock) as channel:       # one process
        channel.write_all(b"hello")
        channel.shutdown()

    with Channel.attach(sock) as channel:       # the other
        while data := channel.read(65536):
            ...

What this guarantees:

* Bytes arrive once, in order, or an exception says why not.
* ``readinto``, ``write`` and ``write_all`` copy between the ring and the caller's
  buffer directly; Python makes no copy in between.
* The Unix socket stays open as the sign of life: when the other process is gone, what
  it had published can still be read, then :class:`PeerDied` is raised.
* One thread may read while another writes.  A second reader (or writer) at the same
  time is an error, not a corruption.
* A timeout is in seconds; None waits for ever, 0 does not wait.  Signal handlers run
  while a call waits, and the call goes on afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from kmap import native

# Anything with the buffer protocol; collections.abc.Buffer needs Python 3.12.
ReadableBuffer = Any
WritableBuffer = Any

DEFAULT_RING_SIZE = 262144
_GREETING = b"kmap-channel/1"
_MAX_WAIT_MS = 2**31 - 1


class WouldBlock(BlockingIOError):
    """With timeout 0: nothing to read, or no space to write."""


class PeerDied(ConnectionResetError):
    """The other process went away without ending its stream."""


class ProtocolViolation(ConnectionError):
    """The other process wrote something impossible into the shared memory."""


@dataclass(frozen=True)
class ChannelStats:
    """Counts of this end since the channel was made."""

    futex_wakes: int
    futex_sleeps: int
    bells_rung: int
    bell_sleeps: int
    grows: int


class _PyBuffer(ctypes.Structure):
    """Py_buffer: in the stable ABI from Python 3.11, and no different in 3.10."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_SIMPLE = 0
_WRITABLE = 1
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


@contextlib.contextmanager
def _memory(obj: ReadableBuffer, flags: int) -> Iterator[tuple[int, int]]:
    """Address and length of the memory of obj, which cannot move meanwhile."""
    view = _PyBuffer()
    _get_buffer(obj, ctypes.byref(view), flags)
    try:
        yield view.buf or 0, view.len
    finally:
        _release_buffer(ctypes.byref(view))


class _Deadline:
    """Milliseconds that remain of a timeout in seconds, as the C ABI takes them."""

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and (math.isnan(timeout) or timeout < 0):
            raise ValueError(f"timeout must be None, 0 or positive, not {timeout!r}")
        self._end = None if timeout is None else time.monotonic() + timeout
        self._poll = timeout == 0

    def milliseconds(self) -> int:
        if self._end is None:
            return -1
        if self._poll:
            return 0
        # At least 1: a wait must not turn into a poll as it ends.
        left = math.ceil((self._end - time.monotonic()) * 1000)
        return max(1, min(left, _MAX_WAIT_MS))

    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


def _error(code: int) -> Exception:
    """The exception for -code, a result of the C ABI."""
    text = os.strerror(code)
    if code == errno.EAGAIN:
        return WouldBlock(code, text)
    if code == errno.ECONNRESET:
        return PeerDied(code, "the peer died without ending its stream")
    if code == errno.EPROTO:
        return ProtocolViolation(code, "the peer broke the ring protocol")
    # OSError picks the subclass: TimeoutError, BrokenPipeError, PermissionError.
    return OSError(code, text)


class Channel:
    """One end of a channel; made by :meth:`create` or :meth:`attach`."""

    def __init__(self, handle: int, liveness: socket.socket | None) -> None:
        self._lib = native.library()
        self._handle: int | None = handle
        self._liveness = liveness
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._state = threading.Lock()
        self._users = 0
        self._closing = False
        if liveness is not None:
            result = self._lib.kmap_channel_set_liveness(handle, liveness.fileno())
            if result < 0:
                self.close()
                raise _error(-result)

    @classmethod
    def create(
        cls, sock: socket.socket | None = None, *, ring_size: int = DEFAULT_RING_SIZE
    ) -> Channel:
        """Makes a channel and sends it over sock, which becomes the sign of life.

        The socket stays the caller's and must stay open as long as the channel.
        Without one, pass :attr:`fds` on yourself; a dead peer then goes unnoticed.
        """
        lib = native.library()
        handle = native.ChannelPointer()
        result = lib.kmap_channel_create(ring_size, ctypes.byref(handle))
        if result < 0:
            raise _error(-result)
        assert handle.value is not None
        channel = cls(handle.value, sock)
        if sock is not None:
            try:
                socket.send_fds(sock, [_GREETING], list(channel.fds))
            except BaseException:
                channel.close()
                raise
        return channel

    @classmethod
    def attach(cls, sock: socket.socket) -> Channel:
        """Receives the channel that the other end of sock made.

        Raises ProtocolViolation for a message that is not a channel, PermissionError
        for memory that is not sealed, and ConnectionError if the sender has gone.
        """
        message, fds, flags, _ = socket.recv_fds(
            sock, len(_GREETING), native.CHANNEL_FDS, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not message:
                raise ConnectionError("the peer closed before it sent a channel")
            if message != _GREETING or flags & socket.MSG_CTRUNC:
                raise ProtocolViolation(errno.EPROTO, "the message is not a channel")
            return cls.attach_fds(fds, liveness=sock)
        except BaseException:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            raise

    @classmethod
    def attach_fds(
        cls, fds: list[int], *, liveness: socket.socket | None = None
    ) -> Channel:
        """Attaches to the memfd and doorbells that :attr:`fds` of the other end lists.

        The channel owns the descriptors afterwards; on an exception the caller still
        does.
        """
        if len(fds) != native.CHANNEL_FDS:
            raise ProtocolViolation(
                errno.EPROTO,
                f"a channel has {native.CHANNEL_FDS} descriptors, not {len(fds)}",
            )
        lib = native.library()
        handle = native.ChannelPointer()
        result = lib.kmap_channel_attach(native.ChannelFds(*fds), ctypes.byref(handle))
        if result < 0:
            raise _error(-result)
        assert handle.value is not None
        return cls(handle.value, liveness)

    @contextlib.contextmanager
    def _use(self) -> Iterator[int]:
        """The handle, which is not freed before this use ends."""
        with self._state:
            if self._handle is None or self._closing:
                raise ValueError("the channel is closed")
            self._users += 1
            handle = self._handle
        try:
            yield handle
        finally:
            with self._state:
                self._users -= 1
                self._free_if_unused()

    def _free_if_unused(self) -> None:
        if self._closing and self._users == 0 and self._handle is not None:
            self._lib.kmap_channel_close(self._handle)
            self._handle = None

    @property
    def fds(self) -> tuple[int, ...]:
        """The memfd and the four doorbells, which stay the channel's."""
        with self._use() as handle:
            fds = native.ChannelFds()
            result = self._lib.kmap_channel_fds(handle, fds)
            if result < 0:
                raise _error(-result)
            return tuple(fds)

    def _transfer(
        self,
        function: Any,
        busy: threading.Lock,
        what: str,
        memory: tuple[int, int],
        timeout: float | None,
    ) -> int:
        address, length = memory
        deadline = _Deadline(timeout)
        if not busy.acquire(blocking=False):
            raise RuntimeError(f"another thread is {what} this channel")
        try:
            with self._use() as handle:
                while True:
                    result: int = function(
                        handle, address, length, deadline.milliseconds()
                    )
                    if result >= 0:
                        return result
                    # A signal: the interpreter runs its handler between these two
                    # calls, and a handler that raises ends the wait.
                    if result != -errno.EINTR:
                        raise _error(-result)
                    if deadline.passed():
                        raise _error(errno.ETIMEDOUT)
        finally:
            busy.release()

    def readinto(self, buffer: WritableBuffer, timeout: float | None = None) -> int:
        """Reads at least one byte into buffer; 0 is the end of the peer's stream."""
        with _memory(buffer, _WRITABLE) as memory:
            if memory[1] == 0:
                raise ValueError("the buffer is empty, and 0 would mean end of stream")
            return self._transfer(
                self._lib.kmap_channel_read, self._reading, "reading", memory, timeout
            )

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """Reads 1 to size bytes; empty at the end of the peer's stream."""
        buffer = bytearray(size)
        count = self.readinto(buffer, timeout)
        return bytes(memoryview(buffer)[:count])

    def write(self, data: ReadableBuffer, timeout: float | None = None) -> int:
        """Writes at least one byte of data and returns how many."""
        with _memory(data, _SIMPLE) as memory:
            if memory[1] == 0:
                return 0
            return self._transfer(
                self._lib.kmap_channel_write, self._writing, "writing", memory, timeout
            )

    def write_all(self, data: ReadableBuffer, timeout: float | None = None) -> None:
        """Writes all of data; the timeout is for the whole."""
        end = None if timeout is None else time.monotonic() + timeout
        with memoryview(data) as whole, whole.cast("B") as view:
            done = 0
            while done < len(view):
                left = None if end is None else max(0.0, end - time.monotonic())
                with view[done:] as rest:
                    done += self.write(rest, left)

    def shutdown(self) -> None:
        """Ends this side's stream; the peer reads what is left, then the end."""
        with self._use() as handle:
            result = self._lib.kmap_channel_shutdown(handle)
            if result < 0:
                raise _error(-result)

    @property
    def readable(self) -> int:
        """Bytes that wait to be read here."""
        with self._use() as handle:
            return int(self._lib.kmap_channel_readable(handle))

    @property
    def unread(self) -> int:
        """Bytes written here that the peer has not read yet."""
        with self._use() as handle:
            return int(self._lib.kmap_channel_unread(handle))

    @property
    def stats(self) -> ChannelStats:
        """Counts of this end."""
        with self._use() as handle:
            raw = native.ChannelStats()
            self._lib.kmap_channel_get_stats(handle, ctypes.byref(raw))
            return ChannelStats(
                **{name: getattr(raw, name) for name, _ in raw._fields_}
            )

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._closing

    def close(self) -> None:
        """Ends the stream and frees the channel; the socket stays open.

        A call that another thread is in goes on, and the channel is freed when that
        call returns; until then the peer sees only the end of the stream.
        """
        with self._state:
            if not self._closing:
                self._closing = True
                if self._users and self._handle is not None:
                    self._lib.kmap_channel_shutdown(self._handle)
            self._free_if_unused()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_state"):
            self.close()
