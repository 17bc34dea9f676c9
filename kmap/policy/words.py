# SPDX-License-Identifier: Apache-2.0
"""Rules in words."""

from __future__ import annotations

from kmap.policy.rules import ALLOW, Rule


def in_words(rule: Rule) -> str:
    """One rule as a sentence, for people who do not know the format."""
    fields = dict(rule.fields)
    role = fields.get("role")
    verb = {"connector": "makes", "acceptor": "accepts"}.get(
        role or "", "makes or accepts"
    )
    parts = [f"what {fields.get('program', 'any program')} {verb}"]
    for name, phrase in (
        ("local", "at its own address {}" if role != "acceptor" else "at {}"),
        ("peer", "to {}" if role == "connector" else "from {}" if role else "with {}"),
        ("to", "meant for {}"),
        ("port", "for port {}"),
        ("via", "redirected to {}"),
        ("uid", "with user {} at the other end"),
    ):
        if name in fields:
            parts.append(phrase.format(fields[name]))
    start = "may be upgraded" if rule.action == ALLOW else "stays on the kernel"
    return f"{start}: {', '.join(parts)}"
