# SPDX-License-Identifier: Apache-2.0
"""The parts of scripts/soak: that it sees a leak, and that it sees none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kmap.demo.children import Child, Deadline
from tests.conftest import Spawn
from tests.soak import report, samples
from tests.soak.__main__ import DOCS, TABLE, main
from tests.soak.judge import Verdict, judge
from tests.soak.loads import Load
from tests.soak.report import Soak
from tests.soak.run import Runner
from tests.soak.samples import METRICS, Held, Sample

_HOUR_S = 3600
_BASE = Held(1, pss_kb=80_000, shmem_kb=4_000, fds=60, threads=7, mappings=120)


def _verdicts(
    change: Callable[[int], dict[str, float]], final: Held = _BASE, count: int = 360
) -> dict[str, Verdict]:
    """Verdicts on a server that differs from the base by what change says."""
    series = []
    for number in range(count):
        values = {**vars(_BASE), **change(number)}
        series.append(Sample(number * _HOUR_S / count, {"server": Held(**values)}, 0))
    found = judge({"server": _BASE}, series, {"server": final})
    return {verdict.metric: verdict for verdict in found}


def _bad(verdicts: dict[str, Verdict]) -> set[str]:
    return {name for name, verdict in verdicts.items() if not verdict.ok}


def test_a_flat_server_is_flat() -> None:
    assert set(_verdicts(lambda n: {})) == set(METRICS)
    assert _bad(_verdicts(lambda n: {})) == set()


def test_load_that_comes_and_goes_is_no_growth() -> None:
    # Rounds of ten samples: connections, and what they cost.
    verdicts = _verdicts(
        lambda n: {
            "fds": 60 + 50 * (n % 10 > 3),
            "mappings": 120 + 50 * (n % 10 > 3),
            "pss_kb": 80_000 + 9_000 * (n % 10 > 3),
        }
    )
    assert _bad(verdicts) == set()


def test_connections_that_stay_longer_are_no_growth() -> None:
    """Where no sample falls between two rounds any more, as on a busy machine."""

    def busier(number: int) -> dict[str, float]:
        rows = 0 if number % 10 < 4 and number < 250 else 10
        return {"rows": rows, "fds": 60 + rows, "mappings": 120 + rows}

    assert _bad(_verdicts(busier)) == set()
    without = _verdicts(lambda n: {**busier(n), "rows": 0})
    assert _bad(without) == {"fds", "mappings"}


def test_connections_that_are_kept_show_at_the_end() -> None:
    """They are no growth, and not given back."""
    kept = Held(**{**vars(_BASE), "rows": 5, "fds": 65, "mappings": 125})
    verdicts = _verdicts(
        lambda n: {"rows": n // 72, "fds": 60 + n // 72, "mappings": 120 + n // 72},
        kept,
    )
    assert _bad(verdicts) == {"fds"}
    assert verdicts["fds"].flat


def test_growth_until_everything_is_warm_is_no_leak() -> None:
    warm = _verdicts(lambda n: {"pss_kb": 80_000 + min(n, 120) * 200})
    assert _bad(warm) == set()


def test_one_sample_at_a_bad_moment_is_no_growth() -> None:
    assert _bad(_verdicts(lambda n: {"fds": 500 if n == 350 else 60})) == set()


@pytest.mark.parametrize(
    ("metric", "per_sample"),
    [
        ("fds", 0.1),
        ("threads", 0.02),
        ("mappings", 0.1),
        ("pss_kb", 30),
        ("shmem_kb", 20),
    ],
)
@pytest.mark.parametrize("noise", [False, True])
def test_a_leak_is_growth(metric: str, per_sample: float, noise: bool) -> None:
    """A leak of one descriptor in a hundred seconds, say."""
    base = getattr(_BASE, metric)

    def leak(number: int) -> dict[str, float]:
        wave = base * 0.2 * (number % 10 > 3) if noise else 0
        return {metric: int(base + wave + per_sample * number)}

    verdicts = _verdicts(leak)
    assert _bad(verdicts) == {metric}
    assert verdicts[metric].judged
    assert not verdicts[metric].flat


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_given_back_is_seen(metric: str) -> None:
    more = {**vars(_BASE), metric: getattr(_BASE, metric) + 20_000}
    verdicts = _verdicts(lambda n: {}, Held(**more))
    assert _bad(verdicts) == {metric}
    assert verdicts[metric].flat


def test_few_samples_judge_no_growth() -> None:
    verdicts = _verdicts(lambda n: {"fds": 60 + 10 * n}, count=6)
    assert not verdicts["fds"].judged
    assert verdicts["fds"].ok


def _soak(verdicts: Sequence[Verdict], **other: Any) -> Soak:
    return Soak(
        **{
            "minutes": 60.0,
            "cpus": 2,
            "own_network": True,
            "verdicts": verdicts,
            "series": [Sample(1.0, {"server": _BASE}, 0)],
            "done": {"requests": 12345, "stress bytes by ring": 1 << 30},
            "faults": {"peer-crash": 7},
            "upgrades": {"server": 9},
            "names_left": 0,
            "resets": 0,
            **other,
        }
    )


def test_the_report_says_what_was_found() -> None:
    good = _soak(list(_verdicts(lambda n: {}).values()))
    assert good.exit_code == 0
    text = report.markdown(good)
    assert "no error, all flat" in text
    assert "| requests | 12,345 |" in text
    assert "peer-crash 7" in text
    assert text.count(" flat |") == len(METRICS)
    document = json.loads(json.dumps(good.to_json()))
    assert document["ok"] is True
    assert document["samples"][0]["groups"]["server"]["fds"] == 60


@pytest.mark.parametrize("leak", [0, 1])
def test_a_run_is_judged_again_from_its_file(leak: int, tmp_path: Path) -> None:
    series = [
        Sample(at, {"server": Held(**{**vars(_BASE), "fds": 60 + leak * at})}, 0)
        for at in range(100)
    ]
    last = Held(**{**vars(_BASE), "fds": 60 + leak * 100})
    first = _soak(
        judge({"server": _BASE}, series, {"server": last}), series=series, kernel="6.1"
    )
    file = tmp_path / "soak.json"
    file.write_text(json.dumps(first.to_json()))
    again = Soak.from_json(json.loads(file.read_text()))
    assert again.to_json() == first.to_json()
    assert main(["--again", str(file)]) == first.exit_code == leak


def test_the_report_says_what_is_wrong() -> None:

    growing = _soak(list(_verdicts(lambda n: {"fds": 60 + n}).values()))
    assert growing.exit_code == 1
    assert "NOT all flat" in report.markdown(growing)
    assert "| GROWS |" in report.markdown(growing)
    kept = _verdicts(lambda n: {}, Held(**{**vars(_BASE), "fds": 90}))
    assert "| NOT GIVEN BACK |" in report.markdown(_soak(list(kept.values())))


@pytest.mark.parametrize(
    "other", [{"errors": ["redis: wrong"]}, {"names_left": 1}, {"resets": 1}]
)
def test_other_faults_fail_it_too(other: dict[str, Any]) -> None:
    assert _soak([], **other).exit_code == 1
    shared = {"own_network": False} if "names_left" in other else {"minutes": 1.0}
    assert _soak([], **other, **shared).exit_code == (0 if "names_left" in other else 1)


_GROWS = """
import mmap, os, sys, threading
print(flush=True)
sys.stdin.readline()
fds = [os.memfd_create("kmap-soak-test") for _ in range(3)]
over = threading.Event()
threading.Thread(target=over.wait, daemon=True).start()
os.ftruncate(fds[0], 64 << 20)
mapping = mmap.mmap(fds[0], 64 << 20)
mapping.write(b"x" * (64 << 20))
print(flush=True)
sys.stdin.readline()
"""


def test_a_process_is_seen_as_it_is(spawn: Spawn, kernel_env: dict[str, str]) -> None:
    process = spawn(
        [sys.executable, "-c", _GROWS],
        env=kernel_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline()
    before = samples.group([process.pid])
    assert before.processes == 1
    # What it shares is divided by how many have it, and they come and go.
    assert 0 < before.pss_kb < 65536
    assert before.shmem_kb < 65536
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline()
    now = samples.group([process.pid])
    assert now.fds - before.fds == 3 + 1  # mmap keeps a duplicate
    assert now.threads - before.threads == 1
    assert now.mappings > before.mappings
    assert now.pss_kb > now.shmem_kb >= 65536
    assert samples.held(2**22 + 1) is None


def test_rendezvous_names_are_counted() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        # Other tests bind and free such names meanwhile.
        sock.bind(f"\0kmap1-soak-test-{os.getpid()}")
        assert samples.names() >= 1


_LEAKER = """
import os, signal
there, _ = os.pipe()
signal.signal(signal.SIGUSR1, lambda *_: os.dup(there))
while True: signal.pause()
"""


class _Leaky(Load):
    """A server that keeps a descriptor of each round."""

    name = "leaky"

    def start(self) -> None:
        self._server = Child(
            "leaker",
            [sys.executable, "-I", "-c", _LEAKER],
            env=self.env,
            log=self.directory / "log",
        )
        self.stack.callback(self._server.close)
        deadline = Deadline(20, "the leaker did not start")
        # Its handler is there: before, the signal would end it.
        while not self._catches(signal.SIGUSR1):
            deadline.pause()

    def _catches(self, number: int) -> bool:
        with open(f"/proc/{self._server.pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def groups(self) -> dict[str, list[int]]:
        return {"leaker": [self._server.pid]}

    def round(self, seconds: int) -> None:
        before = samples.group([self._server.pid]).fds
        self._server.send(signal.SIGUSR1)
        deadline = Deadline(20, "the leaker did not leak")
        while samples.group([self._server.pid]).fds == before:
            deadline.pause(0.1)
        self.done["rounds"] += 1


def test_a_server_that_leaks_is_found(
    tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    load = _Leaky(tmp_path / "leaky", kernel_env)
    runner = Runner([load], round_s=1, rest_s=0.5)
    try:
        seen = runner.run(8, 0.1)
    finally:
        load.close()
    assert seen.errors == []
    assert load.done["rounds"] > 10
    verdicts = {v.metric: v for v in judge(seen.base, seen.series, seen.final)}
    assert _bad(verdicts) == {"fds"}
    assert verdicts["fds"].judged
    assert not verdicts["fds"].flat
    assert not verdicts["fds"].returned


def test_an_error_ends_it_and_is_told(
    tmp_path: Path, kernel_env: dict[str, str]
) -> None:
    class Failing(Load):
        name = "failing"

        def round(self, seconds: int) -> None:
            raise ValueError("as it should")

    load = Failing(tmp_path / "failing", kernel_env)
    seen = Runner([load], round_s=1, rest_s=0.1).run(600, 0.5)
    assert seen.errors == ["failing: ValueError: as it should"]


def test_redis_for_a_moment(tmp_path: Path, kernel_env: dict[str, str]) -> None:
    """The whole tool with one of its loads."""
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "tests.soak", "--loads", "redis"),
            *("--minutes", "0.05", "--json", out, "--keep", tmp_path / "kept"),
        ],
        env=kernel_env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert document["ok"] is True
    assert document["errors"] == []
    assert document["upgrades"]["redis-server"] > 50
    assert document["done"]["rounds of values read back from redis"] >= 4
    assert "redis-server" in done.stdout
    # It ended what it started.
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path / "kept").encode() not in process.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.mark.parametrize(
    "arguments",
    [("--minutes", "0"), ("--loads", "redis,oracle"), ("--docs", "--loads", "redis")],
)
def test_usage(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_the_document_has_a_place_for_the_table() -> None:
    assert TABLE.search(DOCS.read_text())
