# SPDX-License-Identifier: Apache-2.0
"""Sleeping, waking, leaving, closing and cutting over, as docs/protocol.md has them.

Each function makes the threads of one situation for the search.  ``without`` names the
parts that a mutant leaves out; ``SITUATIONS`` says which parts there are, and the test
wants every one of them to be missed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from operator import ne
from typing import Any

from tests.model.engine import (
    End,
    Operation,
    Thread,
    cas,
    choose,
    explore,
    fence,
    load,
    store,
    swap,
    update,
    wait,
)

Steps = Generator[Operation, Any, Any]
Without = frozenset[str]
Made = tuple[list[Thread], dict[str, Any]]


def _loads_over(change: Operation, name: str, fenced: bool) -> Steps:
    """Changes something atomically and loads name: the old value, and what is seen.

    Without a fence between the two the load may come first, as on arm64.
    """
    early = None
    if not fenced:
        early = yield load(name)
    old = yield change
    if fenced:
        yield fence()
    seen = yield load(name)
    if not fenced:
        seen = yield choose(early, seen)
    return old, seen


# --- section 6: one end publishes, the other sleeps on the futex --------------------
#
# Bytes or space: what is published is a position, and the sleeper waits for it to move.


def sleep(without: Without, *, change: bool = False, messages: int = 2) -> Made:
    """change: the word is set by an atomic change, not by a store."""

    def teller() -> Steps:
        for position in range(1, messages + 1):
            yield store("position", position)
            if "teller's fence" not in without:
                yield fence()
            if (yield load("word")) and "wake" not in without:
                yield swap("word", 0)
        return messages

    def sleeper() -> Steps:
        fenced = "sleeper's fence" not in without
        taken = 0
        while taken < messages:
            seen = yield load("position")
            if seen != taken:
                taken = seen
                continue
            if change:
                _, again = yield from _loads_over(swap("word", 1), "position", fenced)
            else:
                yield store("word", 1)
                if fenced:
                    yield fence()
                again = yield load("position")
            if "second look" in without or again == taken:
                yield wait("word", lambda word: word == 0)
        return taken

    return [teller, sleeper], {"position": 0, "word": 0}


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


def bell(without: Without, messages: int = 2) -> Made:
    """One peer that publishes twice, so that it may find its bit set already."""

    def publisher() -> Steps:
        for position in range(1, messages + 1):
            yield store("wpos", position)
            if "teller's fence" not in without:
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

    def take(set_: int) -> Steps:
        if set_ and (yield swap("news", 0)):
            return (yield load("wpos"))
        return 0

    def owner() -> Steps:
        fenced = "sleeper's fence" not in without
        taken = 0
        while True:
            taken = max(taken, (yield from take((yield load("news")))))
            if taken == messages:
                return taken
            _, news = yield from _loads_over(_changed(1), "news", fenced)
            found = 0
            if "second look" not in without:
                found = yield from take(news)
            if found <= taken:
                yield wait("edge", lambda edge: edge > 0)
                yield update("edge", lambda edge: edge - 1)
            yield _changed(-1)
            taken = max(taken, found)

    memory = {"wpos": 0, "news": 0, "sleep": (0, 0), "rung": -1, "edge": 0}
    return [publisher, owner], memory


def sleepers(without: Without) -> Made:
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


# --- section 5: which end leaves the ring first -------------------------------------


def leave(without: Without, *, take: bool, then: str, messages: int = 2) -> Made:
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
            yield fence()
            seen = yield load("wpos")
        else:
            old, seen = yield from _loads_over(
                cas("left", None, "consumer"), "wpos", "consumer's fence" not in without
            )
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


def take_back(without: Without, messages: int = 2) -> Made:
    """A producer ends its stream as the consumer begins to read.

    Returned as with leave.
    """

    def producer() -> Steps:
        for position in range(1, messages + 1):
            yield store("wpos", position)
        if "one decision" in without:
            old = yield load("left")
            if old is None:
                yield store("left", "taken back")
        else:
            old = yield cas("left", None, "taken back")
        return () if old else tuple(range(messages))

    def consumer() -> Steps:
        if "one decision" in without or "says that it begins" in without:
            old = yield load("left")
            if "says that it begins" not in without:
                yield store("left", "reading")
        else:
            old = yield cas("left", None, "reading")
        if old == "taken back":
            return ()
        seen = yield wait("wpos", lambda wpos: wpos == messages)
        return tuple(range(seen))

    return [producer, consumer], {"wpos": 0, "left": None}


# --- section 7: the end of a stream -------------------------------------------------


def close(without: Without) -> Made:
    """The producer publishes and ends its stream; the consumer may sleep for ever.

    Both return what they think the stream was.
    """

    def producer() -> Steps:
        if "bytes before the flag" in without:
            yield store("pflags", "fin")
        yield store("wpos", 1)
        for ending in (False, True):
            if ending and "bytes before the flag" not in without:
                yield store("pflags", "fin")
            if "teller's fence" not in without:
                yield fence()
            asleep = yield load("word")
            if asleep and not (ending and "wake at the end" in without):
                yield swap("word", 0)
        return 1

    def consumer() -> Steps:
        taken = 0
        while True:
            flags = None
            if "flag before the ring" not in without:
                flags = yield load("pflags")
            seen = yield load("wpos")
            if seen != taken:
                taken = seen
                continue
            if "flag before the ring" in without:
                flags = yield load("pflags")
            if flags:
                return taken
            yield store("word", 1)
            if "sleeper's fence" not in without:
                yield fence()
            again = yield load("wpos")
            flags = None
            if "second look at the flag" not in without:
                flags = yield load("pflags")
            if again == taken and not flags:
                yield wait("word", lambda word: word == 0)

    return [producer, consumer], {"wpos": 0, "pflags": None, "word": 0}


def death(without: Without) -> Made:
    """The producer publishes and dies without a word; the kernel tells of it."""

    def producer() -> Steps:
        yield store("wpos", 1)
        yield fence()  # the kernel's own, on the way to closing what the dead held
        yield store("fin", True)
        return 1

    def consumer() -> Steps:
        taken = yield load("wpos")
        yield wait("fin", lambda fin: fin)
        if "look behind the end" not in without:
            taken = yield load("wpos")
        return taken

    return [producer, consumer], {"wpos": 0, "fin": False}


# --- section 5: from the kernel to the ring and back --------------------------------


def cut(without: Without) -> Made:
    """One byte by the kernel, one by the ring, one by the kernel again.

    "kernel" is what its socket holds, in order.
    """

    def producer() -> Steps:
        yield update("kernel", lambda held: (*held, "a"))
        if "position before the flag" in without:
            yield store("pflags", ("cut",))
            yield store("cut", 1)
        else:
            yield store("cut", 1)
            yield store("pflags", ("cut",))
        yield store("wpos", 1)
        yield store("end", 1)
        if "flag before the kernel" not in without:
            yield store("pflags", ("cut", "end"))
        yield fence()  # entering the kernel
        yield update("kernel", lambda held: (*held, "c"))
        yield store("pflags", ("cut", "end"))
        return "abc"

    def receive() -> Steps:
        held = yield update("kernel", lambda held: held[1:])
        return held[0] if held else ""

    def consumer() -> Steps:
        got = ""
        while not (yield load("pflags")):
            got += yield from receive()
            yield wait("pflags", lambda flags: flags != ())
        left = (yield load("cut")) - len(got)
        if "drains the kernel first" not in without:
            while left > 0:
                yield wait("kernel", lambda held: held != ())
                got += yield from receive()
                left -= 1
        while True:
            flags = yield load("pflags")
            if (yield load("wpos")) == 1 and "b" not in got:
                got += "b"
            ended = "end" in flags and (yield load("end")) == ("b" in got)
            if ended or "ring before the kernel" in without:
                break
            if (yield load("kernel")):
                if "end" not in (yield load("pflags")):
                    return got + ", and the peer broke the rules"
                continue
            yield wait("pflags", partial(ne, flags))
        yield wait("kernel", lambda held: held != ())
        got += yield from receive()
        return got

    memory = {"kernel": (), "cut": 0, "pflags": (), "wpos": 0, "end": 0}
    return [producer, consumer], memory


def grow(without: Without) -> Made:
    """A byte in the first level, one in the second; nobody puts an "x" there."""

    def producer() -> Steps:
        yield store("small", "a")
        yield store("wpos", 1)
        if "level before the position" in without:
            yield store("large", "b")
            yield store("wpos", 2)
            yield store("grow_at", 1)
        else:
            yield store("grow_at", 1)
            yield store("large", "b")
            yield store("wpos", 2)
        return "ab"

    def consumer() -> Steps:
        got = ""
        while len(got) < 2:
            ends = None
            if "position before the level" in without:
                ends = yield load("grow_at")
            yield wait("wpos", partial(int.__lt__, len(got)))
            if "position before the level" not in without:
                ends = yield load("grow_at")
            large = ends is not None and ends <= len(got)
            got += yield load("large" if large else "small2" if got else "small")
        return got

    memory = {"small": "x", "small2": "x", "large": "x", "wpos": 0, "grow_at": None}
    return [producer, consumer], memory


# --- what is wanted of them ---------------------------------------------------------


def sleeps_for_ever(end: End) -> bool:
    """Somebody does."""
    return end.stuck


def loses_something(end: End) -> bool:
    """A message is missing, there twice, or out of order."""
    kernel, ring = end.results
    return end.stuck or ring + kernel != (0, 1)


def differs(end: End) -> bool:
    """The reader has not got what the writer wrote."""
    return end.stuck or len(set(end.results)) != 1


@dataclass(frozen=True)
class Situation:
    """Some ways that one part of the protocol runs, and what it must not come to."""

    makes: tuple[Callable[[Without], Made], ...]
    bad: Callable[[End], bool]
    parts: tuple[str, ...]

    def search(self, *without: str) -> tuple[int, End | None]:
        """How many states there are, up to a bad end, and that end."""
        states = 0
        for make in self.makes:
            search = explore(*make(frozenset(without)), until=self.bad)
            assert search.ends
            states += search.states
            if self.bad(search.ends[-1]):
                return states, search.ends[-1]
        return states, None


def _leave(take: bool, then: str) -> Callable[[Without], Made]:
    return lambda without: leave(without, take=take, then=then)


_SLEEP = ("teller's fence", "sleeper's fence", "second look", "wake")

SITUATIONS = {
    "sleep, word stored": Situation((sleep,), sleeps_for_ever, _SLEEP),
    "sleep, word changed": Situation(
        (lambda without: sleep(without, change=True),), sleeps_for_ever, _SLEEP
    ),
    "bell": Situation(
        (bell,),
        sleeps_for_ever,
        (
            "teller's fence",
            "sleeper's fence",
            "second look",
            "news before the sleep word",
        ),
    ),
    "bell with two sleepers": Situation(
        (sleepers,),
        sleeps_for_ever,
        ("change on waking", "second look", "wakes the next"),
    ),
    "leaving a ring": Situation(
        (
            _leave(False, "looks"),
            _leave(False, "ends"),
            _leave(True, "looks"),
            _leave(True, "ends"),
            _leave(True, "silent"),
        ),
        loses_something,
        (
            "producer's fence",
            "consumer's fence",
            "producer asks",
            "one decision",
            "stop before the decision",
            "producer's mark",
        ),
    ),
    "taking back": Situation(
        (take_back,), loses_something, ("one decision", "says that it begins")
    ),
    "end of a stream": Situation(
        (close,),
        differs,
        (
            "bytes before the flag",
            "flag before the ring",
            "teller's fence",
            "sleeper's fence",
            "second look at the flag",
            "wake at the end",
        ),
    ),
    "death of a producer": Situation((death,), differs, ("look behind the end",)),
    "cut-over and return": Situation(
        (cut,),
        differs,
        (
            "position before the flag",
            "drains the kernel first",
            "flag before the kernel",
            "ring before the kernel",
        ),
    ),
    "growth": Situation(
        (grow,),
        differs,
        ("level before the position", "position before the level"),
    ),
}
