# SPDX-License-Identifier: Apache-2.0
"""What all tests share.

Every test has a watchdog (``timeout`` in pyproject.toml) and ends the processes that
it started, by number.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kmap import launch, native
from kmap.demo import programs
from kmap.results import CannotRun

Spawn = Callable[..., "subprocess.Popen[str]"]

# Programs under test are started from many directories, and a package found by
# accident in one of them must not bring other libraries into play.
os.environ.setdefault("KMAP_LIB_DIR", str(native.library_path().parent))

# A shell that starts the tests in the background has them, and so the programs that
# they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no fault of what is tested.  "ci" is the same examples each time.
for _profile in ("ci", "nightly"):
    settings.register_profile(
        _profile,
        deadline=None,
        derandomize=_profile == "ci",
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --forbid-skips."""
    parser.addoption(
        "--forbid-skips",
        action="store_true",
        help="a skipped test fails the run: everything it needs should be here",
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run under --forbid-skips if a test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        session.config.getoption("--forbid-skips")
        and reporter is not None
        and reporter.stats.get("skipped")
        and session.exitstatus == pytest.ExitCode.OK
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _plain_environment() -> dict[str, str]:
    env = launch.without_kmap(os.environ)
    # Not a setting of the library: it says which build is under test.
    env["KMAP_LIB_DIR"] = os.environ["KMAP_LIB_DIR"]
    return env


@pytest.fixture(params=["kernel", "kmap"])
def mode(request: pytest.FixtureRequest) -> str:
    """The kernel run vouches for the test; the other judges the library."""
    value: str = request.param
    return value


@pytest.fixture
def kernel_env() -> dict[str, str]:
    """The environment of a program that runs without Kmap."""
    return _plain_environment()


@pytest.fixture
def kmap_env() -> dict[str, str]:
    """The environment of a program that runs under Kmap."""
    return launch.environment(_plain_environment())


@pytest.fixture
def mode_env(mode: str) -> dict[str, str]:
    """The environment of a program in the mode of this test."""
    env = _plain_environment()
    return launch.environment(env) if mode == "kmap" else env


@pytest.fixture
def installed() -> None:
    """Skips the test where a program of the demo is missing."""
    try:
        programs.find_all()
    except CannotRun as error:
        pytest.skip(str(error))


def _end(process: subprocess.Popen[str]) -> None:
    # Each has a group of its own, so that workers it forked end with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a program that is killed, with all it started, when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(
        argv: Sequence[str], *, env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            argv, env=env, text=True, start_new_session=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in reversed(started):
        _end(process)
