# SPDX-License-Identifier: Apache-2.0
"""What an ELF file says of itself: elf(5), and GNU's additions to it."""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection, GNUVerNeedSection
from elftools.elf.hash import GNUHashTable
from elftools.elf.segments import InterpSegment, NoteSegment

from kmap.results import CommandFailed

_MAGIC = b"\x7fELF"
# The head of Go's build information, since Go 1.13; debug/buildinfo describes it.
_GO_BUILD_INFO = b"\xff Go buildinf:"
_GO_INLINE = 2
_GLIBC = re.compile(r"GLIBC_(\d+)\.(\d+)")

Version = tuple[int, int]


class NotElf(Exception):
    """The file is something else, or too damaged to be read."""


@dataclass(frozen=True)
class Elf:
    """One executable or library."""

    path: str
    # "64-bit x86-64" and the like; equal for what may be in one process.
    machine: str
    interpreter: str | None
    # Names of libraries in DT_NEEDED.
    needed: tuple[str, ...]
    # Names that it takes from other files.
    imports: frozenset[str]
    # Has a malloc that other files get to use, too.
    own_malloc: bool
    # "1.19.8", empty if it is Go of an unknown version, None if it is not Go.
    go: str | None
    # The newest version of glibc's names that it needs, and that it brings.
    glibc_needed: Version | None
    glibc_defined: Version | None

    @property
    def static(self) -> bool:
        """Whether no dynamic loader starts it; static-pie has a dynamic section."""
        return self.interpreter is None


def _dynamic(elf: Any) -> Any:
    for segment in elf.iter_segments():
        if isinstance(segment, DynamicSegment):
            return segment
    return None


def _interpreter(elf: Any) -> str | None:
    for segment in elf.iter_segments():
        if isinstance(segment, InterpSegment):
            return str(segment.get_interp_name())
    return None


def _needed(dynamic: Any) -> tuple[str, ...]:
    return tuple(str(tag.needed) for tag in dynamic.iter_tags("DT_NEEDED"))


def _symbols(elf: Any, dynamic: Any) -> tuple[frozenset[str], bool]:
    """The names that it takes from others, and whether it defines malloc."""
    _, offset = dynamic.get_table_offset("DT_GNU_HASH")
    if offset is None:
        symbols = list(dynamic.iter_symbols())
        malloc = any(s.name == "malloc" and _defined(s) for s in symbols)
    else:
        # Names of others are not in this table and come before those that are; a
        # library has thousands of its own.
        table = GNUHashTable(elf, offset, dynamic)
        first = min(int(table.params["symoffset"]), elf.stream.size())
        symbols = [dynamic.get_symbol(index) for index in range(first)]
        # A program may have the address of another's function as if it were its own.
        found = table.get_symbol("malloc")
        malloc = found is not None and _defined(found)
    names = (str(symbol.name) for symbol in symbols if not _defined(symbol))
    return frozenset(filter(None, names)), malloc


def _defined(symbol: Any) -> bool:
    return bool(symbol["st_shndx"] != "SHN_UNDEF")


def _glibc(sections: list[Any], kind: type[Any]) -> Version | None:
    """The newest GLIBC_x.y among versions that are needed, or defined."""
    found: list[Version] = []
    for section in sections:
        if not isinstance(section, kind):
            continue
        for version, auxiliaries in section.iter_versions():
            if kind is GNUVerNeedSection and not str(version.name).startswith("libc."):
                continue
            for auxiliary in auxiliaries:
                if match := _GLIBC.fullmatch(str(auxiliary.name)):
                    found.append((int(match[1]), int(match[2])))
    return max(found, default=None)


def _go(elf: Any) -> str | None:
    """The version of Go that it was made with; None if it was not."""
    section = elf.get_section_by_name(".go.buildinfo")
    if section is not None:
        data = bytes(section.data()[:128])
        if data.startswith(_GO_BUILD_INFO) and data[15] & _GO_INLINE:
            # A length in one byte, as no version has more than 127 characters.
            text = data[33 : 33 + data[32]].decode(errors="replace")
            return text.removeprefix("go")
        return ""
    for segment in elf.iter_segments():
        if isinstance(segment, NoteSegment):
            for note in segment.iter_notes():
                if note["n_name"] == "Go":
                    return ""
    return None


def _read(path: str, stream: Any) -> Elf:
    elf = ELFFile(stream)
    dynamic = _dynamic(elf)
    imports, own_malloc = (
        _symbols(elf, dynamic) if dynamic else (frozenset[str](), False)
    )
    sections = list(elf.iter_sections())
    return Elf(
        path=path,
        machine=f"{elf.elfclass}-bit {elf.get_machine_arch()}",
        interpreter=_interpreter(elf),
        needed=_needed(dynamic) if dynamic else (),
        imports=imports,
        own_malloc=own_malloc,
        go=_go(elf),
        glibc_needed=_glibc(sections, GNUVerNeedSection),
        glibc_defined=_glibc(sections, GNUVerDefSection),
    )


def open_now(path: str, flags: int) -> int:
    """An opener that does not wait for somebody at the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


@cache
def read(path: str) -> Elf:
    """Reads the file; raises NotElf, or CommandFailed if it cannot be opened."""
    try:
        with open(path, "rb", opener=open_now) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise NotElf(f"{path}: not an ELF file")
            stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CommandFailed(f"{path} cannot be read: {error.strerror}") from None
    with stream:
        try:
            return _read(path, stream)
        # Files come from anywhere; the parser meets damage with all kinds of errors.
        except Exception as error:
            raise NotElf(f"{path}: damaged ELF file: {error}") from None


def mentions(path: str, *words: bytes) -> frozenset[bytes]:
    """Which of words stand somewhere in the file, as in its texts."""
    try:
        with open(path, "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return frozenset(word for word in words if content.find(word) >= 0)
    except (OSError, ValueError):
        return frozenset()
