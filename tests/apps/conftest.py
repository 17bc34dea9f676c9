# SPDX-License-Identifier: Apache-2.0
"""Programs, ports and bodies for the tests with real programs."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.apps.fetch import BODY_SIZES, Bodies
from tests.apps.process import Launch, Ports, Program
from tests.apps.rings import ExpectRing, Rings, rings

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets fixtures know whether the test failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture
def launch(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launch]:
    """Starts programs; all have ended when the test has.

    A test that succeeds must itself have ended each program and looked at its exit
    status; one that still runs then is killed and is an error.
    """
    started: list[Program] = []

    def start(
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        user: str | None = None,
    ) -> Program:
        logs = tmp_path / f"{len(started)}-{Path(argv[0]).name}"
        logs.mkdir()
        program = Program(argv, env=env, logs=logs, cwd=cwd, user=user)
        started.append(program)
        return program

    yield start
    left = [program for program in reversed(started) if program.running()]
    for program in reversed(started):
        program.kill()
    complaints = [text for program in started if (text := program.complaint())]
    assert not complaints, "\n".join(complaints)
    failed = request.node.stash.get(_FAILED, True)
    assert failed or not left, "not ended by the test:\n" + "\n".join(map(str, left))


@pytest.fixture
def ports() -> Iterator[Ports]:
    """Free port numbers."""
    taken = Ports()
    yield taken
    taken.close()


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that other users may enter, as servers that drop root must."""
    with tempfile.TemporaryDirectory(prefix="kmap-apps-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def bodies() -> Iterator[Bodies]:
    """The bodies that HTTP servers serve."""
    with tempfile.TemporaryDirectory(prefix="kmap-apps-") as name:
        os.chmod(name, 0o755)
        digests = {}
        for size in BODY_SIZES:
            content = random.Random(size).randbytes(size)
            (Path(name) / f"body-{size}").write_bytes(content)
            digests[f"body-{size}"] = hashlib.sha256(content).hexdigest()
        yield Bodies(Path(name), digests)


@pytest.fixture
def expect_ring(mode: str) -> ExpectRing:
    """Asserts that a program's traffic went the way that the mode says.

    Under Kmap at least ``upgrades`` connections and ``least`` bytes, both ways
    together, must have been on a ring; on the kernel there must be no trace of it.
    The program has to be alive still.
    """

    def expect(program: Program, *, least: int, upgrades: int = 1) -> None:
        assert least > 0
        assert program.running(), f"it must live to be looked at\n{program}"
        if mode == "kernel":
            assert rings(program.family()) == Rings()
            return
        seen = Rings()

        def enough() -> bool:
            nonlocal seen
            seen = rings(program.family())
            return seen.upgrades >= upgrades and seen.bytes >= least

        # A server may see the end of a connection later than its client.
        try:
            program.wait_until(enough, "traffic on the ring", seconds=5)
        except AssertionError as error:
            raise AssertionError(
                f"expected {upgrades} upgrades and {least} bytes by ring, saw {seen}"
            ) from error

    return expect
