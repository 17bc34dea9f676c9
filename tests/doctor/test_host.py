# SPDX-License-Identifier: Apache-2.0
"""kmap doctor about the host: what is taken away is what it names."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from kmap import native
from tests.cli.peers import kmap
from tests.doctor.diagnosis import NOFILE, diagnose, limited_to, program

# What the machine at hand may have its own opinion on.
_OWN_OPINION = {"library", "seccomp", "address space", "kernel"}


def test_a_host_that_can(kernel_env: dict[str, str]) -> None:
    """A connection really went by ring."""
    found = diagnose(env=kernel_env)
    states = found.states("host")
    assert found.exit_code == 0
    assert set(states) > _OWN_OPINION
    assert {states[name] for name in states.keys() - _OWN_OPINION} == {"ok"}
    trial = found.of("host")["trial"]
    # 64 round trips of 512 bytes, both ways, but for the first few.
    assert 40_000 < int(trial.found.split("ring, ")[1].split()[0]) <= 2 * 64 * 512


@pytest.mark.parametrize(
    ("call", "check", "reason"),
    [
        ("memfd_create", "shared memory", "syscall-failed"),
        (f"fcntl:{fcntl.F_ADD_SEALS}", "shared memory", "syscall-failed"),
        ("bind", "rendezvous", None),
        ("recvmsg", "rendezvous", None),
        ("sendto", "sock_diag", None),
        ("getsockopt", "TCP_INFO", None),
    ],
)
def test_a_call_that_is_refused(
    call: str, check: str, reason: str | None, kernel_env: dict[str, str]
) -> None:
    before = [*limited_to(NOFILE), *program("filtered.py", call)]
    found = diagnose(env=kernel_env, before=before)
    checks = found.of("host")
    assert found.exit_code == 1
    assert checks[check].state == "cannot"
    assert os.strerror(1) in checks[check].found
    assert checks["seccomp"].found.startswith("1 filter")
    if reason is not None:
        assert checks["trial"].state == "cannot"
        assert reason in checks["trial"].found


@pytest.mark.parametrize(
    ("nofile", "state"), [("512:512", "cannot"), ("2048:2048", "limited")]
)
def test_descriptors(nofile: str, state: str, kernel_env: dict[str, str]) -> None:
    found = diagnose(env=kernel_env, before=limited_to(nofile)).of("host")
    assert found["descriptors"].state == state
    # The check is right about the library.
    assert found["trial"].state == ("cannot" if state == "cannot" else "ok")
    if state == "cannot":
        assert "budget-fd" in found["trial"].found


def test_no_loopback(kernel_env: dict[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a network namespace")
    before = [*limited_to(NOFILE), "unshare", "--net"]
    found = diagnose(env=kernel_env, before=before).of("host")
    assert found["TCP_INFO"].state == "cannot"
    assert "lo up" in found["TCP_INFO"].remedy
    own = os.stat("/proc/self/ns/net").st_ino
    assert f"net:[{own}]" not in found["network namespace"].found


def test_settings_of_the_environment(kernel_env: dict[str, str]) -> None:
    """Programs started from here would inherit it; the trial has its own."""
    found = diagnose(env={**kernel_env, "KMAP_DISABLE": "1"}).of("host")
    assert found["settings"].state == "cannot"
    assert found["trial"].state == "ok"


def _copy(directory: Path, preload: bytes | None) -> dict[str, str]:
    shutil.copy(native.library_path(), directory)
    if preload is None:
        shutil.copy(native.preload_path(), directory)
    else:
        (directory / native.PRELOAD_NAME).write_bytes(preload)
    return {"KMAP_LIB_DIR": str(directory)}


def test_a_library_that_does_not_load(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    env = kernel_env | _copy(tmp_path, b"\x7fELF, but no more")
    found = diagnose(env=env).of("host")
    assert found["library"].state == "cannot"
    assert "cannot be preloaded" in found["library"].found
    assert "trial" not in found


def test_no_library(kernel_env: dict[str, str], tmp_path: Path) -> None:
    found = diagnose(env=kernel_env | {"KMAP_LIB_DIR": str(tmp_path)}).of("host")
    assert found["library"].state == "cannot"
    assert "pip install" in found["library"].remedy


def test_a_library_that_others_cannot_reach(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    found = diagnose(env=kernel_env | _copy(tmp_path, None)).of("host")
    assert found["library"].state == "limited"
    assert "is closed to them" in found["library"].found


def test_a_line_for_each_check(kernel_env: dict[str, str]) -> None:
    document = json.loads(kmap("doctor", "--json", env=kernel_env).stdout)
    lines = kmap("doctor", env=kernel_env).stdout.splitlines()
    assert len(lines) == len(document["checks"]) + 1
    for line, check in zip(lines, document["checks"], strict=False):
        assert line.startswith(check["state"])
        assert check["name"] in line
        assert check["remedy"] in line
    assert lines[-1].startswith(document["state"])


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--peer", "1"), 2, "--peer"),
        (("sh", "--peer", "1"), 2, "--peer"),
        (("--envoy-config", "x.yaml"), 2, "--envoy-config"),
        (("1", "--envoy-config", "x.yaml"), 2, "--envoy-config"),
        (("no-such-program",), 1, "no-such-program"),
        (("",), 1, "PATH"),
        (("/",), 1, "not a file"),
        (("/dev/zero",), 1, "not a file"),
        ((__file__,), 1, "not an ELF file"),
        (("99999999999999999999",), 1, "no process"),
        (("sh", "--envoy-config", "/no/such/file"), 1, "/no/such/file"),
    ],
)
def test_what_cannot_be_checked(
    arguments: tuple[str, ...], code: int, word: str, kernel_env: dict[str, str]
) -> None:
    done = kmap("doctor", "--json", *arguments, env=kernel_env)
    assert done.returncode == code
    assert word in json.loads(done.stdout)["error"]
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_things_that_would_block(kernel_env: dict[str, str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket"):
            done = kmap("doctor", tmp_path / name, env=kernel_env)
            assert done.returncode == 1
            assert "not a file" in done.stderr
