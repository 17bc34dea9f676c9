# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md, the compiled structures and the Python decoder agree.

A structure is documented by a heading or a paragraph that names it in backquotes,
followed by a table whose first columns are offset, size and field.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from pathlib import Path

import pytest

from kmap import native, wire
from kmap.native import LayoutField

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
_STRUCTURE = re.compile(r"`(?:struct )?(km_\w+)`")
_HEAD = ("offset", "size", "field")


def documented(text: str) -> list[LayoutField]:
    """The rows of all byte tables, in their order."""
    found: list[LayoutField] = []
    structure = ""
    in_table = False
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            in_table = False
            if names := _STRUCTURE.findall(line):
                structure = names[-1]
            continue
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if tuple(cell.lower() for cell in cells[:3]) == _HEAD:
            in_table = True
        elif in_table and cells[0].isdigit():
            found.append(LayoutField(structure, cells[2], int(cells[0]), int(cells[1])))
    return found


def test_the_document_is_what_was_compiled() -> None:
    rows = documented(PROTOCOL.read_text())
    assert len(rows) == len(set(rows)), "a field is listed twice"
    described = {row.structure for row in rows}
    assert set(rows) == set(native.layout())
    assert {"km_stats_header", "km_stats_row"} <= described


def test_a_wrong_table_is_seen() -> None:
    text = """
The header, `km_x`:

| offset | size | field | meaning |
|---|---|---|---|
| 0 | 8 | `magic` | what it is |
| 8 | 4 | `version` | |
"""
    assert documented(text) == [
        LayoutField("km_x", "magic", 0, 8),
        LayoutField("km_x", "version", 8, 4),
    ]


def test_fields_do_not_overlap() -> None:
    by_structure: dict[str, list[LayoutField]] = {}
    for field in native.layout():
        by_structure.setdefault(field.structure, []).append(field)
    assert by_structure
    for fields in by_structure.values():
        end = 0
        for field in sorted(fields, key=lambda each: each.offset):
            assert field.offset >= end, field
            assert field.size > 0, field
            end = field.offset + field.size


def _memfd_with(values: dict[tuple[str, str], bytes]) -> int:
    """A statistics memfd of one row, each field put where the compiler has it."""
    header_size, row_size = 4096, 512
    image = bytearray(header_size + row_size)
    for field in native.layout():
        raw = values.get((field.structure, field.field))
        if raw is not None:
            base = header_size if field.structure == "km_stats_row" else 0
            assert len(raw) == field.size, field
            image[base + field.offset : base + field.offset + field.size] = raw
    fd = os.memfd_create("test-stats")
    os.write(fd, image)
    return fd


def test_the_decoder_reads_what_was_compiled() -> None:
    header = {"magic": wire.MAGIC, "version": wire.VERSION, "header_size": 4096}
    header |= {"row_size": 512, "row_count": 1, "used_rows": 1, "pid": 4711}
    # Distinct values, so that two fields of one size cannot change places unseen.
    row = {"state": 2, "role": 1, "reason": 3, "transport": 1, "inode": 0x1_0000_0001}
    row |= {"fd": -5, "pid": 4712, "lport": 1001, "pport": 1002, "oport": 1003}
    row |= {"ring_size": 65536, "generation": 9, "ring_rx_bytes": 11}
    row |= {"ring_tx_bytes": 12, "kernel_rx_bytes": 13, "kernel_tx_bytes": 14}
    row |= {"rx_seen": 15, "tx_seen": 16, "segment": 0x7FFF_0000_1000}
    raw = {
        "laddr": ipaddress.IPv6Address("::ffff:127.0.0.1").packed,
        "paddr": ipaddress.IPv6Address("2001:db8::2").packed,
        "oaddr": ipaddress.IPv6Address("::ffff:10.0.0.3").packed,
        "token": bytes(range(16)),
    }
    sizes = {(f.structure, f.field): f.size for f in native.layout()}
    values = {
        (structure, name): value.to_bytes(
            sizes[structure, name], sys.byteorder, signed=value < 0
        )
        for structure, fields in (("km_stats_header", header), ("km_stats_row", row))
        for name, value in fields.items()
    }
    values |= {("km_stats_row", name): value for name, value in raw.items()}
    values["km_stats_header", "comm"] = b"envoy".ljust(16, b"\0")
    assert set(values) == {
        key for key in sizes if key[0] in ("km_stats_header", "km_stats_row")
    }, "a field was added that this test does not fill"

    fd = _memfd_with(values)
    try:
        statistics = wire.read_statistics(fd)
    finally:
        os.close(fd)
    assert (statistics.pid, statistics.comm) == (4711, "envoy")
    (decoded,) = statistics.rows
    for name in row.keys() - {"state", "role", "lport", "pport", "oport"}:
        assert getattr(decoded, name) == row[name], name
    assert (decoded.state, decoded.role) == (wire.RowState.RING, wire.Role.CONNECTOR)
    assert str(decoded.local) == "127.0.0.1:1001"
    assert str(decoded.peer) == "[2001:db8::2]:1002"
    assert str(decoded.original_dst) == "10.0.0.3:1003"
    assert decoded.token == raw["token"]


def test_the_decoder_knows_the_bytes_of_closed_connections() -> None:
    names = [counter.name for counter in native.counters()]
    assert names[wire.CLOSED_BYTES] == [
        f"{path}_{way}_bytes" for path in ("ring", "kernel") for way in ("rx", "tx")
    ]


@pytest.mark.parametrize(
    "image",
    [
        b"",
        bytes(8192),
        wire.HEADER.pack(wire.MAGIC, 2, 0, 0, 0, 0, 0, b""),
        # Sizes that are not to be believed, of a file that has room for none of it.
        wire.HEADER.pack(wire.MAGIC, 1, 4096, 1 << 31, 9, 9, 0, b"").ljust(8192),
        wire.HEADER.pack(wire.MAGIC, 1, 4096, 512, 1 << 31, 1 << 31, 0, b"").ljust(
            8192
        ),
        wire.HEADER.pack(wire.MAGIC, 1, 4096, 512, 9, 9, 0, b"").ljust(8192),
    ],
)
def test_the_decoder_refuses_other_files(image: bytes) -> None:
    fd = os.memfd_create("test-stats")
    try:
        os.write(fd, image)
        assert wire.is_made(fd) == any(image)
        with pytest.raises(wire.NotStatistics):
            wire.read_statistics(fd)
    finally:
        os.close(fd)
