# SPDX-License-Identifier: Apache-2.0
"""TCP whose messages an eBPF program moves to the socket at the other end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kmap.bench import machine
from kmap.results import CannotRun

_SOURCE = Path(__file__).with_name("sockmap.c")
# With the version in their names compilers come without a package named clang.
_COMPILERS = ("clang", *(f"clang-{version}" for version in range(20, 12, -1)))
# Where Debian has tools for root, which may not be in PATH.
_PLACES = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _run(*argv: str | Path) -> None:
    done = subprocess.run(
        list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotRun(
            f"sockmap: {argv[0]} {argv[1]} ended with {done.returncode}"
            + (f": {said[-1]}" if said else "")
            + "; it takes root, a kernel with CONFIG_BPF_STREAM_PARSER, and Debian's "
            "packages clang, libbpf-dev and bpftool"
        )


def _tool(package: str, *names: str) -> str:
    """The first of a few programs that is there."""
    for name in names:
        if path := shutil.which(name, path=_PLACES):
            return path
    raise CannotRun(f"sockmap: there is no {names[0]}: apt-get install {package}")


@contextlib.contextmanager
def group() -> Iterator[Path]:
    """A new cgroup in which TCP connections are joined; its file of processes."""
    clang = _tool("clang", *_COMPILERS)
    bpftool = _tool("bpftool", "bpftool")
    if os.geteuid() != 0:
        raise CannotRun("sockmap: only root may load eBPF programs: run this as root")
    with contextlib.ExitStack() as stack:
        cgroup = stack.enter_context(machine.new_group())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        binary, mount = directory / "sockmap.o", directory / "bpf"
        headers = f"-I/usr/include/{os.uname().machine}-linux-gnu"
        options = ("-O2", "-g", "-target", "bpf", headers)
        _run(clang, *options, "-c", _SOURCE, "-o", binary)
        mount.mkdir()
        _run("mount", "-t", "bpf", "none", mount)
        stack.callback(_run, "umount", mount)
        # Its parent has to be a file system for this, or bpftool mounts one there.
        pins = mount / "pins"
        _run(bpftool, "prog", "loadall", binary, pins, "pinmaps", pins)
        establish = ("sock_ops", "pinned", pins / "establish")
        redirect = (pins / "redirect", "msg_verdict", "pinned", pins / "sockets")
        _run(bpftool, "prog", "attach", "pinned", *redirect)
        stack.callback(_run, bpftool, "prog", "detach", "pinned", *redirect)
        _run(bpftool, "cgroup", "attach", cgroup, *establish)
        stack.callback(_run, bpftool, "cgroup", "detach", cgroup, *establish)
        yield cgroup / "cgroup.procs"
