# SPDX-License-Identifier: Apache-2.0
"""The C ABI of libkmap in ctypes: every signature of kmap.h, declared once here.

``KMAP_LIB_DIR`` names a directory with the two libraries to use instead of the
installed ones, which is how a build tree is tested without installing it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.resources
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmap.results import CannotRun

ABI_VERSION = 1
CHANNEL_FDS = 5
POLICY_ERROR = 256

LIBRARY_NAME = "libkmap.so"
PRELOAD_NAME = "libkmap_preload.so"
MUSL_NAME = "libkmap_preload-musl.so"
# A process has one of them, or both and one of them at work.
PRELOAD_NAMES = (PRELOAD_NAME, MUSL_NAME)
BENCH_NAME = "kmap-bench"

ChannelPointer = ctypes.c_void_p
ChannelFds = ctypes.c_int * CHANNEL_FDS


class ChannelStats(ctypes.Structure):
    """struct kmap_channel_stats."""

    _fields_ = (
        ("futex_wakes", ctypes.c_uint64),
        ("futex_sleeps", ctypes.c_uint64),
        ("bells_rung", ctypes.c_uint64),
        ("bell_sleeps", ctypes.c_uint64),
        ("grows", ctypes.c_uint64),
    )


class _Symbol(ctypes.Structure):
    """struct kmap_symbol."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("subject", ctypes.c_char_p),
        ("class_name", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
    )


class _Option(ctypes.Structure):
    """struct kmap_option."""

    _fields_ = (
        ("env", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("default_text", ctypes.c_char_p),
        ("help", ctypes.c_char_p),
        ("min", ctypes.c_uint64),
        ("max", ctypes.c_uint64),
    )


class _Layout(ctypes.Structure):
    """struct kmap_layout."""

    _fields_ = (
        ("structure", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "kmap_abi_version": (ctypes.c_int, ()),
    "kmap_wire_version": (ctypes.c_int, ()),
    "kmap_channel_create": (
        ctypes.c_int,
        (ctypes.c_size_t, ctypes.POINTER(ChannelPointer)),
    ),
    "kmap_channel_fds": (ctypes.c_int, (ChannelPointer, ChannelFds)),
    "kmap_channel_attach": (
        ctypes.c_int,
        (ChannelFds, ctypes.POINTER(ChannelPointer)),
    ),
    "kmap_channel_set_liveness": (ctypes.c_int, (ChannelPointer, ctypes.c_int)),
    "kmap_channel_read": (
        ctypes.c_ssize_t,
        (ChannelPointer, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    ),
    "kmap_channel_write": (
        ctypes.c_ssize_t,
        (ChannelPointer, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    ),
    "kmap_channel_shutdown": (ctypes.c_int, (ChannelPointer,)),
    "kmap_channel_readable": (ctypes.c_size_t, (ChannelPointer,)),
    "kmap_channel_unread": (ctypes.c_size_t, (ChannelPointer,)),
    "kmap_channel_close": (None, (ChannelPointer,)),
    "kmap_channel_get_stats": (None, (ChannelPointer, ctypes.POINTER(ChannelStats))),
    "kmap_reason_name": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_reason_meaning": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_transport_name": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_transport_meaning": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_counter_name": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_counter_meaning": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_symbol_name": (ctypes.c_char_p, (ctypes.c_uint,)),
    "kmap_symbol_get": (ctypes.c_int, (ctypes.c_uint, ctypes.POINTER(_Symbol))),
    "kmap_option_get": (ctypes.c_int, (ctypes.c_uint, ctypes.POINTER(_Option))),
    "kmap_layout_get": (ctypes.c_int, (ctypes.c_uint, ctypes.POINTER(_Layout))),
    "kmap_policy_check": (
        ctypes.c_int,
        (
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_char_p,
        ),
    ),
}


@dataclass(frozen=True)
class Option:
    """One setting of the library, from its own table."""

    env: str
    type: str
    default: str
    help: str
    minimum: int
    maximum: int


@dataclass(frozen=True)
class Symbol:
    """An interposed name and what becomes of the call, in the words of symbols.def."""

    name: str
    subject: str
    class_name: str
    text: str


@dataclass(frozen=True)
class LayoutField:
    """Where the compiler put one field of a structure that other programs read."""

    structure: str
    field: str
    offset: int
    size: int


@dataclass(frozen=True)
class PolicyFault:
    """What is wrong with a policy; line 0 is none in particular."""

    line: int
    message: str


@dataclass(frozen=True)
class Named:
    """A reason, transport or counter: its name in output and what it means."""

    name: str
    meaning: str


_REMEDY = (
    "install the package with 'pip install .', or set KMAP_LIB_DIR to the directory of "
    "a build"
)


def _library_path(name: str, remedy: str = _REMEDY) -> Path:
    override = os.environ.get("KMAP_LIB_DIR")
    if override:
        candidates = [Path(override) / name]
    else:
        candidates = [Path(str(importlib.resources.files("kmap") / "lib" / name))]
        # In the root of the source tree, python -m kmap finds the package there,
        # and the libraries are where it was installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.distribution("kmap")
            candidates.append(Path(str(installed.locate_file(f"kmap/lib/{name}"))))
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise CannotRun(f"{candidates[0]} does not exist: {remedy}")


def library_path() -> Path:
    """Where libkmap.so is; raises CannotRun when it is not installed."""
    return _library_path(LIBRARY_NAME)


def preload_path() -> Path:
    """Where libkmap_preload.so is; raises CannotRun when it is not installed."""
    return _library_path(PRELOAD_NAME)


def musl_path() -> Path:
    """Where the preload library for musl is; raises CannotRun when it was not built."""
    return _library_path(
        MUSL_NAME,
        "it is built where musl-gcc is found; install Debian's musl-tools and then the "
        "package again",
    )


def bench_path() -> Path:
    """Where kmap-bench is; raises CannotRun when it is not installed."""
    return _library_path(BENCH_NAME)


@functools.cache
def library() -> ctypes.CDLL:
    """libkmap.so with all signatures set; loaded once."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotRun(f"{path} cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    version = loaded.kmap_abi_version()
    if version != ABI_VERSION:
        raise CannotRun(
            f"{path} has ABI version {version}, this package needs {ABI_VERSION}: "
            "install the two from the same source"
        )
    return loaded


def _texts(function: Callable[[int], bytes | None]) -> Iterator[str]:
    index = 0
    while (text := function(index)) is not None:
        yield text.decode()
        index += 1


@functools.cache
def reasons() -> tuple[Named, ...]:
    """Why a connection is on the kernel; the index is the number in a row."""
    lib = library()
    names = _texts(lib.kmap_reason_name)
    return tuple(map(Named, names, _texts(lib.kmap_reason_meaning)))


@functools.cache
def transports() -> tuple[Named, ...]:
    """What can carry a connection's bytes; the index is the number in a row."""
    lib = library()
    names = _texts(lib.kmap_transport_name)
    return tuple(map(Named, names, _texts(lib.kmap_transport_meaning)))


@functools.cache
def counters() -> tuple[Named, ...]:
    """The process-wide counters; the index is the place in the stats memfd."""
    lib = library()
    names = _texts(lib.kmap_counter_name)
    return tuple(map(Named, names, _texts(lib.kmap_counter_meaning)))


@functools.cache
def symbols() -> tuple[str, ...]:
    """The names that the preload library interposes."""
    return tuple(_texts(library().kmap_symbol_name))


@functools.cache
def symbol_table() -> tuple[Symbol, ...]:
    """Those names with what becomes of each call."""
    found: list[Symbol] = []
    entry = _Symbol()
    while library().kmap_symbol_get(len(found), ctypes.byref(entry)) == 0:
        texts = (entry.name, entry.subject, entry.class_name, entry.text)
        found.append(Symbol(*(text.decode() for text in texts)))
    return tuple(found)


@functools.cache
def options() -> tuple[Option, ...]:
    """Every setting of the library."""
    found: list[Option] = []
    entry = _Option()
    while library().kmap_option_get(len(found), ctypes.byref(entry)) == 0:
        found.append(
            Option(
                env=entry.env.decode(),
                type=entry.type.decode(),
                # A text default is a C literal in the table.
                default=entry.default_text.decode().strip('"'),
                help=entry.help.decode(),
                minimum=entry.min,
                maximum=entry.max,
            )
        )
    return tuple(found)


@functools.cache
def layout() -> tuple[LayoutField, ...]:
    """Offsets and sizes as compiled, of every structure that crosses processes."""
    found: list[LayoutField] = []
    entry = _Layout()
    while library().kmap_layout_get(len(found), ctypes.byref(entry)) == 0:
        found.append(
            LayoutField(
                structure=entry.structure.decode(),
                field=entry.field.decode(),
                offset=entry.offset,
                size=entry.size,
            )
        )
    return tuple(found)


def policy_error(text: bytes) -> PolicyFault | None:
    """What the library's parser finds wrong in the text of a policy, if anything."""
    line = ctypes.c_uint()
    message = ctypes.create_string_buffer(POLICY_ERROR)
    if library().kmap_policy_check(text, len(text), ctypes.byref(line), message) == 0:
        return None
    return PolicyFault(line.value, message.value.decode(errors="replace"))
