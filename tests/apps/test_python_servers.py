# SPDX-License-Identifier: Apache-2.0
"""gunicorn, which forks its workers, and uvicorn on two event loops."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import sys

import pytest

from tests.apps.fetch import (
    Bodies,
    Request,
    gets,
    run_wrk,
    start_client,
    total_size,
)
from tests.apps.process import PROGRAMS, Launch, Ports, Program
from tests.apps.rings import ExpectRing


def need(module: str) -> None:
    """Skips the test if a Python package is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; scripts/setup test installs it")


def all_requests(bodies: Bodies) -> list[Request]:
    """Every body in one piece, in many pieces, and sent."""
    requests = gets(bodies, "/file/") + gets(bodies, "/stream/")
    for name, digest in bodies.digests.items():
        answer = hashlib.sha256(digest.encode()).hexdigest()
        upload = bodies.directory / name
        requests.append(Request("POST", f"/digest/{name}", answer, upload))
    return requests


def start_gunicorn(
    launch: Launch, port: int, bodies: Bodies, env: dict[str, str], *options: str
) -> Program:
    """Two workers, both ready."""
    need("gunicorn")
    program = launch(
        [
            *(sys.executable, "-m", "gunicorn", "--workers", "2", *options),
            *("--bind", f"127.0.0.1:{port}", "--pythonpath", PROGRAMS),
            # Its control socket would be in a place shared by all.
            *("--no-control-socket", "wsgi_app:application"),
        ],
        env={**env, "BODIES": str(bodies.directory)},
    )
    program.wait_until(
        lambda: program.stderr().count("Booting worker with pid") == 2, "two workers"
    )
    return program


def test_gunicorn_with_keep_alive(
    launch: Launch,
    ports: Ports,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
) -> None:
    port = ports.take()
    options = ("--worker-class", "gthread", "--threads", "8", "--keep-alive", "20")
    server = start_gunicorn(launch, port, bodies, mode_env, *options)
    requests = all_requests(bodies)
    client = start_client(launch, port, requests, env=mode_env)
    least = 3 * total_size(bodies, requests) * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    expect_ring(server, least=least, upgrades=3)
    client.finish()
    server.stop()


def test_gunicorn_without_keep_alive(
    launch: Launch,
    ports: Ports,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
) -> None:
    """A sync worker closes after each answer.

    An answer that it sends in many pieces is worth a ring still.  A file is one
    blocking call to it, and so is a body to send to the client: those are over before
    anything is known to be hot.
    """
    port = ports.take()
    server = start_gunicorn(launch, port, bodies, mode_env, "--worker-class", "sync")
    largest = bodies.names[-1]
    content = (bodies.directory / largest).read_bytes()
    # Longer than what the kernel may hold of it while the client has read little.
    times = 10
    long = hashlib.sha256(content * times).hexdigest()
    requests = [
        *all_requests(bodies),
        Request("GET", f"/stream/{largest}?{times}", long),
    ]
    client = start_client(
        launch, port, requests, env=mode_env, connections=2, keep_alive=False
    )
    expect_ring(server, least=2 * times * len(content) // 2, upgrades=2)
    client.finish()
    server.stop()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_uvicorn(
    launch: Launch,
    ports: Ports,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    loop: str,
    http: str,
) -> None:
    for module in ("uvicorn", *{loop, http}):
        need(module)
    port = ports.take()
    server = launch(
        [
            *(sys.executable, "-m", "uvicorn", "--loop", loop, "--http", http),
            *("--host", "127.0.0.1", "--port", str(port), "--app-dir", PROGRAMS),
            *("--timeout-keep-alive", "20", "--no-access-log"),
            "asgi_app:application",
        ],
        env={**mode_env, "BODIES": str(bodies.directory)},
    )
    server.wait_listening(port)
    requests = all_requests(bodies)
    client = start_client(launch, port, requests, env=mode_env)
    least = 3 * total_size(bodies, requests) * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    expect_ring(server, least=least, upgrades=3)
    client.finish()

    load = run_wrk(
        launch,
        port,
        "/stream/body-1000",
        bodies.directory / "body-1000",
        env=mode_env,
        seconds=1,
    )
    expect_ring(server, least=least + load.bytes * 9 // 10, upgrades=32)
    # It ends its work and then dies of the signal as if it had not caught it.
    server.stop(signal.SIGTERM, exits=-signal.SIGTERM)
