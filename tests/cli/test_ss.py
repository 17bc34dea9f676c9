# SPDX-License-Identifier: Apache-2.0
"""kmap ss and kmap stats, on real connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import Any

import pytest

from kmap import procfs
from kmap.procfs import parse_tcp
from tests.cli.peers import (
    KMAP,
    Peers,
    Spawn,
    kmap,
    kmap_json,
    python,
    start,
    wait_until,
)

ROW_FIELDS = {
    "pid",
    "comm",
    "fd",
    "role",
    "local",
    "peer",
    "original_dst",
    "state",
    "transport",
    "reason",
    "ring_rx_bytes",
    "ring_tx_bytes",
    "kernel_rx_bytes",
    "kernel_tx_bytes",
    "rx_queued",
    "tx_queued",
    "ring_size",
}


def ends(peers: Peers, *options: str, env: dict[str, str]) -> dict[str, Any]:
    """The rows of the two processes, by "server" and "client"."""
    document = kmap_json("ss", *options, env=env)
    assert (document["schema"], document["ok"]) == ("kmap.ss/1", True)
    names = {peers.server.pid: "server", peers.client.pid: "client"}
    found: dict[str, Any] = {}
    for row in document["connections"]:
        assert set(row) == ROW_FIELDS
        if name := names.get(row["pid"]):
            assert name not in found, "one connection has one row at each end"
            found[name] = row
    return found


def test_a_ring_has_a_row_at_each_end(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env, rounds=200, size=1000)
    found = ends(peers, env=kernel_env)
    server, client = found["server"], found["client"]
    assert server["local"] == client["peer"] == f"127.0.0.1:{peers.port}"
    assert server["peer"] == client["local"]
    for row in (server, client):
        assert (row["state"], row["transport"]) == ("ring", "shm")
        assert row["reason"] == ""
        assert row["original_dst"] is None
        assert row["rx_queued"] == row["tx_queued"] == 0
        assert row["ring_size"] >= 4096
        # Every byte is counted on one path or the other, and most by the ring.
        assert row["ring_rx_bytes"] + row["kernel_rx_bytes"] == 200_000
        assert row["ring_tx_bytes"] + row["kernel_tx_bytes"] == 200_000
        assert row["ring_rx_bytes"] > 100_000
    assert (server["role"], client["role"]) == ("acceptor", "connector")

    table = kmap("ss", env=kernel_env)
    assert table.returncode == 0
    lines = [line for line in table.stdout.splitlines() if f":{peers.port} " in line]
    assert len(lines) == 2
    assert all(line.startswith("ring ") for line in lines)
    assert peers.finish() == (0, 0)
    assert not ends(peers, env=kernel_env)


def test_bytes_that_wait_are_shown(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    # The server echoes what arrives, and the client reads none of it.
    assert peers.tell("more 5000") == "sent"
    wait_until(
        lambda: ends(peers, env=kernel_env)["client"]["rx_queued"] == 5000,
        "the echo waits at the client",
    )
    found = ends(peers, env=kernel_env)
    assert found["server"]["tx_queued"] == 5000
    assert found["server"]["rx_queued"] == found["client"]["tx_queued"] == 0


def test_why_not_is_shown(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    one_sided = start(spawn, kernel_env, kmap_env)
    assert not ends(one_sided, env=kernel_env)
    row = ends(one_sided, "-a", env=kernel_env)["client"]
    assert (row["state"], row["reason"]) == ("kernel", "peer-absent")
    assert (row["transport"], row["role"]) == (None, "connector")
    assert row["local"].startswith("127.0.0.1:")
    assert row["peer"] == f"127.0.0.1:{one_sided.port}"

    cold = start(spawn, kmap_env, kmap_env, rounds=0)
    wait_until(lambda: len(ends(cold, "-a", env=kernel_env)) == 2, "it is accepted")
    found = ends(cold, "-a", env=kernel_env)
    assert {row["reason"] for row in found.values()} == {"not-hot"}
    assert {row["state"] for row in found.values()} == {"kernel"}

    # A listener that never accepts: its process is what counts.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = spawn(
            python("echo_client", listener.getsockname()[1], 0, 0),
            env=kmap_env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        row = ends(Peers(client, client, 0), "-a", env=kernel_env)["client"]
        assert row["reason"] == "peer-absent"

    disabled = start(spawn, {**kmap_env, "KMAP_DISABLE": "1"}, kmap_env)
    found = ends(disabled, "-a", env=kernel_env)
    assert found["server"]["reason"] == "disabled"
    assert found["client"]["reason"] == "peer-absent"


def test_watch_has_no_json(kernel_env: dict[str, str]) -> None:
    done = kmap("ss", "--watch", "--json", env=kernel_env)
    assert done.returncode == 2
    assert json.loads(done.stdout)["ok"] is False


def test_filters_choose(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    one = start(spawn, kmap_env, kmap_env)
    two = start(spawn, kernel_env, kmap_env)

    def shown(*arguments: object) -> set[int]:
        rows = kmap_json("ss", *arguments, env=kernel_env)["connections"]
        ours = {one.server.pid, one.client.pid, two.client.pid}
        return {row["pid"] for row in rows} & ours

    ring = {one.server.pid, one.client.pid}
    assert shown() == shown("--state", "ring") == ring
    assert shown("--state", "kernel") == {two.client.pid}
    assert shown("-a", "--pid", one.client.pid, "--pid", two.client.pid) == {
        one.client.pid,
        two.client.pid,
    }
    assert shown("--port", one.port) == ring
    assert shown("--sport", one.port) == {one.server.pid}
    assert shown("--dport", one.port) == {one.client.pid}
    assert shown("-a", "--comm", "no such program") == set()
    assert shown("reason", "peer-absent") == {two.client.pid}
    assert shown("-a", f"( port = :{two.port} or sport = :{one.port} )") == {
        one.server.pid,
        two.client.pid,
    }
    # Options and words must match together.
    assert shown("--pid", one.client.pid, "pid", "=", one.server.pid) == set()

    wide = kmap("ss", "-W", "--pid", one.client.pid, env=kernel_env).stdout
    assert " connector " in wide
    assert "ring size" in wide.splitlines()[0]


@pytest.mark.parametrize("json_option", [(), ("--json",)])
@pytest.mark.parametrize(
    "arguments", [("established",), ("--state", "up"), ("pid", "=")]
)
def test_a_filter_that_makes_no_sense(
    arguments: tuple[str, ...], json_option: tuple[str, ...], kernel_env: dict[str, str]
) -> None:
    done = kmap("ss", *json_option, *arguments, env=kernel_env)
    assert done.returncode == 2
    assert done.stderr.startswith("kmap ss: ")
    assert bool(done.stdout) == bool(json_option)


def test_watch_shows_rates(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    watch = spawn(
        [*KMAP, "ss", "-w", "--interval", "0.1", "--pid", str(peers.client.pid)],
        env=kernel_env,
        stdout=subprocess.PIPE,
    )
    assert watch.stdout is not None
    idle = {"", "0"}
    cells: list[str] = []
    # What goes out between two looks is seen in one of them.
    for sent in range(1000):
        line = watch.stdout.readline()
        assert line, "it ended by itself"
        if line.startswith("state"):
            assert line.split("  ")[-1].strip() == "why"
            assert "ring tx/s" in line
            assert peers.tell(f"more {1000 * (sent % 2)}") == "sent"
        if f":{peers.port} " in line:
            cells = line.split()
            # state, process, local, peer and the four rates, once they are known.
            if len(cells) == 8 and cells[5] not in idle:
                break
    assert cells[5] not in idle
    assert cells[7] == "0", "nothing of it goes by the kernel"
    watch.send_signal(signal.SIGTERM)
    watch.stdout.read()
    assert watch.wait() == 143


def test_watch_shows_again_and_again(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kernel_env, kmap_env)
    watch = spawn([*KMAP, "ss", "-a", "-w"], env=kernel_env, stdout=subprocess.PIPE)
    assert watch.stdout is not None
    seen = 0
    while seen < 2:
        line = watch.stdout.readline()
        assert line, "it ended by itself"
        seen += f"127.0.0.1:{peers.port} " in line
    watch.send_signal(signal.SIGINT)
    watch.stdout.read()
    assert watch.wait() == 0


def test_stats_of_a_process(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env, rounds=200, size=1000)
    document = kmap_json("stats", peers.client.pid, env=kernel_env)
    assert (document["schema"], document["ok"]) == ("kmap.stats/1", True)
    (process,) = document["processes"]
    assert process["pid"] == peers.client.pid
    assert process["pids"] == [peers.client.pid]
    assert process["connections"] == {"ring": 1}
    counters = process["counters"]
    assert counters["upgrades"] == 1
    assert counters["ring_tx_bytes"] + counters["kernel_tx_bytes"] == 200_000

    every = kmap_json("stats", env=kernel_env)["processes"]
    assert {peers.client.pid, peers.server.pid} <= {each["pid"] for each in every}
    text = kmap("stats", peers.client.pid, env=kernel_env)
    assert text.returncode == 0
    assert "connections moved to a ring" in text.stdout


def test_what_forked_processes_share_is_shown_once(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    assert peers.tell("fork") == "forked"
    assert set(ends(peers, "-a", env=kernel_env)) == {"client", "server"}
    (child,) = procfs.children(peers.client.pid)
    rows = kmap_json("ss", "-a", env=kernel_env)["connections"]
    assert child not in {row["pid"] for row in rows}
    (process,) = kmap_json("stats", child, env=kernel_env)["processes"]
    assert process["counters"]["upgrades"] == 1
    every = kmap_json("stats", env=kernel_env)["processes"]
    (shared,) = (each for each in every if peers.client.pid in each["pids"])
    assert sorted(shared["pids"]) == sorted([peers.client.pid, child])
    assert shared["pid"] == peers.client.pid


def test_stats_of_processes_without_any(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kernel_env, kmap_env)
    (process,) = kmap_json("stats", peers.client.pid, env=kernel_env)["processes"]
    assert process["counters"]["upgrades"] == 0
    assert process["connections"] == {}
    plain = kmap("stats", peers.server.pid, env=kernel_env)
    assert plain.returncode == 1
    assert "kmap run" in plain.stderr
    assert peers.finish() == (0, 0)
    gone = kmap("stats", peers.server.pid, env=kernel_env)
    assert gone.returncode == 1
    assert "no process" in gone.stderr


def test_a_process_that_is_gone_shows_no_empty_table(
    spawn: Spawn, kernel_env: dict[str, str]
) -> None:
    process = spawn(["true"], env=kernel_env)
    # Dead and not yet waited for: its directory is still there.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert procfs.exists(process.pid)
    assert procfs.tcp_sockets(process.pid) is None
    assert procfs.tcp_sockets(os.getpid()) is not None


def test_proc_net_tcp_is_understood() -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when ...\n"
    (four,) = parse_tcp(
        head + "   0: 0100007F:1F90 0200007F:D431 01 00000005:00000007 00:00000000 "
        "00000000  1000        0 12345 1 0000000000000000 20 4 30 10 -1\n"
    )
    assert (str(four.local), str(four.peer)) == ("127.0.0.1:8080", "127.0.0.2:54321")
    assert (four.tx_queue, four.rx_queue, four.uid, four.inode) == (5, 7, 1000, 12345)
    assert four.connected
    (six,) = parse_tcp(
        head + "   0: 0000000000000000FFFF00000100007F:0050 "
        "B80D0120000000000000000001000000:0051 0A 00000000:00000000 00:00000000 "
        "00000000     0        0 7 1 0000000000000000 100 0 0 10 0\n"
    )
    assert str(six.local) == "127.0.0.1:80"
    assert str(six.peer) == "[2001:db8::1]:81"
    assert not six.connected
