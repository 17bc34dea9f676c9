# SPDX-License-Identifier: Apache-2.0
"""Changes written into YAML text.

Everything that a change does not name stays as it is, byte for byte: comments, order,
quotes, anchors, line ends.  What is added is lines of its own (or, inside braces and
brackets, a run of text), so that taking the same thing out gives the text back.

The result is parsed again and compared with the data that the changes should lead to.
A text for which that does not come out is refused, never printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kmap.kubernetes.changes import END, Change, Path, apply
from kmap.kubernetes.yaml_nodes import Alias, BadYaml, is_merge, parse, resolved


class CannotEdit(Exception):
    """The text has a form in which the change cannot be written; with the line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


# What reads as the same string by YAML 1.1 and 1.2 without quotes.
_PLAIN = re.compile(r"[A-Za-z/][\w./$-]*(:[\w./$-]+)*|[0-9]+(m|[KMG]i)")
_NOT_STRINGS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _scalar(value: Any) -> str:
    plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    if plain and value.lower() not in _NOT_STRINGS:
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _block(value: Any, dash: int) -> list[str]:
    """Value as lines of block style; lists in mappings are indented by dash."""
    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(item, dict | list) or not item:
                lines.append(f"{_scalar(key)}: {_scalar(item)}")
                continue
            lines.append(f"{_scalar(key)}:")
            pad = " " * (dash if isinstance(item, list) else 2)
            lines.extend(pad + line for line in _block(item, dash))
        return lines
    for item in value:
        inner = _block(item, dash) if isinstance(item, dict | list) else [_scalar(item)]
        lines.append(f"- {inner[0]}")
        lines.extend(f"  {line}" for line in inner[1:])
    return lines


class _Editor:
    """Splices for the changes of one step; each is found in the text as it was."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._roots = [document.root for document in parse(text)]
        # start, depth downwards, order, end, text
        self._splices: list[tuple[int, int, int, int, str]] = []
        self._done: set[tuple[int, str, str]] = set()
        # Lists and mappings that were empty and have got something.
        self._filled: set[int] = set()
        self._dash = self._list_indent()

    def text(self) -> str:
        pieces: list[str] = []
        at = 0
        # At one place, what is nested deeper comes first: it belongs to the end of the
        # thing after which the other one is written.
        for start, _, _, end, piece in sorted(self._splices):
            if start < at:
                line = self._text.count("\n", 0, start) + 1
                raise CannotEdit("changes overlap here", line)
            pieces += (self._text[at:start], piece)
            at = end
        text = "".join(pieces) + self._text[at:]
        if at == len(self._text) and not self._text.endswith("\n"):
            # The last line, which has no end, was taken out: another one is the last.
            text = text.removesuffix("\n").removesuffix("\r")
        return text

    def change(self, change: Change) -> None:
        *where, last = change.path
        parent = self._at(tuple(where))
        # Aliases lead several paths to one place, which is changed once.
        key = (id(parent), f"{change.op} {last}", json.dumps(change.value))
        if key in self._done:
            return
        self._done.add(key)
        if isinstance(parent, MappingNode):
            self._change_key(parent, change, str(last))
        elif isinstance(parent, SequenceNode):
            self._change_item(parent, change, last)
        else:
            raise CannotEdit("there is no mapping or list here", _line_of(parent))

    def _list_indent(self) -> int:
        """How far lists are indented in this text, below their keys: 0, 2 or so."""
        stack = [root for root in self._roots if root is not None]
        while stack:
            node = stack.pop()
            if isinstance(node, Alias | ScalarNode):
                continue
            if isinstance(node, SequenceNode):
                stack.extend(reversed(node.value))
                continue
            for key, value in node.value:
                if isinstance(value, SequenceNode) and not value.flow_style:
                    column = self._column(self._dash_of(value, 0))
                    return max(0, column - int(key.start_mark.column))
            stack.extend(reversed([value for _, value in node.value]))
        return 0

    # Places in the text

    def _at(self, path: Path) -> Node:
        node: Any = self._roots[int(path[0])]
        for step in path[1:]:
            node = resolved(node)
            if isinstance(node, SequenceNode):
                node = node.value[int(step)]
                continue
            pair = self._pair(node, str(step))
            if pair is None:
                raise CannotEdit(
                    f"{step} comes in by a merge key (<<) and would have to be changed "
                    "where it comes from: write it out here",
                    _line_of(node),
                )
            node = pair[1]
        return resolved(node)

    @staticmethod
    def _pair(mapping: Node, key: str) -> tuple[Node, Node] | None:
        for key_node, value_node in mapping.value:
            if not is_merge(key_node) and resolved(key_node).value == key:
                return key_node, value_node
        return None

    def _end(self, node: Node) -> int:
        """Where the text of node ends, without comments and blank lines after it."""
        flow = getattr(node, "flow_style", False)
        if isinstance(node, MappingNode | SequenceNode) and node.value and not flow:
            last = node.value[-1]
            return self._end(last[1] if isinstance(last, tuple) else last)
        end = int(node.end_mark.index)
        if isinstance(node, ScalarNode) and node.style in ("|", ">"):
            header = self._text[node.start_mark.index : end].split("\n", 1)[0]
            kept = self._text[:end].rstrip(" \n\r")
            # "+" keeps blank lines at the end as part of the text.
            return end if "+" in header.split("#")[0] else len(kept)
        if end == int(node.start_mark.index):
            return self._end_before(end)
        return end

    def _end_before(self, index: int) -> int:
        """Where the text before index ends; nothing has been found up to there.

        The parser says of a value that is not there that it is in front of whatever
        comes next.
        """
        while True:
            head = self._text[:index].rstrip()
            line = self._line_start(len(head))
            if not self._text[line : len(head)].lstrip().startswith("#"):
                return len(head)
            index = line

    def _line_start(self, index: int) -> int:
        return self._text.rfind("\n", 0, index) + 1

    def _next_line(self, index: int) -> int:
        """The start of the line after that of index, or the end of the text."""
        if index and self._text[index - 1] == "\n":
            return index
        found = self._text.find("\n", index)
        return len(self._text) if found < 0 else found + 1

    def _column(self, index: int) -> int:
        return index - self._line_start(index)

    def _dash_of(self, sequence: Node, index: int) -> int:
        """Where the dash of an item of a block sequence is."""
        item = sequence.value[index]
        before = self._text[: item.start_mark.index].rstrip(" \t\r\n")
        if not before.endswith("-"):
            raise CannotEdit(
                "there is something between a dash and its item: write them together",
                _line_of(item),
            )
        return len(before) - 1

    # Edits

    def _splice(self, start: int, end: int, piece: str, depth: int) -> None:
        self._splices.append((start, -depth, len(self._splices), end, piece))

    def _add_lines(
        self, at: int, lines: Sequence[str], column: int, depth: int
    ) -> None:
        padded = [" " * column + line for line in lines]
        if at == len(self._text) and not self._text.endswith("\n"):
            piece = "".join(self._newline + line for line in padded)
        else:
            piece = "".join(line + self._newline for line in padded)
        self._splice(at, at, piece, depth)

    def _change_key(self, parent: MappingNode, change: Change, key: str) -> None:
        depth = len(change.path)
        pair = self._pair(parent, key)
        if change.op == "remove":
            if pair is None:
                raise CannotEdit(
                    f"{key} comes in by a merge key (<<)", _line_of(parent)
                )
            self._remove_key(parent, *pair)
        elif pair is not None:
            self._set_value(pair[1], change.value, pair[0])
        elif parent.flow_style:
            piece = f"{json.dumps(key)}: {json.dumps(change.value)}"
            ends = [value for _, value in parent.value]
            self._add_in_flow(parent, ends, piece, depth)
        else:
            column = int(parent.value[0][0].start_mark.column)
            lines = _block({key: change.value}, self._dash)
            at = self._next_line(self._end(parent))
            self._add_lines(at, lines, column, depth)

    def _change_item(self, parent: SequenceNode, change: Change, last: Any) -> None:
        depth = len(change.path)
        if change.op == "remove":
            self._remove_item(parent, int(last))
        elif change.op == "replace":
            self._set_value(parent.value[int(last)], change.value)
        elif parent.flow_style and last == END:
            self._add_in_flow(parent, parent.value, json.dumps(change.value), depth)
        elif parent.flow_style:
            start = int(parent.value[0].start_mark.index)
            self._splice(start, start, json.dumps(change.value) + ", ", depth)
        else:
            first = self._dash_of(parent, 0)
            at = self._line_start(first)
            if last == END:
                at = self._next_line(self._end(parent))
            elif self._text[at:first].strip():
                raise CannotEdit(
                    "a list starts inside a line",
                    int(parent.start_mark.line) + 1,
                )
            lines = _block([change.value], self._dash)
            self._add_lines(at, lines, self._column(first), depth)

    def _add_in_flow(
        self, parent: Node, ends: Sequence[Node], piece: str, depth: int
    ) -> None:
        if ends:
            at = self._end(ends[-1])
            piece = ", " + piece
        else:
            # Behind the bracket, which may follow an anchor.
            at = self._text.index(
                "{" if isinstance(parent, MappingNode) else "[",
                int(parent.start_mark.index),
            )
            at += 1
            if id(parent) in self._filled:
                piece = ", " + piece
            self._filled.add(id(parent))
        self._splice(at, at, piece, depth)

    def _set_value(self, node: Node, value: Any, key: Node | None = None) -> None:
        start, end = int(node.start_mark.index), int(node.end_mark.index)
        if start == end and key is not None:
            start = end = self._text.index(":", int(key.end_mark.index)) + 1
        if isinstance(node, ScalarNode) and isinstance(value, str):
            styled = self._in_style(node, value)
            if styled is not None:
                self._splice(start, end, styled, 0)
                return
        text = json.dumps(value, ensure_ascii=False)
        if start == end:
            text = " " + text  # there is nothing behind the colon
        elif isinstance(node, ScalarNode) and node.style in ("|", ">"):
            text += self._newline
        self._splice(start, end, text, 0)

    def _in_style(self, node: ScalarNode, value: str) -> str | None:
        """The text of node with something appended or cut off, or None."""
        raw = self._text[node.start_mark.index : node.end_mark.index]
        quote = node.style if node.style in ("'", '"') and raw[0] == node.style else ""
        if node.style is not None and not quote:
            return None
        inner = raw[len(quote) : len(raw) - len(quote)]
        old = str(node.value)
        if value.startswith(old) and re.fullmatch(r"[\w./:$-]*", value[len(old) :]):
            return quote + inner + value[len(old) :] + quote
        cut = old.removeprefix(value)
        if old.startswith(value) and cut and inner.endswith(cut):
            return quote + inner.removesuffix(cut) + quote
        return None

    def _remove_key(self, parent: MappingNode, key: Node, value: Node) -> None:
        if parent.flow_style:
            pairs = parent.value
            index = next(i for i, pair in enumerate(pairs) if pair[0] is key)
            self._remove_in_flow(
                [k.start_mark.index for k, _ in pairs],
                [self._end(v) for _, v in pairs],
                index,
            )
            return
        start = int(key.start_mark.index)
        line = self._line_start(start)
        if not self._text[line:start].strip():
            self._splice(line, self._next_line(self._end(value)), "", 0)
            return
        # It shares its line with the dash of an item.
        following = [k for k, _ in parent.value if k.start_mark.index > start]
        if not following:
            raise CannotEdit(f"{key.value} is alone in its item", _line_of(key))
        self._splice(start, int(following[0].start_mark.index), "", 0)

    def _remove_item(self, parent: SequenceNode, index: int) -> None:
        if parent.flow_style:
            items = parent.value
            starts = [item.start_mark.index for item in items]
            self._remove_in_flow(starts, [self._end(item) for item in items], index)
            return
        start = self._dash_of(parent, index)
        line = self._line_start(start)
        if self._text[line:start].strip():
            raise CannotEdit("a list starts inside a line", _line_of(parent))
        self._splice(line, self._next_line(self._end(parent.value[index])), "", 0)

    def _remove_in_flow(self, starts: list[int], ends: list[int], index: int) -> None:
        if index > 0:
            self._splice(ends[index - 1], ends[index], "", 0)
        elif len(starts) > 1:
            self._splice(starts[0], starts[1], "", 0)
        else:
            self._splice(starts[0], ends[0], "", 0)


def _line_of(node: Node) -> int:
    return int(node.start_mark.line) + 1


def edit(text: str, steps: Sequence[Sequence[Change]]) -> str:
    """Text with changes made.  Paths begin with the number of the document, from 0.

    Raises CannotEdit, and BadYaml for text that is no YAML.
    """
    for changes in steps:
        before: Any = [document.data for document in parse(text)]
        editor = _Editor(text)
        for change in changes:
            editor.change(change)
        after = editor.text()
        try:
            made = [document.data for document in parse(after)]
        except BadYaml as error:
            raise _unable(error.line or 1, str(error)) from error
        wanted = apply(before, changes)
        if made != wanted:
            different = next((i for i, m in enumerate(made) if m != wanted[i]), 0)
            raise _unable(parse(text)[different].line, "anchors or unusual layout")
        text = after
    return text


def _unable(line: int, why: str) -> CannotEdit:
    return CannotEdit(
        f"the change cannot be written into this text ({why}); write the manifest in "
        "plain block style, without anchors that others share",
        line,
    )
