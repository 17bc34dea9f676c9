# SPDX-License-Identifier: Apache-2.0
"""One end of a TCP connection: the calls it makes, and what it does to itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

from kmap.stress.flow import Flow, Mismatch, Setting
from kmap.stress.plan import ConnectionPlan


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
        self._act_due = threading.Event()
        self._act_lock = threading.Lock()
        self._choice = random.Random(f"{setting.case}/{plan.number}/{setting.side}/act")
        # Ends what another process does with the connection on our behalf.
        self.dismiss: Callable[[], None] = lambda: None
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
        self.dismiss()
        with self._act_lock:
            self.done = True
            if self.end.dup:
                self.out_sock.close()
            if self.gone and self.end.act == "close":
                # The number may be somebody else's by now.
                self.sock.detach()
            elif self.end.act == "move" and self._choice.random() < 0.5:
                self._close_by_dup2()
            else:
                self.sock.close()
        self._act_due.set()

    def abandon(self) -> None:
        if self.end.dup:
            self.out_sock.close()
        self.sock.close()

    def _close_by_dup2(self) -> None:
        fd = self.sock.detach()
        with open("/dev/null", "rb") as null:
            os.dup2(null.fileno(), fd)
        os.close(fd)
        self.outcome.acts += 1

    def act(self) -> None:
        act = self.end.act
        if act == "move":
            self._move()
        elif act == "reset":
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.outcome.acts += 1
            self.outcome.end = "reset here"
            self.reset = self.broken = True
        else:
            self._act_due.set()

    @property
    def acts_later(self) -> bool:
        """Whether the act is for another thread, which runs act_later."""
        return self.end.act not in ("", "move", "reset")

    def act_later(self) -> None:
        """What other threads do with the connection, while this end may be in a call.

        Returns when the end is done, at the latest.
        """
        self._act_due.wait()
        time.sleep(self.end.act_delay_us / 1e6)
        with self._act_lock:
            if self.done:
                return
            act = self.end.act
            if act == "close":
                self.gone = True
                os.close(self.fd)
            elif act == "dup2":
                self.gone = True
                with socket.socket() as unconnected:
                    os.dup2(unconnected.fileno(), self.fd, inheritable=False)
            else:
                how = {"shut-rd": 0, "shut-wr": 1, "shut-rdwr": 2}[act]
                try:
                    if act != "shut-wr":
                        # A writer that the window holds up would, on the kernel too,
                        # wait for the minute that FIN-WAIT-2 lasts.
                        self.sock.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    self.sock.shutdown(how)
                except OSError as error:
                    # The peer has reset the connection already.
                    if error.errno != errno.ENOTCONN:
                        raise
                    return
            self.outcome.acts += 1

    def _move(self) -> None:
        """Gives the connection another number; no other thread uses this one."""
        old = self.sock.detach()
        how = self._choice.choice(("dup", "fcntl", "dup2", "dup3"))
        if how == "dup":
            new = os.dup(old)
        elif how == "fcntl":
            new = fcntl.fcntl(old, fcntl.F_DUPFD_CLOEXEC, 100)
        else:
            new = socket.socket().detach()
            os.dup2(old, new, inheritable=how == "dup2")
        os.close(old)
        self.sock = self.out_sock = socket.socket(fileno=new)
        self.fd = self.out_fd = new
        self.sock.settimeout(None)
        self.outcome.acts += 1

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
