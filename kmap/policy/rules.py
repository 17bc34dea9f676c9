# SPDX-License-Identifier: Apache-2.0
"""The rules of a policy, from text and to text.

The format has one parser, the library's own in core/base/policy.c: what passes here is
what the library will read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kmap import native
from kmap.policy.tree import Node, PolicyError, parse_yaml
from kmap.render import printable

ALLOW = "allow"
DENY = "deny"
# What makes the rules themselves the value of KMAP_POLICY.
INLINE = "rules:"
# Longest policy that the library reads (core/base/policy.h).
TEXT_MAX = 65536

_YAML_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Rule:
    """One rule; why says where it comes from."""

    action: str
    fields: tuple[tuple[str, str], ...]
    why: str = ""

    @property
    def text(self) -> str:
        """The rule as a line."""
        return " ".join(
            [self.action, *(f"{name}={value}" for name, value in self.fields)]
        )


@dataclass(frozen=True)
class Policy:
    """Rules, of which the first that matches decides, and what holds for the rest."""

    rules: tuple[Rule, ...]
    default: str = DENY

    def lines(self, *, comments: bool) -> Iterator[str]:
        """The lines of a rule file."""
        for rule in self.rules:
            if comments and rule.why:
                yield f"# {printable(rule.why)}"
            yield rule.text
        yield f"default {self.default}"

    def text(self, *, comments: bool = True) -> str:
        """The content of a rule file; PolicyError if the library would refuse it."""
        text = "".join(f"{line}\n" for line in self.lines(comments=comments))
        check(text, "the rules made")
        return text


def check(text: str, label: str, *, line: int | None = None) -> None:
    """PolicyError if the library refuses the text; line is where it stands if known."""
    error = native.policy_error(text.encode(errors="surrogateescape"))
    if error is not None:
        raise PolicyError(label, line or error.line or None, error.message)


def _words(line: str) -> list[str]:
    words: list[str] = []
    for word in re.split(r"[ \t\r]+", line):
        if word.startswith("#"):
            break
        if word:
            words.append(word)
    return words


def parse_lines(text: str, label: str) -> Policy:
    """Rules one a line; each one's why is its line."""
    check(text, label)
    rules: list[Rule] = []
    default = DENY
    for number, line in enumerate(text.split("\n"), 1):
        words = _words(line)
        if not words:
            continue
        if words[0] == "default":
            default = words[1]
            continue
        pairs = [word.split("=", 1) for word in words[1:]]
        fields = tuple((name, value) for name, value in pairs)
        rules.append(Rule(words[0], fields, f"line {number}"))
    return Policy(tuple(rules), default)


def _yaml_rule(node: Node) -> Rule:
    entries = node.mapping()
    if len(entries) != 1 or not {ALLOW, DENY} & set(entries):
        raise node.error("a rule is 'allow' or 'deny' with the fields below it")
    action, body = next(iter(entries.items()))
    fields: list[tuple[str, str]] = []
    for name, value in body.mapping().items():
        text = value.text()
        if not text or re.search(r"\s", text):
            raise value.error(f"{text!r} has blanks in it or is empty")
        fields.append((name, text))
        check(f"{action} {name}={text}\n", node.label, line=value.line)
    rule = Rule(action, tuple(fields), f"line {node.line}")
    check(rule.text, node.label, line=node.line)
    return rule


def parse_yaml_rules(text: str, label: str) -> Policy:
    """``rules:``, a list of ``allow:`` or ``deny:`` with fields, and ``default:``."""
    root = parse_yaml(text, label)
    for name, node in root.mapping().items():
        if name not in ("rules", "default"):
            raise node.error(f"{name} is not known here: there are rules and default")
    default = root.get("default")
    if default is not None and default.text() not in (ALLOW, DENY):
        raise default.error("a default is allow or deny")
    listed = root.get("rules")
    return Policy(
        tuple(_yaml_rule(node) for node in listed.sequence()) if listed else (),
        default.text() if default else DENY,
    )


def read_text(path: str) -> str:
    """The content of a file that the user named."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except OSError as error:
        raise PolicyError(path, None, error.strerror or str(error)) from None


def is_yaml(path: str) -> bool:
    """Whether the name of a rule file says that it is YAML or JSON."""
    return os.path.splitext(path)[1].lower() in _YAML_SUFFIXES


def load(path: str) -> Policy:
    """The rules of a file: YAML by its name, else one rule a line."""
    text = read_text(path)
    return parse_yaml_rules(text, path) if is_yaml(path) else parse_lines(text, path)
