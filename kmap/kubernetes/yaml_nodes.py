# SPDX-License-Identifier: Apache-2.0
"""YAML text as nodes that know where they stand, and as plain data.

The parser is ruamel.yaml's, for YAML 1.2.  Its composer forgets where an alias stood;
here each alias is a node of its own, so that text can be edited beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_CORE = "tag:yaml.org,2002:"
# An alias may stand for a list of aliases, and so on: text of a few lines for more data
# than fits into memory.  No manifest comes near this.
MOST_NODES = 1_000_000


class BadYaml(Exception):
    """The text is no YAML, or not of the kind that manifests are made of."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        # From 1; None where the parser does not say.
        self.line = line


@dataclass(frozen=True)
class OtherScalar:
    """A scalar that is no string, integer, boolean or null: a float, a date."""

    tag: str
    text: str


class Alias(Node):
    """Where an alias stands; target is what it stands for."""

    __slots__ = ("target",)
    id = "alias"

    def __init__(self, target: Node, start: Any, end: Any) -> None:
        super().__init__(target.ctag, target.value, start, end)
        self.target = target


class _Composer(Composer):  # type: ignore[misc,unused-ignore]
    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        # An anchor may be used again, and what is right is no reason to warn.
        self.warn_double_anchors = False

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, AliasEvent):
            return Alias(node, event.start_mark, event.end_mark)
        return node


def resolved(node: Node) -> Node:
    """The node itself, or what an alias stands for."""
    while isinstance(node, Alias):
        node = node.target
    return node


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


@dataclass(frozen=True)
class Document:
    """One document of a stream."""

    # None for a document without content.
    root: Node | None
    data: Any
    # Where it starts, from 1.
    line: int


def _int(text: str) -> int | None:
    text = text.replace("_", "")
    for prefix, base in (("0o", 8), ("0x", 16)):
        if text.lstrip("+-").startswith(prefix):
            return int(text.replace(prefix, "", 1), base)
    return int(text)


class _Builder:
    """Plain data from nodes."""

    def __init__(self) -> None:
        self._count = 0
        self._open: set[int] = set()

    def data(self, node: Node) -> Any:
        node = resolved(node)
        self._count += 1
        if self._count > MOST_NODES:
            raise BadYaml(f"it stands for more than {MOST_NODES} values", _line(node))
        if id(node) in self._open:
            raise BadYaml("an alias stands for something that it is in", _line(node))
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        known = ("map", "omap") if isinstance(node, MappingNode) else ("seq",)
        if str(node.tag) not in {_CORE + name for name in known}:
            raise BadYaml(f"the tag {node.tag} is not known", _line(node))
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.data(item) for item in node.value]
            return self._mapping(node)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: ScalarNode) -> Any:
        tag, text = str(node.tag), node.value
        if tag == _CORE + "null":
            return None
        if tag == _CORE + "str" or node.style is not None:
            return str(text)
        if tag == _CORE + "bool":
            return text.lower() in ("true", "yes", "on")
        if tag == _CORE + "int":
            try:
                return _int(text)
            except ValueError:
                return OtherScalar(tag, text)
        if not tag.startswith(_CORE):
            raise BadYaml(f"the tag {tag} is not known", _line(node))
        return OtherScalar(tag, text)

    def _mapping(self, node: Node) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if is_merge(key_node):
                for base in self._bases(value_node):
                    for name, value in base.items():
                        merged.setdefault(name, value)
                continue
            key = self.data(key_node)
            if isinstance(key, dict | list):
                raise BadYaml("a key is a mapping or a list", _line(key_node))
            if key in own:
                raise BadYaml(f"the key {key} is there twice", _line(key_node))
            own[key] = self.data(value_node)
        return {**merged, **own}

    def _bases(self, node: Node) -> Iterator[Mapping[Any, Any]]:
        value = self.data(node)
        for base in value if isinstance(value, list) else [value]:
            if not isinstance(base, dict):
                raise BadYaml("<< merges something that is no mapping", _line(node))
            yield base


def is_merge(key: Node) -> bool:
    """Whether key is ``<<``, which takes in the keys of other mappings."""
    return str(key.tag) == _CORE + "merge"


def parse(text: str) -> list[Document]:
    """All documents of text.

    Raises BadYaml for anything else than YAML with mappings that have each key once.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    found: list[Document] = []
    builder = _Builder()
    try:
        for root in yaml.compose_all(text):
            if root is None:
                found.append(Document(None, None, 0))
            else:
                found.append(Document(root, builder.data(root), _line(root)))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(filter(None, (error.context, error.problem)))
        raise BadYaml(
            message or str(error), None if mark is None else mark.line + 1
        ) from error
    except (YAMLError, ValueError) as error:
        raise BadYaml(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise BadYaml("it is nested too deeply") from error
    return found
