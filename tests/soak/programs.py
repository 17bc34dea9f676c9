# SPDX-License-Identifier: Apache-2.0
"""Where the programs are, and a network namespace of the soak's own."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct

from kmap.demo import programs
from kmap.results import CannotRun

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def find(name: str) -> str:
    """The path of an installed program."""
    found = programs.find_path(name)
    if found is None:
        raise CannotRun(f"{name} is not installed: scripts/setup test demo installs it")
    return found


def own_network() -> bool:
    """Moves this process, and what it starts, to a network namespace of its own.

    Only root may; without it the soak shares the ports and names of the host.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        return False
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
    return True
