# SPDX-License-Identifier: Apache-2.0
"""Programs that the library cannot or must not get into, and other preloaded ones.

One program in C that makes most of the calls, built and started in many ways.  What it
prints is the same but for one word: whether its connection was on a ring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from kmap import native
from tests.apps.process import PROGRAMS, Launch, find_program

FLAGS = ["-O2", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-pthread"]
NOBODY = "www-data"  # as user and as group; every Debian has both
ALLOCATORS = ["libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libmimalloc.so.2"]

# Two threads of Python that talk over TCP until they are on a ring, a child, a fork.
PYTHON = """
import os, socket, subprocess, threading
listener = socket.create_server(("127.0.0.1", 0))
def echo():
    server, _ = listener.accept()
    with server:
        while data := server.recv(1 << 16):
            server.sendall(data)
thread = threading.Thread(target=echo)
thread.start()
with socket.create_connection(listener.getsockname()) as client:
    for n in range(1, 300):
        client.sendall(bytes(n * 50))
        got = 0
        while got < n * 50:
            got += len(client.recv(1 << 16))
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}")]
thread.join()
print(subprocess.check_output(["cat"], input=b"text"))
pid = os.fork()
if pid == 0:
    os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print("on a ring:", int(any(n.startswith("/memfd:kmap-stats") for n in names)))
"""


@dataclass(frozen=True)
class Built:
    """Directories and compilers for many_calls.c."""

    directory: Path

    def program(self, name: str, compiler: str = "gcc", *flags: str) -> Path:
        path = self.directory / name
        if not path.exists():
            source = PROGRAMS / "many_calls.c"
            command = [find_program(compiler), *FLAGS, *flags, str(source), "-o"]
            subprocess.run([*command, str(path)], check=True)
        return path


@pytest.fixture
def built(public_path: Path) -> Built:
    return Built(public_path)


@pytest.fixture
def public_env(public_path: Path, kmap_env: dict[str, str]) -> dict[str, str]:
    """Kmap's environment with a library that every user may read."""
    copy = public_path / native.PRELOAD_NAME
    shutil.copy(native.preload_path(), copy)
    return {**kmap_env, "LD_PRELOAD": str(copy)}


def same(
    launch: Launch,
    argv: list[str],
    envs: tuple[dict[str, str], dict[str, str]],
    *,
    ring: bool,
    user: str | None = None,
    exits: int = 5,
) -> None:
    """Runs it without and with the library, and compares."""
    seen: list[str] = []
    for env in envs:
        done = launch(argv, env=env, user=user)
        seen.append(done.finish(exits=exits))
        assert done.stderr() == ""
    assert "on a ring: 0" in seen[0]
    if ring:
        assert "on a ring: 1" in seen[1], "the test would prove nothing"
        seen[0] = seen[0].replace("on a ring: 0", "on a ring: 1")
    assert seen[0] == seen[1]


def test_the_program_upgrades_where_it_can(
    launch: Launch,
    built: Built,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
) -> None:
    """What the tests below find missing is there when nothing forbids it."""
    same(launch, [str(built.program("plain"))], (kernel_env, kmap_env), ring=True)


@pytest.mark.parametrize(
    "compiler", [["gcc", "-static"], ["musl-gcc"], ["musl-gcc", "-static"]]
)
def test_static_and_musl(
    launch: Launch,
    built: Built,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    compiler: list[str],
) -> None:
    """A loader that does not know the library, or none at all: nothing happens."""
    program = built.program("foreign", *compiler)
    # The argument: also nothing is left open.
    same(launch, [str(program), "x"], (kernel_env, kmap_env), ring=False)


@pytest.mark.parametrize("how", ["none", "setuid", "setgid", "setcap"])
def test_privileged(
    launch: Launch,
    built: Built,
    kernel_env: dict[str, str],
    public_env: dict[str, str],
    how: str,
) -> None:
    """The loader ignores LD_PRELOAD for a program that gains something by exec."""
    if os.geteuid() != 0:
        pytest.skip("only root can make such programs")
    program = built.program("privileged")
    if how == "setcap":
        tool = find_program("setcap")
        subprocess.run([tool, "cap_net_bind_service+ep", str(program)], check=True)
    elif how != "none":
        program.chmod(0o4755 if how == "setuid" else 0o2755)
    envs = (kernel_env, public_env)
    same(launch, [str(program)], envs, ring=how == "none", user=NOBODY)


@pytest.mark.parametrize("first", ["allocator", "kmap"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("program", ["c", "python"])
def test_allocators(
    launch: Launch,
    built: Built,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    program: str,
    allocator: str,
    first: str,
) -> None:
    """Allocators that call libc before the library has started, on either side."""
    if program == "c":
        argv, exits = [str(built.program("plain"))], 5
    else:
        argv, exits = [find_program("python3"), "-c", PYTHON], 0
    pair = [allocator, kmap_env["LD_PRELOAD"]]
    both = ":".join(pair if first == "allocator" else reversed(pair))
    envs = (
        {**kernel_env, "LD_PRELOAD": allocator},
        {**kmap_env, "LD_PRELOAD": both},
    )
    same(launch, argv, envs, ring=True, exits=exits)
