# SPDX-License-Identifier: Apache-2.0
"""The environment in which a program runs under Kmap."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from kmap import native, procfs, settings
from kmap.results import CannotRun, UsageError

# Linkers put the name of a program's loader behind its headers, into the first page.
_HEAD = 4096
_MUSL_LOADER = re.compile(rb"\0(/[^\0]*)?/ld-musl-[^/\0]+\0")
# How often the kernel follows a script to a script.
_SCRIPT_DEPTH = 5


def transport(name: str) -> str:
    """The name of a transport, as --transport takes it; others are a usage error."""
    known = settings.transports()
    if name not in known:
        raise UsageError(f"--transport {name}: it is one of {', '.join(known)}")
    return name


def _is_on_musl(command: str) -> bool:
    """Whether musl's loader starts the command, or the interpreter of the script."""
    path = shutil.which(command)
    for _ in range(_SCRIPT_DEPTH):
        if path is None:
            return False
        try:
            with open(procfs.open_regular(path), "rb") as file:
                head = file.read(_HEAD)
        except OSError:
            return False
        if not head.startswith(b"#!"):
            return head.startswith(b"\x7fELF") and bool(_MUSL_LOADER.search(head))
        words = head[2:].split(b"\n", 1)[0].split()
        path = words[0].decode(errors="surrogateescape") if words else None
    return False


def library_for(command: str) -> Path:
    """The preload library for the libc of a command, as execvp would find it.

    The one for glibc, if the command is no program for musl or there is none for musl.
    """
    if _is_on_musl(command):
        try:
            return native.musl_path()
        except CannotRun:
            pass
    return native.preload_path()


def environment(
    base_env: Mapping[str, str],
    *,
    options: Mapping[str, str] | None = None,
    preload: Path | None = None,
) -> dict[str, str]:
    """base_env with the library preloaded and settings such as KMAP_LOG set.

    preload is the file of the library, if it is not the installed one for glibc.

    The library goes after what LD_PRELOAD names already, so that another tool's
    wrappers see the program's calls first, as they would without Kmap.
    """
    env = dict(base_env)
    known = {option.env for option in native.options()}
    for name, value in (options or {}).items():
        if name not in known:
            raise ValueError(
                f"{name} is not a setting of this version; it has "
                + ", ".join(sorted(known))
            )
        env[name] = value
    library = str(preload or native.preload_path())
    if re.search(r"[\s:]", library):
        raise CannotRun(
            f"the dynamic loader splits LD_PRELOAD at blanks and colons, and {library} "
            "has one: install the package in another directory"
        )
    before = env.get("LD_PRELOAD", "")
    if library not in re.split(r"[\s:]+", before):
        env["LD_PRELOAD"] = f"{before}:{library}" if before else library
    return env


def without_kmap(base_env: Mapping[str, str]) -> dict[str, str]:
    """base_env with the library and every KMAP_ setting taken out."""
    env = {name: value for name, value in base_env.items() if name[:5] != "KMAP_"}
    kept = [
        entry
        for entry in re.split(r"[\s:]+", env.pop("LD_PRELOAD", ""))
        if entry and entry.rsplit("/", 1)[-1] not in native.PRELOAD_NAMES
    ]
    if kept:
        env["LD_PRELOAD"] = ":".join(kept)
    return env
