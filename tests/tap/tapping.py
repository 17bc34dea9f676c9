# SPDX-License-Identifier: Apache-2.0
"""Runs kmap tap, and has tshark read what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kmap.snapshot import connections
from tests.cli.peers import wait_until

PROGRAMS = Path(__file__).parent / "programs"
Spawn = Callable[..., "subprocess.Popen[str]"]

# Without capabilities root is a user like others: it owns its processes, no more.
_NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def needs(program: str, package: str) -> str:
    """The path of a program that Debian has."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program}: apt-get install {package}")
    return found


@dataclass(frozen=True)
class As:
    """Who runs the programs and the tap."""

    name: str
    prefix: tuple[str, ...]


# Owns nothing of what root starts.
NOBODY = As("nobody", ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))


def someone(name: str) -> As:
    """The superuser, who maps segments, or an owner, who reads memory."""
    root = os.geteuid() == 0
    if name == "root":
        if not root:
            pytest.skip("needs root")
        return As(name, ())
    return As(name, _NO_CAPABILITIES if root else ())


@dataclass(eq=False)
class Talker:
    """A program of this directory that answers a line with a line."""

    process: subprocess.Popen[str]

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer, "it ended"
        return answer

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


def talker(
    spawn: Spawn, who: As, env: Mapping[str, str], name: str, *arguments: object
) -> Talker:
    """Starts one."""
    argv = [sys.executable, "-W", "error", str(PROGRAMS / f"{name}.py")]
    return Talker(
        spawn(
            [*who.prefix, *argv, *map(str, arguments)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )


@dataclass
class Tap:
    """A capture that is under way."""

    process: subprocess.Popen[str]
    file: Path

    def size(self) -> int:
        """Of the file so far."""
        return self.file.stat().st_size

    def wait_for(self, size: int) -> None:
        """Until it has so many bytes: what was sent was seen."""
        wait_until(lambda: self.size() >= size, f"{size} bytes in {self.file}")

    def finish(self) -> dict[str, Any]:
        """Ends it as Ctrl-C does; its summary."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate()
        assert self.process.returncode == 0, err
        document: dict[str, Any] = json.loads(out)
        assert (document["schema"], document["ok"]) == ("kmap.tap/1", True)
        return document


def start_tap(
    spawn: Spawn, who: As, env: Mapping[str, str], file: Path, *options: object
) -> Tap:
    """Starts one; it captures when this returns."""
    process = spawn(
        [
            *who.prefix,
            *(sys.executable, "-m", "kmap", "tap", "--json", "-w", str(file)),
            *map(str, options),
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "capturing" in line, line + process.stderr.read()
    return Tap(process, file)


def on_ring(*pids: int) -> bool:
    """Whether one has a connection of which both directions are on their rings."""
    return any(
        each.ring_rx_bytes and each.ring_tx_bytes
        for each in connections(include_kernel=False)
        if each.pid in pids
    )


def tshark(file: Path, *options: str) -> str:
    """Its output, with both checksums checked."""
    done = subprocess.run(
        [
            needs("tshark", "tshark"),
            *("-r", str(file), "-n"),
            *("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"),
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def fields(file: Path, display: str, names: Sequence[str]) -> list[list[str]]:
    """The fields of the packets that the display filter lets through."""
    options = [word for name in names for word in ("-e", name)]
    out = tshark(file, "-Y", display, "-T", "fields", *options)
    return [line.split("\t") for line in out.splitlines()]


def assert_packets(file: Path) -> None:
    """There are some, and each checksum is right."""
    assert fields(file, "tcp", ["frame.number"])
    bad = "tcp.checksum.status != 1 || ip.checksum.status != 1"
    assert fields(file, bad, ["frame.number", "tcp.checksum", "ip.checksum"]) == []


def assert_well_formed(file: Path) -> None:
    """The same, and nothing that tshark makes of them is malformed."""
    assert_packets(file)
    bad = "_ws.malformed || _ws.expert.severity == error"
    assert fields(file, bad, ["frame.number", "_ws.expert.message"]) == []
