# SPDX-License-Identifier: Apache-2.0
"""nginx with two workers and sendfile, as another user when it is started as root."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from kmap import procfs
from tests.apps.fetch import (
    Bodies,
    Request,
    gets,
    run_wrk,
    start_client,
    total_size,
)
from tests.apps.process import Launch, Ports, Program, find_program
from tests.apps.rings import ExpectRing, Rings, rings

CONFIGURATION = """\
daemon off;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log notice;
events {{ worker_connections 1024; }}
http {{
    sendfile {sendfile};
    tcp_nopush on;
    access_log off;
    keepalive_requests 10000000;
    client_max_body_size 100m;
    client_body_temp_path {directory}/client;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port}{reuseport};
        root {bodies};
        location /put/ {{
            root {directory};
            dav_methods PUT;
        }}
        location /proxied/ {{
            proxy_pass http://127.0.0.1:{port}/;
        }}
        location /again/ {{
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass http://self/;
        }}
    }}
    upstream self {{
        server 127.0.0.1:{port};
        keepalive 16;
    }}
}}
"""


class Nginx:
    """A running nginx."""

    def __init__(
        self,
        launch: Launch,
        directory: Path,
        port: int,
        bodies: Bodies,
        env: Mapping[str, str],
        *,
        sendfile: bool = True,
        reuseport: bool = False,
    ) -> None:
        self.port = port
        self._log = directory / "error.log"
        configuration = directory / "nginx.conf"
        configuration.write_text(
            CONFIGURATION.format(
                directory=directory,
                port=port,
                bodies=bodies.directory,
                sendfile="on" if sendfile else "off",
                reuseport=" reuseport" if reuseport else "",
            )
        )
        self.program: Program = launch(
            [find_program("nginx"), "-p", directory, "-c", configuration], env=env
        )
        self.program.wait_listening(port)
        self.program.wait_until(
            lambda: len(self.program.family()) == 3, "a master and two workers"
        )

    def quit(self) -> None:
        """Ends it when its connections have ended; it must have nothing to tell."""
        self.program.stop(signal.SIGQUIT)
        bad = [
            line
            for line in self._log.read_text().splitlines()
            if "[notice]" not in line and "is buffered to a temporary file" not in line
        ]
        assert not bad, "\n".join(bad)


@pytest.mark.parametrize("sendfile", [True, False], ids=["sendfile", "writev"])
def test_bodies_arrive_whole(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    sendfile: bool,
) -> None:
    nginx = Nginx(
        launch, public_path, ports.take(), bodies, mode_env, sendfile=sendfile
    )
    requests = gets(bodies)
    client = start_client(launch, nginx.port, requests, env=mode_env)
    least = 3 * total_size(bodies, requests) * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    expect_ring(nginx.program, least=least, upgrades=3)
    client.finish()
    nginx.quit()


def test_uploads_arrive_whole(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
) -> None:
    stored = public_path / "put"
    stored.mkdir()
    stored.chmod(0o777)
    nginx = Nginx(launch, public_path, ports.take(), bodies, mode_env)
    nothing = hashlib.sha256().hexdigest()
    requests = [
        Request("PUT", f"/put/{name}", nothing, bodies.directory / name, status=201)
        for name in bodies.names
    ]
    client = start_client(launch, nginx.port, requests, env=mode_env, connections=1)
    for name, digest in bodies.digests.items():
        content = (stored / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
    expect_ring(nginx.program, least=total_size(bodies, requests) * 9 // 10)
    client.finish()
    nginx.quit()


@pytest.mark.parametrize("prefix", ["/proxied/", "/again/"])
def test_bodies_arrive_whole_through_nginx_as_a_proxy(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    prefix: str,
) -> None:
    """Without keep-alive to the upstream, and with it."""
    nginx = Nginx(launch, public_path, ports.take(), bodies, mode_env)
    requests = gets(bodies, prefix)
    client = start_client(launch, nginx.port, requests, env=mode_env)
    least = 3 * total_size(bodies, requests) * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    # At least the hop to the client; with it the other two ends of the second.
    expect_ring(nginx.program, least=least, upgrades=3)
    client.finish()
    nginx.quit()


@pytest.mark.parametrize("reuseport", [False, True], ids=["shared", "reuseport"])
@pytest.mark.parametrize("name", ["body-100", "body-65537"])
def test_wrk_sees_no_error(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    name: str,
    reuseport: bool,
) -> None:
    nginx = Nginx(
        launch, public_path, ports.take(), bodies, mode_env, reuseport=reuseport
    )
    load = run_wrk(
        launch, nginx.port, f"/{name}", bodies.directory / name, env=mode_env
    )
    expect_ring(nginx.program, least=load.bytes * 9 // 10, upgrades=32)
    nginx.quit()


def test_large_bodies_after_many_small_ones(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
) -> None:
    """Sizes alternate on one connection, so that each meets a ring in another state."""
    nginx = Nginx(launch, public_path, ports.take(), bodies, mode_env)
    names = [*bodies.names[:5], *reversed(bodies.names), *bodies.names[:5]]
    unique: list[Request] = []
    for number, name in enumerate(names):
        unique.append(Request("GET", f"/{name}?{number}", bodies.digests[name]))
    client = start_client(launch, nginx.port, unique, env=mode_env, connections=6)
    expect_ring(client, least=6 * 8 * 1024 * 1024, upgrades=6)
    client.finish()
    nginx.quit()


@pytest.mark.parametrize("side", ["server", "client"])
def test_one_side_alone_stays_on_the_kernel(
    launch: Launch,
    ports: Ports,
    public_path: Path,
    bodies: Bodies,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    side: str,
) -> None:
    server_env, client_env = (
        (kmap_env, kernel_env) if side == "server" else (kernel_env, kmap_env)
    )
    nginx = Nginx(launch, public_path, ports.take(), bodies, server_env)
    client = start_client(launch, nginx.port, gets(bodies), env=client_env)
    assert procfs.has_library(client.pid) == (side == "client")
    assert rings(client.family()) == Rings()
    client.finish()
    name = "body-1000"
    body = bodies.directory / name
    run_wrk(launch, nginx.port, f"/{name}", body, env=client_env, seconds=1)
    for pid in nginx.program.family():
        assert procfs.has_library(pid) == (side == "server")
    assert rings(nginx.program.family()) == Rings()
    nginx.quit()
