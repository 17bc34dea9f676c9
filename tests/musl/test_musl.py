# SPDX-License-Identifier: Apache-2.0
"""The preload library for musl: a connection between programs on two libcs is a ring.

One program in C, built for either libc, each with the library made for its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kmap import native, procfs, snapshot
from tests.apps.process import PROGRAMS as APPS
from tests.apps.process import Launch, find_program
from tests.apps.rings import Rings, rings
from tests.spec.test_exports import exported, undefined

PROGRAMS = Path(__file__).parent / "programs"
FLAGS = ["-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-pthread"]
COMPILERS = {"glibc": "gcc", "musl": "musl-gcc"}
LIBRARIES: dict[str, Callable[[], Path]] = {
    "glibc": native.preload_path,
    "musl": native.musl_path,
}
LIBCS = list(COMPILERS)

pytestmark = pytest.mark.skipif(
    not shutil.which("musl-gcc"), reason="musl-tools is not installed"
)


def compiled(source: Path, libc: str, directory: Path) -> str:
    """A program for this libc."""
    path = directory / f"{source.stem}-{libc}"
    compiler = find_program(COMPILERS[libc])
    subprocess.run([compiler, *FLAGS, str(source), "-o", str(path)], check=True)
    return str(path)


def under(env: dict[str, str], library: Path) -> dict[str, str]:
    """The environment in which a library is preloaded."""
    return {**env, "LD_PRELOAD": str(library)}


@pytest.mark.parametrize("asker", LIBCS)
@pytest.mark.parametrize("server", LIBCS)
def test_two_ends(
    launch: Launch,
    tmp_path: Path,
    mode: str,
    kernel_env: dict[str, str],
    server: str,
    asker: str,
) -> None:
    """Messages, streams, forks and threads; by ring, whatever libc is at the ends."""
    ends = {}
    for libc in {server, asker}:
        program = compiled(PROGRAMS / "ends.c", libc, tmp_path)
        env = kernel_env if mode == "kernel" else under(kernel_env, LIBRARIES[libc]())
        ends[libc] = (program, env)
    program, env = ends[server]
    serving = launch([program, "serve"], env=env)
    port = serving.wait_line()
    program, env = ends[asker]
    asking = launch([program, "ask", port], env=env)
    assert asking.wait_line() == "done"
    for end in (serving, asking):
        # Twice 300 messages of half 20 kB; the rest may have gone by either way.
        if mode == "kernel":
            assert rings([end.pid]) == Rings()
            continue
        assert rings([end.pid]).upgrades == 1
        assert rings([end.pid]).bytes > 2_000_000
    asking.finish()
    serving.finish()


@pytest.mark.parametrize("program", LIBCS)
@pytest.mark.parametrize("library", LIBCS)
def test_many_calls(
    launch: Launch,
    tmp_path: Path,
    kernel_env: dict[str, str],
    program: str,
    library: str,
) -> None:
    """A library that was made for the other libc forwards every call."""
    argv = [compiled(APPS / "many_calls.c", program, tmp_path)]
    plain = launch(argv, env=kernel_env).finish(exits=5)
    preloaded = launch(argv, env=under(kernel_env, LIBRARIES[library]()))
    seen = preloaded.finish(exits=5)
    assert preloaded.stderr() == ""
    assert "on a ring: 0" in plain
    if program == library:
        plain = plain.replace("on a ring: 0", "on a ring: 1")
    assert seen == plain


def test_either_library_for_a_tree_of_both(
    launch: Launch, tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    """Both may be named at once: each forwards where the other one is at home."""
    both = f"{native.preload_path()}:{native.musl_path()}"
    for libc in LIBCS:
        argv = [compiled(APPS / "many_calls.c", libc, tmp_path)]
        done = launch(argv, env={**kernel_env, "LD_PRELOAD": both})
        assert "on a ring: 1" in done.finish(exits=5), libc
        assert done.stderr() == ""


def _libc_of_musl() -> Path:
    # The loader is the library.
    return next(Path("/lib").glob("ld-musl-*.so.1"))


def test_exports_what_musl_has() -> None:
    """All that musl defines is interposed, and nothing that only glibc knows."""
    names = set(native.symbols())
    libc = exported(_libc_of_musl())
    assert {"read", "epoll_wait"} < libc
    mine = exported(native.musl_path())
    assert mine <= names
    assert names & libc <= mine
    only_glibc = {name for name in names - libc if name.startswith("__")}
    assert "__read_chk" in only_glibc
    assert not mine & only_glibc


def test_needs_nothing_but_musl() -> None:
    library = native.musl_path()
    assert undefined(library) <= exported(_libc_of_musl())
    done = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "SONAME" in done.stdout
    assert re.findall(r"NEEDED", done.stdout) == []


def test_tools_see_it(
    launch: Launch, tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    """Tools find the statistics of a program on musl like those of any other."""
    program = compiled(PROGRAMS / "ends.c", "musl", tmp_path)
    env = under(kernel_env, native.musl_path())
    serving = launch([program, "serve"], env=env)
    asking = launch([program, "ask", serving.wait_line()], env=env)
    assert asking.wait_line() == "done"
    (file,) = procfs.open_statistics(asking.pid)
    statistics = procfs.read_statistics(file)
    assert statistics is not None
    (row,) = statistics.rows
    assert row.ring_tx_bytes > 0
    seen = snapshot.connections(include_kernel=True, pids={asking.pid, serving.pid})
    assert [each.state for each in seen] == ["ring", "ring"]
    processes, _ = procfs.survey()
    assert {asking.pid, serving.pid} <= {each.pid for each in processes}
    asking.finish()
    serving.finish()
