# SPDX-License-Identifier: Apache-2.0
"""kmap tap as a command: whom it lets, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli.peers import KMAP, Peers, kmap, start
from tests.tap.tapping import NOBODY, Spawn, fields, needs, someone, start_tap


@pytest.fixture
def peers(spawn: Spawn, kmap_env: dict[str, str]) -> Peers:
    """A connection that is on a ring."""
    return start(spawn, kmap_env, kmap_env, rounds=50)


def as_nobody(
    *arguments: object, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root to be another user")
    return subprocess.run(
        [*NOBODY.prefix, *KMAP, "tap", *map(str, arguments)],
        env={**env, "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def test_another_user_is_refused(
    peers: Peers, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "none.pcapng"
    done = as_nobody(*("--pid", peers.server.pid, "-w", file, "--json"), env=kernel_env)
    assert done.returncode == 77, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert "root's" in document["error"]
    assert "run this as root" in document["error"]
    assert not file.exists()


def test_another_user_sees_nothing(
    spawn: Spawn, peers: Peers, kernel_env: dict[str, str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to be another user")
    env = {**kernel_env, "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
    tap = start_tap(spawn, NOBODY, env, Path("/dev/null"))
    assert peers.tell("more 10") == "sent"
    summary = tap.finish()
    assert (summary["packets"], summary["connections"]) == (0, 0)


def test_it_streams_into_a_pipe(
    spawn: Spawn, peers: Peers, kernel_env: dict[str, str]
) -> None:
    tshark = needs("tshark", "tshark")
    tap = spawn(
        [*KMAP, "tap", "-w", "-", "--port", str(peers.port)],
        env=kernel_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    reader = spawn(
        [
            *(tshark, "-l", "-n", "-r", "-"),
            *("-Y", "tcp.len > 0", "-T", "fields", "-e", "tcp.len"),
        ],
        env=kernel_env,
        stdin=tap.stdout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert tap.stderr is not None
    assert reader.stdout is not None
    assert "capturing" in tap.stderr.readline()
    assert peers.tell("more 700") == "sent"
    # It comes while the capture goes on.
    assert reader.stdout.readline() == "700\n"
    tap.send_signal(signal.SIGINT)
    assert tap.wait() == 0
    summary = tap.stderr.read()
    assert "packets of 1 connections" in summary
    reader.stdout.read()
    assert reader.wait() == 0


def test_a_reader_that_goes_is_the_end(
    spawn: Spawn, peers: Peers, kernel_env: dict[str, str]
) -> None:
    tap = spawn(
        [*KMAP, "tap", "-w", "-", "--port", str(peers.port)],
        env=kernel_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert tap.stderr is not None
    assert tap.stdout is not None
    assert "capturing" in tap.stderr.readline()
    tap.stdout.close()
    assert peers.tell("more 700") == "sent"
    assert tap.wait() == 0
    err = tap.stderr.read()
    assert "packets" in err
    assert "Traceback" not in err


def test_snaplen_cuts_off_and_count_ends(
    spawn: Spawn, peers: Peers, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    needs("tshark", "tshark")
    file = tmp_path / "cut.pcapng"
    options = ("--snaplen", 100, "--count", 4, "--pid", peers.client.pid)
    tap = start_tap(spawn, someone("root"), kernel_env, file, *options)
    assert peers.tell("more 5000") == "sent"
    out, _ = tap.process.communicate()
    assert tap.process.returncode == 0
    summary = json.loads(out)
    assert summary["packets"] >= 4
    rows = fields(file, "tcp.len == 5000", ["frame.cap_len", "frame.len"])
    assert rows[:1] == [["100", "5040"]]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_process_that_is_killed_ends_by_a_reset(
    spawn: Spawn, peers: Peers, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    needs("tshark", "tshark")
    file = tmp_path / "killed.pcapng"
    tap = start_tap(spawn, someone("root"), kernel_env, file, "--port", peers.port)
    seen = tap.size()
    assert peers.tell("more 700") == "sent"
    tap.wait_for(seen + 1400)
    seen = tap.size()
    peers.client.kill()
    peers.client.wait()
    peers.server.kill()
    peers.server.wait()
    tap.wait_for(seen + 40)
    summary = tap.finish()
    assert summary["gaps"] == 0
    rows = fields(file, "tcp.flags.reset == 1", ["frame.comment"])
    assert len(rows) == 1
    assert "without a close" in rows[0][0]


def test_what_makes_no_sense_is_said(
    kernel_env: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "x"
    for arguments, code, words in (
        ((), 2, "-w"),
        (("-w", "-", "--json"), 2, "name a file"),
        (("-w", file, "--snaplen", 10), 2, "less than 60"),
        (("-w", file, "--port", 70000), 2, "invalid port"),
        (("-w", file, "--interval", -1), 2, "invalid number"),
        (("-w", file, "--seconds", "nan"), 2, "number of seconds"),
        (("-w", file, "--pid", 2**22 + 1), 1, "there is no process"),
        (("-w", file, "--pid", os.getpid()), 1, "start it with kmap run"),
        (("-w", tmp_path / "no" / "where"), 1, "cannot write"),
    ):
        done = kmap("tap", *arguments, env=kernel_env)
        assert done.returncode == code, (arguments, done)
        assert words in done.stderr, (arguments, done.stderr)
        assert not file.exists()


def test_it_ends_by_itself(kernel_env: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "empty.pcapng"
    done = kmap("tap", "-w", file, "--seconds", "0.2", "--comm", "none", env=kernel_env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "0 packets of 0 connections" in done.stderr
    assert file.stat().st_size > 0
