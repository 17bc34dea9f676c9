# SPDX-License-Identifier: Apache-2.0
"""kmap doctor about processes: whether the library is there, and why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from kmap import native, procfs
from kmap.demo.programs import find_envoy
from kmap.doctor import process
from kmap.doctor.check import Check, State
from kmap.results import CommandFailed
from tests.apps.process import find_program
from tests.cli.peers import Spawn, start, wait_until
from tests.doctor.diagnosis import (
    NOFILE,
    PROGRAMS,
    diagnose,
    limited_to,
    program,
)
from tests.doctor.test_program import ENVOY_SETTINGS, IO_URING

Begin = Callable[..., int]

# Says that it is there and waits to be ended.
_WAIT = """
import socket, sys
print("ready", flush=True)
sys.stdin.read()
"""
_C_WAIT = """
#include <unistd.h>
int main(void) { char c; return write(1, "ready\\n", 6) != 6 || read(0, &c, 1) != 0; }
"""
# io_uring_setup by its number, with parameters of zeros.
_IO_URING = """
import ctypes, sys
assert ctypes.CDLL(None).syscall(425, 4, (ctypes.c_char * 120)()) >= 0
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def begin(spawn: Spawn) -> Begin:
    """Starts a program; its number, when it has printed a line."""

    def start_program(
        argv: Sequence[str | Path], env: Mapping[str, str], **options: object
    ) -> int:
        found = spawn(
            list(map(str, argv)),
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,
        )
        assert found.stdout is not None
        assert found.stdout.readline()
        return found.pid

    return start_program


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="kmap-doctor-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def python(script: str = _WAIT) -> list[str]:
    return [*limited_to(NOFILE), sys.executable, "-c", script]


def checks(pid: int, **options: int) -> dict[str, Check]:
    """What it says of the process, by check."""
    subject = f"{procfs.comm(pid)}/{pid}"
    found = [c for c in process.check(pid, **options) if c.subject == subject]
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def refusal(pid: int) -> Check:
    """Why it does not have the library."""
    found = checks(pid)["library"]
    assert found.state is State.CANNOT
    assert found.found.startswith("not loaded")
    return found


def _not_ok(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.state is not State.OK}


def test_both_ends_of_a_connection(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    peers = start(spawn, kmap_env, kmap_env, prefix=limited_to(NOFILE))
    client, server = peers.client.pid, peers.server.pid
    found = diagnose(client, "--peer", server, env=kmap_env)
    assert found.exit_code == 0
    for pid in (client, server):
        one = found.of(f"{procfs.comm(pid)}/{pid}")
        assert {each.state for each in one.values()} == {"ok"}
        assert one["library"].found == f"loaded: {native.preload_path()}"
        assert one["connections"].found == "1 on a ring, 0 not"
        assert one["statistics"].found.startswith("1 upgrades")
        assert "socket" in one["system calls"].found
    both = found.of(f"{client} and {server}")
    assert {each.state for each in both.values()} == {"ok"}
    assert both["connections"].found == "1 on a ring, 0 not"
    assert peers.finish() == (0, 0)


def test_an_end_without_it(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kernel_env, kmap_env)
    found = checks(peers.client.pid)["connections"]
    assert found.state is State.LIMITED
    assert found.found == "0 on a ring, 1 not: 1 peer-absent"
    assert "kmap run" in found.remedy
    assert "without LD_PRELOAD" in refusal(peers.server.pid).found
    assert peers.finish() == (0, 0)


def test_two_network_namespaces(begin: Begin, kmap_env: dict[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a network namespace")
    here = begin(python(), kmap_env)
    there = begin(["unshare", "--net", *python()], kmap_env)
    found = process.check(here, peer=there)[-1]
    assert (found.name, found.state) == ("network namespace", State.CANNOT)
    assert found.subject == f"{here} and {there}"
    assert "another" in checks(there)["network namespace"].found


def test_two_transports(begin: Begin, kmap_env: dict[str, str]) -> None:
    other = {**kmap_env, "KMAP_TRANSPORT": "pipe"}
    pair = begin(python(), kmap_env), begin(python(), other)
    found = {check.name: check for check in process.check(pair[0], peer=pair[1])}
    assert found["transport"].state is State.CANNOT


def waiting(compiler: str, directory: Path, *flags: str) -> Path:
    """A program that waits to be ended."""
    path = directory / f"waits-{compiler}"
    command = [find_program(compiler), "-x", "c", "-", "-o", str(path), *flags]
    subprocess.run(command, input=_C_WAIT, text=True, check=True)
    return path


def test_static(begin: Begin, kmap_env: dict[str, str], tmp_path: Path) -> None:
    found = refusal(begin([waiting("gcc", tmp_path, "-static")], kmap_env))
    assert "static" in found.found


@pytest.mark.parametrize("libc", ["glibc", "musl"])
@pytest.mark.parametrize("preloaded", ["glibc", "musl", "both"])
def test_libraries_for_two_libcs(
    libc: str,
    preloaded: str,
    begin: Begin,
    kernel_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """The library at work is the one for the program's libc; its end is named."""
    path = waiting({"glibc": "gcc", "musl": "musl-gcc"}[libc], tmp_path)
    libraries = {"glibc": native.preload_path(), "musl": native.musl_path()}
    named = list(libraries) if preloaded == "both" else [preloaded]
    value = ":".join(str(libraries[each]) for each in named)
    pid = begin([path], {**kernel_env, "LD_PRELOAD": value})
    library = checks(pid)["library"]
    if libc in named:
        assert library.state is State.OK
        assert library.found == f"loaded: {libraries[libc]}"
    else:
        assert library.state is State.CANNOT
        assert "another libc" in library.found
        command = "kmap path --musl" if libc == "musl" else "kmap path"
        assert f"$({command})" in library.remedy


def test_setcap(begin: Begin, kmap_env: dict[str, str], public_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make such a program")
    copy = public_path / "program"
    command = [find_program("gcc"), "-x", "c", "-", "-o", str(copy)]
    subprocess.run(command, input=_C_WAIT, text=True, check=True)
    library = public_path / native.PRELOAD_NAME
    shutil.copy(native.preload_path(), library)
    env = {**kmap_env, "LD_PRELOAD": str(library)}
    tool = find_program("setcap")
    subprocess.run([tool, "cap_net_bind_service+ep", str(copy)], check=True)
    # Root gains nothing by it, and has the library.
    assert checks(begin([copy], env))["library"].state is State.OK
    pid = begin([copy], env, user="www-data", group="www-data", extra_groups=[])
    assert "distrusts LD_PRELOAD" in refusal(pid).found
    assert str(copy) in refusal(pid).remedy


@pytest.mark.parametrize(
    ("make", "word"),
    [
        ("nothing", "there is no"),
        ("text", "not an ELF file"),
        ("aarch64-linux-gnu-gcc", "AArch64"),
        ("relative", "no whole path"),
    ],
)
def test_what_the_loader_refuses(
    make: str,
    word: str,
    begin: Begin,
    kernel_env: dict[str, str],
    tmp_path: Path,
) -> None:
    path = tmp_path / native.PRELOAD_NAME
    if make == "text":
        path.write_text("no library")
    elif make.endswith("gcc"):
        compiler = find_program(make)
        subprocess.run(
            [compiler, "-shared", "-xc", "/dev/null", "-o", path], check=True
        )
    named = native.PRELOAD_NAME if make == "relative" else str(path)
    pid = begin(
        python(), {**kernel_env, "LD_PRELOAD": named}, stderr=subprocess.DEVNULL
    )
    assert word in refusal(pid).found


def test_a_library_named_for_either_libc(
    begin: Begin, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    """As containers have it in Kubernetes: the loader knows what $LIB is."""
    named = f"{tmp_path}/$LIB/{native.PRELOAD_NAME}"
    env = {**kernel_env, "LD_PRELOAD": named}
    programs = [python(), [str(waiting("musl-gcc", tmp_path))]]
    for argv in programs:
        pid = begin(argv, env, stderr=subprocess.DEVNULL)
        assert f"there is no {named}" in refusal(pid).found
    for directory in ("lib64", "$LIB"):
        (tmp_path / directory).mkdir()
        path = tmp_path / directory / native.PRELOAD_NAME
        path.write_text("no library")
    for argv, directory in zip(programs, ("lib64", "$LIB"), strict=True):
        pid = begin(argv, env, stderr=subprocess.DEVNULL)
        assert f"{directory}/{native.PRELOAD_NAME}: not an" in refusal(pid).found


def test_a_library_out_of_reach(
    begin: Begin, kernel_env: dict[str, str], public_path: Path
) -> None:
    """Root reads it, and the user that the program runs as does not."""
    if os.geteuid() != 0:
        pytest.skip("only root can start programs of other users")
    closed = public_path / "closed"
    closed.mkdir(0o700)
    library = closed / native.PRELOAD_NAME
    shutil.copy(native.preload_path(), library)
    env = {**kernel_env, "LD_PRELOAD": str(library)}
    command = ["sh", "-c", "echo ready; read line"]
    options = {"user": "www-data", "group": "www-data", "extra_groups": []}
    pid = begin(command, env, stderr=subprocess.DEVNULL, **options)
    assert f"{closed} is closed to others" in refusal(pid).found
    assert checks(begin(command, env))["library"].state is State.OK


def test_a_library_in_another_root(
    begin: Begin, kmap_env: dict[str, str], tmp_path: Path
) -> None:
    """Another mount namespace has no such file, though ours has."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a mount namespace")
    hidden = tmp_path / "lib"
    hidden.mkdir()
    library = hidden / native.PRELOAD_NAME
    shutil.copy(native.preload_path(), library)
    script = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", "env"]
    preload = f"LD_PRELOAD={library}"
    pid = begin(
        [*command, preload, *python()],
        {**kmap_env, "LD_PRELOAD": ""},
        stderr=subprocess.DEVNULL,
    )
    assert library.exists()
    assert f"there is no {library}" in refusal(pid).found


def test_a_library_that_was_replaced(
    begin: Begin, kmap_env: dict[str, str], tmp_path: Path
) -> None:
    library = tmp_path / native.PRELOAD_NAME
    shutil.copy(native.preload_path(), library)
    pid = begin(python(), {**kmap_env, "LD_PRELOAD": str(library)})
    found = checks(pid)["library"]
    assert found.state is State.OK
    assert "not the one of this command" in found.found
    library.unlink()
    found = checks(pid)["library"]
    assert found.state is State.LIMITED
    assert "replaced or removed" in found.found


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"KMAP_DISABLE": "1"}, "forwarded"),
        ({"KMAP_POLICY": "rules:prot=80"}, "line 1"),
        ({"KMAP_POLICY": "no/such/file"}, "No such file"),
    ],
)
def test_settings(
    settings: dict[str, str], word: str, begin: Begin, kmap_env: dict[str, str]
) -> None:
    pid = begin(python(), kmap_env | settings, stderr=subprocess.DEVNULL)
    found = checks(pid)
    assert _not_ok(found) == {"settings"}
    assert word in found["settings"].found
    assert found["settings"].state is State.CANNOT


def test_a_setting_out_of_range(begin: Begin, kmap_env: dict[str, str]) -> None:
    settings = {"KMAP_RING_SIZE": "1"}
    pid = begin(python(), kmap_env | settings, stderr=subprocess.DEVNULL)
    found = checks(pid)
    assert _not_ok(found) == {"settings"}
    assert "KMAP_RING_SIZE=1" in found["settings"].found
    assert found["settings"].state is State.LIMITED


def test_good_settings(begin: Begin, kmap_env: dict[str, str], tmp_path: Path) -> None:
    """A policy is looked for from where the program runs."""
    (tmp_path / "hops.rules").write_text("allow port=80\n")
    settings = {"KMAP_POLICY": "hops.rules", "KMAP_RING_SIZE": "64K"}
    found = checks(begin(python(), kmap_env | settings, cwd=tmp_path))
    assert _not_ok(found) == set()
    assert "KMAP_RING_SIZE=64K" in found["settings"].found


def test_a_filter_of_its_own(begin: Begin, kmap_env: dict[str, str]) -> None:
    command = [*limited_to(NOFILE), *program("filtered.py", "getpid", "-")]
    found = checks(begin(command, kmap_env))
    # Whether it has socket calls depends on how Python was built: it did not need any.
    assert _not_ok(found) - {"system calls"} == {"seccomp"}
    assert found["seccomp"].found.startswith("1 filter")


def test_too_few_descriptors(begin: Begin, kmap_env: dict[str, str]) -> None:
    found = checks(begin([*limited_to("512:512"), *python()[2:]], kmap_env))
    assert _not_ok(found) == {"descriptors"}
    assert found["descriptors"].state is State.CANNOT


def test_io_uring(
    begin: Begin, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    found = checks(begin(python(_IO_URING), kernel_env))
    assert found["io_uring"].state is State.LIMITED
    assert found["io_uring"].found.startswith("has 1")
    assert checks(begin(python(), kmap_env))["io_uring"].state is State.OK


def _says(log: Path, what: str) -> bool:
    return what in log.read_text()


def test_envoy_with_io_uring(
    spawn: Spawn, kmap_env: dict[str, str], tmp_path: Path
) -> None:
    for settings, state in (
        (ENVOY_SETTINGS, State.OK),
        (ENVOY_SETTINGS + IO_URING, State.CANNOT),
    ):
        path = tmp_path / f"{state.value}.yaml"
        path.write_text(settings)
        log = tmp_path / f"{state.value}.log"
        with log.open("w") as output:
            argv = [find_envoy().path, "-c", path, "--use-dynamic-base-id"]
            envoy = spawn([*argv, "--concurrency", "1"], env=kmap_env, stderr=output)
        wait_until(partial(_says, log, "starting main dispatch loop"), "Envoy")
        found = checks(envoy.pid)
        assert found["library"].state is State.OK
        assert "accept4" in found["system calls"].found
        assert found["io_uring"].state is state
        envoy.kill()


def test_java(begin: Begin, kmap_env: dict[str, str]) -> None:
    """What its file could not tell: it has loaded its network library by now."""
    java = find_program("java")
    pid = begin([java, "-Xshare:auto", PROGRAMS / "Server.java"], kmap_env)
    found = checks(pid)
    assert found["library"].state is State.OK
    assert found["system calls"].state is State.OK
    assert "accept" in found["system calls"].found


def test_go(begin: Begin, kmap_env: dict[str, str], tmp_path: Path) -> None:
    """Linked to libc it has the library, which sees nothing."""
    go = find_program("go")
    path = tmp_path / "listen"
    source = PROGRAMS / "listen.go"
    subprocess.run([go, "build", "-o", path, source], check=True, cwd=tmp_path)
    found = checks(begin([path], kmap_env))
    assert found["library"].state is State.OK
    assert found["system calls"].state is State.CANNOT
    assert "Go 1." in found["system calls"].found


def test_processes_that_cannot_be_looked_at(spawn: Spawn) -> None:
    with pytest.raises(CommandFailed, match="there is no process"):
        process.check(2**30)
    ended = spawn(["true"], env={})
    wait_until(
        lambda: b") Z " in Path(f"/proc/{ended.pid}/stat").read_bytes(), "its end"
    )
    with pytest.raises(CommandFailed, match="has ended"):
        process.check(ended.pid)
