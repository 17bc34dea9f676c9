# SPDX-License-Identifier: Apache-2.0
"""The configurations of nginx and Envoy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# No limit of Envoy may decide a comparison of transports.
_UNLIMITED = 1_000_000


@dataclass(frozen=True)
class Upstream:
    """Where Envoy finds a service: a port of 127.0.0.1, or a Unix socket."""

    port: int = 0
    path: str = ""


# Relative to the directory that nginx and Envoy work in: a full path could be longer
# than the 107 bytes that the address of a Unix socket has.
UNIX_SOCKET = "nginx.sock"


def nginx(directory: Path, port: int, *, workers: int = 1, root: Path) -> str:
    """Makes nginx serve the files below root, on a TCP port and a Unix socket."""
    # Files in a private directory are unreadable for nginx's usual user.
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(
        f"    {kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
    )
    return f"""\
{user}
daemon off;
worker_processes {workers};
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log warn;
events {{
    worker_connections 4096;
}}
http {{
{temporary}
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    # Connections of Envoy stay for the whole demo.
    keepalive_timeout 1h;
    keepalive_requests {_UNLIMITED}000;
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port};
        listen unix:{UNIX_SOCKET};
        root {root};
    }}
}}
"""


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _cluster(name: str, upstream: Upstream, idle: str | None = None) -> dict[str, Any]:
    address = (
        {"pipe": {"path": upstream.path}} if upstream.path else _address(upstream.port)
    )
    limits = dict.fromkeys(
        ("max_connections", "max_pending_requests", "max_requests", "max_retries"),
        _UNLIMITED,
    )
    options: dict[str, Any] = {}
    if idle is not None:
        kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        options[kind] = {
            "@type": f"type.googleapis.com/{kind}",
            "common_http_protocol_options": {"idle_timeout": idle},
            "explicit_http_config": {"http_protocol_options": {}},
        }
    return {
        "name": name,
        "typed_extension_protocol_options": options,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def _filter(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    prefix = "type.googleapis.com/envoy.extensions.filters"
    return {"name": name, "typed_config": {"@type": f"{prefix}.{kind}", **fields}}


def envoy(
    service: Upstream,
    echo: Upstream | None = None,
    ports: Mapping[str, int] | None = None,
    idle: str | None = None,
) -> dict[str, Any]:
    """Envoy with an HTTP listener and a TCP proxy before one service.

    Without ports Envoy takes free ones, which its admin endpoint names.  The echo
    service, if there is one, answers below /echo.  idle is how long it keeps a
    connection to a service that nobody uses.
    """
    clusters = [_cluster("service", service, idle)]
    routes = [
        {
            "match": {"prefix": "/"},
            # No time limit: a slow machine must show as slow and not as errors.
            "route": {"cluster": "service", "timeout": "0s"},
        }
    ]
    if echo is not None:
        clusters.append(_cluster("echo", echo, idle))
        routes.insert(
            0,
            {
                "match": {"prefix": "/echo"},
                "route": {"cluster": "echo", "timeout": "0s"},
            },
        )
    http = _filter(
        "envoy.filters.network.http_connection_manager",
        "network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="demo",
        http_filters=[
            _filter("envoy.filters.http.router", "http.router.v3.Router"),
        ],
        route_config={"virtual_hosts": [{"name": "demo", "domains": ["*"]}]},
    )
    http["typed_config"]["route_config"]["virtual_hosts"][0]["routes"] = routes
    tcp = _filter(
        "envoy.filters.network.tcp_proxy",
        "network.tcp_proxy.v3.TcpProxy",
        stat_prefix="demo",
        cluster="service",
    )
    return {
        "admin": {"address": _address(0)},
        "static_resources": {
            "listeners": [
                {
                    "name": name,
                    "address": _address((ports or {}).get(name, 0)),
                    "filter_chains": [{"filters": [network_filter]}],
                }
                for name, network_filter in (("http", http), ("tcp", tcp))
            ],
            "clusters": clusters,
        },
    }
