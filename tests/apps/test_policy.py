# SPDX-License-Identifier: Apache-2.0
"""A policy from the settings of a real Envoy, and what becomes of whose connections."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmap.demo import programs
from kmap.results import CannotRun
from tests.apps.process import Launch, Ports, Program, python
from tests.cli.peers import kmap, kmap_json

RING = ("ring", "")
POLICY = ("kernel", "policy")
_TEXT = "hello, world"
# One that keeps the admin interface's connection open.
_ADMIN_TEXT = r"GET /ready HTTP/1.1\r\nHost: admin\r\n\r\n"


@pytest.fixture(scope="module")
def envoy_path() -> str:
    try:
        return programs.find_envoy().path
    except CannotRun as error:
        pytest.skip(str(error))


def _address(port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _proxy(name: str, port: int, cluster: str) -> dict[str, Any]:
    kind = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    proxy = {"@type": kind, "stat_prefix": name, "cluster": cluster}
    filters = [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]
    return {
        "name": name,
        "address": _address(port),
        "filter_chains": [{"filters": filters}],
    }


def _cluster(
    name: str, endpoint: Mapping[str, Any], kind: str = "STATIC"
) -> dict[str, Any]:
    return {
        "name": name,
        "type": kind,
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": endpoint}}]}],
        },
    }


def _bootstrap(admin: int, **resources: Any) -> dict[str, Any]:
    return {
        "node": {"id": "test", "cluster": "test"},
        "admin": {"address": _address(admin)},
        **resources,
    }


def _one_service(directory: Path, admin: int, inbound: int, served: int) -> Path:
    """The settings of an Envoy before one service, in a file."""
    config = directory / "envoy.json"
    resources = {
        "listeners": [_proxy("inbound", inbound, "service")],
        "clusters": [_cluster("service", _address(served))],
    }
    config.write_text(json.dumps(_bootstrap(admin, static_resources=resources)))
    return config


def _start_envoy(
    launch: Launch, path: str, config: Path, port: int, env: Mapping[str, str]
) -> Program:
    envoy = launch(
        [
            path,
            "-c",
            config,
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "warning",
        ],
        env=env,
    )
    envoy.wait_listening(port)
    return envoy


def _talk(launch: Launch, env: Mapping[str, str], text: str, *ports: int) -> Program:
    talker = launch(python("talk", text, *ports), env=env)
    talker.wait_line(len(ports))
    return talker


def _ways(port: int, env: Mapping[str, str]) -> list[tuple[str, str]]:
    """The states of both ends of all connections to the port."""
    found = kmap_json("ss", "-a", env=env)["connections"]
    return sorted(
        (row["state"], row["reason"])
        for row in found
        if f":{port}" in (row["local"][-6:], row["peer"][-6:])
    )


@pytest.mark.parametrize("source", ["--policy", "--envoy-config", "--envoy-admin"])
def test_only_the_sidecars_hops_are_upgraded(
    source: str,
    launch: Launch,
    ports: Ports,
    envoy_path: str,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
    public_path: Path,
) -> None:
    admin, inbound, served, other = (ports.take() for _ in range(4))
    config = _one_service(public_path, admin, inbound, served)
    rules = public_path / "hops.rules"
    if source == "--envoy-admin":
        plain = _start_envoy(launch, envoy_path, config, inbound, kernel_env)
        value = f"http://127.0.0.1:{admin}"
        made = kmap("policy", source, value, "-o", rules, env=kernel_env)
        plain.stop()
    else:
        made = kmap("policy", "--envoy-config", config, "-o", rules, env=kernel_env)
    assert made.returncode == 0, made.stderr
    env = {**kmap_env, "KMAP_POLICY": str(rules)}
    if source == "--envoy-config":
        command = ("sh", "-c", 'printf %s "$KMAP_POLICY"')
        done = kmap("run", source, config, "--", *command, env=kernel_env)
        env["KMAP_POLICY"] = done.stdout
    service = launch(python("echo_ports", served, other), env=env)
    service.wait_line()
    envoy = _start_envoy(launch, envoy_path, config, inbound, env)
    caller = _talk(launch, env, _TEXT, inbound)
    stranger = _talk(launch, env, _TEXT, other, served)
    curious = _talk(launch, env, _ADMIN_TEXT, admin)

    assert _ways(inbound, kernel_env) == [RING, RING]
    # Envoy's connection to the service, and the stranger's, who is no Envoy.
    assert _ways(served, kernel_env) == [POLICY, POLICY, RING, RING]
    assert _ways(other, kernel_env) == [POLICY, POLICY]
    assert _ways(admin, kernel_env) == [POLICY, POLICY]

    # Without the rules all of them would be upgraded: the test can fail.
    assert caller.wait_line(1) == f"{inbound} {100 * len(_TEXT)}"
    for program in (caller, stranger, curious, service):
        program.finish()
    envoy.stop()


def test_without_a_policy_all_of_them_are(
    launch: Launch,
    ports: Ports,
    envoy_path: str,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
    public_path: Path,
) -> None:
    """Vouches for the test above."""
    admin, inbound, served, other = (ports.take() for _ in range(4))
    config = _one_service(public_path, admin, inbound, served)
    service = launch(python("echo_ports", served, other), env=kmap_env)
    service.wait_line()
    envoy = _start_envoy(launch, envoy_path, config, inbound, kmap_env)
    talkers = [
        _talk(launch, kmap_env, _TEXT, inbound, other, served),
        _talk(launch, kmap_env, _ADMIN_TEXT, admin),
    ]
    for port, ends in ((inbound, 2), (other, 2), (served, 4), (admin, 2)):
        assert _ways(port, kernel_env) == [RING] * ends
    for program in (*talkers, service):
        program.finish()
    envoy.stop()


def test_what_came_by_xds(
    launch: Launch,
    ports: Ports,
    envoy_path: str,
    kernel_env: dict[str, str],
    public_path: Path,
) -> None:
    admin, static, dynamic, served = (ports.take() for _ in range(4))
    types = "type.googleapis.com/envoy.config"
    original_dst = {
        "name": "envoy.filters.listener.original_dst",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener."
            "original_dst.v3.OriginalDst"
        },
    }
    found = {
        "lds": [
            {
                "@type": f"{types}.listener.v3.Listener",
                **_proxy("dynamic", dynamic, "local"),
                "listener_filters": [original_dst],
            },
            {
                "@type": f"{types}.listener.v3.Listener",
                **_proxy("any-port", 0, "local"),
            },
        ],
        "cds": [
            {
                "@type": f"{types}.cluster.v3.Cluster",
                **_cluster("local", _address(served, "localhost"), "STRICT_DNS"),
                "dns_lookup_family": "V4_ONLY",
            },
            {
                "@type": f"{types}.cluster.v3.Cluster",
                **_cluster("far", _address(80, "192.0.2.1")),
            },
            {
                "@type": f"{types}.cluster.v3.Cluster",
                "name": "original",
                "type": "ORIGINAL_DST",
                "lb_policy": "CLUSTER_PROVIDED",
            },
        ],
    }
    for name, resources in found.items():
        document = {"version_info": "1", "resources": resources}
        (public_path / f"{name}.json").write_text(json.dumps(document))
    sources = {
        f"{name}_config": {
            "resource_api_version": "V3",
            "path_config_source": {"path": str(public_path / f"{name}.json")},
        }
        for name in found
    }
    config = public_path / "envoy.json"
    config.write_text(
        json.dumps(
            _bootstrap(
                admin,
                dynamic_resources=sources,
                static_resources={"listeners": [_proxy("static", static, "local")]},
            )
        )
    )
    envoy = _start_envoy(launch, envoy_path, config, dynamic, kernel_env)
    document = kmap_json(
        "policy",
        "--envoy-admin",
        f"http://127.0.0.1:{admin}",
        "--local-address",
        "10.9.8.7",
        env=kernel_env,
    )
    uid = os.geteuid()
    by_why: dict[str, list[str]] = {}
    for rule in document["rules"]:
        by_why.setdefault(rule["why"], []).append(rule["rule"])
    assert by_why.pop("the admin interface") == [f"deny to=127.0.0.1:{admin}"]
    assert by_why.pop("listener static") == [
        f"allow role=acceptor local=127.0.0.1:{static} program=envoy",
        f"allow role=connector peer=127.0.0.1:{static} uid={uid}",
    ]
    assert by_why.pop("listener dynamic") == [
        f"allow role=acceptor local=127.0.0.1:{dynamic} program=envoy"
    ]
    assert by_why.pop("listener dynamic, for connections redirected to it") == [
        f"allow role=connector via=127.0.0.1:{dynamic} uid={uid}"
    ]
    # The port that the kernel chose.
    chosen = by_why.pop("listener any-port")
    assert len(chosen) == 2
    assert chosen[0].split(":")[1].split()[0] not in ("0", str(static), str(dynamic))
    assert by_why.pop("cluster local") == [
        f"allow role=connector peer=127.0.0.1:{served} program=envoy",
        f"allow role=acceptor local=127.0.0.1:{served} uid={uid}",
    ]
    (original,) = by_why.values()
    assert original == [
        "allow role=connector peer=127.0.0.0/8 program=envoy",
        "allow role=connector peer=[::1] program=envoy",
        "allow role=connector peer=10.9.8.7 program=envoy",
        f"allow role=acceptor uid={uid}",
    ]
    assert document["without_rule"] == [
        {"what": "cluster far, 192.0.2.1:80", "why": "not an address of this host"}
    ]
    # The file alone has none of this, and says so.
    alone = kmap_json("policy", "--envoy-config", config, env=kernel_env)
    assert {rule["why"] for rule in alone["rules"]} == {
        "the admin interface",
        "listener static",
    }
    assert [left["what"] for left in alone["without_rule"]] == [
        "listeners and clusters by xDS"
    ]
    envoy.stop()
