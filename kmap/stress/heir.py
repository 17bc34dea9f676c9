# SPDX-License-Identifier: Apache-2.0
"""Another program that goes on with a connection: how it is started, and what it does.

``python -m kmap.stress.heir INFO``: INFO is a JSON document that says which end of
which case it is, how far that has come, and on which descriptors everything is.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from kmap import launch
from kmap.stress.drive import Blocking
from kmap.stress.end import End
from kmap.stress.flow import Mismatch, Progress, Setting
from kmap.stress.plan import MAX_CONNECTIONS
from kmap.stress.scenarios import find_case
from kmap.stress.stream import Pattern
from kmap.stress.traces import dump_on_request

# Where posix_spawn puts the connection and the report in the new program.
_SPAWNED_SOCKET, _SPAWNED_REPORT = 210, 211

Wait = Callable[[], int]


def _info(end: End, how: str, sock: int, report: int) -> str:
    setting = end.setting
    return json.dumps(
        {
            "id": setting.identity,
            "seed": setting.seed,
            "side": setting.side,
            "number": end.plan.number,
            "sent": end.sent,
            "received": end.received,
            "pattern": setting.pattern.fd,
            "progress": setting.progress.fd,
            "how": how,
            "socket": sock,
            "report": report,
        }
    )


def _argv(info: str) -> list[str]:
    return [sys.executable, "-m", "kmap.stress.heir", info]


def _environment(plain: bool) -> dict[str, str]:
    env = dict(os.environ)
    if not plain:
        return env
    kept = {name: env[name] for name in ("KMAP_LIB_DIR",) if name in env}
    return {**launch.without_kmap(env), **kept}


def _forked(end: End, report: int, env: dict[str, str]) -> Wait:
    argv = _argv(_info(end, "kept", end.fd, report))
    pid = os.fork()
    if pid == 0:
        # Only here: a program that another thread starts must not inherit them.
        try:
            os.set_inheritable(end.fd, True)
            os.set_inheritable(report, True)
            os.execve(argv[0], argv, env)
        finally:
            os._exit(127)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _spawned(end: End, report: int, env: dict[str, str]) -> Wait:
    argv = _argv(_info(end, "kept", _SPAWNED_SOCKET, _SPAWNED_REPORT))
    actions = [
        (os.POSIX_SPAWN_DUP2, end.fd, _SPAWNED_SOCKET),
        (os.POSIX_SPAWN_DUP2, report, _SPAWNED_REPORT),
    ]
    pid = os.posix_spawn(argv[0], argv, env, file_actions=actions)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _popen(argv: Sequence[str], env: dict[str, str], fds: tuple[int, ...]) -> Wait:
    # Without preexec_fn this is a vfork.
    process = subprocess.Popen(argv, env=env, pass_fds=fds, stdin=subprocess.DEVNULL)
    return process.wait


def _vforked(end: End, report: int, env: dict[str, str]) -> Wait:
    setting = end.setting
    fds = (end.fd, report, setting.pattern.fd, setting.progress.fd)
    return _popen(_argv(_info(end, "kept", end.fd, report)), env, fds)


def _passed(end: End, report: int, env: dict[str, str]) -> Wait:
    setting = end.setting
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        argv = _argv(_info(end, "pass", theirs.fileno(), report))
        fds = (theirs.fileno(), report, setting.pattern.fd, setting.progress.fd)
        wait = _popen(argv, env, fds)
        socket.send_fds(ours, [b"here"], [end.fd])
    return wait


_WAYS: dict[str, Callable[[End, int, dict[str, str]], Wait]] = {
    "exec": _forked,
    "vfork": _vforked,
    "spawn": _spawned,
    "pass": _passed,
}


def bequeath(end: End) -> str:
    """Gives the connection to another program; its report, once it has ended.

    Empty, or an error, if it did not end well.
    """
    reader, writer = os.pipe()
    try:
        env = _environment(end.end.heir_plain)
        wait = _WAYS[end.end.heir](end, writer, env)
    finally:
        os.close(writer)
    # From now on the connection is the other program's alone.
    end.close()
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read().decode()
    status = wait()
    return "" if status else report


def main() -> None:
    """Goes on with the connection until it is done, and reports."""
    info: dict[str, Any] = json.loads(sys.argv[1])
    dump_on_request()
    fd = info["socket"]
    if info["how"] == "pass":
        with socket.socket(fileno=fd) as messages:
            _, (fd,), _, _ = socket.recv_fds(messages, 16, 1)
    plan = find_case(info["id"])
    words = memoryview(mmap.mmap(info["progress"], 0)).cast("Q")
    setting = Setting(
        seed=info["seed"],
        case=plan.name,
        identity=info["id"],
        side=info["side"],
        pattern=Pattern(info["pattern"]),
        progress=Progress(info["progress"], words, info["side"], MAX_CONNECTIONS),
        fuse=None,
        breakage="",
    )
    (connection,) = (c for c in plan.connections if c.number == info["number"])
    end = End(connection, setting, socket.socket(fileno=fd))
    end.sent, end.received = info["sent"], info["received"]
    end.outcome.acts = 1
    end.sock.settimeout(None)
    try:
        Blocking(end, lambda: []).run_rest()
    except (OSError, Mismatch, AssertionError) as error:
        end.fail(error)
    with contextlib.closing(os.fdopen(info["report"], "w")) as report:
        json.dump(asdict(end.outcome), report)


if __name__ == "__main__":
    main()
