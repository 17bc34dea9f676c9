# SPDX-License-Identifier: Apache-2.0
"""The drop-in for systemd, and what a unit's restrictions do to Kmap."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmap import native
from tests.builds import ROOT

DROP_IN = ROOT / "deploy/systemd/kmap.conf"
INSTALLED = "/usr/local/lib/kmap/libkmap_preload.so"
TALK = ROOT / "tests/dist/talk.py"
CONFINED = Path(__file__).parent / "programs/confined.py"


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed; scripts/setup test installs it")
    return found


def _environment() -> dict[str, str]:
    """What the drop-in adds, as systemd reads it."""
    words: list[str] = []
    section = ""
    for line in DROP_IN.read_text().splitlines():
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            section = line
            continue
        name, _, value = line.partition("=")
        assert (section, name) == ("[Service]", "Environment"), line
        words += shlex.split(value)
    return dict(word.split("=", 1) for word in words)


def _unit(directory: Path, library: Path) -> Path:
    """A service with the drop-in, in a directory of units."""
    unit = directory / "talk.service"
    command = shlex.join([sys.executable, str(TALK)])
    unit.write_text(f"[Service]\nType=oneshot\nExecStart={command}\n")
    folder = directory / "talk.service.d"
    folder.mkdir()
    text = DROP_IN.read_text().replace(INSTALLED, str(library))
    (folder / "kmap.conf").write_text(text)
    return unit


def test_systemd_reads_it(analyze: str, tmp_path: Path) -> None:
    unit = _unit(tmp_path, native.preload_path())
    env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    command = [analyze, "verify", "--man=no", str(unit)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert "kmap.conf" not in done.stderr, done.stderr
    # It does look at the drop-in.
    conf = tmp_path / "talk.service.d/kmap.conf"
    conf.write_text(conf.read_text() + "NoSuchSetting=1\n")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "NoSuchSetting" in done.stderr


def _talk(
    env: dict[str, str], *prefix: str, **more: str
) -> subprocess.CompletedProcess[str]:
    added = _environment()
    assert added == {"LD_PRELOAD": INSTALLED}
    added["LD_PRELOAD"] = str(native.preload_path())
    return subprocess.run(
        [*prefix, sys.executable, str(TALK)],
        env={**env, **added, **more},
        capture_output=True,
        text=True,
    )


def test_its_environment_puts_a_service_under_kmap(kernel_env: dict[str, str]) -> None:
    done = _talk(kernel_env)
    assert (done.returncode, done.stdout) == (0, "by ring\n"), done.stderr
    done = _talk(kernel_env, KMAP_DISABLE="1")
    assert (done.returncode, done.stdout) == (1, "")


def _system_service(analyze: str) -> str:
    """The calls of @system-service, with the groups in it unfolded."""
    names: set[str] = set()
    groups, seen = ["@system-service"], set()
    while groups:
        group = groups.pop()
        seen.add(group)
        done = subprocess.run(
            [analyze, "syscall-filter", group],
            check=True,
            capture_output=True,
            text=True,
        )
        for line in done.stdout.splitlines()[1:]:
            word = line.strip()
            if word.startswith("@") and word not in seen:
                groups.append(word)
            elif word and word[0] not in "@#":
                names.add(word)
    assert {"read", "socket"} <= names
    assert "kexec_load" not in names
    return " ".join(sorted(names))


def _confined(
    env: dict[str, str], kind: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return _talk(env, sys.executable, str(CONFINED), kind, **more)


@pytest.mark.parametrize("kind", ["none", "syscalls", "wx"])
def test_restrictions_that_it_works_under(
    kernel_env: dict[str, str], analyze: str, kind: str
) -> None:
    names = _system_service(analyze)
    done = _confined(kernel_env, kind, CONFINED_SYSCALLS=names)
    if kind == "wx" and f"[Errno {errno.EINVAL}]" in done.stderr:
        pytest.skip("this kernel has no PR_SET_MDWE; it came with 6.3")
    assert (done.returncode, done.stdout) == (0, "by ring\n"), done.stderr


def test_without_netlink_it_stays_on_the_kernel(kernel_env: dict[str, str]) -> None:
    """Nobody can say who the other end is; the program works, the log says why."""
    done = _confined(kernel_env, "netlink", KMAP_LOG="error")
    assert done.returncode == 1
    assert "the connection stayed on the kernel" in done.stderr
    assert "sock_diag cannot say" in done.stderr
