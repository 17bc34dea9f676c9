# SPDX-License-Identifier: Apache-2.0
"""The libraries of a program, as its dynamic loader finds them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmap import native
from kmap.doctor import elf
from kmap.doctor.elf import Elf, NotElf
from kmap.results import CannotRun, CommandFailed

# glibc's own: what they do inside is not done through names of other libraries.
GLIBC_NAMES = re.compile(
    r"(ld-linux.*|ld64|ld-[0-9].*|lib(c|m|dl|rt|pthread|util|resolv|anl|nsl|mvec"
    r"|nss_.*))\.so\.[0-9]+"
)
_LOADER_NAMES = re.compile(r"(ld-linux.*|ld64|ld-[0-9].*)\.so\.[0-9]+")
# musl is one file, its loader and its libc, under these names.
_MUSL_NAMES = re.compile(r"ld-musl-.*\.so\.1|libc\.musl-.*\.so\.1|libc\.so")
_LINE = re.compile(r"\t\S+ => (?P<path>.+) \(0x[0-9a-f]+\)")
# glibc's stops at the first that it does not find; musl's says more in its own words.
_MISSING = re.compile(
    r"(error while loading shared libraries: |Error loading shared library )"
    r"(?P<name>[^:\n]+):"
)
_LOADER_TIMEOUT_S = 10


@dataclass(frozen=True)
class Libraries:
    """What a program is linked to, all the way down."""

    found: tuple[Elf, ...]
    missing: tuple[str, ...]
    # The libc among them, None if it was not found.
    libc: Elf | None


def is_glibc_loader(interpreter: str) -> bool:
    """Whether the dynamic loader is glibc's, by its name."""
    return _LOADER_NAMES.fullmatch(os.path.basename(interpreter)) is not None


def is_musl_loader(interpreter: str) -> bool:
    """Whether the dynamic loader is musl's, by its name."""
    return os.path.basename(interpreter).startswith("ld-musl-")


def _of_libc(name: str) -> bool:
    return bool(GLIBC_NAMES.fullmatch(name) or _MUSL_NAMES.fullmatch(name))


def _trusted(path: str) -> bool:
    """Whether it may be run: a loader of the system, or of the caller."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def read_all(paths: list[str], missing: tuple[str, ...] = ()) -> Libraries:
    """The libraries at paths, but for what cannot be read."""
    found: list[Elf] = []
    libc: Elf | None = None
    for path in paths:
        try:
            library = elf.read(path)
        except (NotElf, CommandFailed):
            continue
        if os.path.basename(path) == "libc.so.6":
            libc = library
        elif not _of_libc(os.path.basename(path)):
            found.append(library)
    return Libraries(tuple(found), missing, libc)


def find(program: Elf) -> Libraries:
    """Asks the program's own loader; the program is not run."""
    loader = program.interpreter
    if loader is None or not _trusted(loader):
        return Libraries((), (), None)
    if not is_glibc_loader(loader) and not is_musl_loader(loader):
        return Libraries((), (), None)
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            [loader, "--list", os.path.abspath(program.path)],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_LOADER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Libraries((), (), None)
    if match := _MISSING.search(done.stderr):
        return Libraries((), (match["name"],), None)
    lines = map(_LINE.fullmatch, done.stdout.splitlines())
    return read_all([match["path"] for match in lines if match])


def _read_or_none(path: Callable[[], Path]) -> Elf | None:
    try:
        return elf.read(str(path()))
    except (CannotRun, CommandFailed, NotElf):
        return None


def preload() -> Elf | None:
    """The preload library for glibc; None if it is not there or is no ELF file."""
    return _read_or_none(native.preload_path)


def musl_preload() -> Elf | None:
    """The preload library for musl; None if it is not there or is no ELF file."""
    return _read_or_none(native.musl_path)


def preload_for(program: Elf) -> Elf | None:
    """The preload library that is made for the libc of the program."""
    loader = program.interpreter
    if loader is not None and is_musl_loader(loader):
        return musl_preload()
    return preload()
