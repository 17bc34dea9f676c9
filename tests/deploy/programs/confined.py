# SPDX-License-Identifier: Apache-2.0
"""Starts a program under restrictions as systemd makes them.

``confined.py KIND CMD...``; what is forbidden is answered by an error:

syscalls   SystemCallFilter= with the words of CONFINED_SYSCALLS
netlink    RestrictAddressFamilies= without AF_NETLINK
wx         MemoryDenyWriteExecute=
none       nothing, to vouch for the rest
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys

import pyseccomp as seccomp

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65


def prctl(option: int, value: int) -> None:
    """Or an OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Confines this process and becomes the program."""
    kind, argv = sys.argv[1], sys.argv[2:]
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if kind == "syscalls":
        rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
        for name in os.environ["CONFINED_SYSCALLS"].split():
            try:
                rules.add_rule(seccomp.ALLOW, name)
            except (OSError, RuntimeError):
                # Of another architecture, or newer than the library of filters.
                continue
        rules.load()
    elif kind == "netlink":
        rules = seccomp.SyscallFilter(seccomp.ALLOW)
        rules.add_rule(
            seccomp.ERRNO(errno.EAFNOSUPPORT),
            "socket",
            seccomp.Arg(0, seccomp.EQ, int(socket.AF_NETLINK)),
        )
        rules.load()
    elif kind == "wx":
        prctl(_PR_SET_MDWE, 1)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
