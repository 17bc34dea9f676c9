# SPDX-License-Identifier: Apache-2.0
"""Rules from the settings of an Envoy: every form of an address, and what gets none."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmap.policy import derive, envoy
from kmap.policy.derive import Derivation, Parties
from kmap.policy.envoy import EnvoyConfig
from kmap.policy.rules import Policy, Rule, check
from kmap.policy.tree import PolicyError

HERE = frozenset({ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("fd00::3")})

# As protobuf's JSON may have a number.
QUOTED = '"81"'


@pytest.fixture
def bootstrap(tmp_path: Path) -> Path:
    return tmp_path / "envoy.yaml"


def _read(path: Path, text: str) -> EnvoyConfig:
    path.write_text(text)
    return envoy.read_bootstrap(str(path))


def _derive(path: Path, text: str, **parties: int) -> Derivation:
    who = Parties(addresses=HERE, **parties)  # type: ignore[arg-type]
    return derive.derive(_read(path, text), who)


def _lines(found: Derivation) -> list[str]:
    return [rule.text for rule in found.policy.rules]


def _left(found: Derivation) -> dict[str, str]:
    return {left.what: left.why for left in found.left}


def _listener(body: str) -> str:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return f"static_resources:\n  listeners:\n  - name: in\n{indented}\n"


def _cluster(body: str) -> str:
    return _listener(body).replace("listeners", "clusters").replace("in\n", "up\n", 1)


def _socket(host: str, port: object) -> str:
    return f"{{socket_address: {{address: '{host}', port_value: {port}}}}}"


@pytest.mark.parametrize(
    ("host", "net"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("10.200.0.1", "10.200.0.1:80"),
        ("0.0.0.0", "*:80"),
        ("::", "*:80"),
        ("::1", "[::1]:80"),
        ("::ffff:127.0.0.1", "127.0.0.1:80"),
    ],
)
def test_a_listener(host: str, net: str, bootstrap: Path) -> None:
    found = _derive(bootstrap, _listener(f"address: {_socket(host, 80)}"))
    assert _lines(found) == [
        f"allow role=acceptor local={net} program=envoy",
        f"allow role=connector peer={net}",
    ]
    assert not found.left
    assert {rule.why for rule in found.policy.rules} == {"listener in"}


def test_users_are_named_where_they_are_known(bootstrap: Path) -> None:
    text = _listener(f"address: {_socket('::', 80)}")
    found = _derive(bootstrap, text, envoy_uid=1337, service_uid=1000)
    assert _lines(found) == [
        "allow role=acceptor local=*:80 uid=1000 program=envoy",
        "allow role=connector peer=*:80 uid=1337",
    ]


def test_more_addresses_of_a_listener(bootstrap: Path) -> None:
    found = _derive(
        bootstrap,
        _listener(
            f"address: {_socket('127.0.0.1', 80)}\n"
            "additionalAddresses:\n"
            f"- address: {_socket('127.0.0.1', QUOTED)}\n"
            "- address: {pipe: {path: /run/x}}\n"
        ),
    )
    assert [line for line in _lines(found) if "acceptor" in line] == [
        "allow role=acceptor local=127.0.0.1:80 program=envoy",
        "allow role=acceptor local=127.0.0.1:81 program=envoy",
    ]
    assert _left(found) == {"listener in, /run/x": "a Unix socket is not TCP"}


@pytest.mark.parametrize(
    "how",
    [
        "use_original_dst: true",
        "useOriginalDst: true",
        "listener_filters: [{name: envoy.filters.listener.original_dst}]",
        "listener_filters: [{name: x, typed_config: {'@type': type.googleapis.com/"
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}]",
    ],
)
def test_a_listener_of_redirected_connections(how: str, bootstrap: Path) -> None:
    text = _listener(f"{how}\naddress: {_socket('0.0.0.0', 15001)}")
    assert _lines(_derive(bootstrap, text, envoy_uid=1337)) == [
        "allow role=acceptor local=*:15001 program=envoy",
        "allow role=connector via=*:15001 uid=1337",
    ]
    found = _derive(bootstrap, text)
    assert _lines(found)[1] == "allow role=connector via=*:15001"
    assert any("--envoy-uid" in why for why in _left(found).values())


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("address: {pipe: {path: /run/x}}", "Unix socket"),
        (
            "address: {envoy_internal_address: {server_listener_name: x}}",
            "inside Envoy",
        ),
        (f"internal_listener: {{}}\naddress: {_socket('::1', 1)}", "internal listener"),
        (f"api_listener: {{}}\naddress: {_socket('::1', 1)}", "no socket"),
        (f"bind_to_port: false\naddress: {_socket('::1', 1)}", "not bound"),
        (f"address: {_socket('::1', 0)}", "--envoy-admin"),
        (
            "address: {socket_address: {protocol: UDP, address: '::', port_value: 1}}",
            "not TCP",
        ),
        (f"address: {_socket('some.host', 1)}", "a name is not resolved"),
    ],
)
def test_listeners_without_a_rule(body: str, why: str, bootstrap: Path) -> None:
    found = _derive(bootstrap, _listener(body))
    assert _lines(found) == []
    (left,) = found.left
    assert left.what.startswith("listener in")
    assert why in left.why


ENDPOINTS = (
    "load_assignment: {{endpoints: [{{lb_endpoints: "
    "[{{endpoint: {{address: {}}}}}]}}]}}",
    "loadAssignment: {{endpoints: [{{lbEndpoints: [{{endpoint: {{address: {}}}}}]}}]}}",
    "load_assignment: {{endpoints: [{{load_balancer_endpoints: {{lb_endpoints: "
    "[{{endpoint: {{address: {}}}}}]}}}}]}}",
    "load_assignment: {{named_endpoints: {{a: {{address: {}}}}}}}",
    "load_assignment: {{endpoints: [{{lb_endpoints: [{{endpoint: "
    "{{additional_addresses: [{{address: {}}}]}}}}]}}]}}",
)


@pytest.mark.parametrize("form", ENDPOINTS)
@pytest.mark.parametrize(
    ("host", "nets"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("127.7.7.7", ["127.7.7.7"]),
        ("10.1.2.3", ["10.1.2.3"]),
        ("fd00::3", ["[fd00::3]"]),
        ("localhost", ["127.0.0.1", "[::1]"]),
    ],
)
def test_endpoints_of_this_host(
    form: str, host: str, nets: list[str], bootstrap: Path
) -> None:
    found = _derive(bootstrap, _cluster(form.format(_socket(host, 8080))))
    assert _lines(found) == [
        line
        for net in nets
        for line in (
            f"allow role=connector peer={net}:8080 program=envoy",
            f"allow role=acceptor local={net}:8080",
        )
    ]
    assert not found.left


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (_socket("10.1.2.4", 80), "not an address of this host"),
        (_socket("service.local", 80), "--envoy-admin"),
        ("{pipe: {path: '@x'}}", "Unix socket"),
        ("{envoy_internal_address: {server_listener_name: x}}", "inside Envoy"),
    ],
)
def test_endpoints_without_a_rule(address: str, why: str, bootstrap: Path) -> None:
    found = _derive(bootstrap, _cluster(ENDPOINTS[0].format(address)))
    assert _lines(found) == []
    (left,) = found.left
    assert why in left.why


@pytest.mark.parametrize("kind", ["ORIGINAL_DST", "4"])
def test_a_cluster_of_original_destinations(kind: str, bootstrap: Path) -> None:
    text = _cluster(f"type: {kind}")
    assert _lines(_derive(bootstrap, text, envoy_uid=1337)) == [
        "allow role=connector peer=127.0.0.0/8 program=envoy",
        "allow role=connector peer=[::1] program=envoy",
        "allow role=connector peer=10.1.2.3 program=envoy",
        "allow role=connector peer=[fd00::3] program=envoy",
        "allow role=acceptor uid=1337",
    ]
    found = _derive(bootstrap, text)
    assert not any("acceptor" in line for line in _lines(found))
    assert any("--envoy-uid" in why for why in _left(found).values())


def test_the_admin_interface_comes_first(bootstrap: Path) -> None:
    text = _cluster(ENDPOINTS[0].format(_socket("127.0.0.1", 9901)))
    text += f"admin: {{address: {_socket('0.0.0.0', 9901)}}}\n"
    assert _lines(_derive(bootstrap, text))[0] == "deny to=*:9901"


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "envoy.json"
    address = {"socketAddress": {"address": "127.0.0.1", "portValue": 80}}
    document = {"staticResources": {"listeners": [{"name": "in", "address": address}]}}
    text = json.dumps(document, indent="\t")
    assert "\t" in text
    assert len(_lines(_derive(path, text))) == 2


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("static_resources:\n  listeners: 7\n", 2, "listeners: a list is expected"),
        (_listener("address: 7"), 4, "listeners.[0].address: a mapping"),
        (_listener("address:\n  socket_address: {port_value: 1}"), 5, "is missing"),
        (_listener(f"address: {_socket('::1', 65536)}"), 4, "'65536' is not a number"),
        (_listener(f"address: {_socket('::1', 'http')}"), 4, "'http' is not a number"),
        (_listener("use_original_dst: maybe"), 4, "neither true nor false"),
        (
            _listener("address: {socket_address: {address: '::', named_port: http}}"),
            4,
            "named_port is not read",
        ),
        (_cluster("load_assignment: {endpoints: {a: b}}"), 4, "a list is expected"),
        ("a: 1\n", 1, "no Envoy bootstrap"),
        ("admin:\n  <<: {a: b}\n", 2, "merge keys"),
        ("admin: {address\n", 2, "not YAML"),
    ],
)
def test_errors_name_the_place(
    text: str, line: int, message: str, bootstrap: Path
) -> None:
    with pytest.raises(PolicyError) as caught:
        _derive(bootstrap, text)
    assert str(caught.value).startswith(f"{bootstrap}:{line}: ")
    assert message in str(caught.value)


@given(name=st.text(), program=st.sampled_from(["envoy", "e\xfcvoy"]))
def test_any_name_makes_a_file_that_is_read(name: str, program: str) -> None:
    fields = (("port", "80"), ("program", program))
    check(Policy((Rule("allow", fields, f"listener {name}"),)).text(), "made")
