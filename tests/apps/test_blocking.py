# SPDX-License-Identifier: Apache-2.0
"""Servers and clients with a blocking thread per connection, in Python and Java."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kmap import procfs
from tests.apps.process import PROGRAMS, Launch, Program, find_program, python
from tests.apps.rings import ExpectRing, Rings, rings

Frames = Callable[..., list[str]]


@pytest.fixture(scope="session")
def java_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled Java program."""
    classes = tmp_path_factory.mktemp("classes")
    source = PROGRAMS / "BlockingFrames.java"
    subprocess.run(
        [find_program("javac"), "-d", classes, source], check=True, timeout=60
    )
    return classes


@pytest.fixture
def frames(request: pytest.FixtureRequest) -> Frames:
    """The command line of the program in a language, with its arguments."""

    def command(language: str, *arguments: object) -> list[str]:
        if language == "python":
            return python("frames", *arguments)
        java = find_program("java")
        classes = request.getfixturevalue("java_classes")
        # Neither a file in a place shared by all, nor a long warm-up.
        options = ("-XX:-UsePerfData", "-XX:TieredStopAtLevel=1", "-Xmx256m")
        return [java, *options, "-cp", str(classes), "BlockingFrames"] + [
            str(argument) for argument in arguments
        ]

    return command


def run_both(
    launch: Launch,
    frames: Frames,
    languages: tuple[str, str],
    envs: tuple[Mapping[str, str], Mapping[str, str]],
) -> tuple[Program, Program, int]:
    """Server and client, when all frames have come back, and the bytes moved."""
    server = launch(frames(languages[0], "server"), env=envs[0])
    port = int(server.wait_line())
    client = launch(frames(languages[1], "client", port), env=envs[1])
    report = json.loads(client.wait_line())
    assert report["threads"] == 4, str(client)
    return server, client, report["bytes"]


@pytest.mark.parametrize("client_language", ["python", "java"])
@pytest.mark.parametrize("server_language", ["python", "java"])
def test_frames_come_back(
    launch: Launch,
    frames: Frames,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    server_language: str,
    client_language: str,
) -> None:
    languages = (server_language, client_language)
    server, client, moved = run_both(launch, frames, languages, (mode_env, mode_env))
    expect_ring(server, least=moved * 9 // 10, upgrades=4)
    expect_ring(client, least=moved * 9 // 10, upgrades=4)
    client.finish()
    server.finish()


@pytest.mark.parametrize("language", ["python", "java"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_one_side_alone_stays_on_the_kernel(
    launch: Launch,
    frames: Frames,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    language: str,
    side: str,
) -> None:
    envs = (kmap_env, kernel_env) if side == "server" else (kernel_env, kmap_env)
    server, client, _ = run_both(launch, frames, (language, language), envs)
    assert procfs.has_library(server.pid) == (side == "server")
    assert procfs.has_library(client.pid) == (side == "client")
    assert rings([*server.family(), *client.family()]) == Rings()
    client.finish()
    server.finish()


def test_disabled_on_one_side_stays_on_the_kernel(
    launch: Launch, frames: Frames, kmap_env: dict[str, str]
) -> None:
    disabled = {**kmap_env, "KMAP_DISABLE": "1"}
    both = ("python", "python")
    server, client, _ = run_both(launch, frames, both, (kmap_env, disabled))
    assert procfs.has_library(server.pid)
    assert procfs.has_library(client.pid)
    assert rings([*server.family(), *client.family()]) == Rings()
    client.finish()
    server.finish()
