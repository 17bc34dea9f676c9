# SPDX-License-Identifier: Apache-2.0
"""A pod as Istio makes it, in network namespaces of the test.

The pod's namespace has an interface to another one, "outside", where a service and a
client are.  iptables redirects what the application sends to Envoy's port 15001 and
what comes from outside to 15006, with the rules of istio-init that matter.  Application
and Envoy are different users, each with a PID and a mount namespace of its own, as the
containers of a pod are.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kmap
from kmap import procfs
from kmap.demo import programs
from kmap.native import PRELOAD_NAME, preload_path
from tests.cli.peers import wait_until

PROGRAMS = Path(__file__).parent / "programs"
Spawn = Callable[..., "subprocess.Popen[str]"]

POD = "10.244.0.5"
OUTSIDE = "10.244.0.1"
# The address of a service, which only the outside has.
VIP = "10.96.0.7"
# The same in IPv6, with which only outbound connections are made.
POD6 = "fd00:244::5"
OUTSIDE6 = "fd00:244::1"
VIP6 = "fd00:96::7"
VIP_PORT = 80
APP_PORT = 8080
OUTBOUND, INBOUND, ADMIN = 15001, 15006, 15000
# What Istio has Envoy call the application from.
INBOUND_SOURCE = "127.0.0.6"
ENVOY_UID, APP_UID = 1337, 1000

_NAT = f"""\
PREROUTING -p tcp -j REDIRECT --to-ports {INBOUND}
OUTPUT -p tcp -s {INBOUND_SOURCE}/32 -o lo -j RETURN
OUTPUT -p tcp -m owner --uid-owner {ENVOY_UID} -j RETURN
OUTPUT -p tcp -d 127.0.0.1/32 -j RETURN
OUTPUT -p tcp -j REDIRECT --to-ports {OUTBOUND}
"""
_NAT6 = f"""\
OUTPUT -p tcp -m owner --uid-owner {ENVOY_UID} -j RETURN
OUTPUT -p tcp -d ::1/128 -j RETURN
OUTPUT -p tcp -j REDIRECT --to-ports {OUTBOUND}
"""


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


@dataclass(frozen=True)
class Namespaces:
    """The names of the two network namespaces."""

    pod: str
    outside: str


@contextlib.contextmanager
def namespaces() -> Iterator[Namespaces]:
    """Makes both, connected, with addresses and redirection; removes them."""
    tag = secrets.token_hex(4)
    names = Namespaces(f"kmap-pod-{tag}", f"kmap-out-{tag}")
    with contextlib.ExitStack() as exits:
        for name in (names.pod, names.outside):
            _run("ip", "netns", "add", name)
            exits.callback(_run, "ip", "netns", "del", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        veth = ("link", "add", "eth0", "type", "veth", "peer", "eth0")
        _run("ip", "-n", names.pod, *veth, "netns", names.outside)
        for name, address, address6 in (
            (names.pod, POD, POD6),
            (names.outside, OUTSIDE, OUTSIDE6),
        ):
            add = ("ip", "-n", name, "addr", "add")
            _run(*add, f"{address}/24", "dev", "eth0")
            _run(*add, f"{address6}/64", "dev", "eth0", "nodad")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        for address, gateway in ((f"{VIP}/32", OUTSIDE), (f"{VIP6}/128", OUTSIDE6)):
            _run("ip", "-n", names.outside, "addr", "add", address, "dev", "lo")
            _run("ip", "-n", names.pod, "route", "add", "default", "via", gateway)
        for program, rules in (("iptables", _NAT), ("ip6tables", _NAT6)):
            for rule in rules.splitlines():
                command = (program, "-w", "-t", "nat", "-A", *rule.split())
                _run("ip", "netns", "exec", names.pod, *command)
        yield names


def _public_python() -> str:
    """A Python that users without rights may execute."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        parents = Path(path).parents
        if os.path.exists(path) and all(p.stat().st_mode & 0o001 for p in parents):
            return path
    raise AssertionError(
        "no Python outside root's directories: apt-get install python3"
    )


def _listener(name: str, port: int, cluster: str) -> dict[str, Any]:
    prefix = "type.googleapis.com/envoy.extensions.filters"
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}
    manager = {
        "@type": f"{prefix}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{prefix}.http.router.v3.Router"},
            }
        ],
        "route_config": {
            "virtual_hosts": [{"name": name, "domains": ["*"], "routes": [route]}]
        },
    }
    http = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": manager,
    }
    first, second = (
        {"socket_address": {"address": address, "port_value": port}}
        for address in ("0.0.0.0", "::")
    )
    return {
        "name": name,
        "address": first,
        "additional_addresses": [{"address": second}],
        "listener_filters": [
            {
                "name": "envoy.filters.listener.original_dst",
                "typed_config": {
                    "@type": f"{prefix}.listener.original_dst.v3.OriginalDst"
                },
            }
        ],
        "filter_chains": [{"filters": [http]}],
    }


def _cluster(name: str, source: str | None) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
    }
    if source is not None:
        address = {"address": source, "port_value": 0}
        cluster["upstream_bind_config"] = {"source_address": address}
    return cluster


def bootstrap() -> str:
    """Envoy's settings, in the shape of Istio's."""
    admin = {"address": "127.0.0.1", "port_value": ADMIN}
    return json.dumps(
        {
            "admin": {"address": {"socket_address": admin}},
            "static_resources": {
                "listeners": [
                    _listener("virtualOutbound", OUTBOUND, "PassthroughCluster"),
                    _listener("virtualInbound", INBOUND, "InboundPassthroughCluster"),
                ],
                "clusters": [
                    _cluster("PassthroughCluster", None),
                    _cluster("InboundPassthroughCluster", INBOUND_SOURCE),
                ],
            },
        }
    )


class Pod:
    """The programs of the pod and of the outside."""

    def __init__(self, spawn: Spawn, names: Namespaces, directory: Path) -> None:
        self._spawn = spawn
        self._names = names
        # Users without rights cannot enter where the sources and the packages are.
        self.directory = directory
        for source in (preload_path(), PROGRAMS / "http_end.py"):
            shutil.copy(source, directory)
        # The part of the package that http_end.py needs.
        for name in ("__init__.py", "demo/__init__.py", "demo/echo_service.py"):
            target = directory / "kmap" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(kmap.__file__).parent / name, target)
        self._envoy_path = directory / "envoy"
        envoy = programs.find_envoy().path
        try:
            os.link(envoy, self._envoy_path)
        except OSError:
            shutil.copy(envoy, self._envoy_path)
        self._config = directory / "bootstrap.json"
        self._config.write_text(bootstrap())
        # Whatever the umask is.
        for path in directory.rglob("*"):
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))

    @property
    def config(self) -> Path:
        """Envoy's bootstrap."""
        return self._config

    def environment(self, policy: Path | None) -> dict[str, str]:
        """Of a program in the pod that has Kmap."""
        env = {"LD_PRELOAD": str(self.directory / PRELOAD_NAME)}
        return env if policy is None else {**env, "KMAP_POLICY": str(policy)}

    def _start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        uid: int | None = None,
    ) -> subprocess.Popen[str]:
        inside: list[str] = []
        if uid is not None:
            user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            inside = ["unshare", "--pid", "--mount", "--fork", "--mount-proc"]
            inside += ["setpriv", *user]
        # The preload is the program's own, and none of those that start it.
        settings = [f"{key}={value}" for key, value in env.items()]
        return self._spawn(
            ["ip", "netns", "exec", name, *inside, "env", *settings, *argv],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )

    def http_end(
        self,
        address: str,
        port: int,
        *,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
        outside: bool = False,
    ) -> HttpEnd:
        """The application, or somebody outside."""
        name = self._names.outside if outside else self._names.pod
        argv = [
            _public_python(),
            "-sES",
            str(self.directory / "http_end.py"),
            address,
            str(port),
        ]
        return HttpEnd(self._start(name, argv, env or {}, uid))

    def envoy(self, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Envoy, listening."""
        argv = [
            *(str(self._envoy_path), "-c", str(self._config)),
            *("--disable-hot-restart", "--concurrency", "1", "--log-level", "error"),
        ]
        process = self._start(self._names.pod, argv, env, ENVOY_UID)
        wait_until(
            lambda: self._listening(process.pid) >= {OUTBOUND, INBOUND},
            "Envoy to listen",
        )
        return process

    def _listening(self, pid: int) -> set[int]:
        return {
            found.local.port
            for each in procfs.descendants(pid)
            for found in procfs.tcp_sockets(each) or ()
            if found.state == procfs.LISTEN
        }


class HttpEnd:
    """One http_end.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def call(self, host: str, port: int, count: int, size: int) -> str:
        """Posts so many bodies there, on a connection that stays; what it says.

        The host "again" is the connection of that number, counted from 0.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{host} {port} {count} {size}\n")
        self.process.stdin.flush()
        return self._line()

    def finish(self) -> int:
        """Its exit status, after the end of its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait()
