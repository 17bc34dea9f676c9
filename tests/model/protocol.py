# SPDX-License-Identifier: Apache-2.0
"""Sleeping, waking and leaving a ring, as docs/protocol.md has them, for the search.

Each function makes the threads of one situation.  ``without`` names the parts that a
mutant leaves out; the test wants every one of them to be missed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tests.model.engine import (
    Operation,
    Thread,
    cas,
    fence,
    load,
    store,
    swap,
    update,
    wait,
)

Steps = Generator[Operation, Any, Any]
Without = frozenset[str]

# --- section 6: one producer, one sleeping consumer ---------------------------------

SLEEP_PARTS = ("producer's fence", "sleeper's fence", "second look", "wake")


def sleep(without: Without, messages: int = 2) -> tuple[list[Thread], dict[str, Any]]:
    def producer() -> Steps:
        for position in range(1, messages + 1):
            yield store("wpos", position)
            if "producer's fence" not in without:
                yield fence()
            if (yield load("wait")) and "wake" not in without:
                yield swap("wait", 0)
        return messages

    def consumer() -> Steps:
        taken = 0
        while taken < messages:
            seen = yield load("wpos")
            if seen == taken:
                yield store("wait", 1)
                if "sleeper's fence" not in without:
                    yield fence()
                again = taken
                if "second look" not in without:
                    again = yield load("wpos")
                if again == taken:
                    yield wait("wait", lambda word: word == 0)
                continue
            taken = seen
        return taken

    return [producer, consumer], {"wpos": 0, "wait": 0}


# --- section 6: bells ---------------------------------------------------------------
#
# "sleep" is (how often changed, sleepers).  "edge" counts rings of the latch; each
# lets one of the threads go on that are in epoll_wait.


def _changed(by: int) -> Operation:
    return update("sleep", lambda word: (word[0] + 1, word[1] + by))


def _ring(changes: int, sleepers: int) -> Steps:
    if sleepers and (yield load("rung")) != changes:
        yield update("edge", lambda edge: edge + 1)
        yield store("rung", changes)


BELL_PARTS = ("publisher's fence", "second look", "news before the sleep word")


def bell(without: Without, messages: int = 2) -> tuple[list[Thread], dict[str, Any]]:
    """One peer that publishes twice, so that it may find its bit set already."""

    def publisher() -> Steps:
        for position in range(1, messages + 1):
            yield store("wpos", position)
            if "publisher's fence" not in without:
                yield fence()
            word = None
            if "news before the sleep word" in without:
                word = yield load("sleep")
            if not (yield load("news")):
                yield swap("news", 1)
            if word is None:
                word = yield load("sleep")
            yield from _ring(*word)
        return messages

    def drain() -> Steps:
        if (yield load("news")) and (yield swap("news", 0)):
            return (yield load("wpos"))
        return 0

    def owner() -> Steps:
        taken = 0
        while True:
            taken = max(taken, (yield from drain()))
            if taken == messages:
                return taken
            yield _changed(1)
            found = 0
            if "second look" not in without:
                found = yield from drain()
            if found <= taken:
                yield wait("edge", lambda edge: edge > 0)
                yield update("edge", lambda edge: edge - 1)
            yield _changed(-1)
            taken = max(taken, found)

    memory = {"wpos": 0, "news": 0, "sleep": (0, 0), "rung": -1, "edge": 0}
    return [publisher, owner], memory


SLEEPERS_PARTS = ("change on waking", "second look", "wakes the next")


def sleepers(without: Without) -> tuple[list[Thread], dict[str, Any]]:
    """Two peers with one piece of news each, and two threads that wait for one each."""

    def peer(bit: int) -> Thread:
        def publisher() -> Steps:
            yield update("news", lambda word: word | bit)
            yield from _ring(*(yield load("sleep")))
            return "told"

        return publisher

    def look() -> Steps:
        """Takes the lowest bit that is set; who leaves another wakes the next."""
        old: int = yield update("news", lambda word: word & (word - 1))
        if old & (old - 1) and "wakes the next" not in without:
            yield update("edge", lambda edge: edge + 1)
        return old & -old

    def sleeper() -> Steps:
        while not (taken := (yield from look())):
            yield _changed(1)
            if "second look" not in without:
                taken = yield from look()
            if not taken:
                yield wait("edge", lambda edge: edge > 0)
                yield update("edge", lambda edge: max(edge - 1, 0))
            if "change on waking" in without:
                yield update("sleep", lambda word: (word[0], word[1] - 1))
            else:
                yield _changed(-1)
            if taken:
                break
        return taken

    memory = {"news": 0, "sleep": (0, 0), "rung": -1, "edge": 0}
    return [peer(1), peer(2), sleeper, sleeper], memory


# --- section 5: which end leaves the ring first ---------------------------------------

# The consumer's compare-and-swap is a fence already, on the machine of this model.
LEAVE_PARTS = (
    "producer's fence",
    "producer asks",
    "one decision",
    "stop before the decision",
    "producer's mark",
)


def leave(
    without: Without, *, take: bool, then: str, messages: int = 2
) -> tuple[list[Thread], dict[str, Any]]:
    """The consumer leaves at any moment while the producer publishes.

    take: the consumer keeps what is unread.  then: what the producer does in the end;
    it "looks" at the ring again in a later call, "ends" its stream, or makes no call
    any more ("silent", which only a consumer that takes what is unread can live with).
    Each thread returns the messages that it has moved: the consumer those of the ring,
    the producer those that went by the kernel.
    """

    def producer() -> Steps:
        position = 0
        left = None
        while position < messages and left != "consumer":
            position += 1
            yield store("wpos", position)
            if "producer's fence" not in without:
                yield fence()
            left = yield load("left")
        if then == "ends" and left is None:
            if "one decision" in without:
                left = yield load("left")
                yield store("left", "producer")
            else:
                left = yield cas("left", None, "producer")
        if left != "consumer":
            if then != "looks":
                return ()
            left = yield wait("left", lambda word: word is not None)
        if "producer asks" in without:
            return tuple(range(position, messages))
        if "producer's mark" in without:
            stop = yield load("stop")
        else:
            stop = yield update("stop", lambda word: word and (word[0], True))
        if stop is None:
            return ("a position that nobody has stored",)
        return tuple(range(stop[0], messages))

    def consumer() -> Steps:
        taken = yield load("wpos")
        if "stop before the decision" not in without:
            yield store("stop", (taken, False))
        if "one decision" in without:
            old = yield load("left")
            yield store("left", "consumer")
        else:
            old = yield cas("left", None, "consumer")
        if "consumer's fence" not in without:
            yield fence()
        seen = yield load("wpos")
        if "stop before the decision" in without:
            yield store("stop", (taken, False))
        if old == "producer":
            taken = seen
        elif take:
            was = (taken, False)
            if (yield cas("stop", was, (seen, False))) == was:
                taken = seen
        return tuple(range(taken))

    return [producer, consumer], {"wpos": 0, "left": None, "stop": None}
