# SPDX-License-Identifier: Apache-2.0
"""The filters of kmap ss, on rows without processes."""

from __future__ import annotations

from typing import Any

import pytest

from kmap import filters
from kmap.results import UsageError
from kmap.snapshot import Connection


def row(**changes: Any) -> Connection:
    base = Connection(
        pid=12,
        comm="envoy",
        fd=7,
        role="connector",
        local="10.0.0.5:40000",
        peer="127.0.0.1:8080",
        original_dst=None,
        state="ring",
        transport="shm",
        reason="",
        ring_rx_bytes=0,
        ring_tx_bytes=0,
        kernel_rx_bytes=0,
        kernel_tx_bytes=0,
        rx_queued=0,
        tx_queued=0,
        ring_size=4096,
    )
    return base._replace(**changes)


ROWS = {
    "ring": row(),
    "kernel": row(
        pid=13, comm="my svc", state="kernel", reason="policy", local="10.1.0.5:80"
    ),
    "six": row(pid=14, comm="nginx", state="pending", peer="[2001:db8::1]:443"),
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "ring kernel six"),
        ("state ring", "ring"),
        ("state ring,pending", "ring six"),
        ("not state ring", "kernel six"),
        ("! ( state ring or state pending )", "kernel"),
        ("sport = :80", "kernel"),
        ("sport=80", "kernel"),
        ("sport 80", "kernel"),
        ("sport != 80", "ring six"),
        ("sport >= :40000", "ring six"),
        ("dport = 8080", "ring kernel"),
        ("dport lt 444", "six"),
        ("port = 80", "kernel"),
        ("port = 8080", "ring kernel"),
        ("port != 8080", "six"),
        ("pid = 12 or pid = 14", "ring six"),
        ("pid>12 pid<14", "kernel"),
        ("state pending or pid 12 and state kernel", "six"),
        ("(state pending or pid 12) and state ring", "ring"),
        ("comm = nginx,envoy", "ring six"),
        ("comm != envoy", "kernel six"),
        ("reason policy", "kernel"),
        ("src 10.0.0.0/16", "ring six"),
        ("src 10.1.0.5:80", "kernel"),
        ("src 10.1.0.5:81", ""),
        ("dst = [2001:db8::1]:443", "six"),
        ("dst 2001:db8::/32", "six"),
        ("dst != 127.0.0.1", "six"),
        ("state ring && pid 12 || pid 13", "ring kernel"),
    ],
)
def test_what_passes(text: str, names: str) -> None:
    for words in ([text], text.split()):
        wanted = filters.parse(words)
        assert [name for name in ROWS if wanted(ROWS[name])] == names.split()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("established", "'established' is no word of a filter: there are state, comm"),
        ("state up", "there are ring, kernel, pending"),
        ("state", "should follow 'state'"),
        ("sport = http", "as in sport = 8080"),
        ("pid =", "should follow 'pid ='"),
        ("( state ring", "should follow 'the filter'|not closed|follow '\\('"),
        ("( state ring pid 3 (", "should follow"),
        ("state ring )", "closes nothing"),
        ("not", "should follow 'not'"),
        ("comm < envoy", "compared with = or !="),
        ("src > 10.0.0.1", "compared with = or !="),
        ("src localhost", "write 127.0.0.1"),
        ("dst 10.0.0.1:x", "a number should follow"),
        ("state ring or", "should follow"),
        ("(" * 5000, "too many parentheses"),
    ],
)
def test_what_makes_no_sense_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        filters.parse([text])
