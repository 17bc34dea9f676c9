# SPDX-License-Identifier: Apache-2.0
"""A pod in Istio's shape: redirection, two users, namespaces of their own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kmap import procfs
from kmap.demo import programs
from kmap.results import CannotRun
from tests.cli.peers import kmap, kmap_json, wait_until
from tests.istio import pod as shape
from tests.istio.pod import Namespaces, Pod, Spawn

COUNT = 60
SIZES = (100, 40_000)
TARGETS = {f"{shape.VIP}:{shape.VIP_PORT}", f"[{shape.VIP6}]:{shape.VIP_PORT}"}
ARRIVALS = {f"127.0.0.1:{shape.OUTBOUND}", f"[::1]:{shape.OUTBOUND}"}


@pytest.fixture(scope="module")
def names() -> Iterator[Namespaces]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces and other users need root")
    for tool, package in (("iptables", "iptables"), ("ip", "iproute2")):
        if programs.find_path(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {package}")
    try:
        programs.find_envoy()
    except CannotRun as error:
        pytest.skip(str(error))
    with shape.namespaces() as found:
        yield found


@pytest.fixture
def pod(spawn: Spawn, names: Namespaces) -> Iterator[Pod]:
    directory = Path(tempfile.mkdtemp(prefix="kmap-istio-"))
    directory.chmod(0o755)
    try:
        yield Pod(spawn, names, directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def policy(pod: Pod, kernel_env: dict[str, str]) -> Path:
    """The file that both containers share, made where neither is."""
    rules = pod.directory / "hops.rules"
    done = kmap(
        *("policy", "--envoy-config", pod.config, "-o", rules),
        *("--envoy-uid", shape.ENVOY_UID, "--service-uid", shape.APP_UID),
        *("--local-address", shape.POD),
        env=kernel_env,
    )
    assert done.returncode == 0, done.stderr
    return rules


class Traffic:
    """Calls both ways through the pod, on connections that stay open."""

    def __init__(
        self, pod: Pod, *, app_env: dict[str, str], envoy_env: dict[str, str]
    ) -> None:
        self.services = [
            pod.http_end(address, shape.VIP_PORT, outside=True)
            for address in (shape.VIP, shape.VIP6)
        ]
        self.caller = pod.http_end(shape.OUTSIDE, 8081, outside=True)
        self.envoy = pod.envoy(envoy_env)
        self.app = pod.http_end(
            "0.0.0.0", shape.APP_PORT, env=app_env, uid=shape.APP_UID
        )
        for size in SIZES:
            for address in (shape.VIP, shape.VIP6):
                out = self.app.call(address, shape.VIP_PORT, COUNT, size)
                assert out == f"{COUNT} right"
            into = self.caller.call(shape.POD, shape.APP_PORT, COUNT, size)
            assert into == f"{COUNT} right"

    def pids(self, of: str) -> list[int]:
        """Of the application or of Envoy, as this PID namespace knows them."""
        process = self.envoy if of == "envoy" else self.app.process
        return procfs.descendants(process.pid)

    def ends(self, env: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
        """The ends of each hop that the pod has."""
        rows = kmap_json("ss", "-a", env=env)["connections"]
        app, envoy = set(self.pids("app")), set(self.pids("envoy"))
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            local, peer = row["local"], row["peer"]
            if row["pid"] in app:
                hop = "app to envoy" if peer in TARGETS else "app from envoy"
            elif row["pid"] in envoy:
                hop = (
                    "envoy from app"
                    if local.endswith(f":{shape.OUTBOUND}")
                    else "envoy to app"
                    if local.startswith(f"{shape.INBOUND_SOURCE}:")
                    else "envoy and outside"
                )
            else:
                continue
            found.setdefault(hop, []).append(row)
        return found

    def finish(self) -> None:
        """The programs end well."""
        for end in (self.app, self.caller, *self.services):
            assert end.finish() == 0


def _ways(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["state"], row["reason"]) for row in rows}


RING = {("ring", "")}


def test_both_hops_are_upgraded(
    pod: Pod, policy: Path, kernel_env: dict[str, str]
) -> None:
    env = pod.environment(policy)
    traffic = Traffic(pod, app_env=env, envoy_env=env)
    ends = traffic.ends(kernel_env)
    # The hop that leaves the pod is the kernel's.
    outside = ends.pop("envoy and outside")
    assert {row["state"] for row in outside} == {"kernel"}
    assert {hop: _ways(rows) for hop, rows in ends.items()} == {
        "app to envoy": RING,
        "envoy from app": RING,
        "envoy to app": RING,
        "app from envoy": RING,
    }
    assert {row["role"] for row in ends["app to envoy"]} == {"connector"}
    assert {row["peer"] for row in ends["app to envoy"]} == TARGETS
    assert {row["role"] for row in ends["envoy from app"]} == {"acceptor"}
    assert {row["local"] for row in ends["envoy from app"]} == ARRIVALS
    assert {row["original_dst"] for row in ends["envoy from app"]} == TARGETS
    targets = {row["local"]: row["peer"] for row in ends["app to envoy"]}
    for row in ends["envoy from app"]:
        assert row["original_dst"] == targets[row["peer"]]
    for row in ends["envoy to app"]:
        assert (row["role"], row["peer"]) == (
            "connector",
            f"{shape.POD}:{shape.APP_PORT}",
        )
        assert row["original_dst"] is None
    # All of the application's bytes are accounted for, and most went by ring.
    sent = sum(r["ring_tx_bytes"] + r["kernel_tx_bytes"] for r in ends["app to envoy"])
    got = sum(r["ring_rx_bytes"] + r["kernel_rx_bytes"] for r in ends["envoy from app"])
    assert sent == got > COUNT * sum(SIZES) * len(TARGETS)
    ring = sum(r["ring_tx_bytes"] for r in ends["app to envoy"])
    assert ring > sent * 0.8
    traffic.finish()


@pytest.mark.parametrize("without", ["app", "envoy"])
def test_without_kmap_in_one_of_them(
    without: str, pod: Pod, policy: Path, kernel_env: dict[str, str]
) -> None:
    env = pod.environment(policy)
    traffic = Traffic(
        pod,
        app_env={} if without == "app" else env,
        envoy_env={} if without == "envoy" else env,
    )
    ends = traffic.ends(kernel_env)
    assert {hop for hop in ends if hop != "envoy and outside"} == (
        {"envoy from app", "envoy to app"}
        if without == "app"
        else {"app to envoy", "app from envoy"}
    )
    assert _ways(ends.pop("envoy and outside", [])) <= {("kernel", "peer-remote")}
    for hop, rows in ends.items():
        assert _ways(rows) == {("kernel", "peer-absent")}, hop
    traffic.finish()


def test_without_a_policy_the_redirected_hop_is_not_believed(
    pod: Pod, kernel_env: dict[str, str]
) -> None:
    env = pod.environment(None)
    traffic = Traffic(pod, app_env=env, envoy_env=env)
    ends = traffic.ends(kernel_env)
    assert _ways(ends["app to envoy"]) == {("kernel", "peer-uid")}
    assert _ways(ends["envoy from app"]) == {("kernel", "peer-uid")}
    assert _ways(ends["envoy to app"]) == _ways(ends["app from envoy"]) == RING
    traffic.finish()


def test_another_user_than_the_one_named(
    pod: Pod, policy: Path, kernel_env: dict[str, str]
) -> None:
    rules = policy.read_text()
    for uid in (shape.ENVOY_UID, shape.APP_UID):
        rules = rules.replace(f"uid={uid}", "uid=4242")
    policy.write_text(rules)
    env = pod.environment(policy)
    traffic = Traffic(pod, app_env=env, envoy_env=env)
    ends = traffic.ends(kernel_env)
    for hop, rows in ends.items():
        if hop != "envoy and outside":
            assert _ways(rows) == {("kernel", "policy")}, hop
    traffic.finish()


def test_envoy_killed_is_seen_by_the_application(
    pod: Pod, policy: Path, kernel_env: dict[str, str]
) -> None:
    env = pod.environment(policy)
    traffic = Traffic(pod, app_env=env, envoy_env=env)
    assert _ways(traffic.ends(kernel_env)["app to envoy"]) == RING
    assert traffic.app.call("again", 0, COUNT, SIZES[1]) == f"{COUNT} right"
    (envoy,) = (pid for pid in traffic.pids("envoy") if procfs.comm(pid) == "envoy")
    os.kill(envoy, signal.SIGKILL)
    wait_until(lambda: not procfs.exists(envoy), "Envoy to be gone")
    # A new connection finds nobody, and the old ones are over.
    said = traffic.app.call(shape.VIP, shape.VIP_PORT, 1, 10)
    assert said.startswith("ConnectionRefusedError")
    for number in range(len(SIZES) * len(TARGETS)):
        said = traffic.app.call("again", number, 1, 10)
        assert said.split(":")[0] in (
            "RemoteDisconnected",
            "ConnectionResetError",
            "BrokenPipeError",
        )
    traffic.finish()
