# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL, which forks a process per connection, over TCP, and its load tool."""

from __future__ import annotations

import hashlib
import os
import pwd
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kmap import launch as kmap_launch
from kmap import native
from tests.apps.process import Launch, Ports, Program, find_program
from tests.apps.rings import Rings, Watch

pytestmark = pytest.mark.usefixtures("reachable_library")


def owner() -> str | None:
    """The user that the server runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("there is no user postgres; the package postgresql makes one")


@pytest.fixture
def reachable_library(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the libraries that the server's user can read, wherever they are."""
    for path in (native.library_path(), native.preload_path()):
        shutil.copy(path, public_path)
        (public_path / path.name).chmod(0o755)
    monkeypatch.setenv("KMAP_LIB_DIR", str(public_path))


@pytest.fixture
def env(
    reachable_library: None, mode: str, kernel_env: dict[str, str]
) -> dict[str, str]:
    """The environment of all programs here."""
    base = {name: value for name, value in kernel_env.items() if name[:2] != "PG"}
    base["PGCONNECT_TIMEOUT"] = "20"
    return kmap_launch.environment(base) if mode == "kmap" else base


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty database cluster; each test works on it in turn."""
    initdb = find_program("initdb")
    user = owner()
    with tempfile.TemporaryDirectory(prefix="kmap-apps-") as name:
        os.chmod(name, 0o755)
        data = Path(name, "data")
        data.mkdir()
        if user is not None:
            shutil.chown(data, user)
        program = Program(
            [
                *(initdb, "-D", data, "-U", "postgres", "-A", "trust", "-N"),
                *("--no-instructions", "--locale=C", "-E", "UTF8"),
            ],
            env={"PATH": os.defpath, "TZ": "UTC"},
            logs=tmp_path_factory.mktemp("initdb"),
            cwd=Path("/"),
            user=user,
        )
        try:
            program.wait()
        finally:
            program.kill()
        yield data


class Server:
    """A running server and what its processes have moved by ring."""

    def __init__(self, program: Program, port: int, env: Mapping[str, str]) -> None:
        self.program = program
        self.port = port
        self.env = env
        self.watch = Watch()
        self.address = ("-h", "127.0.0.1", "-p", str(port), "-U", "postgres")

    def look(self) -> Rings:
        return self.watch.look(self.program.family())

    def stop(self) -> None:
        # Waits until every session has seen that its client went away.
        self.program.stop(signal.SIGTERM)
        # The server's log is its standard error.
        log = self.program.stderr()
        bad = re.findall(r"^.*(?:ERROR|FATAL|PANIC|WARNING):.*$", log, re.MULTILINE)
        assert not bad, log


@pytest.fixture
def server(launch: Launch, ports: Ports, cluster: Path, env: dict[str, str]) -> Server:
    port = ports.take()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
        "shared_buffers": "32MB",
        "max_connections": "40",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    program = launch(
        [find_program("postgres"), "-D", cluster, *options],
        env=env,
        cwd=Path("/"),
        user=owner(),
    )
    program.wait_until(
        lambda: "ready to accept connections" in program.stderr(), "a server"
    )
    return Server(program, port, env)


def psql(launch: Launch, server: Server) -> Program:
    """A session that takes commands from its standard input."""
    return launch(
        [
            *(find_program("psql"), *server.address, "-d", "postgres"),
            *("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"),
        ],
        env=server.env,
    )


def ask(session: Program, query: str) -> str:
    """Sends a query; all of its answer."""
    before = len(session.stdout())
    mark = "-- done --\n"
    session.write(f"{query}\n\\echo -- done --\n")
    session.wait_until(
        lambda: session.stdout()[before:].endswith(mark), "the end of an answer"
    )
    return session.stdout()[before:].removesuffix(mark).rstrip("\n")


def test_rows_arrive_whole(launch: Launch, server: Server, mode: str) -> None:
    """Large results, bulk loads, and small queries between them."""
    session = psql(launch, server)
    source = random.Random(1)
    lines = [source.randbytes(500).hex() for _ in range(4000)]
    # The first exchanges of a connection are on the kernel.
    for _ in range(10):
        assert ask(session, "select 6 * 7;") == "42"
    ask(session, "create temporary table t (n serial, v text);")
    assert ask(session, "\n".join(["copy t (v) from stdin;", *lines, "\\."])) == ""
    expected = "".join(f"{line}\n" for line in lines)
    digest = hashlib.md5(expected.encode(), usedforsecurity=False).hexdigest()
    query = "select md5(string_agg(v || chr(10), '' order by n)) from t;"
    assert ask(session, query) == digest
    assert ask(session, "select v from t order by n;") + "\n" == expected
    assert ask(session, "copy (select v from t order by n) to stdout;") + "\n" == (
        expected
    )
    for size in (0, 1, 8191, 8192, 8193, 3_000_000):
        assert ask(session, f"select repeat('x', {size});") == "x" * size
    least = 3 * len(expected)
    seen, client = server.look(), Watch().look([session.pid])
    if mode == "kmap":
        assert min(seen.upgrades, client.upgrades) >= 1
        assert min(seen.bytes, client.bytes) >= least
    else:
        assert (seen, client) == (Rings(), Rings())
    session.finish()
    server.stop()


@pytest.mark.parametrize(
    "options",
    [("-S",), ("-S", "-M", "prepared"), ()],
    ids=["select", "select-prepared", "tpcb"],
)
def test_pgbench(
    launch: Launch, server: Server, mode: str, options: tuple[str, ...]
) -> None:
    pgbench = find_program("pgbench")
    launch(
        [pgbench, *server.address, "-i", "-s", "1", "-q", "postgres"], env=server.env
    ).wait()
    load = launch(
        [
            *(pgbench, *server.address, "-c", "8", "-j", "2", "-T", "3", "-n"),
            *(*options, "postgres"),
        ],
        env=server.env,
    )
    client = Watch()
    # Its connections' processes end with them.
    while load.running():
        server.look()
        moved = client.look([load.pid])
        load.tick()
    report = load.wait()
    done = re.search(r"actually processed: (\d+)", report)
    assert done, report
    assert int(done[1]) > 100, report
    assert "number of failed transactions: 0 (0.000%)" in report
    seen = server.look()
    if mode == "kmap":
        assert min(seen.upgrades, moved.upgrades) >= 8
        # A select alone asks with 25 bytes at least and has as many in answer.
        assert min(seen.bytes, moved.bytes) >= int(done[1]) * 50 * 8 // 10
    else:
        assert (seen, moved) == (Rings(), Rings())
    server.stop()
