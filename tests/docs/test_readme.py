# SPDX-License-Identifier: Apache-2.0
"""Every command of the README is run, as it stands there.

A command is a line of an indented block.  In a network namespace of its own, in a
directory that has the reader's envoy.yaml, my-service and deployment.yaml, they run by
bash.  A line that is new in the README fails until it is listed here.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kmap.demo import programs
from kmap.results import CannotRun
from tests.builds import ROOT

README = ROOT / "README.md"
TOUR = Path(__file__).parent / "programs/tour.py"

# Too long or too large for this test, and what runs the same.
ELSEWHERE = {
    "./scripts/demo": "tests/cli/test_demo.py",
    "./scripts/test": "tests/docs/test_readme.py",
    "python3 -m venv kmap-venv": "scripts/dist",
    ". kmap-venv/bin/activate": "scripts/dist",
    "pip install .": "tests/dist/test_dist.py",
    "pip install '.[kubernetes]'": "tests/dist/test_dist.py",
}
# Run until they are stopped; the port on which they then listen.
SERVERS = {
    "kmap run -- envoy -c envoy.yaml": 10000,
    "kmap run -- ./my-service": 8080,
    'LD_PRELOAD="$(kmap path)" ./my-service': 8080,
    "kmap run --policy hops.rules -- envoy -c envoy.yaml": 10000,
    "kmap run --policy hops.rules -- ./my-service": 8080,
    "KMAP_DISABLE=1 kmap run -- ./my-service": 8080,
    "kmap run --log debug -- ./my-service": 8080,
}
SERVICE = """#!/bin/sh
exec {nginx} -p "$PWD" -c {conf} -g 'daemon off; pid pid; error_log stderr; user root;'
"""
# A cluster is out of reach: this only sees that what it is given is a manifest.
KUBECTL = """#!/bin/sh
exec {python} -c 'import sys, yaml
assert sys.argv[1:] == ["apply", "-f", "-"]
print(*(document["kind"] for document in yaml.safe_load_all(sys.stdin)))' "$@"
"""
DEPLOYMENT = """apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      containers:
      - {name: service, image: registry.example/shop:1}
"""


def commands() -> list[str]:
    """Lines of the indented blocks, without their comments."""
    text = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.M | re.S)
    found = re.findall(r"(?:(?<=\n\n)|(?<=\n))    (\S.*)", text)
    return [re.sub(r"\s+#\s.*$", "", line).rstrip() for line in found]


def test_commands_are_found() -> None:
    found = commands()
    assert "kmap ss -a" in found
    assert len(found) > 15


def test_figures_are_those_of_the_picture() -> None:
    """The short table has what kmap demo showed in the picture beside it."""
    picture = html.unescape((ROOT / "docs/figures/demo.svg").read_text())
    shown = re.sub(r"<[^>]*>", " ", picture).replace("\xa0", " ")
    rows = re.findall(r"^\| (?:HTTP|TCP proxy) .*$", README.read_text(), re.M)
    assert len(rows) == 4
    for row in rows:
        gains = re.findall(r"\d+\.\d\dx", row)
        assert len(gains) == 2
        for gain in gains:
            assert f" {gain}" in shown, row
        for ms in re.findall(r"(\d+\.\d) ms", row):
            microseconds = [int(us) for us in re.findall(r"\b(\d+) us\b", shown)]
            assert ms in {f"{us / 1000:.1f}" for us in microseconds} or (
                f" {ms} ms" in shown
            ), row


@pytest.mark.parametrize("command", ELSEWHERE)
def test_those_that_are_tested_elsewhere(command: str) -> None:
    assert command in commands()
    assert (ROOT / ELSEWHERE[command]).is_file()
    script = ROOT / command
    if command.startswith("./"):
        assert script.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(script)], check=True)


def _place(directory: Path) -> dict[str, str]:
    """The reader's directory; the environment in which commands find programs."""
    try:
        envoy, nginx = programs.find_envoy().path, programs.find_nginx().path
    except CannotRun as error:
        pytest.skip(str(error))
    tools = directory / "tools"
    tools.mkdir()
    example = ROOT / "deploy/compose"
    scripts = {
        tools / "kmap": f'#!/bin/sh\nexec {sys.executable} -m kmap "$@"\n',
        tools / "envoy": f'#!/bin/sh\nexec {envoy} "$@" --use-dynamic-base-id\n',
        tools / "kubectl": KUBECTL.format(python=sys.executable),
        directory / "my-service": SERVICE.format(
            nginx=nginx, conf=example / "nginx.conf"
        ),
    }
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(example / "envoy.yaml", directory)
    (directory / "deployment.yaml").write_text(DEPLOYMENT)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }


@pytest.mark.timeout(300)
def test_every_command_runs(kernel_env: dict[str, str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace takes root")
    env = {**kernel_env, **_place(tmp_path)}
    steps: list[list[object]] = []
    run: list[str] = []
    running: list[int] = []
    for command in commands():
        if command in ELSEWHERE:
            continue
        if command not in SERVERS:
            run.append(command)
            steps.append(["run", command])
            continue
        port = SERVERS[command]
        # A reader stops one before starting the next; the port says which.
        while port in running:
            running.pop()
            steps.append(["stop"])
        running.append(port)
        steps.append(["start", command, port])
        if len(running) == 2:
            steps.append(["ask", 300])
    unshare = shutil.which("unshare")
    assert unshare
    done = subprocess.run(
        [unshare, "--net", sys.executable, str(TOUR)],
        input=json.dumps(steps) + "\n",
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = dict(zip(run, json.loads(done.stdout), strict=True))
    for command, (status, out, err) in results.items():
        assert status == 0, f"{command}: {out}{err}"
    # The proxy and the service that the README has just started.
    for end in ("envoy", "nginx"):
        line = rf"^ring +{end}/\d+ .* 127\.0\.0\.1:8080 "
        assert re.search(line, results["kmap ss"][1], re.M), end
    line = r"^kernel +envoy/\d+ .* 127\.0\.0\.1:10000 .* peer-absent"
    assert re.search(line, results["kmap ss -a"][1], re.M)
    assert "upgrades" in results["kmap stats"][1]
    assert "KMAP_RING_SIZE" in results["kmap run --help"][1]
    assert results["kmap inject -f deployment.yaml | kubectl apply -f -"][1] == (
        "Deployment\n"
    )
