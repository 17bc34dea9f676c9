# SPDX-License-Identifier: Apache-2.0
"""The command kmap inject."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.peers import KMAP, kmap
from tests.kubernetes.corpus import FILES, data_of, injected

BY_NAME = {file.name: file for file in FILES}
POD = BY_NAME["pod.yaml"]


def from_stdin(
    *arguments: str, data: bytes, env: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*KMAP, "inject", *arguments], input=data, env=env, capture_output=True
    )


def test_a_file_and_standard_input_and_back(kernel_env: dict[str, str]) -> None:
    done = kmap("inject", "-f", POD, env=kernel_env)
    assert done.returncode == 0
    assert done.stdout == injected(POD.read_text()).text
    assert done.stderr == "kmap inject: Pod web: in app, envoy\n"
    # Also with the line ends of another system, which no step may change.
    data = done.stdout.replace("\n", "\r\n").encode()
    again = from_stdin("-f", "-", data=data, env=kernel_env)
    assert (again.returncode, again.stdout) == (0, data)
    assert again.stderr == b"kmap inject: Pod web: already in app, envoy\n"
    back = from_stdin("-f", "-", "--uninject", data=data, env=kernel_env)
    assert back.stdout == POD.read_bytes().replace(b"\n", b"\r\n")
    assert back.stderr == b"kmap inject: Pod web: taken out\n"


def test_several_files(kernel_env: dict[str, str]) -> None:
    files = [BY_NAME[n] for n in ("no-final-newline.yaml", "cronjob.yaml", "pod.json")]
    words = [word for file in files for word in ("-f", str(file))]
    done = kmap("inject", *words, env=kernel_env)
    assert done.returncode == 0
    alone = [data for f in files for data in data_of(injected(f.read_text()).text)]
    assert [data for data in data_of(done.stdout) if data is not None] == alone


def test_what_it_says_of_each(kernel_env: dict[str, str]) -> None:
    done = kmap("inject", "-f", BY_NAME["several.yaml"], env=kernel_env)
    assert done.stderr.splitlines() == [
        "kmap inject: StatefulSet db: in db",
        'kmap inject: DaemonSet agent: left out: kmap.io/inject is "false"',
        "kmap inject: Job once-*: in once",
    ]
    config = b"apiVersion: v1\nkind: ConfigMap\n"
    none = from_stdin("-f", "-", data=config, env=kernel_env)
    assert (none.returncode, none.stdout) == (0, config)
    assert none.stderr == b"kmap inject: there is no pod in it\n"


def test_json(kernel_env: dict[str, str]) -> None:
    arguments = ("--image", "registry.example/kmap:2", "--set", "KMAP_SPIN_US=0")
    done = kmap("inject", "--json", "-f", POD, *arguments, env=kernel_env)
    document = json.loads(done.stdout)
    assert (document["schema"], document["ok"]) == ("kmap.inject/1", True)
    assert "registry.example/kmap:2" in document["manifest"]
    assert "KMAP_SPIN_US" in document["manifest"]
    assert document["problems"] == []
    (workload,) = document["workloads"]
    assert workload == {
        "file": str(POD),
        "line": 2,
        "kind": "Pod",
        "name": "web",
        "outcome": "changed",
        "containers": ["app", "envoy"],
        "reason": "",
    }


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_problem_prints_no_manifest(
    kernel_env: dict[str, str], tmp_path: Path, as_json: bool
) -> None:
    """What is piped into kubectl must not be half of it."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(POD.read_text() + "---\na: [\n")
    words = ["--json"] if as_json else []
    done = kmap("inject", "-f", POD, "-f", bad, *words, env=kernel_env)
    assert done.returncode == 1
    line = len(bad.read_text().splitlines()) + 1
    if as_json:
        document = json.loads(done.stdout)
        assert (document["ok"], document["manifest"]) == (False, None)
        (problem,) = document["problems"]
        assert (problem["file"], problem["line"]) == (str(bad), line)
    else:
        assert done.stdout == ""
        assert done.stderr.startswith(f"kmap inject: {bad}:{line}: while parsing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: -f/--filename"),
        (("-f", "/nowhere/pod.yaml"), "/nowhere/pod.yaml cannot be read: No such file"),
        (("-f", "/"), "/ cannot be read: Is a directory"),
        (("-f", POD, "--set", "KMAP_LOG"), "--set KMAP_LOG has no value"),
        (("-f", POD, "--set", "KMAP_X=1"), "--set KMAP_X is not a setting"),
        (("-f", POD, "--set", "KMAP_SPIN_US=x"), "KMAP_SPIN_US=x: it is a number from"),
        (("-f", POD, "--uninject", "--image", "x"), "--uninject takes out"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[:12],
)
def test_usage(
    kernel_env: dict[str, str], arguments: tuple[object, ...], message: str
) -> None:
    done = kmap("inject", *arguments, env=kernel_env)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_not_utf_8(kernel_env: dict[str, str]) -> None:
    done = from_stdin("-f", "-", data=b"a: \xff\n", env=kernel_env)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"(standard input) is not UTF-8 (byte 3): convert it first" in done.stderr


def test_without_the_packages(kernel_env: dict[str, str], tmp_path: Path) -> None:
    """It says what to install."""
    # A module of that name that cannot be imported, in front of the real one.
    (tmp_path / "jsonpatch.py").write_text("raise ImportError(name='jsonpatch')\n")
    env = {**kernel_env, "PYTHONPATH": str(tmp_path)}
    done = kmap("inject", "-f", POD, env=env)
    assert (done.returncode, done.stdout) == (77, "")
    assert "jsonpatch is not installed: pip install 'kmap[kubernetes]'" in done.stderr
