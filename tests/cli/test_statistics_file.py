# SPDX-License-Identifier: Apache-2.0
"""What other processes of the user can do with the statistics memfd: read it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import sys

import pytest

from kmap import procfs
from tests.conftest import Spawn

# Both ends of a connection that is used until it is upgraded, in this process and,
# half of the time, in a child that it forks then.
_PROGRAM = """
import os, socket, sys, threading
listener = socket.create_server(("127.0.0.1", 0))
def echo():
    sock, _ = listener.accept()
    while data := sock.recv(100):
        sock.sendall(data)
threading.Thread(target=echo, daemon=True).start()
link = socket.create_connection(listener.getsockname())
def ask(count):
    for _ in range(count):
        link.sendall(b"question")
        assert link.recv(100) == b"question"
ask(50)
if os.fork() == 0:
    # The mapping that it inherits must still be writable.
    os._exit(0)
os.wait()
print("ready", flush=True)
sys.stdin.readline()
ask(50)
print("done", flush=True)
"""


def test_it_cannot_be_written(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    program = spawn(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        env=kmap_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    (file,) = procfs.open_statistics(program.pid)
    fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
    with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)):
        size = os.fstat(fd).st_size
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size + 4096)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096)
        with pytest.raises(OSError, match="Operation not permitted") as error:
            os.posix_fallocate(fd, size, 4096)
        assert error.value.errno == errno.EPERM
        with mmap.mmap(fd, 4096, prot=mmap.PROT_READ) as reading:
            assert reading[:8] == b"MAPSTATS"
    seen = procfs.read_statistics(file)
    assert seen is not None
    assert len(seen.rows) == 2
    program.stdin.write("go on\n")
    program.stdin.flush()
    assert program.stdout.readline() == "done\n"
    program.stdin.close()
    assert program.wait(20) == 0
