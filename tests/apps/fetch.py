# SPDX-License-Identifier: Apache-2.0
"""HTTP bodies, a client process that fetches and sends them, and wrk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.apps.process import PROGRAMS, Launch, Program, find_program, python

KIB = 1024
MIB = 1024 * KIB
BODY_SIZES = (0, 1, 100, 1000, 16 * KIB, 65_537, MIB, 8 * MIB)


@dataclass(frozen=True)
class Bodies:
    """Files of many sizes with random content, by name, and their SHA-256."""

    directory: Path
    digests: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Smallest first."""
        return list(self.digests)

    def size(self, name: str) -> int:
        """Bytes of one."""
        return (self.directory / name).stat().st_size


@dataclass(frozen=True)
class Request:
    """One request that the client makes, and the SHA-256 it must have back."""

    method: str
    path: str
    digest: str
    upload: Path | None = None
    status: int = 200


def gets(bodies: Bodies, prefix: str = "/") -> list[Request]:
    """A request for every body."""
    return [
        Request("GET", f"{prefix}{name}", digest)
        for name, digest in bodies.digests.items()
    ]


def start_client(
    launch: Launch,
    port: int,
    requests: Sequence[Request],
    *,
    env: Mapping[str, str],
    connections: int = 3,
    keep_alive: bool = True,
    program: Sequence[str] | None = None,
) -> Program:
    """Makes the requests on each of some connections at once and checks the bodies.

    The client lives, its connections open, until it is told to finish.
    """
    plan = {
        "port": port,
        "connections": connections,
        "requests": [
            [each.method, each.path, str(each.upload) if each.upload else None]
            for each in requests
        ],
    }
    client = launch([*(program or python("http_client")), json.dumps(plan)], env=env)
    report = json.loads(client.wait_line())
    assert report["connects"] == (
        connections if keep_alive else connections * len(requests)
    )
    seen = Counter(tuple(answer) for answer in report["answers"])
    assert seen == Counter(
        {
            (each.method, each.path, each.status, each.digest): connections
            for each in requests
        }
    )
    return client


def total_size(bodies: Bodies, requests: Sequence[Request]) -> int:
    """Bytes of the bodies of these requests, sent or fetched."""
    return sum(bodies.size(Path(each.path).name) for each in requests)


@dataclass(frozen=True)
class Load:
    """What a run of wrk did."""

    requests: int
    bytes: int


def run_wrk(
    launch: Launch,
    port: int,
    path: str,
    body: Path,
    *,
    env: Mapping[str, str],
    connections: int = 32,
    seconds: int = 2,
) -> Load:
    """Runs wrk; every body is compared in wrk, and there must be no error."""
    done = launch(
        [
            find_program("wrk"),
            f"-c{connections}",
            "-t2",
            f"-d{seconds}s",
            "-s",
            PROGRAMS / "wrk_check.lua",
            f"http://127.0.0.1:{port}{path}",
            "--",
            body,
        ],
        env=env,
    ).wait()
    report = json.loads(done.splitlines()[-1])
    for error in ("connect", "read", "write", "timeout", "status", "different"):
        assert report[error] == 0, report
    assert report["requests"] > connections, report
    return Load(report["requests"], report["bytes"])
