# SPDX-License-Identifier: Apache-2.0
"""Rules from an Envoy's settings: its hops on this host, and nothing else.

The same rules serve the Envoy and its services.  Of each hop there are two: one for the
Envoy's end, which names its program, and one for the service's.  Where the users of the
two are known, each rule also names the other end's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

from kmap.policy.envoy import (
    ORIGINAL_DST,
    Address,
    Cluster,
    EnvoyConfig,
    Ip,
    Kind,
    Listener,
)
from kmap.policy.rules import ALLOW, DENY, Policy, Rule

_LOCALHOST = ("127.0.0.1", "::1")


@dataclass(frozen=True)
class Parties:
    """Who the two sides are, as far as that is known.

    addresses are those of this host, loopback aside.
    """

    envoy_program: str = "envoy"
    envoy_uid: int | None = None
    service_uid: int | None = None
    addresses: frozenset[Ip] = frozenset()


@dataclass(frozen=True)
class Left:
    """Something that got no rule, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Derivation:
    """The rules, and what has none."""

    policy: Policy
    left: tuple[Left, ...]


def own_addresses() -> frozenset[Ip]:
    """The addresses of this network namespace, loopback aside."""
    found: set[Ip] = set()
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            try:
                # A link-local address has its interface behind it.
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
            except ValueError:
                continue
            if not ip.is_loopback:
                found.add(ip)
    return frozenset(found)


def _net(ip: Ip, port: int | None = None) -> str:
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    if ip.is_unspecified:
        host = "*"
    return host if port is None else f"{host}:{port}"


class _Rules:
    """Collects rules, each once."""

    def __init__(self, parties: Parties) -> None:
        self._parties = parties
        self.rules: dict[str, Rule] = {}
        self.left: dict[Left, None] = {}

    def leave(self, what: str, why: str) -> None:
        self.left[Left(what, why)] = None

    def add(self, action: str, why: str, **fields: str | int | None) -> None:
        pairs = tuple((n, str(v)) for n, v in fields.items() if v is not None)
        rule = Rule(action, pairs, why)
        self.rules.setdefault(rule.text, rule)

    def envoy_end(self, why: str, **fields: str) -> None:
        """A rule for Envoy's own end of a hop."""
        who = self._parties
        self.add(ALLOW, why, **fields, uid=who.service_uid, program=who.envoy_program)

    def service_end(self, why: str, **fields: str) -> None:
        """A rule for the end that a service has."""
        self.add(ALLOW, why, **fields, uid=self._parties.envoy_uid)


def _ips(address: Address) -> Iterator[Ip]:
    if address.ip is not None:
        yield address.ip
    elif address.host.lower().rstrip(".") == "localhost":
        yield from map(ipaddress.ip_address, _LOCALHOST)


_NOT_TCP = {
    Kind.UDP: "UDP and QUIC are not TCP",
    Kind.PIPE: "a Unix socket is not TCP",
    Kind.INTERNAL: "it stays inside Envoy",
}
_ASK_ENVOY = "--envoy-admin of the running Envoy knows"


def _tcp(
    rules: _Rules, what: str, addresses: Iterable[Address]
) -> Iterator[tuple[Ip, Address]]:
    """Those that a rule can be about; the others are left with the reason."""
    for address in addresses:
        ips = list(_ips(address))
        if address.kind is not Kind.TCP:
            why = _NOT_TCP[address.kind]
        elif address.port == 0:
            why = f"the kernel chooses its port: {_ASK_ENVOY} it"
        elif not ips:
            why = f"a name is not resolved here: {_ASK_ENVOY} its addresses"
        else:
            yield from ((ip, address) for ip in ips)
            continue
        rules.leave(f"{what}, {address.text}", why)


def _listener(rules: _Rules, listener: Listener, who: Parties) -> None:
    what = f"listener {listener.name or '(without a name)'}"
    if listener.unused:
        rules.leave(what, listener.unused)
        return
    for ip, address in _tcp(rules, what, listener.addresses):
        net = _net(ip, address.port)
        rules.envoy_end(what, role="acceptor", local=net)
        if not listener.original_dst:
            rules.service_end(what, role="connector", peer=net)
            continue
        redirected = f"{what}, for connections redirected to it"
        rules.service_end(redirected, role="connector", via=net)
        if who.envoy_uid is None:
            rules.leave(
                f"{redirected}, from other users than Envoy's",
                "a program trusts another user's Envoy with a redirected connection "
                "only where the user is named: --envoy-uid",
            )


def _original_dst(rules: _Rules, what: str, who: Parties) -> None:
    what = f"{what}, wherever a connection was meant to go on this host"
    for net in (
        "127.0.0.0/8",
        "[::1]",
        *sorted(map(_net, who.addresses)),
    ):
        rules.envoy_end(what, role="connector", peer=net)
    if who.envoy_uid is not None:
        rules.service_end(what, role="acceptor")
    else:
        rules.leave(
            f"{what}, the services' end",
            "any port may be meant, so that only Envoy's user tells its connections "
            "from others: --envoy-uid",
        )


def _cluster(rules: _Rules, cluster: Cluster, who: Parties) -> None:
    what = f"cluster {cluster.name or '(without a name)'}"
    if cluster.discovery == ORIGINAL_DST:
        _original_dst(rules, what, who)
        return
    if not cluster.endpoints:
        rules.leave(
            what,
            f"it has no endpoints here: {_ASK_ENVOY} those that it was told of"
            if cluster.discovery == "EDS"
            else "it has no endpoints",
        )
    for ip, address in _tcp(rules, what, cluster.endpoints):
        if not (ip.is_loopback or ip in who.addresses):
            rules.leave(f"{what}, {address.text}", "not an address of this host")
            continue
        net = _net(ip, address.port)
        rules.envoy_end(what, role="connector", peer=net)
        rules.service_end(what, role="acceptor", local=net)


def derive(config: EnvoyConfig, parties: Parties) -> Derivation:
    """The rules for the Envoy of these settings and for its services."""
    rules = _Rules(parties)
    admin = config.admin
    if admin is not None and admin.kind is Kind.TCP and admin.port:
        for ip in _ips(admin):
            rules.add(DENY, "the admin interface", to=_net(ip, admin.port))
    for listener in config.listeners:
        _listener(rules, listener, parties)
    for cluster in config.clusters:
        _cluster(rules, cluster, parties)
    if config.more_elsewhere:
        rules.leave(
            "listeners and clusters by xDS",
            "they are not in the file: --envoy-admin of the running Envoy has them",
        )
    return Derivation(Policy(tuple(rules.rules.values())), tuple(rules.left))
