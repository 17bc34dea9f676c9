# SPDX-License-Identifier: Apache-2.0
"""One check and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """The answer of a check; the value is what users see."""

    OK = "ok"
    # It works, with less than there could be, or only sometimes.
    LIMITED = "limited"
    # Connections stay on the kernel.
    CANNOT = "cannot"


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    subject: str
    name: str
    state: State
    found: str
    # Empty where there is nothing to do.
    remedy: str = ""


def worst(checks: Iterable[Check]) -> State:
    """The answer of all checks together."""
    states = {check.state for check in checks}
    for state in (State.CANNOT, State.LIMITED):
        if state in states:
            return state
    return State.OK


class Subject:
    """Makes checks of one subject."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ok(self, name: str, found: str, remedy: str = "") -> Check:
        """Nothing in the way."""
        return Check(self.name, name, State.OK, found, remedy)

    def limited(self, name: str, found: str, remedy: str = "") -> Check:
        """Works with less."""
        return Check(self.name, name, State.LIMITED, found, remedy)

    def cannot(self, name: str, found: str, remedy: str) -> Check:
        """Keeps connections on the kernel; there is always something to say."""
        return Check(self.name, name, State.CANNOT, found, remedy)
