# SPDX-License-Identifier: Apache-2.0
"""The workloads of kmap-bench: their names, arguments and the set-ups they run on."""

from __future__ import annotations

from dataclasses import dataclass

from kmap import native

KIB = 1 << 10
_SIZES = {
    "64": 64,
    "1k": KIB,
    "16k": 16 * KIB,
    "64k": 64 * KIB,
    "256k": 256 * KIB,
    "1m": 1024 * KIB,
}
SOCKETS = ("tcp", "unix", "kmap")
FDS = ("tcp", "unix", "pipe", "fifo", "kmap")
ALL = (*FDS, "ring")
# Not a transport: what bounds all of them.  It changes with the place that the
# hypervisor gives to its CPUs, so that it takes its turn like the others.
BOUND = "line"
SETUPS = {
    "tcp": "TCP over loopback",
    "unix": "Unix stream socket",
    "pipe": "unnamed pipes",
    "fifo": "named pipes",
    "kmap": "the TCP program under Kmap",
    "ring": "a channel of libkmap, without sockets",
    "line": "a cache line that goes back and forth, and carries nothing",
}
# TCP, too, and only measured when it is asked for: it takes root, and tools.
SOCKMAP = "sockmap"


# The TCP program under Kmap with another transport than the default one, which has a
# name of this form; not measured unless it is asked for.
_OTHER = "kmap-"


def other_setups() -> tuple[str, ...]:
    """Those set-ups, one for each further transport of the library."""
    return tuple(f"{_OTHER}{entry.name}" for entry in native.transports()[1:])


def transport_of(setup: str) -> str | None:
    """What carries the bytes of a program under Kmap; None in other set-ups."""
    if setup == "kmap":
        return native.transports()[0].name
    return setup.removeprefix(_OTHER) if setup.startswith(_OTHER) else None


def program_of(setup: str) -> str:
    """What kmap-bench is told to use in a set-up."""
    return "tcp" if transport_of(setup) or setup == SOCKMAP else setup


@dataclass(frozen=True)
class Workload:
    """One thing to measure, by kmap-bench on each of its set-ups."""

    name: str
    kind: str
    title: str
    setups: tuple[str, ...]
    cpus: int
    size: int
    mode: str = "blocking"
    connections: int = 1
    # Messages before the measured ones, and messages of one untimed run.
    warm: int = 2000
    traced: int = 2000
    # Connections of a run that is ended by their number and not by time.
    count: int = 0
    # A program that computes on every CPU of the run, or a quota of one CPU.
    hog: bool = False
    quota: bool = False
    # How many times as long as others it runs.
    longer: float = 1

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of kmap-bench, without the transport, the time and the place."""
        return (
            self.kind,
            *("--mode", self.mode, "--size", str(self.size)),
            *("--warm", str(self.warm), "--connections", str(self.connections)),
        )


def _place(cpus: int) -> str:
    return "one CPU" if cpus == 1 else "two CPUs"


def _pingpong(size: str, mode: str, cpus: int) -> Workload:
    # kmap.h has no epoll: a bare channel sleeps, or is asked again and again.
    setups = ALL if mode in ("blocking", "busy") else FDS
    if mode == "busy":
        setups = (*setups, BOUND)
    return Workload(
        name=f"pingpong-{size}-{mode}-{cpus}cpu",
        kind="pingpong",
        title=f"round trip, {size} bytes, {mode}, {_place(cpus)}",
        setups=setups,
        cpus=cpus,
        size=_SIZES[size],
        mode=mode,
    )


def _stream(size: str, cpus: int) -> Workload:
    number = _SIZES[size]
    return Workload(
        name=f"stream-{size}-{cpus}cpu",
        kind="stream",
        title=f"stream, writes of {size} bytes, {_place(cpus)}",
        setups=ALL,
        cpus=cpus,
        size=number,
        # Enough bytes that rings and socket buffers have grown.
        warm=max(64, (8 << 20) // max(number, KIB)),
        traced={64: 20_000, KIB: 8000, 16 * KIB: 2000}.get(number, 500),
    )


def _fanin(cpus: int) -> Workload:
    return Workload(
        name=f"fanin-128-{cpus}cpu",
        kind="fanin",
        title=f"64 connections to one epoll server, 128 bytes, {_place(cpus)}",
        setups=FDS,
        cpus=cpus,
        size=128,
        connections=64,
        mode="epoll",
        warm=6400,
        traced=6400,
    )


def _churn(cpus: int) -> Workload:
    return Workload(
        name=f"churn-128-{cpus}cpu",
        kind="churn",
        title=f"a connection for each request, 128 bytes, {_place(cpus)}",
        setups=SOCKETS,
        cpus=cpus,
        size=128,
        warm=200,
        count=4000,
        traced=500,
    )


def _with(workload: Workload, *, hog: bool = False, quota: bool = False) -> Workload:
    suffix, text = (
        ("hog", "beside a program that computes")
        if hog
        else ("quota", "in a cgroup with a quota of one CPU")
    )
    return Workload(
        **{
            **workload.__dict__,
            "name": f"{workload.name}-{suffix}",
            "title": f"{workload.title}, {text}",
            "setups": tuple(name for name in workload.setups if name in SOCKETS),
            "hog": hog,
            "quota": quota,
            # A time slice and a quota's period are long beside a round trip.
            "longer": 2,
        }
    )


def _all() -> tuple[Workload, ...]:
    pingpongs = [
        _pingpong(size, mode, cpus)
        for cpus in (1, 2)
        for mode in ("blocking", "epoll")
        for size in ("64", "1k", "16k")
    ]
    pingpongs.append(_pingpong("64", "edge", 1))
    pingpongs.append(_pingpong("64", "busy", 2))
    streams = [_stream(size, 2) for size in _SIZES]
    streams.append(_stream("16k", 1))
    others = [_fanin(1), _fanin(2), _churn(1), _churn(2)]
    idle = Workload(
        name="idle-1000",
        kind="idle",
        title="1,000 connections that have nothing to say",
        setups=SOCKETS,
        cpus=2,
        size=64,
        connections=1000,
        warm=12,
        traced=0,
        longer=4,
    )
    return (
        *pingpongs,
        *streams,
        *others,
        idle,
        *(
            _with(each, hog=True)
            for each in (_pingpong("64", "epoll", 1), _stream("16k", 1), _fanin(1))
        ),
        *(
            _with(each, quota=True)
            for each in (_pingpong("64", "epoll", 2), _stream("16k", 2), _fanin(2))
        ),
    )


WORKLOADS = {workload.name: workload for workload in _all()}
