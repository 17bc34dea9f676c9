# SPDX-License-Identifier: Apache-2.0
"""Runs the two programs of the compose example and asks them 300 times.

The plan is one line of JSON on standard input; the answers are one on standard output.
The programs run until standard input ends.  It is started in a network namespace of its
own, and brings up the loopback device there.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Any

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_DEADLINE_S = 40.0
_REQUESTS = 300


def loopback_up() -> None:
    """As the engine does for a container."""
    with socket.socket() as probe:
        request = struct.pack("16sH14x", b"lo", _IFF_UP)
        fcntl.ioctl(probe, _SIOCSIFFLAGS, request)


def wait_for(port: int, program: subprocess.Popen[bytes]) -> None:
    """Until the program listens, or the time is up."""
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        if program.poll() is not None:
            sys.exit(f"{program.args!r} ended with {program.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            os.sched_yield()
    sys.exit(f"nobody listens on port {port}")


def ask() -> list[str]:
    """One connection; the bodies of its answers."""
    client = http.client.HTTPConnection("127.0.0.1", 10000, timeout=_DEADLINE_S)
    found = []
    for _ in range(_REQUESTS):
        client.request("GET", "/")
        answer = client.getresponse()
        body = answer.read().decode()
        found.append(body if answer.status == 200 else f"{answer.status} {body}")
    client.close()
    return found


def main() -> None:
    """Starts, asks, waits, stops."""
    plan: dict[str, Any] = json.loads(sys.stdin.readline())
    loopback_up()
    started = []
    try:
        for name, port in (("nginx", 8080), ("envoy", 10000)):
            # What they have to say, in the way of errors, goes where ours goes.
            started.append(subprocess.Popen(plan[name], env=plan["env"], stdout=2))
            wait_for(port, started[-1])
        print(json.dumps({"answers": ask()}), flush=True)
        sys.stdin.read()
    finally:
        for program in reversed(started):
            program.terminate()
        for program in started:
            program.wait()


main()
