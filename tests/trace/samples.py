# SPDX-License-Identifier: Apache-2.0
"""A small recording, made by hand, for what needs no kernel."""

from __future__ import annotations

from typing import Any

from kmap.demo.syscalls import Calls
from kmap.trace.recording import (
    OTHER,
    RING,
    STACK,
    WAIT,
    WAKE_UP,
    Call,
    Checked,
    Process,
    Recording,
    Side,
    Spread,
)

PROCESSES = (
    Process("client", 10, "client"),
    Process("envoy", 20, "envoy"),
    Process("service", 30, "nginx"),
)


def call(role: str, name: str, kind: str, **changes: Any) -> Call:
    """A call with what matters of it."""
    pid = {process.role: process.pid for process in PROCESSES}[role]
    values: dict[str, Any] = {
        "began_us": 1.0,
        "ended_us": 2.0,
        "role": role,
        "pid": pid,
        "tid": pid,
        "name": name,
        "fd": 5,
        "what": "client-envoy",
        "kind": kind,
        "result": 0,
        "bytes": 0,
        "way": "",
    }
    return Call(**{**values, **changes})


KERNEL = (
    call("client", "sendto", STACK, result=39, bytes=39, way="out"),
    call("envoy", "epoll_wait", WAIT, result=1, what="eventpoll"),
    call("envoy", "readv", STACK, result=39, bytes=39, way="in"),
    call("envoy", "readv", STACK, result=-11),
    call("service", "openat", OTHER, result=7, what=""),
)
KMAP = (
    call("client", "send", RING, result=39, bytes=39, way="out"),
    call("client", "shutdown", WAKE_UP, what="latch"),
    call("envoy", "epoll_wait", WAIT, result=0, what="eventpoll"),
    call("envoy", "readv", RING, result=39, bytes=39, way="in"),
    call("envoy", "readv", RING, result=-1),
)


def side(setup: str, calls: tuple[Call, ...], **changes: Any) -> Side:
    """One request that strace saw, too."""
    plain = Side(
        setup=setup,
        processes=PROCESSES,
        calls=calls,
        spread=Spread(3, 2, Calls(3, 1, 0, 0), Calls(3, 2, 0, 0)),
        ring_bytes={"client-envoy": 39} if setup == "kmap" else {},
        strace=None,
    )
    values: dict[str, Any] = {**vars(plain)}
    values["strace"] = Checked(3, 3, {role: plain.count(role) for role in plain.roles})
    return Side(**{**values, **changes})


RECORDING = Recording(
    command=(),
    versions={"kernel": "6.1.0"},
    sides=(side("kernel", KERNEL), side("kmap", KMAP)),
)
