# SPDX-License-Identifier: Apache-2.0
"""docs/semantics.md says what the tables and the source say."""

from __future__ import annotations

import re

from kmap import native
from tests.conformance.test_conformance import DEVIATIONS
from tests.spec import semantics
from tests.spec.test_exports import exported


def test_the_page_is_what_is_made() -> None:
    page = semantics.PAGE.read_text()
    assert page == semantics.render(), "run scripts/semantics"


def test_every_exported_symbol_has_a_line() -> None:
    page = semantics.PAGE.read_text()
    lines = re.findall(r"^\| `(\w+)` \| \w+ \| \S", page, flags=re.MULTILINE)
    for name in exported(native.preload_path()):
        assert lines.count(name) == 1, name


def test_every_symbol_is_described() -> None:
    for symbol in native.symbol_table():
        assert symbol.subject in semantics.SUBJECTS, symbol
        assert symbol.class_name in semantics.CLASSES, symbol
        assert symbol.text.endswith("."), symbol
        like = re.match(r"As (\w+)[.,;]", symbol.text)
        assert not like or like[1] in native.symbols(), symbol


def test_every_deviation_appears() -> None:
    page = semantics.PAGE.read_text()
    for name, deviation in DEVIATIONS.items():
        assert f"`{name}`" in page
        assert deviation.reason in page


def test_options_that_need_the_kernel_are_those_of_the_source() -> None:
    source = (semantics.ROOT / "core/preload/entry_sock.c").read_text()
    function = re.search(r"^static bool needs_kernel.*?^}", source, re.M | re.S)
    assert function, "needs_kernel was not found"
    in_source = {
        re.sub(r"_(OLD|NEW)$", "", name)
        for name in re.findall(r"case (\w+):", function[0])
    }
    rows = semantics.SOCKET_OPTIONS + semantics.TCP_OPTIONS
    in_page = semantics.names_of(tuple(row for row in rows if row[1] == "PINNED"))
    # This one is read, not set.
    assert in_page - {"TCP_ZEROCOPY_RECEIVE"} == in_source
