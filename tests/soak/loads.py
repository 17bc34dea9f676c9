# SPDX-License-Identifier: Apache-2.0
"""The loads of a soak: long-lived servers under Kmap, and rounds of work on them.

A round is a few seconds of load and a check of what it left behind.  What does not
end well raises, and ends the soak.
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
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kmap import launch, native, procfs
from kmap.demo import programs as demo_programs
from kmap.demo import wrk
from kmap.demo.children import Child, ChildFailed, Deadline
from kmap.demo.rig import Rig, Setup, free_port
from kmap.demo.session import compare_bodies, write_files
from kmap.results import CannotRun
from tests.soak.programs import find

_START_S = 30.0
_STOP_S = 30.0
# What a program of a round may take beyond the seconds it is told.
_EXTRA_S = 60.0
_APPS = Path(__file__).parents[1] / "apps" / "programs"


class Load:
    """One kind of load."""

    name = ""
    # Rounds until everything that is done at all has been done once.
    first_rounds = 1

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.directory = directory
        directory.mkdir()
        self.env = dict(env)
        self.stack = contextlib.ExitStack()
        # What was done, for the report.
        self.done: Counter[str] = Counter()
        self._rounds = 0

    def start(self) -> None:
        """Starts the servers."""

    def groups(self) -> dict[str, list[int]]:
        """The long-lived processes, by the name under which they are judged."""
        return {}

    def round(self, seconds: int) -> None:
        """About so many seconds of work, and a check."""
        raise NotImplementedError

    def finish(self) -> None:
        """Ends the servers as they want to be ended, and looks at how they ended."""

    def close(self) -> None:
        """Ends everything that still runs."""
        self.stack.close()

    def run_program(
        self,
        name: str,
        argv: Sequence[str | Path],
        seconds: float,
        *,
        env: Mapping[str, str] | None = None,
        exits: tuple[int, ...] = (0,),
    ) -> str:
        """Runs a program to its end; its standard output."""
        log = self.directory / f"{name}.log"
        log.unlink(missing_ok=True)
        output = bytearray()
        child = Child(
            name,
            [str(argument) for argument in argv],
            env=self.env if env is None else env,
            log=log,
            take_output=True,
        )
        with child:
            reader = threading.Thread(
                target=lambda: output.extend(child.output.read()), daemon=True
            )
            reader.start()
            if not child.wait(seconds + _EXTRA_S):
                raise child.failure(f"did not end in {seconds + _EXTRA_S:g} s")
            reader.join()
            if child.returncode not in exits:
                said = output.decode(errors="replace")[-4000:]
                raise child.failure(f"ended with {child.returncode}: {said}")
        return output.decode(errors="replace")

    def server(self, name: str, argv: Sequence[str | Path], port: int) -> Child:
        """Starts a server and waits until it listens."""
        child = Child(
            name,
            [str(argument) for argument in argv],
            env=self.env,
            log=self.directory / f"{name}.log",
        )
        self.stack.callback(child.close)
        deadline = Deadline(_START_S, f"{name} did not listen on port {port}")
        while not _listens(child.pid, port):
            child.check()
            deadline.pause()
        return child


def _listens(pid: int, port: int) -> bool:
    return any(
        found.state == procfs.LISTEN and found.local.port == port
        for found in procfs.tcp_sockets(pid) or ()
    )


class EnvoyLoad(Load):
    """wrk through Envoy to nginx, and bodies compared byte by byte."""

    name = "envoy"
    _order = tuple(wrk.LOADS)

    def start(self) -> None:
        self._programs = demo_programs.find_all()
        served, self._bodies = write_files(self.directory, list(wrk.LOADS.values()))
        self._rig = Rig(
            self._programs,
            Setup.KMAP,
            self.directory / "rig",
            served,
            base_env=self.env,
            echo=True,
            # How many connections it keeps for later is chance.
            idle="3s",
        )
        self.stack.callback(self._rig.close)

    def groups(self) -> dict[str, list[int]]:
        return {
            "envoy": [self._rig.envoy.child.pid],
            "nginx": self._rig.nginx.family(),
        }

    def round(self, seconds: int) -> None:
        each = max(1, seconds // len(self._order))
        for name in self._order:
            self._rig.envoy.child.check()
            self._rig.nginx.check()
            load = wrk.LOADS[name]
            with wrk.start(self._programs, self._rig, load, each) as child:
                report = wrk.report(child, each)
            if report.errors or not report.requests:
                raise ChildFailed(f"wrk {name}: {report}")
            self.done["requests through Envoy"] += report.requests
        compared = compare_bodies(self._rig, self._bodies)
        if compared.differences:
            raise ChildFailed(f"bodies through Envoy differ: {compared.differences}")
        self.done["bodies compared"] += compared.bodies

    def finish(self) -> None:
        self._rig.stop()
        if self._rig.envoy_exit != 0:
            raise ChildFailed(f"Envoy ended with {self._rig.envoy_exit}")


class RedisLoad(Load):
    """redis-benchmark, and a client that stores values and reads them back."""

    name = "redis"
    first_rounds = 3
    _sizes = (0, 1, 100, 4095, 16384, 65537, 1 << 20)

    def start(self) -> None:
        self._benchmark = find("redis-benchmark")
        self._cli = find("redis-cli")
        self._port = free_port()
        self._server = self.server(
            "redis-server",
            [
                *(find("redis-server"), "--port", str(self._port)),
                *("--bind", "127.0.0.1", "--dir", self.directory),
                *("--save", "", "--appendonly", "no"),
            ],
            self._port,
        )

    def groups(self) -> dict[str, list[int]]:
        return {"redis-server": [self._server.pid]}

    def round(self, seconds: int) -> None:
        self._server.check()
        # Requests of each kind that take about a tenth of a second.
        loads = (
            (4000, ("-c", "50", "-d", "64")),
            (20000, ("-c", "50", "-d", "64", "-P", "16")),
            (1000, ("-c", "20", "-d", "20000")),
        )
        each, load = loads[self._rounds % len(loads)]
        count = each * seconds
        self._rounds += 1
        text = self.run_program(
            "redis-benchmark",
            [
                *(self._benchmark, "-h", "127.0.0.1", "-p", str(self._port)),
                *("-t", "set,get,incr,lpush,lpop", "--csv", "-r", "1000", *load),
                *("-n", str(count)),
            ],
            seconds,
        )
        rows = list(csv.DictReader(io.StringIO(text)))
        if len(rows) != 5 or not all(float(row["rps"]) > 0 for row in rows):
            raise ChildFailed(f"redis-benchmark said {text}")
        self.done["requests to redis"] += 5 * count
        self.run_program(
            "resp-client",
            [
                *(sys.executable, "-W", "error", _APPS / "resp_client.py"),
                *(str(self._port), *map(str, self._sizes)),
            ],
            seconds,
        )
        self.done["rounds of values read back from redis"] += 1
        self._look_at_failures()

    def _ask(self, *command: str) -> str:
        return self.run_program(
            "redis-cli",
            [self._cli, "-h", "127.0.0.1", "-p", str(self._port), *command],
            0,
            env=launch.without_kmap(self.env),
        )

    def _look_at_failures(self) -> None:
        for line in self._ask("info", "all").splitlines():
            found = re.match(r"cmdstat_(set|get|incr):.*failed_calls=([1-9])", line)
            if found:
                raise ChildFailed(f"redis: {line}")
        # So that each round begins with the same data.
        if self._ask("flushall", "sync").strip() != "OK":
            raise ChildFailed("redis did not flush its data")

    def finish(self) -> None:
        if self._server.stop(_STOP_S) != 0:
            raise self._server.failure("did not end with 0")


class PostgresLoad(Load):
    """pgbench, with its balances added up, and a session that stays open."""

    name = "postgres"

    def start(self) -> None:
        self._pgbench, self._psql = find("pgbench"), find("psql")
        postgres, initdb = find("postgres"), find("initdb")
        self.env = {n: v for n, v in self.env.items() if n[:2] != "PG"}
        data = self.directory / "data"
        data.mkdir()
        # It refuses to be root.
        prefix: list[str | Path] = []
        if os.geteuid() == 0:
            prefix = self._as_postgres(data)
        self._port = free_port()
        plain = launch.without_kmap(self.env)
        self.run_program(
            "initdb",
            [
                *(*prefix, initdb, "-D", data, "-U", "postgres", "-A", "trust", "-N"),
                *("--no-instructions", "--locale=C", "-E", "UTF8"),
            ],
            _START_S,
            env=plain,
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "fsync": "off",
            # Its own shared memory, all in use from the first round on: what is touched
            # later would look like growth.
            "shared_buffers": "4MB",
            "max_connections": "40",
            # So that the first round has seen it at work.
            "autovacuum_naptime": "3s",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._server = self.server(
            "postgres", [*prefix, postgres, "-D", data, *options], self._port
        )
        self._address = ("-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres")
        ready = Deadline(_START_S, "PostgreSQL was not ready")
        while "ready to accept connections" not in self._server.log.read_text():
            self._server.check()
            ready.pause()
        self.run_program(
            "pgbench", [self._pgbench, *self._address, "-i", "-q", "postgres"], _START_S
        )
        # The processes of the server itself, without any session.
        self._own = self._server.family()
        self._start_session()

    def _start_session(self) -> None:
        """A connection that asks five times a second, as long as the soak goes on."""
        self._session = Child(
            "session",
            [
                *(self._pgbench, *self._address, "-S", "-n", "-R", "5"),
                *("-T", "1000000", "postgres"),
            ],
            env=self.env,
            log=self.directory / "session.log",
        )
        self.stack.callback(self._session.close)
        there = Deadline(_START_S, "the session did not connect")
        while not (new := set(self._server.family()) - set(self._own)):
            self._session.check()
            there.pause()
        self._backend = new.pop()

    def _as_postgres(self, data: Path) -> list[str | Path]:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            raise CannotRun(
                "there is no user postgres: the package postgresql makes one"
            ) from None
        os.chown(data, user.pw_uid, user.pw_gid)
        # The libraries may lie where that user cannot go.
        libraries = self.directory / "lib"
        libraries.mkdir()
        for path in (native.library_path(), native.preload_path()):
            shutil.copy(path, libraries)
            (libraries / path.name).chmod(0o755)
        before = self.env.get("LD_PRELOAD", "")
        copy = str(libraries / native.preload_path().name)
        self.env["LD_PRELOAD"] = before.replace(str(native.preload_path()), copy)
        return [
            find("setpriv"),
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
        ]

    def groups(self) -> dict[str, list[int]]:
        return {
            "postgres": self._own,
            "a session": [self._session.pid, self._backend],
        }

    def _ask(self, query: str) -> list[int]:
        return [int(field) for field in self._do(query).strip().split("|")]

    def _do(self, query: str) -> str:
        return self.run_program(
            "psql",
            [
                *(self._psql, *self._address, "-d", "postgres", "-X", "-q", "-A", "-t"),
                *("-v", "ON_ERROR_STOP=1", "-c", query),
            ],
            _START_S,
        )

    def _balances(self) -> list[int]:
        """Of accounts, tellers and branches, and the sum of all changes."""
        return self._ask(
            "select (select sum(abalance) from pgbench_accounts), "
            "(select sum(tbalance) from pgbench_tellers), "
            "(select sum(bbalance) from pgbench_branches), "
            "(select coalesce(sum(delta), 0) from pgbench_history)"
        )

    def round(self, seconds: int) -> None:
        self._server.check()
        each = max(1, seconds // 2)
        accounts, _, _, _ = self._balances()
        # pgbench empties the history first, unless it is told not to.
        for options in (("-S", "-n"), ()):
            text = self.run_program(
                "pgbench",
                [
                    *(self._pgbench, *self._address, "-c", "8", "-j", "2"),
                    *("-T", str(each), *options, "postgres"),
                ],
                each,
            )
            done = re.search(r"actually processed: (\d+)", text)
            if not done or "failed transactions: 0 (0.000%)" not in text:
                raise ChildFailed(f"pgbench said {text}")
            kind = "selects" if options else "transactions"
            self.done[f"pgbench {kind}"] += int(done[1])
        # Otherwise one in five minutes, which opens every file.
        self._do("checkpoint")
        after, tellers, branches, changes = self._balances()
        if not after == tellers == branches == accounts + changes:
            raise ChildFailed(
                f"balances differ: accounts {after} (before {accounts}), tellers "
                f"{tellers}, branches {branches}, changes {changes}"
            )
        self.done["balances that agreed"] += 1

    def finish(self) -> None:
        self._session.check()
        self._session.close()
        if self._server.stop(_STOP_S) != 0:
            raise self._server.failure("did not end with 0")
        bad = re.findall(
            r"^.*(?:ERROR|FATAL|PANIC|WARNING):.*$",
            self._server.log.read_text(),
            re.MULTILINE,
        )
        if bad:
            raise ChildFailed(f"PostgreSQL's log has {bad[:3]}")


class StressLoad(Load):
    """Rounds of ``kmap stress`` with all kinds of fault, each with another seed."""

    name = "stress"

    def __init__(self, directory: Path, env: Mapping[str, str], seed: int = 1) -> None:
        super().__init__(directory, launch.without_kmap(env))
        self.env["KMAP_LIB_DIR"] = str(native.library_path().parent)
        self._seed = seed
        self.faults: Counter[str] = Counter()

    def round(self, seconds: int) -> None:
        seed = self._seed + self._rounds
        self._rounds += 1
        text = self.run_program(
            "stress",
            [
                *(sys.executable, "-m", "kmap.stress", "--json", "--seed", str(seed)),
                *("--duration", str(seconds), "--jobs", "1", "--patience", "60"),
            ],
            seconds + 120,
            exits=(0, 1),
        )
        document = json.loads(text)
        if not document["ok"]:
            (self.directory / f"failure-{seed}.json").write_text(text)
            first = document["failures"][0]
            raise ChildFailed(
                f"stress: {first['kind']}: {first['detail'][:2000]}\n"
                f"replay: {first['replay']}"
            )
        self.done["stress cases"] += sum(
            level["cases"] for level in document["levels"].values()
        )
        self.done["stress connections"] += document["connections"]
        self.done["stress bytes by ring"] += document["ring_bytes"]
        self.faults.update(document["faults"])


LOADS: dict[str, type[Load]] = {
    load.name: load for load in (EnvoyLoad, RedisLoad, PostgresLoad, StressLoad)
}
