# SPDX-License-Identifier: Apache-2.0
"""Rule files: both forms, and what is refused, with file and line."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from kmap.policy import rules, words
from kmap.policy.rules import Policy, Rule
from kmap.policy.tree import PolicyError
from tests.builds import ROOT

LINES = """\
# what a sidecar does
deny to=127.0.0.1:9901
  allow\trole=connector peer=127.0.0.1:8080 program=envoy uid=1000  # the service

allow role=acceptor local=[fd00::/8]:8080-8089 port=8080
default allow
"""
YAML = """\
rules:
- deny: {to: "127.0.0.1:9901"}
- allow:
    role: connector
    peer: 127.0.0.1:8080
    program: envoy
    uid: 1000
- allow: {role: acceptor, local: "[fd00::/8]:8080-8089", port: 8080}
default: allow
"""


def _pairs(policy: Policy) -> list[tuple[str, dict[str, str]]]:
    return [(rule.action, dict(rule.fields)) for rule in policy.rules]


def test_both_forms_mean_the_same() -> None:
    lines = rules.parse_lines(LINES, "x")
    yaml = rules.parse_yaml_rules(YAML, "x")
    assert lines.default == yaml.default == "allow"
    assert _pairs(lines) == _pairs(yaml)
    assert _pairs(lines)[1] == (
        "allow",
        {
            "role": "connector",
            "peer": "127.0.0.1:8080",
            "program": "envoy",
            "uid": "1000",
        },
    )
    assert [rule.why for rule in lines.rules] == ["line 2", "line 3", "line 5"]


def test_what_is_written_is_read_again() -> None:
    policy = rules.parse_lines(LINES, "x")
    again = rules.parse_lines(policy.text(), "x")
    assert _pairs(again) == _pairs(policy)
    assert again.default == policy.default


def test_silence_denies() -> None:
    assert rules.parse_lines("deny port=1\n", "x").default == "deny"
    assert rules.parse_yaml_rules("rules: []", "x").default == "deny"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("allow port=80\nalow port=1\n", 2, "alow: a line begins with"),
        ("allow prot=80\n", 1, "prot=80: no field of a rule"),
        ("\n\nallow port=0", 3, "port=0: a port is"),
        ("allow program=\xff/", 1, "a program is"),
    ],
)
def test_errors_of_lines(text: str, line: int, message: str) -> None:
    with pytest.raises(PolicyError, match=rf"^some\.rules:{line}: ") as caught:
        rules.parse_lines(text, "some.rules")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("rules:\n- allow: {prot: 1}\n", "f:2", "no field of a rule"),
        ("rules:\n- allow:\n    port: 80\n    uid: root\n", "f:4", "id -u NAME"),
        ("rules:\n- allow: {port: 80}\n  deny: {port: 81}\n", "f:2", "a rule is"),
        ("rules:\n- permit: {port: 80}\n", "f:2", "a rule is"),
        ("rules:\n- allow: {}\n", "f:2", "names a field at least"),
        ("rules:\n- allow:\n    port: [80]\n", "f:3", "a single value"),
        ("rules:\n- allow: {program: 'a #b'}\n", "f:2", "blanks"),
        ("rules:\n- allow: {program: ''}\n", "f:2", "blanks"),
        ("rules:\n- allow: {port: 1, port: 2}\n", "f:2", "here twice"),
        ("rules:\n- x\n", "f:2", "a mapping is expected"),
        ("rules: 7\n", "f:1", "a list is expected"),
        ("\nrule: []\n", "f:2", "rule is not known here"),
        ("default: maybe\n", "f:1", "allow or deny"),
        ("rules:\n- allow: {port: 1\n", "f:3", "not YAML"),
        ("a: *b\n", "f:1", "not YAML"),
        ("- allow\n", "f:1", "a mapping is expected"),
        ("rules: &r [*r]\n", "f:1", "a mapping is expected"),
        ("\x00", "f", "not YAML"),
        ("", "f", "empty"),
        ("[" * 5000, "f", ""),
    ],
)
def test_errors_of_yaml(text: str, place: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        rules.parse_yaml_rules(text, "f")
    assert str(caught.value).startswith(f"{place}: ")
    assert message in str(caught.value)


def test_the_form_goes_by_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "a.rules").write_text(LINES)
    yaml = rules.load(str(tmp_path / "a.yaml"))
    assert _pairs(yaml) == _pairs(rules.load(str(tmp_path / "a.rules")))
    with pytest.raises(PolicyError, match="No such file"):
        rules.load(str(tmp_path / "missing"))


def test_a_name_cannot_add_a_rule() -> None:
    rule = Rule("deny", (("port", "1"),), "listener a\nallow port=2")
    text = Policy((rule,)).text()
    assert text == "# listener a?allow port=2\ndeny port=1\ndefault deny\n"


def test_the_rules_in_the_documentation() -> None:
    text = (ROOT / "docs" / "policy.md").read_text()
    found = re.findall(r"^ {4,}(?:rules:)?((?:allow|deny|default) .*)$", text, re.M)
    assert len(found) > 10
    for line in found:
        rules.check(line, line)
    (yaml,) = re.findall(r"^    rules:\n(?:    .*\n)+", text, re.M)
    policy = rules.parse_yaml_rules(textwrap.dedent(yaml), "docs/policy.md")
    assert len(policy.rules) == 2


def test_words() -> None:
    said = [words.in_words(rule) for rule in rules.parse_lines(LINES, "x").rules]
    assert said == [
        "stays on the kernel: what any program makes or accepts, meant for "
        "127.0.0.1:9901",
        "may be upgraded: what envoy makes, to 127.0.0.1:8080, with user 1000 at the "
        "other end",
        "may be upgraded: what any program accepts, at [fd00::/8]:8080-8089, for port "
        "8080",
    ]
