# SPDX-License-Identifier: Apache-2.0
"""Rules and real connections: what they keep on the kernel, and at whose word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.peers import KMAP, Peers, Spawn, kmap, kmap_json, python, start

UID = os.geteuid()
PROGRAM = os.path.basename(os.path.realpath(sys.executable))


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    return tmp_path / "some.rules"


def _ends(peers: Peers, env: dict[str, str]) -> dict[str, Any]:
    names = {peers.server.pid: "server", peers.client.pid: "client"}
    return {
        names[row["pid"]]: row
        for row in kmap_json("ss", "-a", env=env)["connections"]
        if row["pid"] in names
    }


def _states(peers: Peers, env: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {
        name: (row["state"], row["reason"]) for name, row in _ends(peers, env).items()
    }


RING = ("ring", "")
POLICY = ("kernel", "policy")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default allow", RING),
        ("allow to=127.0.0.0/8", RING),
        (f"allow role=connector program={PROGRAM}\nallow role=acceptor", RING),
        (f"allow uid={UID}", RING),
        ("deny uid=77\ndefault allow", RING),
        ("", POLICY),
        ("deny to=127.0.0.1\ndefault allow", POLICY),
        ("allow program=envoy", POLICY),
        ("allow via=*", POLICY),
        ("allow to=[::1]", POLICY),
    ],
)
def test_a_file_that_both_ends_share(
    text: str,
    expected: tuple[str, str],
    spawn: Spawn,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
    rules_file: Path,
) -> None:
    rules_file.write_text(text)
    env = {**kmap_env, "KMAP_POLICY": str(rules_file)}
    peers = start(spawn, env, env, rounds=100)
    # A connector that waits for what only the hello tells looks for it in vain, when
    # the acceptor knows enough to stay away.
    states = _states(peers, kernel_env)
    assert states["server"] == expected
    if "via" not in text:
        assert states["client"] == expected
    assert peers.finish() == (0, 0)


@pytest.mark.parametrize("who", ["server", "client"])
@pytest.mark.parametrize(
    "text",
    [
        "deny to=127.0.0.1\ndefault allow",
        # Known only when the two have met.
        f"deny uid={UID}\ndefault allow",
    ],
)
def test_either_end_can_refuse(
    who: str,
    text: str,
    spawn: Spawn,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
) -> None:
    refusing = {**kmap_env, "KMAP_POLICY": f"rules:{text}"}
    envs = [refusing if name == who else kmap_env for name in ("server", "client")]
    peers = start(spawn, *envs, rounds=100)
    states = _states(peers, kernel_env)
    # The other end was told, or kmap ss finds it out.
    assert states == {"server": POLICY, "client": POLICY}
    ends = _ends(peers, kernel_env)
    assert [row["ring_rx_bytes"] for row in ends.values()] == [0, 0]
    assert peers.finish() == (0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow port=80\nalow\n", "line 2: alow: a line begins with"),
        (None, "there is no such file"),
    ],
)
def test_a_broken_policy_is_one_line_and_the_kernel(
    text: str | None,
    message: str,
    spawn: Spawn,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
    rules_file: Path,
) -> None:
    if text is not None:
        rules_file.write_text(text)
    env = {**kmap_env, "KMAP_POLICY": str(rules_file)}
    done = subprocess.run(["true"], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"kmap: KMAP_POLICY={rules_file}: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    peers = start(spawn, env, kmap_env, rounds=100)
    assert _states(peers, kernel_env)["server"] == POLICY
    assert peers.finish() == (0, 0)


def test_a_file_is_read_at_the_start(
    spawn: Spawn,
    kmap_env: dict[str, str],
    kernel_env: dict[str, str],
    rules_file: Path,
) -> None:
    rules_file.write_text("default allow")
    env = {**kmap_env, "KMAP_POLICY": str(rules_file)}
    server = spawn(python("echo_server"), env=env, stdout=subprocess.PIPE)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    rules_file.unlink()
    client = spawn(
        python("echo_client", port, 100, 100),
        env=kmap_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    peers = Peers(server, client, port)
    assert _states(peers, kernel_env) == {"server": RING, "client": RING}
    assert peers.finish() == (0, 0)


# -- kmap run


def _policy_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_run_takes_a_file_by_its_path(
    kernel_env: dict[str, str], rules_file: Path
) -> None:
    rules_file.write_text("allow port=80\n")
    command = ("--", "sh", "-c", 'printf %s "$KMAP_POLICY"')
    name = os.path.relpath(rules_file)
    done = kmap("run", "--policy", name, *command, env=kernel_env)
    assert _policy_of(done) == str(rules_file)


def test_run_puts_what_it_made_into_the_environment(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    yaml = tmp_path / "rules.yaml"
    yaml.write_text("rules: [allow: {port: 80}]")
    command = ("--", "sh", "-c", 'printf %s "$KMAP_POLICY"')
    done = kmap("run", "--policy", yaml, *command, env=kernel_env)
    assert _policy_of(done) == "rules:allow port=80\ndefault deny\n"
    bootstrap = tmp_path / "envoy.json"
    address = {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}
    bootstrap.write_text(json.dumps({"admin": {"address": address}}))
    done = kmap("run", "--envoy-config", bootstrap, *command, env=kernel_env)
    assert _policy_of(done) == "rules:deny to=127.0.0.1:9901\ndefault deny\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--policy", "{dir}/bad.rules"), 2, "bad.rules:2: alow: a line begins"),
        (("--policy", "{dir}/none.rules"), 2, "none.rules: No such file"),
        (("--envoy-config", "{dir}/bad.rules"), 2, "bad.rules:"),
        (("--envoy-admin", "ftp://x"), 2, "http://127.0.0.1:9901"),
        (("--envoy-admin", "http://127.0.0.1:1"), 77, "nothing answers at"),
        (("--policy", "x", "--envoy-config", "y"), 2, "not allowed with"),
        (
            ("--envoy-config", "{dir}/x", "--envoy-uid", "root"),
            2,
            "id -u NAME",
        ),
    ],
)
def test_run_refuses_what_is_wrong(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    kernel_env: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "bad.rules").write_text("allow port=80\nalow\n")
    done = subprocess.run(
        [*KMAP, "run", *(a.format(dir=tmp_path) for a in arguments), "--", "echo", "x"],
        env=kernel_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
