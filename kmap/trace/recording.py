# SPDX-License-Identifier: Apache-2.0
"""The recording of a request: what it holds, and its file.

A file is one JSON document.  What is read from one is checked field by field, so that
a figure is never drawn from something else.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmap.demo.syscalls import Calls
from kmap.results import JsonObject, UsageError

SCHEMA = "kmap.trace.recording/1"
SETUPS = ("kernel", "kmap")
# Microseconds of thirty years.
_MOST = 1e15
_AGAIN = "make the file again with kmap trace --out DIR"

# What a call is:
# stack     a system call that enters the network stack: it moves bytes of a socket, or
#           makes, asks, changes or closes one
# wait      a system call that waits for something to be ready: epoll_wait, poll, select
# wake-up   a system call that wakes somebody, or sleeps until woken: a latch of the
#           library, a futex, an eventfd
# ring      no system call: the library moved the bytes by shared memory, or knew that
#           there are none
# answered  no system call: the library knew what is ready
# other     every other system call
STACK, WAIT, WAKE_UP, RING, ANSWERED, OTHER = KINDS = (
    "stack",
    "wait",
    "wake-up",
    "ring",
    "answered",
    "other",
)
SYSTEM_CALLS = (STACK, WAIT, WAKE_UP, OTHER)


@dataclass(frozen=True)
class Call:
    """One call of one thread; times are microseconds since the request began.

    began_us is below 0 for a call that was waiting for the request already.
    """

    began_us: float
    ended_us: float
    role: str
    pid: int
    tid: int
    name: str
    # The first argument if it is a descriptor, else -1, and what it is.
    fd: int
    what: str
    kind: str
    # As the kernel returned it: -errno for an error.
    result: int
    # Bytes that the call moved, and which way; 0 and "" for none.
    bytes: int
    way: str

    @property
    def at_us(self) -> float:
        """Its place in the order: when it sent, or when it got what it waited for."""
        late = self.way == "in" or self.kind in (WAIT, ANSWERED)
        return self.ended_us if late else self.began_us


@dataclass(frozen=True)
class Process:
    """One process on the path of the request."""

    role: str
    pid: int
    comm: str


@dataclass(frozen=True)
class Spread:
    """How far the recordings of several requests differ."""

    requests: int
    # So many of them made the very calls that the recording shows.
    alike: int
    # The fewest and the most calls of each kind that strace can count.
    least: Calls
    most: Calls


@dataclass(frozen=True)
class Checked:
    """Requests that strace and the recorder saw both, at the same time."""

    requests: int
    # Of so many they counted the same, program by program.
    agree: int
    # strace's count that was the most frequent, by role.
    calls: Mapping[str, Calls]


@dataclass(frozen=True)
class Side:
    """One request in one set-up."""

    setup: str
    processes: tuple[Process, ...]
    calls: tuple[Call, ...]
    spread: Spread
    # Bytes that the library counted into rings, by hop; none on the kernel.
    ring_bytes: Mapping[str, int]
    strace: Checked | None

    @property
    def roles(self) -> tuple[str, ...]:
        """The programs, from the client to the service."""
        return tuple(dict.fromkeys(process.role for process in self.processes))

    def of(self, role: str, *kinds: str) -> list[Call]:
        """The calls of a program that are of one of these kinds, in order."""
        return [each for each in self.calls if each.role == role and each.kind in kinds]

    def count(self, role: str) -> Calls:
        """What strace counts, counted here."""
        return counted(self.of(role, *SYSTEM_CALLS))

    def agrees(self, role: str) -> bool | None:
        """Whether most requests under strace made as many calls into the stack.

        strace slows the programs down, so that they may wait and wake more often, and
        find another state of a connection that is just being made.  None without it.
        """
        if self.strace is None:
            return None
        return self.strace.calls[role].stack == self.count(role).stack

    def count_all(self) -> Calls:
        """What strace counts, of all programs."""
        return counted(each for each in self.calls if each.kind in SYSTEM_CALLS)

    @property
    def carried(self) -> dict[str, int]:
        """Bytes that were put into rings, by hop, as the calls say."""
        found: Counter[str] = Counter()
        for each in self.calls:
            if each.kind == RING and each.way == "out":
                found[each.what] += each.bytes
        return dict(sorted(found.items()))

    def problems(self) -> list[str]:
        """Where others who looked at the same request saw something else."""
        found = []
        if self.strace is not None:
            differ = self.strace.requests - self.strace.agree
            if differ:
                found.append(
                    f"{self.setup}: strace counted other calls in {differ} of "
                    f"{self.strace.requests} requests"
                )
        # A connection that was closed with its request has no count any more.
        for hop, count in self.ring_bytes.items():
            put = self.carried.get(hop, 0)
            if put != count:
                found.append(
                    f"{self.setup}, {hop}: the calls put {put} bytes into rings, and "
                    f"the library counted {count}"
                )
        return found


def counted(calls: Iterable[Call]) -> Calls:
    """Calls by what strace can tell apart; it is not asked for eventfds."""
    kinds: Counter[str] = Counter()
    for each in calls:
        if each.kind == WAKE_UP:
            kinds["doorbell" if each.name == "shutdown" else each.name] += 1
        else:
            kinds[each.kind] += 1
    return Calls(kinds[STACK], kinds[WAIT], kinds["doorbell"], kinds["futex"])


def spread(requests: Sequence[Sequence[Call]], alike: int) -> Spread:
    """How far requests differ, of which so many are alike."""
    counts = [
        dataclasses.astuple(counted(c for c in calls if c.kind in SYSTEM_CALLS))
        for calls in requests
    ]
    columns = list(zip(*counts, strict=True))
    return Spread(
        requests=len(requests),
        alike=alike,
        least=Calls(*map(min, columns)),
        most=Calls(*map(max, columns)),
    )


@dataclass(frozen=True)
class Recording:
    """The same request without and with Kmap."""

    command: tuple[str, ...]
    # Such as {"kernel": "6.1.0", "envoy": "1.40.0"}.
    versions: Mapping[str, str]
    sides: tuple[Side, ...]

    def side(self, setup: str) -> Side:
        """The one in that set-up."""
        return next(side for side in self.sides if side.setup == setup)

    def to_json(self) -> JsonObject:
        """The document of a recording file."""
        return {
            "schema": SCHEMA,
            "command": list(self.command),
            "versions": dict(self.versions),
            "sides": [_side_to_json(side) for side in self.sides],
        }


def _side_to_json(side: Side) -> JsonObject:
    document = dataclasses.asdict(side)
    for call in document["calls"]:
        for name in ("began_us", "ended_us"):
            call[name] = round(call[name], 1)
    return document


class Field:
    """A value in a document, and where it is."""

    def __init__(self, file: Path, value: Any, where: str = "") -> None:
        self._file = file
        self._value = value
        self._where = where

    def wrong(self, what: str) -> UsageError:
        """What to say of it."""
        where = f"field {self._where} " if self._where else "the document "
        return UsageError(f"{self._file}: {where}{what}; {_AGAIN}")

    def member(self, name: str) -> Field:
        """A member of an object."""
        if not isinstance(self._value, dict):
            raise self.wrong("is no object")
        where = f"{self._where}.{name}" if self._where else name
        if name not in self._value:
            raise Field(self._file, None, where).wrong("is missing")
        return Field(self._file, self._value[name], where)

    def items(self) -> list[Field]:
        """The items of a list."""
        if not isinstance(self._value, list):
            raise self.wrong("is no list")
        return [
            Field(self._file, value, f"{self._where}[{number}]")
            for number, value in enumerate(self._value)
        ]

    def members(self) -> dict[str, Field]:
        """All members of an object."""
        if not isinstance(self._value, dict):
            raise self.wrong("is no object")
        return {name: self.member(name) for name in self._value}

    @property
    def absent(self) -> bool:
        """Whether it is null."""
        return self._value is None

    def text(self, known: Iterable[str] = ()) -> str:
        """A string, one of the known if there are any."""
        if not isinstance(self._value, str):
            raise self.wrong("is no string")
        words = tuple(known)
        if words and self._value not in words:
            raise self.wrong(f"is {self._value!r}, none of {', '.join(words)}")
        return self._value

    def number(self, least: int | None = None) -> int:
        """A whole number."""
        if not isinstance(self._value, int) or isinstance(self._value, bool):
            raise self.wrong("is no whole number")
        if least is not None and self._value < least:
            raise self.wrong(f"is {self._value}, less than {least}")
        return self._value

    def real(self) -> float:
        """Any number."""
        if not isinstance(self._value, (int, float)) or isinstance(self._value, bool):
            raise self.wrong("is no number")
        # JSON as Python reads it has NaN, and whole numbers of any size.
        if not abs(self._value) < _MOST:
            raise self.wrong("is no number of microseconds")
        return float(self._value)


def _call(field: Field, roles: Iterable[str]) -> Call:
    return Call(
        began_us=field.member("began_us").real(),
        ended_us=field.member("ended_us").real(),
        role=field.member("role").text(roles),
        pid=field.member("pid").number(0),
        tid=field.member("tid").number(0),
        name=field.member("name").text(),
        fd=field.member("fd").number(-1),
        what=field.member("what").text(),
        kind=field.member("kind").text(KINDS),
        result=field.member("result").number(),
        bytes=field.member("bytes").number(0),
        way=field.member("way").text(("", "in", "out")),
    )


def _calls(field: Field) -> Calls:
    names = (each.name for each in dataclasses.fields(Calls))
    return Calls(*(field.member(name).number(0) for name in names))


def _spread(field: Field) -> Spread:
    return Spread(
        requests=field.member("requests").number(1),
        alike=field.member("alike").number(1),
        least=_calls(field.member("least")),
        most=_calls(field.member("most")),
    )


def _strace(field: Field, roles: Iterable[str]) -> Checked:
    calls = field.member("calls")
    return Checked(
        requests=field.member("requests").number(1),
        agree=field.member("agree").number(0),
        calls={role: _calls(calls.member(role)) for role in roles},
    )


def _side(field: Field) -> Side:
    processes = tuple(
        Process(
            role=each.member("role").text(),
            pid=each.member("pid").number(0),
            comm=each.member("comm").text(),
        )
        for each in field.member("processes").items()
    )
    if not processes:
        raise field.member("processes").wrong("is empty")
    roles = tuple(dict.fromkeys(process.role for process in processes))
    strace = field.member("strace")
    return Side(
        setup=field.member("setup").text(SETUPS),
        processes=processes,
        calls=tuple(_call(each, roles) for each in field.member("calls").items()),
        spread=_spread(field.member("spread")),
        ring_bytes={
            hop: count.number(0)
            for hop, count in field.member("ring_bytes").members().items()
        },
        strace=None if strace.absent else _strace(strace, roles),
    )


def document(file: Path) -> Field:
    """The document in a JSON file; UsageError says what is wrong with the file."""
    try:
        return Field(file, json.loads(file.read_text()))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no JSON ({error}); {_AGAIN}") from error


def read(top: Field) -> Recording:
    """The recording that a document holds; UsageError names a field that is wrong."""
    top.member("schema").text((SCHEMA,))
    sides = tuple(_side(each) for each in top.member("sides").items())
    if tuple(side.setup for side in sides) != SETUPS:
        raise top.member("sides").wrong("has other set-ups than kernel and kmap")
    return Recording(
        command=tuple(each.text() for each in top.member("command").items()),
        versions={
            name: version.text()
            for name, version in top.member("versions").members().items()
        },
        sides=sides,
    )
