# SPDX-License-Identifier: Apache-2.0
"""What of an Envoy's settings matters to a policy: who listens where, who is called.

The fields are those of Envoy's v3 API (envoy.config.bootstrap.v3.Bootstrap,
listener.v3, cluster.v3, endpoint.v3 and core.v3.Address), in YAML or in protobuf's
JSON.  Fields that say nothing about addresses are not looked at.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from enum import Enum

from kmap.policy.rules import read_text
from kmap.policy.tree import Node, parse_yaml

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

ORIGINAL_DST = "ORIGINAL_DST"
# envoy.config.cluster.v3.Cluster.DiscoveryType by number, as JSON may have it.
_DISCOVERY = ("STATIC", "STRICT_DNS", "LOGICAL_DNS", "EDS", ORIGINAL_DST)
_PORT_MAX = 65535


class Kind(Enum):
    """What an address of Envoy's is."""

    TCP = "TCP"
    UDP = "UDP"
    PIPE = "Unix socket"
    INTERNAL = "inside Envoy"


@dataclass(frozen=True)
class Address:
    """A core.v3.Address.  Only TCP and UDP have a host, an IP address or a name."""

    kind: Kind
    host: str = ""
    port: int = 0
    text: str = ""

    @property
    def ip(self) -> Ip | None:
        """The address, IPv4 if it is one that is mapped into IPv6; None for a name."""
        try:
            ip = ipaddress.ip_address(self.host)
        except ValueError:
            return None
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return mapped or ip


@dataclass(frozen=True)
class Listener:
    """Where Envoy accepts connections."""

    name: str
    addresses: tuple[Address, ...]
    # Connections come to it by redirection, and it asks where they were meant to go.
    original_dst: bool = False
    # Why nobody connects to it, if so.
    unused: str = ""


@dataclass(frozen=True)
class Cluster:
    """Whom Envoy calls."""

    name: str
    discovery: str
    endpoints: tuple[Address, ...] = ()


@dataclass(frozen=True)
class EnvoyConfig:
    """The settings of one Envoy."""

    label: str
    admin: Address | None = None
    listeners: tuple[Listener, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    # It also gets listeners or clusters from elsewhere, which are not among these.
    more_elsewhere: bool = False
    # The user that it runs as, where that is known.
    uid: int | None = field(default=None, compare=False)


def address(node: Node) -> Address | None:
    """An Address; None if there is nothing in it that this version knows."""
    if (sock := node.get("socket_address")) is not None:
        host = sock.get("address")
        port = sock.get("port_value")
        if host is None:
            raise sock.error("an address is missing")
        if port is None and sock.get("named_port") is not None:
            raise sock.error("named_port is not read: give port_value")
        number = port.number(0, _PORT_MAX) if port is not None else 0
        protocol = sock.get("protocol")
        udp = protocol is not None and protocol.text() in ("UDP", "1")
        text = host.text()
        shown = f"[{text}]:{number}" if ":" in text else f"{text}:{number}"
        return Address(Kind.UDP if udp else Kind.TCP, text, number, shown)
    if (pipe := node.get("pipe")) is not None:
        path = pipe.get("path")
        return Address(Kind.PIPE, text=path.text() if path else "pipe")
    if (internal := node.get("envoy_internal_address")) is not None:
        name = internal.get("server_listener_name")
        return Address(Kind.INTERNAL, text=name.text() if name else "internal")
    return None


def name_of(node: Node) -> str:
    """Its name; empty where it has none."""
    name = node.get("name")
    return name.text() if name is not None else ""


def _is_original_dst(node: Node) -> bool:
    use = node.get("use_original_dst")
    if use is not None and use.truth():
        return True
    filters = node.get("listener_filters")
    for each in filters.sequence() if filters is not None else ():
        kind = each.get("typed_config", "@type")
        if name_of(each).endswith("listener.original_dst") or (
            kind is not None and kind.text().endswith(".OriginalDst")
        ):
            return True
    return False


def listener(node: Node) -> Listener:
    """A listener.v3.Listener."""
    found: list[Address] = []
    if (first := node.get("address")) is not None and (one := address(first)):
        found.append(one)
    more = node.get("additional_addresses")
    for each in more.sequence() if more is not None else ():
        if (nested := each.get("address")) is not None and (one := address(nested)):
            found.append(one)
    bind = node.get("bind_to_port")
    unused = ""
    if "internal_listener" in node.mapping():
        unused = "an internal listener takes no connection from outside Envoy"
    elif "api_listener" in node.mapping():
        unused = "an API listener has no socket"
    elif bind is not None and not bind.truth():
        unused = "it is not bound: its connections come through another listener"
    return Listener(name_of(node), tuple(found), _is_original_dst(node), unused)


def _lb_endpoints(assignment: Node) -> list[Node]:
    found: list[Node] = []
    localities = assignment.get("endpoints")
    for locality in localities.sequence() if localities is not None else ():
        # The list stands in the locality itself, or wrapped as one of several kinds.
        for holder in (locality, locality.get("load_balancer_endpoints")):
            listed = holder.get("lb_endpoints") if holder is not None else None
            found.extend(listed.sequence() if listed is not None else ())
    return found


def _endpoint_addresses(endpoint: Node) -> list[Address]:
    nodes = [endpoint.get("address")]
    more = endpoint.get("additional_addresses")
    nodes.extend(each.get("address") for each in (more.sequence() if more else ()))
    return [one for node in nodes if node is not None and (one := address(node))]


def cluster(node: Node) -> Cluster:
    """A cluster.v3.Cluster with the endpoints that it names itself."""
    kind = node.get("type")
    discovery = kind.text() if kind is not None else "STATIC"
    if discovery.isdigit() and int(discovery) < len(_DISCOVERY):
        discovery = _DISCOVERY[int(discovery)]
    custom = node.get("cluster_type")
    if custom is not None:
        discovery = name_of(custom)
        if discovery.endswith("original_dst"):
            discovery = ORIGINAL_DST
    found: list[Address] = []
    assignment = node.get("load_assignment")
    if assignment is not None:
        for each in _lb_endpoints(assignment):
            if (endpoint := each.get("endpoint")) is not None:
                found.extend(_endpoint_addresses(endpoint))
        named = assignment.get("named_endpoints")
        for endpoint in named.mapping().values() if named is not None else ():
            found.extend(_endpoint_addresses(endpoint))
    return Cluster(name_of(node), discovery, tuple(found))


def admin_address(bootstrap: Node) -> Address | None:
    """Where the admin interface listens, as a bootstrap says it."""
    node = bootstrap.get("admin", "address")
    return address(node) if node is not None else None


def read_bootstrap(path: str) -> EnvoyConfig:
    """The static listeners and clusters of a bootstrap file, in YAML or JSON."""
    root = parse_yaml(read_text(path), path)
    known = {"static_resources", "dynamic_resources", "admin", "node"}
    if not known & set(root.mapping()):
        raise root.error(
            "this is no Envoy bootstrap: it has neither static_resources nor "
            "dynamic_resources nor admin"
        )
    listeners = root.get("static_resources", "listeners")
    clusters = root.get("static_resources", "clusters")
    return EnvoyConfig(
        label=path,
        admin=admin_address(root),
        listeners=tuple(map(listener, listeners.sequence() if listeners else ())),
        clusters=tuple(map(cluster, clusters.sequence() if clusters else ())),
        more_elsewhere=root.get("dynamic_resources") is not None,
    )
