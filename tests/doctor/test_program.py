# SPDX-License-Identifier: Apache-2.0
"""kmap doctor about programs: what it says, and that it is so."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kmap import native
from kmap.demo.programs import find_envoy
from kmap.doctor import elf, program
from kmap.doctor.check import Check, State, Subject, worst
from kmap.doctor.libraries import preload
from kmap.results import CommandFailed
from tests.apps.process import PROGRAMS as APP_PROGRAMS
from tests.apps.process import find_program
from tests.cli.peers import KMAP
from tests.doctor.diagnosis import PROGRAMS, diagnose

_MAIN = "int main(void) { return 0; }"
_NAMES = ["file", "loader", "privileges", "glibc", "malloc", "io_uring"]
_OK = dict.fromkeys([*_NAMES, "system calls"], "ok")


def _states(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.state.value for check in checks}


def _of(checks: Sequence[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def _compile(path: Path, source: str, *flags: str, compiler: str = "gcc") -> Path:
    command = [find_program(compiler), "-x", "c", "-", "-o", str(path), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.mark.parametrize("name", ["nginx", "node", "redis-server", "/usr/bin/python3"])
def test_programs_that_can(name: str) -> None:
    find_program(name)
    assert _states(program.check(name)) == _OK


def test_what_nginx_calls() -> None:
    find_program("nginx")
    calls = _of(program.check("nginx"), "system calls")
    assert "accept4" in calls.found
    assert "connect" in calls.found


def test_malloc_of_a_library() -> None:
    find_program("redis-server")
    assert "libjemalloc" in _of(program.check("redis-server"), "malloc").found


def test_java_shows_when_it_runs() -> None:
    """The launcher opens the machine, which opens its network library."""
    find_program("java")
    checks = program.check("java")
    expected = _OK | {"system calls": "limited"}
    assert _states(checks) == expected
    assert "kmap doctor PID" in _of(checks, "system calls").remedy


@pytest.mark.parametrize(
    ("source", "static"), [("listen.go", False), ("alone.go", True)]
)
def test_go(source: str, static: bool, tmp_path: Path) -> None:
    go = find_program("go")
    path = tmp_path / "program"
    subprocess.run(
        [go, "build", "-o", path, PROGRAMS / source], check=True, cwd=tmp_path
    )
    checks = program.check(str(path))
    assert _of(checks, "system calls").state is State.CANNOT
    assert _of(checks, "system calls").found.startswith("Go 1.")
    loader = _of(checks, "loader")
    assert loader.state is (State.CANNOT if static else State.OK)
    # Stripped it is still Go.
    subprocess.run(["strip", path], check=True)
    elf.read.cache_clear()
    assert [c.found for c in program.check(str(path))] == [c.found for c in checks]
    # Without section headers the version is not found, and the note still is.
    content = bytearray(path.read_bytes())
    content[0x28:0x30] = bytes(8)
    content[0x3C:0x40] = bytes(4)
    bare = tmp_path / "bare"
    bare.write_bytes(content)
    assert _of(program.check(str(bare)), "system calls").found.startswith("Go: ")


@pytest.mark.parametrize(
    ("compiler", "flags", "word"),
    [
        ("gcc", ["-static"], "static"),
        ("gcc", ["-static-pie"], "static"),
        ("musl-gcc", ["-static"], "static"),
        ("musl-gcc", [], None),
        ("gcc", [], None),
    ],
)
def test_it_is_right(
    compiler: str,
    flags: list[str],
    word: str | None,
    kernel_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """Under kmap run it goes to a ring if, and only if, doctor says that it can."""
    source = (APP_PROGRAMS / "many_calls.c").read_text()
    flags = [*flags, "-D_GNU_SOURCE", "-pthread"]
    path = _compile(tmp_path / "program", source, *flags, compiler=compiler)
    checks = program.check(str(path))
    command = [*KMAP, "run", "--", str(path)]
    done = subprocess.run(command, env=kernel_env, text=True, capture_output=True)
    able = worst(checks) is not State.CANNOT
    assert f"on a ring: {int(able)}" in done.stdout
    if compiler == "musl-gcc" and word is None:
        assert _states(checks) == {n: s for n, s in _OK.items() if n != "glibc"}
        assert "(musl)" in _of(checks, "loader").found
    elif word is None:
        assert _states(checks) == _OK
    else:
        loader = _of(checks, "loader")
        assert loader.state is State.CANNOT
        assert word in loader.found
        assert loader.remedy


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("setuid", ["setuid", "u-s"]),
        ("setgid", ["setgid", "g-s"]),
        ("setcap", ["cap_net_bind_service, cap_net_raw", "setcap -r"]),
    ],
)
def test_privileges(how: str, words: list[str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make such programs")
    copy = tmp_path / "nginx"
    shutil.copy(find_program("nginx"), copy)
    if how == "setcap":
        tool = find_program("setcap")
        granted = "cap_net_bind_service,cap_net_raw+ep"
        subprocess.run([tool, granted, copy], check=True)
    else:
        copy.chmod(0o4755 if how == "setuid" else 0o2755)
    checks = program.check(str(copy))
    assert _states(checks) == _OK | {"privileges": "cannot"}
    found = _of(checks, "privileges")
    assert words[0] in found.found
    assert words[1] in found.remedy


def test_another_architecture(tmp_path: Path) -> None:
    path = _compile(tmp_path / "arm", _MAIN, compiler="aarch64-linux-gnu-gcc")
    found = _of(program.check(str(path)), "architecture")
    assert found.state is State.CANNOT
    assert "AArch64" in found.found


@pytest.mark.parametrize(
    ("source", "state", "word"),
    [
        (_MAIN, State.CANNOT, "none that"),
        ("#include <unistd.h>\nint main(){return read(0,0,0);}", State.LIMITED, "gets"),
    ],
)
def test_no_sockets(source: str, state: State, word: str, tmp_path: Path) -> None:
    path = _compile(tmp_path / "program", source)
    found = _of(program.check(str(path)), "system calls")
    assert found.state is state
    assert word in found.found


def test_sockets_of_a_library_of_a_library(tmp_path: Path) -> None:
    """What it is linked to counts, all the way down."""
    here = ["-Wl,-rpath," + str(tmp_path), f"-L{tmp_path}", "-Wl,--no-as-needed"]
    inner = "#include <sys/socket.h>\nint inner(void) { return socket(1, 1, 0); }"
    _compile(tmp_path / "libinner.so", inner, "-shared", "-fPIC")
    outer = "int inner(void); int outer(void) { return inner(); }"
    _compile(tmp_path / "libouter.so", outer, "-shared", "-fPIC", *here, "-linner")
    main = "int outer(void); int main(void) { return outer(); }"
    path = _compile(tmp_path / "program", main, *here, "-louter")
    found = program.check(str(path))
    assert _of(found, "system calls").state is State.OK
    assert "socket and 0 other" in _of(found, "system calls").found
    (tmp_path / "libinner.so").unlink()
    missing = _of(program.check(str(path)), "libraries")
    assert missing.state is State.LIMITED
    assert "libinner.so" in missing.found


def test_a_malloc_of_its_own(tmp_path: Path) -> None:
    source = "void *malloc(unsigned long n) { return (void *)n; }" + _MAIN
    path = _compile(tmp_path / "program", source, "-rdynamic", "-fno-builtin")
    found = _of(program.check(str(path)), "malloc")
    assert found.found.startswith(f"its own, in {path}")


def test_io_uring_of_a_library(tmp_path: Path) -> None:
    flags = ["-shared", "-fPIC", "-Wl,-soname,liburing.so.2"]
    _compile(tmp_path / "liburing.so.2", "int io_uring_setup;", *flags)
    rpath = f"-Wl,-rpath,{tmp_path},--no-as-needed"
    library = str(tmp_path / "liburing.so.2")
    path = _compile(tmp_path / "program", _MAIN, "-x", "none", rpath, library)
    found = _of(program.check(str(path)), "io_uring")
    assert found.state is State.LIMITED
    assert "liburing.so.2" in found.found


def test_musl_without_a_library_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = _compile(tmp_path / "program", _MAIN, compiler="musl-gcc")
    (tmp_path / "lib").mkdir()
    shutil.copy(native.preload_path(), tmp_path / "lib")
    monkeypatch.setenv("KMAP_LIB_DIR", str(tmp_path / "lib"))
    loader = _of(program.check(str(path)), "loader")
    assert loader.state is State.CANNOT
    assert "the library for it is missing" in loader.found
    assert "musl-tools" in loader.remedy


def test_libraries_of_a_program_on_musl(tmp_path: Path) -> None:
    """Its own loader finds them, or says what is missing."""
    source = "#include <sys/socket.h>\nint outer(void) { return socket(1, 1, 0); }"
    library = tmp_path / "libouter.so"
    _compile(library, source, "-shared", "-fPIC", compiler="musl-gcc")
    main = "int outer(void); int main(void) { return outer(); }"
    flags = [f"-Wl,-rpath,{tmp_path}", f"-L{tmp_path}", "-louter"]
    path = _compile(tmp_path / "program", main, *flags, compiler="musl-gcc")
    found = program.check(str(path))
    assert "socket and 0 other" in _of(found, "system calls").found
    assert _of(found, "malloc").found == "libc's"
    library.unlink()
    missing = _of(program.check(str(path)), "libraries")
    assert missing.state is State.LIMITED
    assert "libouter.so" in missing.found


def test_an_old_glibc() -> None:
    libc = elf.read(os.path.realpath("/lib/x86_64-linux-gnu/libc.so.6"))
    subject = Subject("old")
    current = program.glibc(libc, subject)
    assert current is not None
    assert current.state is State.OK
    library = preload()
    assert library is not None
    assert library.glibc_needed is not None
    old = replace(libc, glibc_defined=(2, library.glibc_needed[1] - 1))
    found = program.glibc(old, subject)
    assert found is not None
    assert found.state is State.CANNOT


def test_scripts(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_text(f"#! {sys.executable} -I\n")
    outer.write_text(f"#!{inner}\n")
    found = _of(program.check(str(outer)), "file")
    executable = os.path.realpath(sys.executable)
    assert found.state is State.OK
    assert f"{outer} -> {inner} -> {executable}" in found.found
    inner.write_text("#!/usr/bin/env -S FOO=1 sh -e\n")
    found = _of(program.check(str(inner)), "file")
    assert found.state is State.LIMITED
    assert "shell" in found.found


@pytest.mark.parametrize(
    "first", ["#!", "#!/no/such/interpreter", "#!/usr/bin/env no-such-program"]
)
def test_scripts_for_nothing(first: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(first + "\n")
    with pytest.raises(CommandFailed, match=r"script|no/such|does not exist|not found"):
        program.check(str(path))


def test_scripts_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(f"#!{path}\n")
    with pytest.raises(CommandFailed, match="not an ELF file"):
        program.check(str(path))


ENVOY_SETTINGS = """\
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
default_socket_interface: &name "envoy.extensions.network.socket_interface.\
default_socket_interface"
bootstrap_extensions:
- name: *name
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.network.socket_interface.v3.\
DefaultSocketInterface
"""
IO_URING = "    io_uring_options: {}\n"


def test_envoy(kernel_env: dict[str, str], tmp_path: Path) -> None:
    envoy = find_envoy().path
    checks = program.check(envoy)
    assert _states(checks) == _OK
    assert "accept4" in _of(checks, "system calls").found
    assert "its own" in _of(checks, "malloc").found
    assert "--envoy-config" in _of(checks, "io_uring").remedy

    path = tmp_path / "envoy.yaml"
    path.write_text(ENVOY_SETTINGS)
    assert _of(program.check(envoy, envoy_config=str(path)), "io_uring").state is (
        State.OK
    )
    path.write_text(ENVOY_SETTINGS + IO_URING)
    found = diagnose(envoy, "--envoy-config", path, env=kernel_env)
    assert found.exit_code == 1
    assert found.states("envoy") == _OK | {"io_uring": "cannot"}
    assert "io_uring_options" in found.of("envoy")["io_uring"].remedy


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(elf.NotElf, match="not an ELF file"):
        elf.read(str(tmp_path / "pipe"))


def test_damaged_files(tmp_path: Path) -> None:
    """Whatever is in a file, it is read or refused, and in no time."""
    whole = _compile(tmp_path / "whole", _MAIN).read_bytes()
    random_source = random.Random(1)
    refused = 0
    for number in range(150):
        damaged = bytearray(whole)
        if number % 3 == 0:
            del damaged[random_source.randrange(4, len(damaged)) :]
        for _ in range(random_source.randrange(1, 30)):
            # The headers and tables, rather than the padding.
            at = random_source.randrange(4, min(len(damaged), 0x1000))
            damaged[at] = random_source.choice((0, 1, 0x7F, 0xFF))
        path = tmp_path / f"damaged-{number}"
        path.write_bytes(damaged)
        try:
            elf.read(str(path))
        except elf.NotElf:
            refused += 1
    assert 0 < refused < 150
