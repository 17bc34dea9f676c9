# SPDX-License-Identifier: Apache-2.0
"""TCP/IP packets around bytes that never were in any.

The sequence number of byte n of a stream, those that went by the kernel counted in, is
(n + 1) modulo 2**32, so that it does not depend on where the capture begins.
"""

from __future__ import annotations

import struct

from kmap.wire import Endpoint

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10

# The most an IPv4 packet holds behind headers without options; IPv6 has 20 more.
PAYLOAD_MOST = 65535 - 20 - 20

_PROTOCOL_TCP = 6
_HOPS = 64
_DONT_FRAGMENT = 0x4000
_TCP_HEADER = 20
_WINDOW = 0xFFFF
# Maximum segment size, and a window scale of 14, so that no segment seems to be too
# large for the window: the rings have flow control of their own.
_SYN_OPTIONS = struct.pack("!BBHBBBB", 2, 4, PAYLOAD_MOST, 1, 3, 3, 14)


def _ones_complement(raw: bytes) -> int:
    # 2**16 is 1 modulo 2**16 - 1, so the sum of the words is the number itself there.
    return int.from_bytes(raw if len(raw) % 2 == 0 else raw + b"\0", "big") % 0xFFFF


def checksum(*parts: bytes) -> int:
    """The Internet checksum (RFC 1071); every part but the last has an even length.

    Never 0xFFFF: a sum that is zero is -0 in one's complement when its words are not
    all zero, as those of a header never are, and 0 is what RFC 1624 asks for then.
    """
    return -sum(map(_ones_complement, parts)) % 0xFFFF


def packet(
    source: Endpoint,
    target: Endpoint,
    sequence: int,
    acknowledged: int,
    flags: int,
    payload: bytes = b"",
) -> bytes:
    """One packet from source to target, of at most PAYLOAD_MOST bytes."""
    options = _SYN_OPTIONS if flags & SYN else b""
    length = _TCP_HEADER + len(options) + len(payload)
    sender, receiver = source.address.packed, target.address.packed
    if source.address.version == 4:
        pseudo = struct.pack("!4s4sHH", sender, receiver, _PROTOCOL_TCP, length)
    else:
        pseudo = struct.pack("!16s16sII", sender, receiver, length, _PROTOCOL_TCP)

    def tcp(check: int) -> bytes:
        return struct.pack(
            "!HHIIBBHHH",
            source.port,
            target.port,
            sequence & 0xFFFF_FFFF,
            acknowledged & 0xFFFF_FFFF if flags & ACK else 0,
            (_TCP_HEADER + len(options)) // 4 << 4,
            flags,
            _WINDOW,
            check,
            0,
        )

    head = tcp(checksum(pseudo, tcp(0), options, payload)) + options
    if source.address.version == 6:
        ip = struct.pack(
            "!IHBB16s16s", 6 << 28, length, _PROTOCOL_TCP, _HOPS, sender, receiver
        )
        return ip + head + payload

    def ipv4(check: int) -> bytes:
        return struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            0,
            20 + length,
            0,
            _DONT_FRAGMENT,
            _HOPS,
            _PROTOCOL_TCP,
            check,
            sender,
            receiver,
        )

    return ipv4(checksum(ipv4(0))) + head + payload
