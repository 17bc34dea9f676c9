# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common, and kmap path."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from kmap import __version__
from kmap.commands import COMMANDS
from tests.cli.peers import kmap, kmap_json


def test_version(kernel_env: dict[str, str]) -> None:
    done = kmap("--version", env=kernel_env)
    assert (done.returncode, done.stdout) == (0, f"kmap {__version__}\n")


def test_the_console_script_is_the_same(kernel_env: dict[str, str]) -> None:
    script = Path(sysconfig.get_path("scripts")) / "kmap"
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run(
        [script, "--version"], env=kernel_env, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, f"kmap {__version__}\n")


def test_help_lists_every_command(kernel_env: dict[str, str]) -> None:
    done = kmap("--help", env=kernel_env)
    assert done.returncode == 0
    # A long name has its text on the next line.
    lines = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert lines >= set(COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("nosuch",), ("ss", "--nosuch")])
def test_usage_errors(arguments: tuple[str, ...], kernel_env: dict[str, str]) -> None:
    done = kmap(*arguments, env=kernel_env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: kmap" in done.stderr


def test_path(kernel_env: dict[str, str]) -> None:
    found = kmap_json("path", env=kernel_env)
    assert (found["schema"], found["ok"]) == ("kmap.path/1", True)
    assert kmap("path", env=kernel_env).stdout == found["preload"] + "\n"
    assert os.path.samefile(
        found["preload"], Path(kernel_env["KMAP_LIB_DIR"]) / "libkmap_preload.so"
    )


def test_without_libraries_it_says_so(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    env = {**kernel_env, "KMAP_LIB_DIR": str(tmp_path)}
    done = kmap("path", "--json", env=env)
    assert done.returncode == 77
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert str(tmp_path) in document["error"]
    assert "pip install" in done.stderr
