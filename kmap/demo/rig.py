# SPDX-License-Identifier: Apache-2.0
"""One set-up: Envoy in front of nginx, running until it is closed."""

from __future__ import annotations

import contextlib
import enum
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmap import launch
from kmap.demo import config
from kmap.demo.children import Child, ChildFailed, Deadline
from kmap.demo.programs import Programs

_START_S = 30.0
_STOP_S = 20.0
_ADMIN_S = 10.0
_PORT_ATTEMPTS = 8


class Setup(str, enum.Enum):
    """How the bytes travel."""

    KERNEL = "kernel"
    UNIX = "unix"
    KMAP = "kmap"

    def environment(
        self, base: Mapping[str, str], preload: Path | None = None
    ) -> dict[str, str]:
        """The environment of every program in this set-up."""
        if self is Setup.KMAP:
            return launch.environment(base, preload=preload)
        return launch.without_kmap(base)


@dataclass(frozen=True)
class Traffic:
    """Bytes that Envoy itself counted, on both of its hops."""

    client_hop: int
    service_hop: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.client_hop - other.client_hop, self.service_hop - other.service_hop
        )


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def start_nginx(
    programs: Programs,
    directory: Path,
    root: Path,
    *,
    env: Mapping[str, str],
    port: int | None = None,
    workers: int = 1,
    cpus: Iterable[int] | None = None,
) -> tuple[Child, int]:
    """Starts nginx and returns it with its port, once it listens.

    Without a port a free one is taken, and another if somebody else is faster.
    """
    for _ in range(_PORT_ATTEMPTS):
        chosen = port or free_port()
        (directory / config.UNIX_SOCKET).unlink(missing_ok=True)
        settings = directory / "nginx.conf"
        settings.write_text(config.nginx(directory, chosen, workers=workers, root=root))
        log = directory / "nginx-error.log"
        log.unlink(missing_ok=True)
        argv = [programs.nginx.path, "-p", str(directory), "-e", str(log)]
        child = Child(
            "nginx", [*argv, "-c", str(settings)], env=env, log=log, cpus=cpus
        )
        try:
            deadline = Deadline(_START_S, "nginx did not listen")
            # The workers must be there too: what is measured is measured in them.
            while not (len(child.family()) > workers and _answers(chosen)):
                child.check()
                deadline.pause()
        except ChildFailed as error:
            child.close()
            if port is None and "in use" in str(error):
                continue
            raise
        except BaseException:
            child.close()
            raise
        return child, chosen
    raise ChildFailed(f"nginx found no free port in {_PORT_ATTEMPTS} attempts")


class Envoy:
    """A running Envoy and its admin endpoint."""

    def __init__(
        self,
        programs: Programs,
        directory: Path,
        bootstrap: Mapping[str, Any],
        *,
        env: Mapping[str, str],
        cpus: Iterable[int] | None = None,
        arguments: Sequence[str] = ("--disable-hot-restart",),
        name: str = "envoy",
    ) -> None:
        settings = directory / f"{name}.json"
        settings.write_text(json.dumps(bootstrap))
        self._address_file = directory / f"{name}-admin"
        self.child = Child(
            "envoy",
            [
                programs.envoy.path,
                "--config-path",
                str(settings),
                "--admin-address-path",
                str(self._address_file),
                "--concurrency",
                "1",
                "--log-level",
                "warn",
                *arguments,
            ],
            env=env,
            log=directory / f"{name}.log",
            cpus=cpus,
        )
        try:
            self._wait_until_live()
            listeners = json.loads(self.admin("/listeners?format=json"))
            self.ports = {
                status["name"]: int(
                    status["local_address"]["socket_address"]["port_value"]
                )
                for status in listeners["listener_statuses"]
            }
        except BaseException:
            self.child.close()
            raise

    def _wait_until_live(self) -> None:
        deadline = Deadline(_START_S, "Envoy was not ready")
        while not self.live():
            self.child.check()
            deadline.pause()

    def live(self) -> bool:
        """Whether Envoy says that it serves."""
        with contextlib.suppress(OSError, http.client.HTTPException, ChildFailed):
            return self.admin("/ready").strip() == "LIVE"
        return False

    def admin(self, path: str, method: str = "GET") -> str:
        """The text at a path of the admin endpoint."""
        try:
            address = self._address_file.read_text()
        except FileNotFoundError:
            raise ChildFailed("Envoy has not written its admin address") from None
        host, _, port = address.strip().rpartition(":")
        if not port.isdigit():
            raise ChildFailed(f"Envoy's admin address is {address!r}")
        connection = http.client.HTTPConnection(host, int(port), timeout=_ADMIN_S)
        try:
            connection.request(method, path, headers={"Connection": "close"})
            response = connection.getresponse()
            return response.read().decode()
        finally:
            connection.close()

    def counters(self, pattern: str) -> dict[str, int]:
        """The counters and gauges whose names match."""
        text = self.admin(f"/stats?filter={pattern}")
        found = {}
        for line in text.splitlines():
            name, _, value = line.rpartition(": ")
            if value.isdigit():
                found[name] = int(value)
        return found

    def traffic(self) -> Traffic:
        """What Envoy has carried so far for clients and to services."""
        found = self.counters("cx_(rx|tx)_bytes_total")
        client = sum(
            value
            for name, value in found.items()
            if name.startswith(("http.demo.downstream", "tcp.demo.downstream"))
        )
        service = sum(
            value
            for name, value in found.items()
            if name.startswith("cluster.") and ".upstream_cx_" in name
        )
        return Traffic(client_hop=client, service_hop=service)


class Rig:
    """Envoy, nginx and perhaps an echo service of one set-up."""

    def __init__(
        self,
        programs: Programs,
        setup: Setup,
        directory: Path,
        root: Path,
        *,
        base_env: Mapping[str, str] = os.environ,
        cpus: Iterable[int] | None = None,
        echo: bool = False,
        idle: str | None = None,
        preload: Path | None = None,
    ) -> None:
        self.setup = setup
        self.env = setup.environment(base_env, preload)
        # Of the programs that only look on.
        self.plain_env = launch.without_kmap(base_env)
        self.cpus = None if cpus is None else frozenset(cpus)
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.envoy_exit: int | None = None
        with contextlib.ExitStack() as stack:
            self.nginx, self.nginx_port = start_nginx(
                programs, directory, root, env=self.env, cpus=self.cpus
            )
            stack.callback(self.nginx.close)
            self.service = config.Upstream(port=self.nginx_port)
            if setup is Setup.UNIX:
                self.service = config.Upstream(path=config.UNIX_SOCKET)
            upstream = None
            if echo:
                service, port = _start_echo(directory, self.env, self.cpus)
                stack.callback(service.close)
                upstream = config.Upstream(port=port)
            self.envoy = Envoy(
                programs,
                directory,
                config.envoy(self.service, upstream, idle=idle),
                env=self.env,
                cpus=self.cpus,
            )
            stack.callback(self.envoy.child.close)
            self._stack = stack.pop_all()

    @property
    def http_port(self) -> int:
        """Port of Envoy's HTTP listener."""
        return self.envoy.ports["http"]

    @property
    def tcp_port(self) -> int:
        """Port of Envoy's TCP proxy."""
        return self.envoy.ports["tcp"]

    def stop(self) -> None:
        """Ends Envoy as an orchestrator would, and keeps its exit code."""
        self.envoy_exit = self.envoy.child.stop(_STOP_S)
        self.nginx.stop(_STOP_S, signal.SIGTERM)
        self.close()

    def close(self) -> None:
        """Ends everything that still runs."""
        self._stack.close()


def _start_echo(
    directory: Path, env: Mapping[str, str], cpus: Iterable[int] | None
) -> tuple[Child, int]:
    """The service that answers a POST with its body, and the port it took."""
    child = Child(
        "echo service",
        [sys.executable, "-I", str(Path(__file__).with_name("echo_service.py"))],
        env=env,
        log=directory / "echo.log",
        cpus=cpus,
        take_output=True,
    )
    line = child.output.readline()
    if not line.strip().isdigit():
        child.wait(_STOP_S)
        error = child.failure("did not start")
        child.close()
        raise error
    return child, int(line)
