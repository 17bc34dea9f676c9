# SPDX-License-Identifier: Apache-2.0
"""Transports from outside: who agrees, why not, and what is left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmap import native, procfs
from tests.cli.peers import KMAP, Peers, Spawn, kmap, kmap_json, start, wait_until

PIPES = pytest.mark.parametrize("transport", ["pipe", "fifo"])
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root for other users")
NOBODY = 65534


@pytest.fixture
def fifo_dir(tmp_path: Path) -> Path:
    return tmp_path / "fifos"


def _env(env: Mapping[str, str], transport: str, fifo_dir: Path) -> dict[str, str]:
    return {**env, "KMAP_TRANSPORT": transport, "KMAP_FIFO_DIR": str(fifo_dir)}


def _rows(peers: Peers, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of the server and of the client."""
    rows = kmap_json("ss", "-a", env=env)["connections"]
    by_pid = {row["pid"]: row for row in rows}
    return [by_pid[peers.server.pid], by_pid[peers.client.pid]]


def _pipes(pid: int) -> list[str]:
    """Pipes and FIFOs that it has open, beside standard streams."""
    return [
        link
        for fd, link in procfs.links(pid).items()
        if fd > 2 and Path(f"/proc/{pid}/fd/{fd}").is_fifo()
    ]


@PIPES
def test_a_connection_by_pipes(
    transport: str,
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
) -> None:
    env = _env(kmap_env, transport, fifo_dir)
    peers = start(spawn, env, env, rounds=200, size=1000)
    for row in _rows(peers, kernel_env):
        assert (row["state"], row["transport"]) == ("ring", transport)
        assert row["ring_rx_bytes"] + row["kernel_rx_bytes"] == 200_000
        assert row["ring_rx_bytes"] > 100_000
        assert row["ring_size"] == 262144
    for process in (peers.server, peers.client):
        # Two of the connection and one of the process.
        assert len(_pipes(process.pid)) == 3
    # Names are there for the handshake only, and so is their directory.
    assert not fifo_dir.exists()
    assert peers.tell("more 250000") == "sent"
    wait_until(
        lambda: _rows(peers, kernel_env)[1]["rx_queued"] == 250_000,
        "the echo waits at the client",
    )


@PIPES
def test_descriptors_are_given_back(
    transport: str, spawn: Spawn, kmap_env: dict[str, str], fifo_dir: Path
) -> None:
    """Each of several connections of one process has two, until it is closed."""
    code = """
import os, socket, sys
def pipes():
    return sum(1 for fd in os.listdir("/proc/self/fd") if int(fd) > 2
        and os.path.exists(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").startswith(("pipe:", sys.argv[1])))
pairs = []
with socket.create_server(("127.0.0.1", 0)) as listener:
    for number in range(1, 4):
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
        pairs.append((a, b))
        for _ in range(30):
            a.sendall(b"x"), b.recv(1), b.sendall(b"y"), a.recv(1)
        assert pipes() == 1 + 4 * number, pipes()
while pairs:
    for end in pairs.pop():
        end.close()
    assert pipes() == 1 + 4 * len(pairs), pipes()
print("good")
"""
    process = spawn(
        [sys.executable, "-S", "-c", code, str(fifo_dir)],
        env=_env(kmap_env, transport, fifo_dir),
        stdout=subprocess.PIPE,
    )
    assert process.communicate(timeout=30)[0] == "good\n"
    assert not fifo_dir.exists()


@pytest.mark.parametrize(
    ("server", "client"),
    [("shm", "pipe"), ("pipe", "shm"), ("fifo", "pipe"), ("shm", "fifo")],
)
def test_different_settings_stay_on_the_kernel(
    server: str,
    client: str,
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
) -> None:
    peers = start(
        spawn,
        _env(kmap_env, server, fifo_dir),
        _env(kmap_env, client, fifo_dir),
        rounds=200,
    )
    for row in _rows(peers, kernel_env):
        assert (row["state"], row["reason"]) == ("kernel", "transport")
        assert row["ring_rx_bytes"] == 0
    for process in (peers.server, peers.client):
        assert len(_pipes(process.pid)) <= 1
    assert not fifo_dir.exists()
    assert peers.finish() == (0, 0)


def _stays(
    peers: Peers, env: Mapping[str, str], reason: str, *logs: Path, says: str = ""
) -> None:
    """One end knows why, and its log says it in words; the other was told or left."""
    rows = _rows(peers, env)
    assert {row["state"] for row in rows} == {"kernel"}
    reasons = {row["reason"] for row in rows}
    assert reason in reasons
    assert reasons <= {reason, "peer-cancelled"}
    if says:
        (line,) = "".join(log.read_text() for log in logs).splitlines()
        assert says in line
    assert peers.finish() == (0, 0)


def test_directories_that_differ(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    kmap_env["KMAP_LOG"] = f"error:{log}"
    one, two = tmp_path / "one", tmp_path / "two"
    peers = start(
        spawn, _env(kmap_env, "fifo", one), _env(kmap_env, "fifo", two), rounds=200
    )
    _stays(peers, kernel_env, "transport-failed", log, says="the same for both")
    assert not one.exists()
    assert not two.exists()


@pytest.mark.parametrize("what", ["mode", "link", "file", "missing"])
def test_a_directory_that_others_can_change_is_not_used(
    what: str,
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    kmap_env["KMAP_LOG"] = f"error:{log}"
    match what:
        case "mode":
            fifo_dir.mkdir()
            fifo_dir.chmod(0o750)
        case "link":
            target = tmp_path / "target"
            target.mkdir(mode=0o700)
            fifo_dir.symlink_to(target)
        case "file":
            fifo_dir.touch()
        case "missing":
            fifo_dir = fifo_dir / "deeper"
    env = _env(kmap_env, "fifo", fifo_dir)
    peers = start(spawn, env, env, rounds=200)
    _stays(peers, kernel_env, "transport-failed", log, says="of mode 0700")


def test_a_directory_that_is_there_is_used_and_kept_while_in_use(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
) -> None:
    fifo_dir.mkdir(mode=0o700)
    (fifo_dir / "somebody's").touch()
    env = _env(kmap_env, "fifo", fifo_dir)
    peers = start(spawn, env, env, rounds=200)
    assert {row["state"] for row in _rows(peers, kernel_env)} == {"ring"}
    assert os.listdir(fifo_dir) == ["somebody's"]
    assert peers.finish() == (0, 0)


def test_names_of_the_dead_are_swept(
    spawn: Spawn, kmap_env: dict[str, str], fifo_dir: Path
) -> None:
    """Only what looks like a name, is old, and nobody has open for reading."""
    fifo_dir.mkdir(mode=0o700)
    names = {
        what: fifo_dir / f"{number:032x}-{number % 2}"
        for number, what in enumerate(("dead", "dead too", "young", "held", "file"))
    }
    for what, path in names.items():
        path.touch() if what == "file" else os.mkfifo(path, 0o600)
    strange = fifo_dir / f"{9:032x}-2"
    os.mkfifo(strange)
    held = os.open(names["held"], os.O_RDWR | os.O_NONBLOCK)
    old = time.time() - 60
    for path in fifo_dir.iterdir():
        if path != names["young"]:
            os.utime(path, (old, old))
    env = _env(kmap_env, "fifo", fifo_dir)
    peers = start(spawn, env, env, rounds=200)
    assert {path.name for path in fifo_dir.iterdir()} == {
        strange.name,
        *(names[what].name for what in ("young", "held", "file")),
    }
    os.close(held)
    assert peers.finish() == (0, 0)


def test_the_default_directory(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    env = {**kmap_env, "KMAP_TRANSPORT": "fifo", "XDG_RUNTIME_DIR": str(run)}
    # A directory there that cannot be used shows that it is the one.
    (run / "kmap").mkdir(mode=0o755)
    peers = start(spawn, env, env, rounds=200)
    _stays(peers, kernel_env, "transport-failed")
    (run / "kmap").chmod(0o700)
    peers = start(spawn, env, env, rounds=200)
    assert {row["transport"] for row in _rows(peers, kernel_env)} == {"fifo"}
    assert not (run / "kmap").exists()
    assert peers.finish() == (0, 0)


@needs_root
@PIPES
def test_two_users_stay_on_the_kernel(
    transport: str,
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
) -> None:
    env = _env(kmap_env, transport, fifo_dir)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code = f"""
import os, socket
with socket.create_server(("127.0.0.1", {port})) as listener:
    os.setgroups([]), os.setresgid(*[{NOBODY}] * 3), os.setresuid(*[{NOBODY}] * 3)
    print("up", flush=True)
    sock, _ = listener.accept()
    while data := sock.recv(65536):
        sock.sendall(data)
"""
    server = spawn([sys.executable, "-S", "-c", code], env=env, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    client = spawn(
        [sys.executable, "tests/cli/programs/echo_client.py", str(port), "200", "100"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    _stays(Peers(server, client, port), kernel_env, "transport-user")
    assert not fifo_dir.exists()


@needs_root
@PIPES
def test_without_proc(
    transport: str,
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    fifo_dir: Path,
    tmp_path: Path,
) -> None:
    """Copies for MSG_PEEK and unnamed pipes need it."""
    unshare = shutil.which("unshare")
    assert unshare, "unshare is missing: apt-get install util-linux"
    log = tmp_path / "log"
    kmap_env["KMAP_LOG"] = f"error:{log}"
    env = _env(kmap_env, transport, fifo_dir)
    without = ["sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    peers = start(
        spawn,
        env,
        env,
        rounds=200,
        prefix=[unshare, "--mount", "--propagation", "private", *without],
    )
    _stays(peers, kernel_env, "transport-failed", log, says=f"transport {transport}")
    assert not fifo_dir.exists()


@needs_root
@PIPES
def test_a_user_who_has_too_many_pipes(
    transport: str, spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    """Beyond pipe-user-pages-soft new pipes have two pages, and rings half of that."""
    limit = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    if limit == 0:
        # No limit: there is nothing to be short of.
        return
    code = f"""
import fcntl, os, socket, sys
uid = {NOBODY - 17}
os.setgroups([]), os.setresgid(uid, uid, uid), os.setresuid(uid, uid, uid)
hold = []
try:
    while True:
        hold.append(os.pipe())
        fcntl.fcntl(hold[-1][0], fcntl.F_SETPIPE_SZ, 1 << 20)
except OSError:
    pass
while fcntl.fcntl(hold[-1][0], fcntl.F_GETPIPE_SZ) > 8192:
    hold.append(os.pipe())
with socket.create_server(("127.0.0.1", 0)) as listener:
    a = socket.socket()
    a.connect(listener.getsockname())
    b, _ = listener.accept()
for number in range(200):
    data = bytes([number]) * 1000
    a.sendall(data)
    assert b.recv(1000, socket.MSG_WAITALL) == data
    b.sendall(data)
    assert a.recv(1000, socket.MSG_WAITALL) == data
print("good", flush=True)
sys.stdin.read()
"""
    process = spawn(
        [sys.executable, "-S", "-c", code],
        env=_env(kmap_env, transport, Path("/tmp", f"kmap-{secrets.token_hex(8)}")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "good\n"
    rows = kmap_json("ss", env=kernel_env)["connections"]
    sizes = {row["ring_size"] for row in rows if row["pid"] == process.pid}
    assert sizes == {4096}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KMAP_TRANSPORT", "pigeon", "is none of the transports: shm pipe fifo"),
        ("KMAP_FIFO_DIR", "relative", "is no absolute path"),
        ("KMAP_FIFO_DIR", "/" + "x" * 300, "is no absolute path"),
    ],
)
def test_a_bad_setting_is_one_line(
    name: str, value: str, says: str, kmap_env: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "print('runs')"],
        env={**kmap_env, name: value},
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, "runs\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kmap: {name}={value}")
    assert says in line


def test_kmap_run(spawn: Spawn, kernel_env: dict[str, str], fifo_dir: Path) -> None:
    """Kmap run --transport sets it; what is unknown is a usage error with the names."""
    names = [entry.name for entry in native.transports()]
    assert names == ["shm", "pipe", "fifo"]
    wrong = kmap("run", "--transport", "pigeon", "true", env=kernel_env)
    assert wrong.returncode == 2
    assert "shm, pipe, fifo" in wrong.stderr
    peers = start(
        spawn,
        kernel_env,
        kernel_env,
        rounds=200,
        prefix=[*KMAP, "run", "--transport", "pipe", "--"],
    )
    assert {row["transport"] for row in _rows(peers, kernel_env)} == {"pipe"}
    assert peers.finish() == (0, 0)
