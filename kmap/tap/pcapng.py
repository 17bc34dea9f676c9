# SPDX-License-Identifier: Apache-2.0
"""Writes pcapng: one section, one interface of raw IP packets, nanoseconds.

After the IETF draft draft-ietf-opsawg-pcapng: section header, interface description,
enhanced packet and interface statistics blocks, in the byte order of this machine.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_SECTION_HEADER = 0x0A0D0D0A
_INTERFACE_DESCRIPTION = 1
_INTERFACE_STATISTICS = 5
_ENHANCED_PACKET = 6
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_SECTION_LENGTH_UNKNOWN = 0xFFFF_FFFF_FFFF_FFFF
# The packets start with an IPv4 or IPv6 header: LINKTYPE_RAW of the tcpdump.org list.
_LINKTYPE_RAW = 101

_OPT_END = 0
_OPT_COMMENT = 1
_SHB_USERAPPL = 4
_IF_NAME = 2
_IF_TSRESOL = 9
_ISB_IFRECV = 4
_ISB_IFDROP = 5
_NANOSECONDS = 9

# An option's length is 16 bits.
_TEXT_MOST = 0xFFFF


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)


def _options(*options: tuple[int, bytes]) -> bytes:
    if not options:
        return b""
    parts = [struct.pack("=HH", code, len(raw)) + _padded(raw) for code, raw in options]
    return b"".join(parts) + struct.pack("=HH", _OPT_END, 0)


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return struct.pack("=II", kind, length) + body + struct.pack("=I", length)


def _time(ns: int) -> bytes:
    return struct.pack("=II", ns >> 32, ns & 0xFFFF_FFFF)


class Writer:
    """Packets into a file, which it does not close."""

    def __init__(self, file: BinaryIO, application: str, interface: str) -> None:
        """Writes the head of the file and flushes it: a reader can open it then."""
        self._file = file
        file.write(
            _block(
                _SECTION_HEADER,
                struct.pack("=IHHQ", _BYTE_ORDER_MAGIC, 1, 0, _SECTION_LENGTH_UNKNOWN)
                + _options((_SHB_USERAPPL, application.encode())),
            )
        )
        file.write(
            _block(
                _INTERFACE_DESCRIPTION,
                struct.pack("=HHI", _LINKTYPE_RAW, 0, 0)
                + _options(
                    (_IF_NAME, interface.encode()),
                    (_IF_TSRESOL, bytes([_NANOSECONDS])),
                ),
            )
        )
        file.flush()

    def packet(
        self, ns: int, captured: bytes, length: int, comments: tuple[str, ...] = ()
    ) -> None:
        """A packet of length bytes on the wire, seen ns nanoseconds after the epoch."""
        options = [(_OPT_COMMENT, text.encode()[:_TEXT_MOST]) for text in comments]
        self._file.write(
            _block(
                _ENHANCED_PACKET,
                struct.pack("=I", 0)
                + _time(ns)
                + struct.pack("=II", len(captured), length)
                + _padded(captured)
                + _options(*options),
            )
        )

    def statistics(self, ns: int, packets: int, dropped: int, comment: str) -> None:
        """What became of the capture as a whole, at its end."""
        self._file.write(
            _block(
                _INTERFACE_STATISTICS,
                struct.pack("=I", 0)
                + _time(ns)
                + _options(
                    (_OPT_COMMENT, comment.encode()),
                    (_ISB_IFRECV, struct.pack("=Q", packets)),
                    (_ISB_IFDROP, struct.pack("=Q", dropped)),
                ),
            )
        )

    def flush(self) -> None:
        """Hands what was written to the file's reader."""
        self._file.flush()
