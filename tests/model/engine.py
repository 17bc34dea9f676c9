# SPDX-License-Identifier: Apache-2.0
"""An exhaustive search of small concurrent programs on a weakly ordered memory.

A program is some threads, each a generator function that yields one operation at a
time on named variables of shared memory and gets its result.  Every thread has a store
buffer that it alone sees, as on x86-64: a store goes into it, and reaches memory at any
later moment, in order.  ``swap``, ``cas``, ``update`` and ``fence`` first wait for the
buffer to be empty.  (Weaker machines reorder more, which release and acquire forbid for
what the protocol relies on; what they leave open, a store overtaken by a later load, is
what the buffer models, and what the fences of the protocol are for.  On arm64 a load
may overtake an atomic change, too: a program says so with a load before the change, one
after it, and ``choose``.)

``explore`` runs all interleavings, merging those that lead to the same state, and those
that differ in nothing but which of two threads with the same program is where.  A state
of a thread is the history of results it has got, so threads need no state of their own:
they are run again from their start.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Operation = tuple[Any, ...]
Thread = Callable[[], Generator[Operation, Any, Any]]
Memory = tuple[tuple[str, Any], ...]


# --- operations --------------------------------------------------------------------


def load(name: str) -> Operation:
    return ("load", name)


def store(name: str, value: Any) -> Operation:
    return ("store", name, value)


def swap(name: str, value: Any) -> Operation:
    """The old value; ordered with everything."""
    return ("swap", name, value)


def cas(name: str, expected: Any, value: Any) -> Operation:
    """The old value; ordered with everything."""
    return ("cas", name, expected, value)


def update(name: str, change: Callable[[Any], Any]) -> Operation:
    """The old value, replaced by what change makes of it; ordered with everything."""
    return ("update", name, change)


def fence() -> Operation:
    return ("fence",)


def choose(*values: Any) -> Operation:
    """One of them: whichever makes most trouble."""
    return ("choose", values)


def wait(name: str, good: Callable[[Any], bool]) -> Operation:
    """Sleeps in the kernel until memory itself says so; the value then."""
    return ("wait", name, good)


# --- the search --------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """A state in which no thread can move."""

    memory: dict[str, Any]
    results: tuple[Any, ...]  # what each thread returned, or STUCK
    steps: tuple[str, ...]  # one way to get there

    @property
    def stuck(self) -> bool:
        return STUCK in self.results


STUCK = "stuck"


@dataclass
class _Local:
    """A thread after a history of results."""

    operation: Operation | None  # None: it has returned
    value: Any = None


@dataclass
class Search:
    """All ends, and how many states there were."""

    ends: list[End] = field(default_factory=list)
    states: int = 0


def explore(
    threads: Iterable[Thread],
    memory: dict[str, Any],
    *,
    until: Callable[[End], bool] = lambda end: False,
    most: int = 2_000_000,
) -> Search:
    """Every end that the threads can come to, up to one that until is true for."""
    makers = list(threads)
    locals_: dict[tuple[int, tuple[Any, ...]], _Local] = {}

    def local(index: int, history: tuple[Any, ...]) -> _Local:
        key = (index, history)
        if key not in locals_:
            program = makers[index]()
            try:
                operation = next(program)
                for result in history:
                    operation = program.send(result)
                locals_[key] = _Local(operation)
            except StopIteration as stop:
                locals_[key] = _Local(None, stop.value)
        return locals_[key]

    start = (tuple(sorted(memory.items())), tuple(((), ()) for _ in makers))
    came: dict[Any, tuple[Any, tuple[Any, ...]] | None] = {start: None}
    todo = [start]
    alike = _alike(makers)
    search = Search()
    while todo:
        state = todo.pop()
        search.states += 1
        assert search.states <= most, "the model is too large to be searched"
        moved = False
        for note, successor in _steps(state, local):
            moved = True
            successor = _sorted(successor, alike)
            if successor not in came:
                came[successor] = (state, note)
                todo.append(successor)
        if not moved:
            search.ends.append(_end(state, local, came))
            if until(search.ends[-1]):
                break
    return search


def _alike(makers: list[Thread]) -> list[list[int]]:
    """Groups of threads that run the same program."""
    groups: dict[Thread, list[int]] = {}
    for index, maker in enumerate(makers):
        groups.setdefault(maker, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


@cache
def _name(thread: Any) -> str:
    # Not its hash, which is another one in each process.
    return repr(thread)


def _sorted(state: Any, alike: list[list[int]]) -> Any:
    """The same state whichever of some threads that are alike is where."""
    for group in alike:
        memory, threads = state
        ordered = list(threads)
        for index, thread in zip(
            group, sorted((threads[i] for i in group), key=_name), strict=True
        ):
            ordered[index] = thread
        state = memory, tuple(ordered)
    return state


def _steps(
    state: Any, local: Callable[[int, Any], _Local]
) -> Iterable[tuple[tuple[Any, ...], Any]]:
    """What can happen next, with a note of it for people."""
    memory, threads = state
    values = dict(memory)
    for index, (history, buffer) in enumerate(threads):
        if buffer:
            (name, value), rest = buffer[0], buffer[1:]
            note = (index, name, "=", value, "reaches memory")
            yield note, _with(state, index, (history, rest), {name: value})
        operation = local(index, history).operation
        if operation is None:
            continue
        kind = operation[0]
        if kind == "choose":
            for value in dict.fromkeys(operation[1]):
                yield (
                    (index, "goes by", value),
                    _with(state, index, ((*history, value), buffer), {}),
                )
        elif kind == "store":
            after = (*buffer, (operation[1], operation[2]))
            yield (
                (index, *operation),
                _with(state, index, ((*history, None), after), {}),
            )
        elif kind == "load":
            seen = values[operation[1]]
            for name, value in buffer:
                if name == operation[1]:
                    seen = value
            note = (index, *operation, "is", seen)
            yield note, _with(state, index, ((*history, seen), buffer), {})
        elif not buffer:
            moved = _atomic(operation, values)
            if moved is not None:
                result, change = moved
                note = (index, *operation[:2], "was", result)
                yield note, _with(state, index, ((*history, result), buffer), change)


def _atomic(
    operation: Operation, values: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Result and change of memory; None: it cannot go on now."""
    kind, *args = operation
    if kind == "fence":
        return None, {}
    old = values[args[0]]
    if kind == "swap":
        return old, {args[0]: args[1]}
    if kind == "update":
        return old, {args[0]: args[1](old)}
    if kind == "cas":
        return old, {args[0]: args[2]} if old == args[1] else {}
    assert kind == "wait", kind
    return (old, {}) if args[1](old) else None


def _with(state: Any, index: int, thread: Any, change: dict[str, Any]) -> Any:
    memory, threads = state
    if change:
        memory = tuple((name, change.get(name, value)) for name, value in memory)
    return memory, (*threads[:index], thread, *threads[index + 1 :])


def _end(state: Any, local: Callable[[int, Any], _Local], came: Any) -> End:
    memory, threads = state
    results = tuple(
        STUCK if (found := local(i, history)).operation is not None else found.value
        for i, (history, _) in enumerate(threads)
    )
    steps: list[str] = []
    at = state
    while (before := came[at]) is not None:
        at, note = before
        steps.append(" ".join(str(part) for part in note))
    return End(dict(memory), results, tuple(reversed(steps)))
