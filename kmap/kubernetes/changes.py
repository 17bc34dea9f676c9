# SPDX-License-Identifier: Apache-2.0
"""Changes to plain data: a small part of JSON Patch (RFC 6902).

Three operations are used: ``add`` (a key; an item at 0; an item at the end, ``-``),
``replace`` (a value) and ``remove``.  Changes hold in the order in which they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jsonpatch

# Keys and indices from the root; "-" as the last one is the end of a list.
Path = tuple[str | int, ...]
END = "-"


@dataclass(frozen=True)
class Change:
    """One operation."""

    op: Literal["add", "replace", "remove"]
    path: Path
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        """The operation as RFC 6902 writes it."""
        pointer = "".join(
            "/" + str(step).replace("~", "~0").replace("/", "~1") for step in self.path
        )
        operation: dict[str, Any] = {"op": self.op, "path": pointer}
        if self.op != "remove":
            operation["value"] = self.value
        return operation

    def under(self, prefix: Path) -> Change:
        """The same change in a document that has this one's root at prefix."""
        return Change(self.op, prefix + self.path, self.value)


def apply(data: Any, changes: Iterable[Change]) -> Any:
    """A copy of data with changes made; data stays as it is."""
    return jsonpatch.apply_patch(data, to_patch(changes))


def to_patch(changes: Iterable[Change]) -> list[dict[str, Any]]:
    """Changes as a JSON Patch document."""
    return [change.to_json() for change in changes]


def append(
    path: Path, existing: Sequence[Any] | None, items: list[Any]
) -> list[Change]:
    """Adds items at the end of the list at path; existing is None where none is."""
    if not items:
        return []
    if existing is None:
        return [Change("add", path, items)]
    return [Change("add", (*path, END), item) for item in items]


def remove(path: Path, existing: Sequence[Any], indices: list[int]) -> list[Change]:
    """Removes items of the list at path, and the list with its last item."""
    if indices and len(indices) == len(existing):
        return [Change("remove", path)]
    return [Change("remove", (*path, index)) for index in sorted(indices, reverse=True)]
