# SPDX-License-Identifier: Apache-2.0
"""Ten thousand connections between two processes."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.limits import crowd

CONNECTIONS = 10_000
IDLE_S = 10.0
# A page of header, one of each ring's data, and the same again where rings grew.
SEGMENT_BYTES = 3 * 4096
# Hidden ones: the statistics, two of a bell, one of the peer's.
HIDDEN_DESCRIPTORS = 8


def test_ten_thousand_connections(spawn: crowd.Spawn, kmap_env: dict[str, str]) -> None:
    """All are on the ring, need no descriptor each, and cost nothing while idle."""
    many = crowd.gather(spawn, kmap_env, CONNECTIONS)
    for pid in many.pids:
        assert crowd.states(pid) == {"ring": CONNECTIONS}
        numbers = crowd.descriptors(pid)
        assert len(numbers) <= CONNECTIONS + crowd.OWN_DESCRIPTORS
        hidden = [number for number in numbers if number >= CONNECTIONS + 100]
        assert 0 < len(hidden) <= HIDDEN_DESCRIPTORS
        assert crowd.segment_bytes(pid) <= CONNECTIONS * SEGMENT_BYTES
    assert many.idle(IDLE_S) == crowd.Activity(ticks=0, switches=0)
    shown = subprocess.run(
        [sys.executable, "-m", "kmap", "ss", "--json"],
        env=kmap_env | {"KMAP_DISABLE": "1"},
        capture_output=True,
        check=True,
    )
    rows = json.loads(shown.stdout)["connections"]
    ours = [row for row in rows if row["pid"] in many.pids]
    assert len(ours) == 2 * CONNECTIONS
    assert {row["state"] for row in ours} == {"ring"}
    many.turn(1)
    assert many.finish() == (0, 0)
