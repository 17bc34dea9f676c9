# SPDX-License-Identifier: Apache-2.0
"""An echo server and a client as real processes, for the tests of the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
Spawn = Callable[..., "subprocess.Popen[str]"]
KMAP = (sys.executable, "-m", "kmap")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Looks again and again until condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        os.sched_yield()


@dataclass(frozen=True)
class Peers:
    """Both processes and the port between them."""

    server: subprocess.Popen[str]
    client: subprocess.Popen[str]
    port: int

    def tell(self, line: str) -> str:
        """Sends a line to the client and returns its answer."""
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(line + "\n")
        self.client.stdin.flush()
        return self.client.stdout.readline().strip()

    def finish(self) -> tuple[int, int]:
        """Ends the client; the exit codes of both."""
        assert self.client.stdin is not None
        self.client.stdin.close()
        return self.client.wait(), self.server.wait()


def python(name: str, *arguments: object) -> list[str]:
    """The command line of one of the programs."""
    return [
        sys.executable,
        "-W",
        "error",
        str(PROGRAMS / f"{name}.py"),
        *map(str, arguments),
    ]


def start(
    spawn: Spawn,
    server_env: Mapping[str, str],
    client_env: Mapping[str, str],
    *,
    rounds: int = 50,
    size: int = 1000,
    prefix: Sequence[str] = (),
) -> Peers:
    """Starts both; returns when the client has made its round trips."""
    server = spawn(
        [*prefix, *python("echo_server")], env=server_env, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    client = spawn(
        [*prefix, *python("echo_client", port, rounds, size)],
        env=client_env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    return Peers(server, client, port)


def kmap(
    *arguments: object, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    return subprocess.run(
        [*KMAP, *map(str, arguments)],
        env=env,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def kmap_json(*arguments: object, env: Mapping[str, str]) -> Any:
    """Runs one command with --json; its one document."""
    done = kmap(*arguments, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
