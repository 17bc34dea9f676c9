# SPDX-License-Identifier: Apache-2.0
"""Settings in YAML or JSON, of which every part knows its place.

Parts are looked at one by one as they are asked for, so aliases cost nothing and may
even go in a circle.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kmap.results import CommandFailed

_NULL = "tag:yaml.org,2002:null"
_MERGE = "<<"


class PolicyError(CommandFailed):
    """Something is wrong in a file, and where."""

    def __init__(self, label: str, line: int | None, message: str) -> None:
        place = label if line is None else f"{label}:{line}"
        super().__init__(f"{place}: {message}")


def _snake(name: str) -> str:
    """Protobuf's JSON has lbEndpoints for lb_endpoints, and allows both."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: f"_{match[1].lower()}", name)


class Node:
    """A part of the settings; values come from YAML nodes or from parsed JSON."""

    def __init__(self, raw: Any, label: str, path: str, line: int | None) -> None:
        self._raw = raw
        self.label = label
        self.path = path
        self.line = line

    def error(self, message: str) -> PolicyError:
        """An error that names the place; to be raised."""
        text = f"{self.path}: {message}" if self.path else message
        return PolicyError(self.label, self.line, text)

    def _child(self, raw: Any, name: str) -> Node:
        mark = getattr(raw, "start_mark", None)
        line = mark.line + 1 if mark is not None else self.line
        path = f"{self.path}.{name}" if self.path else name
        return Node(raw, self.label, path, line)

    @property
    def is_null(self) -> bool:
        """Whether it is there without a value."""
        raw = self._raw
        return raw is None or (isinstance(raw, yaml.ScalarNode) and raw.tag == _NULL)

    def mapping(self) -> dict[str, Node]:
        """What is below it by name, names with underscores."""
        raw = self._raw
        if self.is_null:
            return {}
        if isinstance(raw, dict):
            return {_snake(str(k)): self._child(v, str(k)) for k, v in raw.items()}
        if not isinstance(raw, yaml.MappingNode):
            raise self.error("a mapping is expected here")
        found: dict[str, Node] = {}
        for key, value in raw.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._child(key, "?").error("a name is expected here")
            name = _snake(str(key.value))
            child = self._child(value, name)
            if name == _MERGE:
                raise child.error("merge keys (<<) are not read")
            if name in found:
                raise self._child(key, name).error("it is here twice")
            found[name] = child
        return found

    def get(self, *names: str) -> Node | None:
        """What is at that path below it; None where there is nothing."""
        node: Node | None = self
        for name in names:
            if node is None:
                return None
            node = node.mapping().get(name)
        return None if node is None or node.is_null else node

    def sequence(self) -> list[Node]:
        """What a list has."""
        raw = self._raw
        if self.is_null:
            return []
        values = raw.value if isinstance(raw, yaml.SequenceNode) else raw
        if not isinstance(values, list) or isinstance(raw, yaml.MappingNode):
            raise self.error("a list is expected here")
        return [self._child(v, f"[{i}]") for i, v in enumerate(values)]

    def text(self) -> str:
        """A scalar, as it stands there."""
        raw = self._raw
        if isinstance(raw, yaml.ScalarNode):
            return str(raw.value)
        if isinstance(raw, bool):
            return "true" if raw else "false"
        if isinstance(raw, (str, int, float)):
            return str(raw)
        raise self.error("a single value is expected here")

    def number(self, low: int, high: int) -> int:
        """A whole number of that range; protobuf's JSON may have it in quotes."""
        text = self.text()
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise self.error(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    def truth(self) -> bool:
        """A boolean, or the BoolValue in which it is wrapped."""
        text = self.text().lower()
        if text in ("true", "yes", "on"):
            return True
        if text in ("false", "no", "off"):
            return False
        raise self.error(f"{text!r} is neither true nor false")


def parse_yaml(text: str, label: str) -> Node:
    """The root of YAML text, or of JSON, which is YAML but for tabs."""
    if text.lstrip()[:1] == "{":
        # A string of JSON cannot hold a tab, so each stands between values.
        text = text.replace("\t", " ")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        message = " ".join(filter(None, (error.problem, error.context)))
        raise PolicyError(label, line, f"not YAML: {message}") from None
    except yaml.YAMLError as error:
        raise PolicyError(label, None, f"not YAML: {error}".split("\n")[0]) from None
    except RecursionError:
        raise PolicyError(label, None, "nested too deeply") from None
    if root is None:
        raise PolicyError(label, None, "it is empty")
    if not isinstance(root, yaml.MappingNode):
        raise PolicyError(label, 1, "a mapping is expected here")
    return Node(root, label, "", 1)


def from_json(value: Any, label: str) -> Node:
    """The root of parsed JSON, which has no lines."""
    return Node(value, label, "", None)
