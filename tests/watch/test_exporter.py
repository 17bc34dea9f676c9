# SPDX-License-Identifier: Apache-2.0
"""kmap exporter, scraped; its documentation and the dashboard that is made for it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kmap import metrics
from tests.cli.peers import KMAP, Spawn, kmap, kmap_json, start
from tests.watch.programs import both_ends

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "kmap.json"
PROMTOOL = shutil.which("promtool")
# Of the kernel's, for the name of a program.
COMM_LENGTH = 15

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Program:
    """A process under Kmap, with both ends, whose name nobody else has."""

    def __init__(self, spawn: Spawn, env: Mapping[str, str], path: Path) -> None:
        path.symlink_to(sys.executable)
        self.comm = path.name
        self.process = spawn(
            [str(path), "-W", "error", both_ends.__file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def turn(self, count: int) -> None:
        """So many round trips on one connection; the other one stays cold."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


@pytest.fixture
def program(spawn: Spawn, kmap_env: dict[str, str], tmp_path: Path) -> Program:
    name = f"w{abs(hash(tmp_path)):x}"[:COMM_LENGTH]
    return Program(spawn, kmap_env, tmp_path / name)


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraper:
    """A collector within this process."""

    def __init__(self, *, per_process: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.collector = metrics.KmapCollector(per_process=per_process)
        self.registry.register(self.collector)

    def scrape(self) -> Samples:
        return samples(generate_latest(self.registry).decode())

    def of(self, program: Program) -> dict[str, float]:
        """The samples of one program, those of one name added up."""
        found: dict[str, float] = {}
        for (name, labels), value in self.scrape().items():
            if dict(labels).get("comm") == program.comm:
                found[name] = found.get(name, 0) + value
        return found


@pytest.fixture(params=[False, True], ids=["by-program", "per-process"])
def scraper(request: pytest.FixtureRequest) -> Iterator[Scraper]:
    found = Scraper(per_process=request.param)
    yield found
    found.collector.close()


def counters_of(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.endswith("_total")}


def test_counts_are_those_of_the_program(program: Program, scraper: Scraper) -> None:
    program.turn(100)
    found = scraper.of(program)
    assert found["kmap_upgrades_total"] == 2
    assert found["kmap_connections"] == 4
    assert found["kmap_processes"] == 1
    for way in ("rx", "tx"):
        ring = found[f"kmap_ring_{way}_bytes_total"]
        assert ring > 1000
        # Both ends.
        moved = 2 * 100 * both_ends.SIZE
        assert ring + found[f"kmap_kernel_{way}_bytes_total"] == moved
        # Of the other connection, what was sent; nobody has read it.
        moved += both_ends.COLD if way == "tx" else 0
        assert ring + found[f"kmap_socket_{way}_bytes_total"] == moved
    program.turn(10)
    assert scraper.of(program)["kmap_ring_rx_bytes_total"] == (
        found["kmap_ring_rx_bytes_total"] + 2 * 10 * both_ends.SIZE
    )


@pytest.mark.parametrize("how", ["exits", "is-killed"])
def test_counters_stay_when_the_process_ends(
    program: Program, scraper: Scraper, how: str
) -> None:
    program.turn(100)
    before = counters_of(scraper.of(program))
    # Counted after the last scrape that saw the process, and not lost.
    program.turn(50)
    if how == "exits":
        program.end()
    else:
        program.process.kill()
        program.process.wait()
    after = counters_of(scraper.of(program))
    gone = {name: value for name, value in before.items() if after[name] < value}
    assert not gone
    for way in ("rx", "tx"):
        name = f"kmap_ring_{way}_bytes_total"
        assert after[name] == before[name] + 2 * 50 * both_ends.SIZE
    again = scraper.of(program)
    assert counters_of(again) == after
    assert "kmap_connections" not in again


def test_a_program_that_starts_again_adds_to_its_name(
    spawn: Spawn, kmap_env: dict[str, str], program: Program, tmp_path: Path
) -> None:
    scraper = Scraper()
    program.turn(100)
    first = counters_of(scraper.of(program))
    program.end()
    (tmp_path / "again").mkdir()
    second = Program(spawn, kmap_env, tmp_path / "again" / program.comm)
    second.turn(100)
    both = counters_of(scraper.of(program))
    assert both["kmap_upgrades_total"] == 2 * first["kmap_upgrades_total"]
    assert both["kmap_ring_rx_bytes_total"] > 1.5 * first["kmap_ring_rx_bytes_total"]
    scraper.collector.close()


def test_names_are_bounded(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_PROGRAMS", 0)
    program.turn(100)
    scraper = Scraper()
    names = {dict(labels).get("comm") for _, labels in scraper.scrape()}
    assert names == {None, metrics.OTHER}
    scraper.collector.close()


def test_a_busy_program_only_counts_up(program: Program) -> None:
    """Several scrapes at once, while counts are on the move."""
    scraper = Scraper()
    program.turn(100)
    with ThreadPoolExecutor(4) as pool:
        last: dict[str, float] = {}
        for _ in range(5):
            program.turn(200)
            for found in list(pool.map(lambda _: scraper.of(program), range(4))):
                now = counters_of(found)
                assert all(now[name] >= value for name, value in last.items())
            last = counters_of(scraper.of(program))
    scraper.collector.close()


def documented() -> dict[str, tuple[str, tuple[str, ...], str]]:
    """The table of docs/metrics.md: type, labels and meaning by name."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(kmap_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", text, re.M)
    assert len(rows) == len({row[0] for row in rows})
    return {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in rows
    }


@contextlib.contextmanager
def serving(
    spawn: Spawn, env: Mapping[str, str], *options: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = spawn(
        [*KMAP, "exporter", "--port", "0", *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    match = re.search(r"serving (http://\S+)", line)
    assert match, line
    yield process, match[1]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
        return text


def test_a_scrape_is_what_the_documentation_says(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    one_sided = start(spawn, kernel_env, kmap_env)
    with serving(spawn, kernel_env, "--json") as (exporter, url):
        text = fetch(url)
        assert fetch(url).count("# HELP") == text.count("# HELP")
        exporter.send_signal(signal.SIGINT)
        assert exporter.stdout is not None
        document = json.loads(exporter.stdout.read())
        assert exporter.wait() == 0
    assert (document["schema"], document["ok"]) == ("kmap.exporter/1", True)
    assert url == f"http://{document['address']}:{document['port']}/metrics"

    told = documented()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M))
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.M))
    assert {name: (types[name], helps[name]) for name in types} == {
        name: (kind, meaning) for name, (kind, _, meaning) in told.items()
    }
    seen: set[str] = set()
    for (name, labels), _ in samples(text).items():
        assert {label for label, _ in labels} == set(told[name][1]), name
        seen.add(name)
    # A value of each can be had; nothing falls back here but by chance.
    assert set(told) - seen <= {"kmap_fallbacks_total"}
    states = {
        dict(labels)["state"]
        for name, labels in samples(text)
        if name == "kmap_connections"
    }
    assert {"ring", "kernel"} <= states
    assert peers.finish() == one_sided.finish() == (0, 0)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize("options", [(), ("--per-process",)])
def test_promtool_finds_no_fault(
    options: tuple[str, ...],
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
) -> None:
    assert PROMTOOL is not None
    start(spawn, kmap_env, kmap_env)
    scrape = kmap("exporter", "--once", *options, env=kernel_env)
    assert scrape.returncode == 0, scrape.stderr
    assert "kmap_upgrades_total{" in scrape.stdout
    assert ("pid=" in scrape.stdout) == bool(options)
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=scrape.stdout,
        text=True,
        capture_output=True,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def expressions(node: Any) -> Iterator[str]:
    """Everything in the dashboard that is sent to Prometheus."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr" or (key == "query" and str(value).endswith(")")):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for each in node:
            yield from expressions(each)


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = list(expressions(dashboard))
    assert len(asked) > len(dashboard["panels"]) > 5
    labels = {metric.name: {*metric.labels, "instance"} for metric in metrics.metrics()}
    for text in asked:
        names = re.findall(r"\bkmap_\w+", text)
        assert names, text
        for name, matchers in re.findall(r"\b(kmap_\w+)(?:\{([^}]*)\})?", text):
            assert name in labels, text
            used = set(re.findall(r"(\w+)\s*=~?", matchers))
            assert used <= labels[name], text
        for by in re.findall(r"by \((\w+)\)", text):
            assert all(by in labels[name] for name in names), text
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_dashboard_is_one_of_grafana() -> None:
    """Grafana's own library reads it, and knows every field that it has."""
    register_default_plugins()
    document = json.loads(DASHBOARD.read_text())
    read = Dashboard.from_json(document)
    again = json.loads(json.dumps(read, cls=JSONEncoder))
    assert lost(document, again) == []


def lost(before: Any, after: Any, where: str = "") -> list[str]:
    """Where before has something that after has not, or otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            each
            for key, value in before.items()
            for each in lost(value, after.get(key, lost), f"{where}/{key}")
        ]
    if (
        isinstance(before, list)
        and isinstance(after, list)
        and len(before) == len(after)
    ):
        return [
            each
            for number, pair in enumerate(zip(before, after, strict=True))
            for each in lost(*pair, f"{where}/{number}")
        ]
    return [] if before == after else [where]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    found = [e for e in expressions(json.loads(DASHBOARD.read_text())) if "(" in e]
    queries = [e for e in found if not e.startswith("label_values")]
    rules = [
        {
            "record": f"kmap:query{number}",
            "expr": text.replace("$__rate_interval", "1m").replace("$__range", "1h"),
        }
        for number, text in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"
    # JSON is YAML.
    file.write_text(json.dumps({"groups": [{"name": "kmap", "rules": rules}]}))
    checked = subprocess.run(
        [PROMTOOL, "check", "rules", str(file)], text=True, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout


def test_once_as_json(kernel_env: dict[str, str]) -> None:
    document = kmap_json("exporter", "--once", env=kernel_env)
    assert "# TYPE kmap_processes gauge" in document["text"]


def test_an_address_that_cannot_be_had(kernel_env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = kmap("exporter", "--port", port, "--json", env=kernel_env)
    assert done.returncode == 77
    assert f"port {port}" in done.stderr
    assert "--port" in json.loads(done.stdout)["error"]
    nowhere = kmap("exporter", "--bind", "no.such.host.invalid", env=kernel_env)
    assert nowhere.returncode == 77
    assert "--bind" in nowhere.stderr
    assert kmap("exporter", "--port", "65536", env=kernel_env).returncode == 2


def test_it_ends_in_order_at_sigterm(spawn: Spawn, kernel_env: dict[str, str]) -> None:
    with serving(spawn, kernel_env) as (exporter, url):
        assert "kmap_build_info" in fetch(url)
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait() == 143
        assert exporter.stderr is not None
        assert exporter.stderr.read() == ""
