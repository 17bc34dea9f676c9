# SPDX-License-Identifier: Apache-2.0
"""Programs that nobody here wrote: servers and their own load generators.

Each is a function that has its server running and measures one run of the client.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap import launch, native, procfs
from kmap.bench import machine
from kmap.bench.figures import Sample
from kmap.bench.workloads import transport_of
from kmap.demo import cpu, programs, rig
from kmap.demo.children import Child, ChildFailed, Deadline
from kmap.demo.ringbytes import Collector
from kmap.results import CannotRun, CommandFailed

_START_S = 30.0
_STOP_S = 20.0
_EXTRA_S = 60.0
_LOOK_S = 0.05
_CONNECTIONS = 32
_REDIS_CLIENTS = 50
_PGBENCH_CLIENTS = 8


@dataclass(frozen=True)
class App:
    """A server and a load generator, on the kernel and under Kmap."""

    name: str
    title: str
    # The programs, and the Debian packages that bring them.
    needs: tuple[tuple[str, str], ...]
    start: Callable[[Running], Child]
    client: Callable[[Running, float], list[str]]
    read: Callable[[str, float], Report]
    # pgbench -i and the like, before anything is measured.
    prepare: Callable[[Running], None] | None = None
    # Ends the server at once.
    stop: signal.Signals = signal.SIGINT
    # A process for each connection, which takes its CPU time with it.
    forks: bool = False
    setups: tuple[str, ...] = ("kernel", "kmap")


@dataclass(frozen=True)
class Report:
    """What the client says of its run."""

    messages: int
    elapsed_s: float
    bytes: int = 0
    p50_us: float | None = None
    p99_us: float | None = None


class Running:
    """What an app needs to know to run in one set-up."""

    def __init__(
        self, directory: Path, env: Mapping[str, str], cpus: tuple[int, int]
    ) -> None:
        self.directory = directory
        self.env = dict(env)
        self.cpus = cpus
        self.port = 0

    def program(self, name: str) -> str:
        """Its path."""
        return programs.find_path(name) or name

    def listening(self, child: Child) -> None:
        """Waits until something of child listens on the port."""
        deadline = Deadline(_START_S, f"{child.name} did not listen")
        while not any(
            found.state == procfs.LISTEN and found.local.port == self.port
            for pid in child.family()
            for found in procfs.tcp_sockets(pid) or ()
        ):
            child.check()
            deadline.pause()

    def server(self, argv: Sequence[str], *, user: str | None = None) -> Child:
        """Starts a server that will listen on the port."""
        child = Child(
            Path(argv[0]).name,
            [*_as_user(user), *argv],
            env=self.env,
            log=self.directory / "server.log",
            cpus={self.cpus[0]},
        )
        try:
            self.listening(child)
        except BaseException:
            child.close()
            raise
        return child


# iperf3: one stream, as large as it goes.


def _iperf3_server(at: Running) -> Child:
    return at.server(
        [at.program("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(at.port)]
    )


def _iperf3_client(at: Running, seconds: float) -> list[str]:
    time = str(max(1, round(seconds)))
    return [
        *(at.program("iperf3"), "-c", "127.0.0.1", "-p", str(at.port)),
        *("-t", time, "--json"),
    ]


def _iperf3_read(text: str, seconds: float) -> Report:
    end = json.loads(text)["end"]["sum_received"]
    # It writes blocks of 128 KiB.
    blocks = int(end["bytes"]) // (128 << 10)
    return Report(blocks, float(end["seconds"]), bytes=int(end["bytes"]))


# sockperf: ping-pong of 64 bytes, blocking.


def _sockperf_server(at: Running) -> Child:
    return at.server(
        [at.program("sockperf"), "sr", "--tcp", "-i", "127.0.0.1", "-p", str(at.port)]
    )


def _sockperf_client(at: Running, seconds: float) -> list[str]:
    return [
        *(at.program("sockperf"), "pp", "--tcp", "-i", "127.0.0.1"),
        *("-p", str(at.port), "-m", "64", "-t", str(max(1, round(seconds)))),
    ]


def _sockperf_read(text: str, seconds: float) -> Report:
    valid = re.search(
        r"\[Valid Duration\] RunTime=([\d.]+) sec;.*Received.*?=(\d+)", text
    )
    percentiles = dict(re.findall(r"percentile ([\d.]+) =\s*([\d.]+)", text))
    if valid is None or not percentiles:
        raise CommandFailed(f"sockperf printed no result: {text[-500:]}")
    count = int(valid[2])
    # It prints half of a round trip.
    return Report(
        count,
        float(valid[1]),
        bytes=count * 128,
        p50_us=2 * float(percentiles["50.000"]),
        p99_us=2 * float(percentiles["99.000"]),
    )


# redis-benchmark: 50 clients without pipelining.


def _redis_server(at: Running) -> Child:
    return at.server(
        [
            *(at.program("redis-server"), "--port", str(at.port)),
            *("--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
            *("--dir", str(at.directory)),
        ]
    )


def _redis_client(command: str) -> Callable[[Running, float], list[str]]:
    def client(at: Running, seconds: float) -> list[str]:
        # It takes a number and no time; the kernel serves about this many here.
        requests = str(int(60_000 * max(0.2, seconds)))
        return [
            *(at.program("redis-benchmark"), "-h", "127.0.0.1", "-p", str(at.port)),
            *("-t", command, "-c", str(_REDIS_CLIENTS), "-n", requests, "--csv"),
        ]

    return client


def _redis_read(text: str, seconds: float) -> Report:
    row = next(csv.DictReader(io.StringIO(text)))
    requests = int(60_000 * max(0.2, seconds))
    return Report(
        requests,
        requests / float(row["rps"]),
        p50_us=float(row["p50_latency_ms"]) * 1000,
        p99_us=float(row["p99_latency_ms"]) * 1000,
    )


# wrk and nginx: keep-alive, 128 bytes.


def _nginx_server(at: Running) -> Child:
    root = at.directory / "root"
    root.mkdir(exist_ok=True)
    (root / "128").write_bytes(b"x" * 128)
    found = programs.find_nginx()
    nothing = programs.Program("", "")
    child, at.port = rig.start_nginx(
        programs.Programs(nothing, found, nothing, None),
        at.directory,
        root,
        env=at.env,
        cpus={at.cpus[0]},
    )
    return child


def _wrk_client(at: Running, seconds: float) -> list[str]:
    return [
        *(at.program("wrk"), "--threads=1", f"--connections={_CONNECTIONS}"),
        f"--duration={max(1, round(seconds))}s",
        f"--script={Path(rig.__file__).with_name('report.lua')}",
        f"http://127.0.0.1:{at.port}/128",
    ]


def _wrk_read(text: str, seconds: float) -> Report:
    for line in text.splitlines():
        if line.startswith("report "):
            fields = line.split()[1:]
            requests, duration_us, received, *errors = map(int, fields[:8])
            if any(errors):
                raise CommandFailed(f"wrk met errors: {text.strip()}")
            return Report(
                requests,
                duration_us / 1e6,
                bytes=received,
                p50_us=float(fields[8]),
                p99_us=float(fields[9]),
            )
    raise CommandFailed(f"wrk printed no report: {text.strip()}")


# pgbench: the built-in transaction that selects one row.


def _postgres_user() -> str | None:
    """The user that PostgreSQL runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise CannotRun(
            "there is no user postgres: apt-get install postgresql"
        ) from None


def _as_user(user: str | None) -> list[str]:
    if user is None:
        return []
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def _check_call(argv: Sequence[str], env: Mapping[str, str]) -> None:
    done = subprocess.run(
        argv, env=dict(env), cwd="/", capture_output=True, text=True, timeout=_EXTRA_S
    )
    if done.returncode:
        raise CommandFailed(f"{argv[0]} failed: {done.stderr.strip()[-500:]}")


def _postgres_server(at: Running) -> Child:
    user = _postgres_user()
    data = at.directory / "data"
    if not data.exists():
        data.mkdir()
        if user:
            shutil.chown(data, user)
        _check_call(
            [
                *(*_as_user(user), at.program("initdb"), "-D", str(data)),
                *("-U", "postgres", "-A", "trust", "-N", "--no-instructions"),
                *("--locale=C", "-E", "UTF8"),
            ],
            launch.without_kmap(at.env),
        )
    return at.server(
        [
            *(at.program("postgres"), "-D", str(data), "-p", str(at.port)),
            *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
            *("-c", "fsync=off", "-c", "autovacuum=off"),
        ],
        user=user,
    )


def _pgbench(at: Running, *arguments: str) -> list[str]:
    address = ("-h", "127.0.0.1", "-p", str(at.port), "-U", "postgres")
    return [at.program("pgbench"), *address, *arguments, "postgres"]


def _pgbench_prepare(at: Running) -> None:
    deadline = Deadline(_START_S, "PostgreSQL did not accept connections")
    while True:
        try:
            _check_call(
                _pgbench(at, "-i", "-q", "-s", "1"), launch.without_kmap(at.env)
            )
            return
        except CommandFailed as error:
            if "starting up" not in str(error):
                raise
        deadline.pause()


def _pgbench_client(at: Running, seconds: float) -> list[str]:
    return _pgbench(
        at,
        *("-S", "-n", "-M", "prepared", "-c", str(_PGBENCH_CLIENTS), "-j", "1"),
        *("-T", str(max(1, round(seconds)))),
    )


def _pgbench_read(text: str, seconds: float) -> Report:
    done = re.search(r"actually processed: (\d+)", text)
    rate = re.search(r"tps = ([\d.]+)", text)
    latency = re.search(r"latency average = ([\d.]+) ms", text)
    failed = re.search(r"failed transactions: (\d+)", text)
    if not done or not rate or not latency or (failed and int(failed[1])):
        raise CommandFailed(f"pgbench printed no result: {text[-500:]}")
    return Report(int(done[1]), int(done[1]) / float(rate[1]))


APPS = {
    app.name: app
    for app in (
        App(
            "iperf3",
            "iperf3, one stream",
            (("iperf3", "iperf3"),),
            _iperf3_server,
            _iperf3_client,
            _iperf3_read,
        ),
        App(
            "sockperf",
            "sockperf ping-pong, 64 bytes",
            (("sockperf", "sockperf"),),
            _sockperf_server,
            _sockperf_client,
            _sockperf_read,
        ),
        *(
            App(
                f"redis-{command}",
                f"redis-benchmark {command.upper()}, {_REDIS_CLIENTS} clients",
                (("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")),
                _redis_server,
                _redis_client(command),
                _redis_read,
            )
            for command in ("get", "set")
        ),
        App(
            "wrk-nginx",
            f"wrk and nginx, 128 bytes, keep-alive, {_CONNECTIONS} connections",
            (("wrk", "wrk"), ("nginx", "nginx-light")),
            _nginx_server,
            _wrk_client,
            _wrk_read,
            stop=signal.SIGTERM,
        ),
        App(
            "pgbench",
            f"pgbench -S, prepared, {_PGBENCH_CLIENTS} clients",
            (("pgbench", "postgresql-contrib"), ("initdb", "postgresql")),
            _postgres_server,
            _pgbench_client,
            _pgbench_read,
            _pgbench_prepare,
            forks=True,
        ),
    )
}


def check(app: App) -> None:
    """Raises CannotRun with the name of a program that is missing."""
    for name, package in app.needs:
        if programs.find_path(name) is None:
            raise CannotRun(f"{name} is not installed: apt-get install {package}")


def versions(app: App) -> dict[str, str]:
    """What the programs say of themselves."""
    found = {}
    for name, _ in app.needs:
        # wrk and nginx know no long option.
        argument = "-v" if name in ("wrk", "nginx") else "--version"
        done = subprocess.run(
            [programs.find_path(name) or name, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_EXTRA_S,
        )
        version = re.search(r"\d+(?:\.\d+)+", done.stdout)
        found[name] = version[0] if version else "unknown"
    return found


@contextlib.contextmanager
def running(
    app: App, env: Mapping[str, str], cpus: tuple[int, int]
) -> Iterator[tuple[Running, Child]]:
    """The server of app, ready for its client."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="kmap-bench-"))
        directory = Path(name)
        # A server that drops root must still get in, and find the library.
        directory.chmod(0o755)
        env = dict(env)
        if "LD_PRELOAD" in env:
            public = directory / native.PRELOAD_NAME
            shutil.copy(native.preload_path(), public)
            public.chmod(0o755)
            env["LD_PRELOAD"] = env["LD_PRELOAD"].replace(
                str(native.preload_path()), str(public)
            )
        at = Running(directory, env, cpus)
        at.port = rig.free_port()
        child = app.start(at)
        stack.callback(child.close)
        if app.prepare is not None:
            app.prepare(at)
        yield at, child
        # Some call being interrupted a failure.
        with contextlib.suppress(ChildFailed):
            child.stop(_STOP_S, app.stop)


def measure(
    app: App, at: Running, server: Child, *, setup: str, seconds: float, number: int
) -> Sample:
    """One run of the client."""
    server.check()
    log = at.directory / "client.log"
    used = frozenset(at.cpus)
    with Collector() as server_ring, Collector() as client_ring:
        server_ring.look(server.family())
        ring_before = server_ring.ring_bytes()
        family = set(server.family())
        cpu_before = _server_cpu_s(app, server, family)
        before = cpu.HostTime.read(used)
        client = Child(
            app.name,
            app.client(at, seconds),
            env=at.env,
            log=log,
            cpus={at.cpus[1]},
            take_output=True,
        )
        with client:
            text = _output(client, client_ring, seconds)
            assert client.usage is not None
            client_cpu = client.usage.ru_utime + client.usage.ru_stime
        host = cpu.HostTime.read(used) - before
        server_ring.look(server.family())
        server_cpu = _server_cpu_s(app, server, family) - cpu_before
        ring = server_ring.ring_bytes() - ring_before + client_ring.ring_bytes()
    report = app.read(text, seconds)
    own = client_cpu + server_cpu
    return Sample(
        setup=setup,
        round=number,
        messages=report.messages,
        bytes=report.bytes,
        elapsed_s=report.elapsed_s,
        cpu_s=own,
        server_cpu_s=server_cpu,
        client_cpu_s=client_cpu,
        sleeps=client.usage.ru_nvcsw,
        p50_us=report.p50_us,
        p99_us=report.p99_us,
        # That there were rings at all: what the programs sent is not known exactly.
        ring_share=float(ring > 0) if transport_of(setup) else None,
        steal=host.steal_share,
        foreign=host.foreign_share(own),
    )


def _server_cpu_s(app: App, server: Child, family: set[int]) -> float:
    """Of all its processes, and of those that have ended since family was looked at."""
    if not app.forks:
        return cpu.used_us(server.family()) / 1e6
    deadline = Deadline(_STOP_S, f"{server.name} kept processes of connections")
    while set(server.family()) - family:
        deadline.pause()
    return machine.tree_cpu_s(server.family())


def _output(client: Child, ring: Collector, seconds: float) -> str:
    """What the client prints; its statistics are opened while it runs."""
    deadline = Deadline(seconds + _EXTRA_S, f"{client.name} did not end")
    while not client.wait(_LOOK_S):
        ring.look(client.family())
        deadline.pause(0)
    text = client.output.read().decode(errors="replace")
    if client.returncode:
        raise client.failure(f"ended with {client.returncode}: {text.strip()[-500:]}")
    return text
