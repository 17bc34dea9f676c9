# SPDX-License-Identifier: Apache-2.0
"""kmap top: what it measures, its keys, and the terminal that it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from kmap.load import Load, Meter, ProcessLoad
from kmap.top_screen import TopApp
from tests.cli.peers import KMAP, Peers, Spawn, kmap, kmap_json, start, wait_until

DEADLINE_S = 60.0
ALTERNATE_ON, ALTERNATE_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
CURSOR_ON = b"\x1b[?25h"


def load_of(load: Load, pid: int) -> ProcessLoad:
    (found,) = (each for each in load.processes if pid in each.pids)
    return found


def test_rates_are_what_was_sent(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    meter = Meter()
    first = load_of(meter.sample(), peers.client.pid)
    assert first.cpu_percent is first.wakeups is first.rates.ring_tx is None
    assert (first.ring, first.kernel, first.reason) == (1, 0, "")
    assert peers.tell("more 5000") == "sent"
    load = meter.sample()
    client = load_of(load, peers.client.pid)
    assert client.cpu_percent is not None
    assert client.rates.ring_tx is not None
    assert round(client.rates.ring_tx * load.seconds) == 5000
    assert client.rates.kernel == 0
    assert client.wakeups is not None
    (row,) = (c for c in load.connections if c.connection.pid == peers.client.pid)
    assert row.rates.ring_tx == client.rates.ring_tx
    assert load_of(meter.sample(), peers.client.pid).rates.ring_tx == 0


def test_wake_ups_are_counted(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    meter = Meter()
    meter.sample()

    def woke() -> bool:
        """It does unless the server happens to be awake."""
        assert peers.tell("more 1") == "sent"
        return bool(load_of(meter.sample(), peers.client.pid).wakeups)

    wait_until(woke, "a write wakes the server", DEADLINE_S)


def test_bytes_by_the_kernel_are_measured_too(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    meter = Meter()
    meter.sample()
    peers = start(spawn, kernel_env, kmap_env, rounds=50, size=100)
    load = meter.sample()
    client = load_of(load, peers.client.pid)
    # It has come since: all that it moved, it moved since.
    for rate in (client.rates.kernel_rx, client.rates.kernel_tx):
        assert rate is not None
        assert round(rate * load.seconds) == 5000
    assert client.rates.ring == 0
    assert (client.kernel, client.reason) == (1, "peer-absent")


def test_forked_processes_are_one_line(spawn: Spawn, kmap_env: dict[str, str]) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    assert peers.tell("fork") == "forked"
    client = load_of(Meter().sample(), peers.client.pid)
    assert client.pid == peers.client.pid
    assert len(client.pids) == 2


async def _until(pilot: Pilot[int], condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await pilot.pause(0.01)


def _lines(app: TopApp) -> list[list[str]]:
    table = app.query_one(DataTable)
    return [
        [str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)
    ]


def _headings(app: TopApp) -> list[str]:
    return [str(column.label) for column in app.query_one(DataTable).ordered_columns]


def _note(app: TopApp) -> str:
    return str(app.query_one("#note", Static).render())


def test_keys(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    peers = start(spawn, kmap_env, kmap_env)
    one_sided = start(spawn, kernel_env, kmap_env)

    def line_of(app: TopApp, pid: int) -> int | None:
        names = [line[0].rpartition("/")[2] for line in _lines(app)]
        return names.index(str(pid)) if str(pid) in names else None

    async def use() -> None:
        app = TopApp(0.1)
        async with app.run_test(size=(80, 24)) as pilot:
            await _until(
                pilot,
                lambda: line_of(app, peers.client.pid) is not None and app.samples > 1,
                "the client is shown",
            )
            assert _headings(app)[0] == "process"
            place = line_of(app, one_sided.client.pid)
            assert place is not None
            assert _lines(app)[place][5:] == ["0", "1", "0", "peer-absent"]

            # From here on it stands still, so that lines keep their places.
            await pilot.press("n", "space")
            assert _note(app).startswith("by name; paused")
            names = [line[0] for line in _lines(app)]
            await pilot.press("i")
            assert "reversed" in _note(app)
            assert [line[0] for line in _lines(app)] == names[::-1]
            for key, order in (("c", "cpu"), ("k", "kernel"), ("w", "wakes")):
                await pilot.press(key)
                assert _note(app).startswith(f"by {order}, reversed")
                assert sorted(line[0] for line in _lines(app)) == sorted(names)
            await pilot.press("i", "r")
            assert _note(app).startswith("by ring; paused")

            place = line_of(app, peers.client.pid)
            assert place is not None
            app.query_one(DataTable).move_cursor(row=place)
            await pilot.press("enter")
            assert _headings(app)[:3] == ["state", "local", "peer"]
            (line,) = _lines(app)
            assert (line[0], line[2]) == ("ring", f"127.0.0.1:{peers.port}")
            await pilot.press("escape")
            assert _headings(app)[0] == "process"
            # Back at the line that it came from.
            assert app.query_one(DataTable).cursor_row == place

            samples = app.samples
            await pilot.press("space")
            await _until(pilot, lambda: app.samples > samples, "it goes on")
            await pilot.press("q")
        assert app.return_value == 0

    asyncio.run(use())


class Terminal:
    """kmap top on a terminal of its own."""

    def __init__(
        self,
        spawn: Spawn,
        env: Mapping[str, str],
        argv: list[str],
        size: tuple[int, int],
    ) -> None:
        self.master, self.slave = pty.openpty()
        rows, columns = size
        window = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, window)
        self.before = termios.tcgetattr(self.slave)
        self.output = b""
        self.process = spawn(
            argv,
            env={**env, "TERM": "xterm-256color"},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
        )

    def read(self) -> bool:
        """What has been written; False when nothing more comes for now."""
        ready, _, _ = select.select([self.master], [], [], 0.05)
        if ready:
            self.output += os.read(self.master, 65536)
        return bool(ready)

    def until(self, text: bytes) -> None:
        """Reads until the text has appeared."""

        def seen() -> bool:
            self.read()
            return text in self.output

        wait_until(seen, f"{text!r} on the terminal", DEADLINE_S)

    def end(self) -> int:
        """Reads until it has ended; its exit code."""

        def ended() -> bool:
            return not self.read() and self.process.poll() is not None

        wait_until(ended, "it has ended", DEADLINE_S)
        return self.process.returncode

    def restored(self) -> bool:
        """Whether the terminal is as it was."""
        return (
            termios.tcgetattr(self.slave) == self.before
            and self.output.rindex(ALTERNATE_OFF) > self.output.rindex(ALTERNATE_ON)
            and CURSOR_ON in self.output[self.output.rindex(ALTERNATE_ON) :]
        )


@pytest.fixture
def terminals(
    spawn: Spawn, kernel_env: dict[str, str]
) -> Iterator[Callable[[list[str]], Terminal]]:
    opened: list[Terminal] = []

    def start_one(argv: list[str]) -> Terminal:
        opened.append(Terminal(spawn, kernel_env, argv, (24, 80)))
        return opened[-1]

    yield start_one
    for each in opened:
        for fd in (each.master, each.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def peers(spawn: Spawn, kmap_env: dict[str, str]) -> Peers:
    return start(spawn, kmap_env, kmap_env)


TOP = [*KMAP, "top", "--interval", "0.2"]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("q", 0),
        ("^C", 0),
        (signal.SIGINT, 0),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
    ],
)
def test_the_terminal_is_left_as_it_was(
    terminals: Callable[[list[str]], Terminal],
    peers: Peers,
    how: str | signal.Signals,
    code: int,
) -> None:
    top = terminals(TOP)
    # Its number, as colours may stand between that and the name.
    top.until(str(peers.client.pid).encode())
    assert termios.tcgetattr(top.slave) != top.before
    if isinstance(how, str):
        os.write(top.master, {"q": b"q", "^C": b"\x03"}[how])
    else:
        top.process.send_signal(how)
    assert top.end() == code
    assert top.restored()


# The third look fails as no look should.
_BROKEN = """
import sys
from kmap import cli, load
looks = 0
real = load.look
def look(**options):
    global looks
    looks += 1
    if looks > 2:
        raise RuntimeError("this look failed")
    return real(**options)
load.look = look
sys.exit(cli.main(["top", "--interval", "0.1"]))
"""


def test_the_terminal_is_left_as_it_was_after_an_error(
    terminals: Callable[[list[str]], Terminal],
) -> None:
    top = terminals([sys.executable, "-c", _BROKEN])
    assert top.end() == 1
    assert b"this look failed" in top.output[top.output.rindex(ALTERNATE_OFF) :]
    assert top.restored()


def test_a_frame_as_text_and_as_json(peers: Peers, kernel_env: dict[str, str]) -> None:
    done = kmap("top", "--once", "--interval", "0.1", env=kernel_env)
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == [
        *("process", "cpu", "%", "ring/s", "kernel/s", "wakes/s"),
        *("ring", "kernel", "pend", "why"),
    ]
    (line,) = (each for each in lines if f"/{peers.client.pid} " in each)
    # Behind the CPU time.
    assert line.split()[2:] == [*("0", "0", "0"), *("1", "0", "0")]

    document = kmap_json("top", "--interval", "0.1", env=kernel_env)
    assert (document["schema"], document["ok"]) == ("kmap.top/1", True)
    assert document["seconds"] >= 0.1
    (process,) = (
        each for each in document["processes"] if each["pid"] == peers.client.pid
    )
    assert process["rates"]["ring_tx"] == 0
    assert (process["ring"], process["kernel"]) == (1, 0)


def test_a_picture(peers: Peers, kernel_env: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "top.svg"
    done = kmap("top", "--interval", "0.1", "--svg", file, env=kernel_env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    text = file.read_text()
    assert text.startswith("<svg")
    assert f"/{peers.client.pid}" in text
    assert "url(http" not in text, "it fetches something"
    nowhere = kmap("top", "--svg", tmp_path / "no" / "x", env=kernel_env)
    assert nowhere.returncode == 1
    assert "cannot be written" in nowhere.stderr


def test_without_a_terminal_it_says_what_to_do(kernel_env: dict[str, str]) -> None:
    done = subprocess.run(
        [*KMAP, "top"],
        env=kernel_env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (77, "")
    assert "--once" in done.stderr
    assert kmap("top", "--interval", "0", env=kernel_env).returncode == 2
