# SPDX-License-Identifier: Apache-2.0
"""Node's http server and client: libuv over epoll, linked into the program."""

from __future__ import annotations

import hashlib

import pytest

from tests.apps.fetch import (
    Bodies,
    Request,
    gets,
    run_wrk,
    start_client,
    total_size,
)
from tests.apps.process import PROGRAMS, Launch, Ports, find_program
from tests.apps.rings import ExpectRing


@pytest.mark.parametrize("client_program", ["python", "node"])
def test_node_http(
    launch: Launch,
    ports: Ports,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    client_program: str,
) -> None:
    node = find_program("node")
    port = ports.take()
    server = launch(
        [node, PROGRAMS / "node_server.js", bodies.directory, str(port)], env=mode_env
    )
    server.wait_listening(port)
    requests = gets(bodies, "/file/") + gets(bodies, "/stream/")
    for name, digest in bodies.digests.items():
        answer = hashlib.sha256(digest.encode()).hexdigest()
        upload = bodies.directory / name
        requests.append(Request("POST", f"/digest/{name}", answer, upload))
    client = start_client(
        launch,
        port,
        requests,
        env=mode_env,
        program=(
            [node, str(PROGRAMS / "node_client.js")]
            if client_program == "node"
            else None
        ),
    )
    least = 3 * total_size(bodies, requests) * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    expect_ring(server, least=least, upgrades=3)
    client.finish()

    load = run_wrk(
        launch,
        port,
        "/file/body-1000",
        bodies.directory / "body-1000",
        env=mode_env,
        seconds=1,
    )
    expect_ring(server, least=least + load.bytes * 9 // 10, upgrades=32)
    server.stop()
