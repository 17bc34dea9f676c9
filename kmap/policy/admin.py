# SPDX-License-Identifier: Apache-2.0
"""The settings of an Envoy that runs, from its admin interface.

``/config_dump`` has listeners and clusters, also those that came by xDS;
``/listeners`` has the addresses that listeners are really bound to, and ``/clusters``
the hosts of clusters as they are resolved now.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

from kmap import procfs
from kmap.policy import envoy
from kmap.policy.envoy import Address, Cluster, EnvoyConfig, Listener
from kmap.policy.tree import Node, PolicyError, from_json
from kmap.results import CannotRun, UsageError

_TIMEOUT_S = 10.0
# The dump of an Envoy with ten thousand clusters is some 100 MB.
_ANSWER_MAX = 1 << 28


def _fetch(base: str, path: str) -> Node:
    url = base + path
    # Not through a proxy that the environment names: the admin interface is near.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            raw = response.read(_ANSWER_MAX + 1)
    except urllib.error.HTTPError as error:
        raise CannotRun(
            f"{url} answers {error.code}: is that Envoy's admin interface?"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CannotRun(
            f"nothing answers at {url} ({reason}): give the admin address of an Envoy "
            "that runs, as http://127.0.0.1:9901"
        ) from None
    if len(raw) > _ANSWER_MAX:
        raise PolicyError(url, None, f"the answer is longer than {_ANSWER_MAX} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise PolicyError(url, None, "the answer is not JSON") from None
    if not isinstance(value, dict):
        raise PolicyError(url, None, "the answer is not a JSON object")
    return from_json(value, url)


def _each(node: Node, *names: str) -> Iterator[Node]:
    for name in names:
        listed = node.get(name)
        yield from listed.sequence() if listed is not None else ()


def _dumped_listeners(dump: Node) -> Iterator[Listener]:
    for each in _each(dump, "static_listeners"):
        if (found := each.get("listener")) is not None:
            yield envoy.listener(found)
    for each in _each(dump, "dynamic_listeners"):
        # One that is only draining takes no new connection.
        for state in ("active_state", "warming_state"):
            if (found := each.get(state, "listener")) is not None:
                yield envoy.listener(found)
                break


def _dumped_clusters(dump: Node) -> Iterator[Cluster]:
    for each in _each(
        dump, "static_clusters", "dynamic_active_clusters", "dynamic_warming_clusters"
    ):
        if (found := each.get("cluster")) is not None:
            yield envoy.cluster(found)


def _bound(statuses: Node) -> dict[str, tuple[Address, ...]]:
    bound: dict[str, tuple[Address, ...]] = {}
    for each in _each(statuses, "listener_statuses"):
        nodes = [each.get("local_address"), *_each(each, "additional_local_addresses")]
        found = [one for n in nodes if n is not None and (one := envoy.address(n))]
        bound[envoy.name_of(each)] = tuple(found)
    return bound


def _hosts(statuses: Node) -> dict[str, tuple[Address, ...]]:
    hosts: dict[str, tuple[Address, ...]] = {}
    for each in _each(statuses, "cluster_statuses"):
        nodes = [host.get("address") for host in _each(each, "host_statuses")]
        found = [one for n in nodes if n is not None and (one := envoy.address(n))]
        hosts[envoy.name_of(each)] = tuple(found)
    return hosts


def _owner(port: int) -> int | None:
    """The user who listens on the port, if that is one user of this namespace."""
    owners = {
        found.uid
        for found in procfs.tcp_sockets(os.getpid()) or ()
        if found.state == procfs.LISTEN and found.local.port == port
    }
    return owners.pop() if len(owners) == 1 else None


def _base(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise UsageError(
            f"--envoy-admin {url}: it is an address such as http://127.0.0.1:9901"
        )
    return f"http://{parts.netloc}", port


def read_admin(url: str) -> EnvoyConfig:
    """The listeners and clusters that the Envoy has now."""
    base, port = _base(url)
    config = EnvoyConfig(label=base, uid=_owner(port))
    listeners: list[Listener] = []
    clusters: list[Cluster] = []
    dump = _fetch(base, "/config_dump")
    if dump.get("configs") is None:
        raise dump.error("this is no config_dump of Envoy's: it has no configs")
    for part in _each(dump, "configs"):
        bootstrap = part.get("bootstrap")
        if bootstrap is not None:
            config = replace(config, admin=envoy.admin_address(bootstrap))
        listeners.extend(_dumped_listeners(part))
        clusters.extend(_dumped_clusters(part))
    bound = _bound(_fetch(base, "/listeners?format=json"))
    hosts = _hosts(_fetch(base, "/clusters?format=json"))
    return replace(
        config,
        listeners=tuple(
            replace(each, addresses=bound.get(each.name) or each.addresses)
            for each in listeners
        ),
        clusters=tuple(
            replace(each, endpoints=hosts.get(each.name) or each.endpoints)
            for each in clusters
        ),
    )
