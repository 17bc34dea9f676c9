# SPDX-License-Identifier: Apache-2.0
"""Headers that kmap tap makes up, as tshark reads them."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from kmap.tap.packets import ACK, packet
from kmap.tap.pcapng import Writer
from kmap.wire import Endpoint
from tests.tap.tapping import assert_packets, fields, needs


@pytest.mark.parametrize("network", ["::ffff:10.0.0.0", "2001:db8::"])
def test_every_checksum_there_is(tmp_path: Path, network: str) -> None:
    """Also the one of which there are two in one's complement, 0 and 0xFFFF."""
    needs("tshark", "tshark")
    file = tmp_path / "all.pcapng"
    first = ip_address(network)
    target = Endpoint(first.packed, 80)
    with open(file, "wb") as out:
        writer = Writer(out, "test", "test")
        for low in range(1 << 16):
            source = Endpoint((first + (1 << 16) + low).packed, 50_000)
            raw = packet(source, target, 1, 1, ACK, b"odd")
            writer.packet(low, raw, len(raw))
    assert_packets(file)
    # It did come by there: 0 is one of 65,535.
    assert fields(file, "tcp.checksum == 0", ["frame.number"])
    if target.address.version == 4:
        assert fields(file, "ip.checksum == 0", ["frame.number"])
