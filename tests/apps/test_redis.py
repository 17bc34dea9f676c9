# SPDX-License-Identifier: Apache-2.0
"""Redis: an event loop of its own over level-triggered epoll."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.apps.process import Launch, Ports, Program, find_program, python
from tests.apps.rings import ExpectRing

KIB = 1024
SIZES = (0, 1, 100, 4095, 16 * KIB, 65_537, 1024 * KIB, 4096 * KIB)


def start_redis(
    launch: Launch,
    directory: Path,
    port: int,
    env: Mapping[str, str],
    *options: str,
) -> Program:
    """A server without persistence."""
    server = launch(
        [
            find_program("redis-server"),
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", directory),
            *("--save", "", "--appendonly", "no", *options),
        ],
        env=env,
    )
    server.wait_listening(port)
    return server


def info(launch: Launch, port: int, env: Mapping[str, str]) -> dict[str, str]:
    """The server's own counts."""
    done = launch(
        [find_program("redis-cli"), "-h", "127.0.0.1", "-p", str(port), "info", "all"],
        env=env,
    ).wait()
    return dict(re.findall(r"^(\w+):(.*?)\r?$", done, re.MULTILINE))


# Connections are then read and written by threads other than the one that polls.
# They spin, so that a benchmark of them takes a minute where processors are few.
IO_THREADS = ("--io-threads", "2", "--io-threads-do-reads", "yes")


@pytest.mark.parametrize("options", [(), IO_THREADS], ids=["one-thread", "io-threads"])
def test_values_come_back_as_they_were_stored(
    launch: Launch,
    ports: Ports,
    tmp_path: Path,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    options: tuple[str, ...],
) -> None:
    port = ports.take()
    server = start_redis(launch, tmp_path, port, mode_env, *options)
    client = launch(python("resp_client", port, *SIZES), env=mode_env)
    report = json.loads(client.wait_line())
    assert report["workers"] == 3
    least = report["bytes"] * 9 // 10
    expect_ring(client, least=least, upgrades=3)
    expect_ring(server, least=least, upgrades=3)
    client.finish()
    server.stop()


@pytest.mark.parametrize(
    "load",
    [("-c", "50", "-d", "3"), ("-c", "50", "-P", "16"), ("-c", "20", "-d", "20000")],
    ids=["plain", "pipelined", "20kB"],
)
def test_redis_benchmark(
    launch: Launch,
    ports: Ports,
    tmp_path: Path,
    mode_env: dict[str, str],
    kernel_env: dict[str, str],
    expect_ring: ExpectRing,
    load: tuple[str, ...],
) -> None:
    pipeline = 16 if "-P" in load else 1
    port = ports.take()
    server = start_redis(launch, tmp_path, port, mode_env)
    before = info(launch, port, kernel_env)
    # Enough that the first round trips, which go by the kernel, are few among them.
    requests = 20_000 * pipeline
    done = launch(
        [
            find_program("redis-benchmark"),
            *("-h", "127.0.0.1", "-p", str(port), "-t", "set,get", "--csv"),
            *("-n", str(requests), "-r", "1000", *load),
        ],
        env=mode_env,
    ).wait()
    rows = {row["test"]: row for row in csv.DictReader(io.StringIO(done))}
    assert set(rows) == {"SET", "GET"}
    assert all(float(row["rps"]) > 0 for row in rows.values())

    after = info(launch, port, kernel_env)
    # With -P requests are sent in whole pipelines, so there may be a few more.

    for name in ("set", "get"):
        found = re.match(
            r"calls=(\d+),.*rejected_calls=0,failed_calls=0$", after[f"cmdstat_{name}"]
        )
        assert found, after[f"cmdstat_{name}"]
        assert requests <= int(found[1]) < requests + 50 * pipeline
    traffic = sum(
        int(after[name]) - int(before[name])
        for name in ("total_net_input_bytes", "total_net_output_bytes")
    )
    connections = int(load[1])
    expect_ring(server, least=traffic * 9 // 10, upgrades=connections)
    server.stop()
