# SPDX-License-Identifier: Apache-2.0
"""Two versions side by side: a second build that differs in its wire version only.

docs/upgrading.md says what a user may rely on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kmap import launch, native, procfs, wire
from tests.builds import build
from tests.cli.peers import Peers, Spawn, start, wait_until


@pytest.fixture(scope="module")
def other() -> Path:
    """The preload library of another wire version."""
    return build("other-wire", "kmap_preload") / native.PRELOAD_NAME


def _statistics(pid: int) -> wire.Statistics | None:
    for file in procfs.open_statistics(pid):
        return procfs.read_statistics(file)
    return None


def _count(peers: Peers, name: str) -> tuple[int, int]:
    """How often server and client said this reason."""
    index = [reason.name for reason in native.reasons()].index(name)
    seen = [_statistics(end.pid) for end in (peers.server, peers.client)]
    one, two = (found.reasons[index] if found else 0 for found in seen)
    return one, two


def _ring_bytes(peers: Peers) -> int:
    seen = [_statistics(end.pid) for end in (peers.server, peers.client)]
    return sum(
        row.ring_rx_bytes + row.ring_tx_bytes
        for found in seen
        if found is not None
        for row in found.rows
    )


def _under(env: dict[str, str], library: Path) -> dict[str, str]:
    return {**launch.without_kmap(env), "LD_PRELOAD": str(library)}


@pytest.mark.parametrize("newer", ["server", "client"])
def test_different_versions_stay_on_the_kernel(
    spawn: Spawn, kernel_env: dict[str, str], other: Path, newer: str
) -> None:
    """Every byte arrives, and both ends say why it is not on a ring."""
    envs = [_under(kernel_env, native.preload_path()), _under(kernel_env, other)]
    if newer == "server":
        envs.reverse()
    peers = start(spawn, *envs, rounds=100)
    wait_until(
        lambda: min(_count(peers, "peer-version")) >= 1, "the reason at both ends"
    )
    assert _ring_bytes(peers) == 0
    assert _count(peers, "peer-bad") == (0, 0)
    assert peers.finish() == (0, 0)


def test_the_other_version_works_with_itself(
    spawn: Spawn, kernel_env: dict[str, str], other: Path
) -> None:
    """What keeps the two apart is the number, and nothing else in that build."""
    env = _under(kernel_env, other)
    peers = start(spawn, env, env, rounds=100)
    assert _ring_bytes(peers) > 0
    assert _count(peers, "peer-version") == (0, 0)
    assert peers.finish() == (0, 0)
