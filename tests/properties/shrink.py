# SPDX-License-Identifier: Apache-2.0
"""Makes a program that differs as small as it gets.

Hypothesis' own shrinker knows nothing of what an operation is, and needs many runs;
operations can be left out and simplified one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Program = dict[str, Any]

CALLS = {"give": "send", "take": "recv", "poll": "poll", "wait": "epoll_wait"}
SIMPLE: dict[str, list[Any]] = {
    "size": [0, 1, 2, 3, 5, 4096, 16384, 16385, 40000],
    "flags": [0, 64],
    "parts": [1, 2],
    "fork": [False],
    "slot": [0],
    "set": [0],
    "end": [0],
    "events": [1, 4, 5, 1 | 1 << 31, 4 | 1 << 31],
    "cookie": [1, 2, 3],
    "sets": [False],
    "most": [64],
    "ms": [0],
    "how": ["fcntl", "dup", 1, 0],
    "linger": [False],
    "all": [True],
}


def _candidates(program: Program) -> Iterator[Program]:
    ops = program["ops"]
    length = max(len(ops) // 2, 1)
    while length:
        for at in range(len(ops) - length, -1, -1):
            yield {**program, "ops": ops[:at] + ops[at + length :]}
        length //= 2
    if program["variant"] != "one":
        yield {**program, "variant": "one"}
    for at, op in enumerate(ops):
        for key, values in [("call", [CALLS.get(op["op"])]), *SIMPLE.items()]:
            if key not in op:
                continue
            for value in values:
                if value == op[key]:
                    break
                if isinstance(value, str) == isinstance(op[key], str):
                    changed = [*ops[:at], {**op, key: value}, *ops[at + 1 :]]
                    yield {**program, "ops": changed}


def shrink(program: Program, fails: Callable[[Program], bool], most: int) -> Program:
    """The smallest program found with that many tries for which fails is still true."""
    again = True
    while again:
        again = False
        for candidate in _candidates(program):
            if most <= 0:
                return program
            most -= 1
            if fails(candidate):
                program, again = candidate, True
                break
    return program
