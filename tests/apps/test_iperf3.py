# SPDX-License-Identifier: Apache-2.0
"""iperf3: streams in one direction, beside a control connection."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.apps.process import Launch, Ports, find_program
from tests.apps.rings import ExpectRing

MIB = 1024 * 1024


def socket_buffers() -> int:
    """Bytes that the two sockets of a connection hold at the most."""
    return sum(
        int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])
        for name in ("tcp_rmem", "tcp_wmem")
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["to-server", "to-client"])
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("length", ["128K", "1K"])
def test_iperf3(
    launch: Launch,
    ports: Ports,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    streams: int,
    reverse: bool,
    length: str,
) -> None:
    iperf3 = find_program("iperf3")
    port = ports.take()
    # Without a file whose place is shared by all.
    server = launch(
        [iperf3, "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"],
        env=mode_env,
    )
    server.wait_listening(port)
    wanted = (256 if length == "128K" else 64) * MIB
    done = launch(
        [
            *(iperf3, "-c", "127.0.0.1", "-p", str(port), "--json", "-l", length),
            *("-P", str(streams), "-n", str(wanted), *(["-R"] if reverse else [])),
        ],
        env=mode_env,
    ).wait()
    report = json.loads(done)
    assert "error" not in report
    assert len(report["start"]["connected"]) == streams
    assert len(report["end"]["streams"]) == streams
    sent = report["end"]["sum_sent"]["bytes"]
    received = report["end"]["sum_received"]["bytes"]
    assert sent >= wanted
    # What is under way at the end is not counted: as much as the socket buffers and the
    # ring hold.
    assert 0 < received <= sent
    assert sent - received <= (socket_buffers() + 8 * MIB) * streams
    for stream in report["end"]["streams"]:
        assert stream["sender"]["bytes"] > 0
        assert stream["receiver"]["bytes"] > 0
    expect_ring(server, least=received * 8 // 10, upgrades=streams)
    server.stop(signal.SIGTERM, exits=1)
