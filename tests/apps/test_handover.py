# SPDX-License-Identifier: Apache-2.0
"""Real programs that give connections to other processes."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.apps.fetch import (
    Bodies,
    Request,
    gets,
    run_wrk,
    start_client,
    total_size,
)
from tests.apps.process import PROGRAMS, Launch, Ports, find_program, python
from tests.apps.rings import ExpectRing


def test_node_cluster(
    launch: Launch,
    ports: Ports,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
) -> None:
    port = ports.take()
    server = launch(
        [
            find_program("node"),
            PROGRAMS / "node_cluster.js",
            bodies.directory,
            str(port),
        ],
        env=mode_env,
    )
    server.wait_listening(port)
    requests = gets(bodies, "/file/") + gets(bodies, "/stream/")
    for name, digest in bodies.digests.items():
        answer = hashlib.sha256(digest.encode()).hexdigest()
        requests.append(
            Request("POST", f"/digest/{name}", answer, bodies.directory / name)
        )
    client = start_client(launch, port, requests, env=mode_env)
    # The workers upgrade what the primary passed to them and closed.
    expect_ring(server, least=total_size(bodies, requests), upgrades=1)
    expect_ring(client, least=total_size(bodies, requests), upgrades=1)
    client.finish()
    load = run_wrk(
        launch,
        port,
        "/file/body-1000",
        bodies.directory / "body-1000",
        env=mode_env,
        seconds=1,
    )
    assert load.bytes > 0
    server.stop()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("frames", [0, 9])
def test_multiprocessing_send_handle(
    launch: Launch, mode_env: dict[str, str], method: str, frames: int
) -> None:
    """Before the upgrade, and after nine frames, which is after it."""
    server = launch(python("send_handle", method, frames), env=mode_env)
    port = int(server.wait_line())
    client = launch(python("frames", "client", port), env=mode_env)
    report = json.loads(client.wait_line())
    assert report["threads"] == 4, str(client)
    client.finish()
    server.finish()
