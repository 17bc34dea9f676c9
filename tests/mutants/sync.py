# SPDX-License-Identifier: Apache-2.0
"""core/base/sync.def: what orders accesses to shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.builds import ROOT

SYNC = ROOT / "core" / "base" / "sync.def"
_ENTRY = re.compile(r"^(ORDER|FENCE|LOOK)\((\w+),(.*?)\)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    kind: str
    name: str
    rest: str

    @property
    def text(self) -> str:
        """What it is for."""
        return "".join(re.findall(r'"([^"]*)"', self.rest))


def entries() -> list[Entry]:
    """All of them, in their order."""
    return [Entry(*found.groups()) for found in _ENTRY.finditer(SYNC.read_text())]
