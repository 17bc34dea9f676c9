# SPDX-License-Identifier: Apache-2.0
"""Which test catches which mutant of core/base/sync.def."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.sync import Entry

FOR_EVER = "3600000000000"  # nanoseconds that a sleeper trusts the futex
AT_ONCE = "0"  # a channel waits on descriptors from the start
REFUSED = "-1"  # the futex refuses, and a socket call goes on to descriptors
RACE = 66  # ThreadSanitizer's exit status
ROUNDS = 200_000
WATCHDOG = 8  # seconds without an answer in which a wake-up is taken for lost
ATTEMPTS = 60


@dataclass(frozen=True)
class Run:
    """One program of tests/c, with what it is to do."""

    program: str
    way: str = ""
    slice_ns: str = AT_ONCE

    def __str__(self) -> str:
        return f"{self.program} {self.way}".strip()


@dataclass(frozen=True)
class Catch:
    """How a mutant is caught: by one of these programs, in turn, and by the model."""

    runs: tuple[Run, ...]
    model: tuple[tuple[str, str], ...] = ()  # situation, part


_RING = Run("test_order_ring")
_SOCKET = Run("test_socket_order")
_ATTACH = Run("test_order_attach")
_STORED = "sleep, word stored"
_CHANGED = "sleep, word changed"

CATCHES = {
    "PUBLISH": Catch((_RING,)),
    "OBSERVE": Catch((_RING,)),
    "RELEASE_SPACE": Catch((_RING,)),
    "SEE_SPACE": Catch((_RING,)),
    "FLAGS_SET": Catch((_SOCKET,)),
    "FLAGS_SEE": Catch((_SOCKET,)),
    "LEFT": Catch((_SOCKET,)),
    "ATTACH_SET": Catch((_ATTACH,)),
    "ATTACH_SEE": Catch((_ATTACH,)),
    "TELL_CONSUMER": Catch(
        (Run("test_socket_lost", "recv", FOR_EVER), Run("test_socket_lost", "poll")),
        (
            (_CHANGED, "teller's fence"),
            ("bell", "teller's fence"),
            ("leaving a ring", "producer's fence"),
        ),
    ),
    "TELL_PRODUCER": Catch(
        (Run("test_socket_lost", "send", FOR_EVER),), ((_CHANGED, "teller's fence"),)
    ),
    "NAP": Catch((), ((_CHANGED, "sleeper's fence"),)),
    "ARM": Catch((), (("bell", "sleeper's fence"),)),
    "ASK": Catch((), ((_CHANGED, "sleeper's fence"),)),
    "LEAVE": Catch((), (("leaving a ring", "consumer's fence"),)),
    "CHANNEL_TELL": Catch(
        (
            Run("test_channel_lost", "space"),
            Run("test_channel_lost", "bytes", FOR_EVER),
        ),
        ((_STORED, "teller's fence"), ("end of a stream", "teller's fence")),
    ),
    "CHANNEL_READ": Catch(
        (Run("test_channel_lost", "bytes", FOR_EVER),),
        ((_STORED, "sleeper's fence"), ("end of a stream", "sleeper's fence")),
    ),
    "CHANNEL_WRITE": Catch(
        (Run("test_channel_lost", "space", FOR_EVER),), ((_STORED, "sleeper's fence"),)
    ),
    "NAP_LOOK": Catch(
        (Run("test_socket_lost", "recv", FOR_EVER),), ((_CHANGED, "second look"),)
    ),
    "BELL_LOOK": Catch(
        (
            Run("test_socket_lost", "send", REFUSED),
            Run("test_socket_lost", "recv", REFUSED),
        ),
        (("bell", "second look"),),
    ),
    "ASK_LOOK": Catch((Run("test_socket_lost", "edge"),), ((_CHANGED, "second look"),)),
    "SET_LOOK": Catch(
        (Run("test_socket_lost", "epoll"),),
        (("bell", "second look"), ("bell with two sleepers", "second look")),
    ),
    "POLL_LOOK": Catch((Run("test_socket_lost", "poll"),), (("bell", "second look"),)),
    "CHANNEL_READ_LOOK": Catch(
        (Run("test_channel_lost", "bytes", FOR_EVER),), ((_STORED, "second look"),)
    ),
    "CHANNEL_WRITE_LOOK": Catch(
        (Run("test_channel_lost", "space", FOR_EVER),), ((_STORED, "second look"),)
    ),
}


def preset_of(entry: Entry) -> str:
    """The build that a mutant is caught in."""
    return "mutants-tsan" if entry.kind == "ORDER" else "mutants"


def run(
    programs: Path, what: Run, mutant: str, *, rounds: int, watchdog: int = 60
) -> subprocess.CompletedProcess[str]:
    """Runs what as that mutant ("": as none)."""
    env = {
        **os.environ,
        "KMAP_MUTANT": mutant,
        "KMAP_MUTANT_SLICE": what.slice_ns,
        "KMAP_UNIT_ROUNDS": str(rounds),
        "KMAP_UNIT_WATCHDOG": str(watchdog),
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [os.fspath(programs / what.program), *([what.way] if what.way else [])],
        env=env,
        capture_output=True,
        text=True,
    )


def caught(entry: Entry, done: subprocess.CompletedProcess[str]) -> bool:
    """Was that the failure that it should be?  Any other is an error."""
    if done.returncode == 0:
        return False
    want = RACE if entry.kind == "ORDER" else -signal.SIGALRM
    assert done.returncode == want, (
        f"{entry.name}: {done.args} ended with {done.returncode}, not {want}\n"
        f"{done.stderr}"
    )
    return True
