# SPDX-License-Identifier: Apache-2.0
"""``kmap policy``: which connections may be upgraded, in words, and as a rule file."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass

from rich.console import Console

from kmap.policy import arguments, source
from kmap.policy.derive import Left
from kmap.policy.rules import DENY, Policy
from kmap.policy.words import in_words
from kmap.render import printable, renders
from kmap.results import (
    EXIT_OK,
    CommandFailed,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
)


@dataclass(frozen=True)
class PolicyResult:
    """A policy, where it comes from, and where it was written to."""

    source: str
    policy: Policy
    left: tuple[Left, ...]
    written: str | None

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.policy/1",
            "ok": True,
            "source": self.source,
            "default": self.policy.default,
            "rules": [
                {
                    "action": rule.action,
                    "fields": dict(rule.fields),
                    "rule": rule.text,
                    "words": in_words(rule),
                    "why": rule.why,
                }
                for rule in self.policy.rules
            ],
            "without_rule": [
                {"what": left.what, "why": left.why} for left in self.left
            ],
            "written": self.written,
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "policy",
        run,
        help="say which connections may be upgraded, from Envoy's settings or a file",
        description="Prints the rules that an Envoy's settings give, or those of a "
        "file, in words, and\nwrites them as a file that the Envoy and its services "
        "share: KMAP_POLICY=FILE, or\nkmap run --policy FILE.",
    )
    arguments.add_source_arguments(parser, files="--rules")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="also write the rules to FILE, one a line; - is standard output, and then "
        "nothing else is printed",
    )


def _write(path: str, text: str) -> None:
    """Puts text at path at once, readable by all: services have users of their own."""
    directory = os.path.dirname(path) or "."
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
            return
        fd, temporary = tempfile.mkstemp(dir=directory, prefix=".kmap-policy-")
        try:
            with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}") from None


def run(args: argparse.Namespace) -> PolicyResult:
    """Reads or derives the rules, and writes them where that is asked for."""
    if args.output == "-" and args.json:
        raise UsageError("-o - and --json would both be on standard output")
    if not arguments.names_source(args):
        raise UsageError("name a source: --envoy-config, --envoy-admin or --rules")
    label, derivation = source.read(args)
    text = derivation.policy.text()
    if args.output not in (None, "-"):
        _write(args.output, text)
    return PolicyResult(label, derivation.policy, derivation.left, args.output)


@renders(PolicyResult)
def _render(result: PolicyResult, console: Console) -> None:
    if result.written == "-":
        console.out(result.policy.text(), end="", highlight=False)
        return
    # Not print(): rich would wrap rules and read names in brackets as styles.
    for rule in result.policy.rules:
        console.out(rule.text, highlight=False)
        why = f" ({printable(rule.why)})" if rule.why else ""
        console.out(f"    {in_words(rule)}{why}", highlight=False)
    console.out(f"default {result.policy.default}", highlight=False)
    rest = "stays on the kernel" if result.policy.default == DENY else "may be upgraded"
    console.out(f"    {rest}: everything else", highlight=False)
    if result.left:
        console.out("\nwithout a rule, so on the kernel:", highlight=False)
        for left in result.left:
            console.out(f"    {printable(left.what)}: {left.why}", highlight=False)
    if result.written is not None:
        console.out(f"\nwritten to {result.written}", highlight=False)
