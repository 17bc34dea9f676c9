# SPDX-License-Identifier: Apache-2.0
"""Runs commands of the README, one after the other, as a reader would.

Standard input is one line of JSON, a list of steps: ``["run", COMMAND]`` to its end,
``["start", COMMAND, PORT]`` until it listens, ``["ask", COUNT]`` requests through the
proxy, ``["stop"]`` what was started last.  One line of JSON comes out: for each command
its exit status and output.  All are lines for bash; the network is this process's own.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_DEADLINE_S = 60.0
Started = list["subprocess.Popen[bytes]"]


def start(started: Started, command: str, port: int) -> None:
    """In the background, in a process group of its own."""
    process = subprocess.Popen(
        ["bash", "-c", command], stdout=2, start_new_session=True
    )
    started.append(process)
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"{command} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            os.sched_yield()
    sys.exit(f"{command}: nobody listens on port {port}")


def stop(started: Started) -> None:
    """Ends what was started last, with all that it started."""
    process = started.pop()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def main() -> None:
    """All steps."""
    with socket.socket() as probe:
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    steps: list[list[Any]] = json.loads(sys.stdin.readline())
    started: Started = []
    client: http.client.HTTPConnection | None = None
    done = []
    try:
        for word, *arguments in steps:
            if word == "start":
                start(started, *arguments)
            elif word == "stop":
                stop(started)
            elif word == "ask":
                # The connection stays open, so that it is there to be looked at.
                client = http.client.HTTPConnection("127.0.0.1", 10000, timeout=30)
                for _ in range(*arguments):
                    client.request("GET", "/")
                    answer = client.getresponse()
                    if answer.status != 200 or not answer.read():
                        sys.exit(f"answered {answer.status}")
            else:
                found = subprocess.run(
                    ["bash", "-o", "pipefail", "-c", *arguments],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                )
                done.append([found.returncode, found.stdout, found.stderr])
    finally:
        if client:
            client.close()
        while started:
            stop(started)
    print(json.dumps(done))


main()
