# SPDX-License-Identifier: Apache-2.0
"""kmap ss where not everything may be seen, and into containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kmap import procfs
from tests.cli.peers import Spawn, kmap, kmap_json, start
from tests.cli.test_ss import ROW_FIELDS
from tests.watch.programs import both_ends

NOBODY = 65534
ROUNDS = 50
# A command as another user, who need not be able to read the interpreter's files.
_AS_NOBODY = f"""
import os, sys
from kmap import cli, native
from kmap.commands import ss
native.reasons()
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(cli.main(sys.argv[1:]))
"""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changes user or namespaces")


@root_only
def test_other_users_processes_are_counted(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    for options in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _AS_NOBODY, "ss", "-a", *options],
            env=kernel_env,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert f"/{peers.client.pid} " not in done.stdout
        said = "may not be looked at by this user: try as root" in done.stderr
        assert said == (options == ())
    document = json.loads(done.stdout)
    # Somebody else may run programs under Kmap as that user.
    shown = {row["pid"] for row in document["connections"]}
    assert not shown & {peers.client.pid, peers.server.pid}
    # Both peers and this process; kernel threads are none.
    assert document["hidden_processes"] >= 3
    mine = kmap_json("ss", env=kernel_env)
    assert peers.client.pid in {row["pid"] for row in mine["connections"]}
    assert mine["hidden_processes"] < document["hidden_processes"]


@root_only
@pytest.mark.parametrize("network", [False, True], ids=["same-network", "own-network"])
def test_a_container(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    network: bool,
) -> None:
    """PID, mount and network namespaces of its own; and no PID means the same there."""
    namespaces = ["unshare", "--pid", "--mount", "--fork", "--mount-proc"]
    namespaces += ["--net"] if network else []
    script = 'ip link set lo up; exec env "$@"'
    # The preload is the program's own, and none of those that start it.
    settings = [f"{key}={value}" for key, value in kmap_env.items()]
    program = [sys.executable, "-W", "error", both_ends.__file__]
    container = spawn(
        [*namespaces, "sh", "-c", script, "sh", *settings, *program],
        env=kernel_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert container.stdin is not None
    assert container.stdout is not None
    container.stdin.write(f"{ROUNDS}\n")
    container.stdin.flush()
    assert container.stdout.readline() == "done\n"
    (pid,) = procfs.children(container.pid)
    every = kmap_json("ss", "-a", "--pid", pid, env=kernel_env)["connections"]
    # Nobody but the kernel of that network knows what these have carried.
    cold = [row for row in every if row["state"] == "kernel"]
    assert {row["reason"] for row in cold} == {"not-hot"}
    assert sorted(row["kernel_tx_bytes"] for row in cold) == [0, both_ends.COLD]
    rows = [row for row in every if row["state"] == "ring"]
    assert len(rows) == 2
    assert {row["role"] for row in rows} == {"connector", "acceptor"}
    for row in rows:
        assert set(row) == ROW_FIELDS
        assert row["ring_rx_bytes"] > 0
        for way in ("rx", "tx"):
            both = row[f"ring_{way}_bytes"] + row[f"kernel_{way}_bytes"]
            assert both == ROUNDS * both_ends.SIZE
    (process,) = kmap_json("stats", pid, env=kernel_env)["processes"]
    assert process["pids"] == [pid]
    assert process["counters"]["upgrades"] == 2


# It holds what looks like statistics and is none: a FIFO, and a file of false sizes.
_IMPOSTOR = """
import os, sys
from kmap import wire
path = f"/dev/shm/#kmap-test-{os.getpid()}"
os.mkfifo(path)
fifo = os.open(path, os.O_RDWR)
os.unlink(path)
huge = os.memfd_create("kmap-stats-impostor")
os.ftruncate(huge, 1 << 40)
os.pwrite(huge, wire.HEADER.pack(wire.MAGIC, 1, 4096, 512, 1 << 31, 1 << 31, 0, b""), 0)
print("ready", flush=True)
sys.stdin.readline()
"""


def test_impostors_hinder_nobody(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    impostor = spawn(
        [sys.executable, "-c", _IMPOSTOR],
        env=kmap_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert impostor.stdout is not None
    assert impostor.stdout.readline() == "ready\n"
    peers = start(spawn, kmap_env, kmap_env)
    document = kmap_json("ss", env=kernel_env)
    assert peers.client.pid in {row["pid"] for row in document["connections"]}
    (note,) = (n for n in document["notes"] if f"/{impostor.pid}/" in n)
    assert "rows of 512 bytes" in note
    refused = kmap("stats", impostor.pid, env=kernel_env)
    assert refused.returncode == 1
    assert "another version of the library" in refused.stderr
    scrape = kmap("exporter", "--once", env=kernel_env)
    assert scrape.returncode == 0
    assert "kmap_unreadable_statistics 0" not in scrape.stdout
