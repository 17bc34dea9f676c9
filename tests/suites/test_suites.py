# SPDX-License-Identifier: Apache-2.0
"""A few of CPython's own suites, by the same driver as scripts/suites.

All of them take half an hour; these are short, and use the rings most.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kmap import procfs
from kmap.results import CannotRun
from tests.cli.peers import wait_until
from tests.suites import __main__ as suites
from tests.suites import judge, run
from tests.suites.judge import Exclusion
from tests.suites.run import Ended, Mode, Run

SHORT = (
    "test_socketserver",
    "test_ftplib",
    "test_asyncore",
    "test_wsgiref",
    "test_asyncio.test_streams",
)
# Their connections make enough calls to be upgraded every time.
ON_RINGS = ("test_ftplib", "test_asyncore", "test_asyncio.test_streams")
# A suite to test the driver with: each way for a test to end.
BAD = """
import os, time, unittest
class T(unittest.TestCase):
    def test_a_ok(self): pass
    def test_b_fail(self): self.fail("as it should")
    def test_c_error(self): 1 / 0
    def test_d_skip(self): self.skipTest("no")
    def test_e_died(self): os.abort()
    def test_f_hang(self): time.sleep(600)
    def test_g_left_out(self): self.fail("was not left out")
    def test_h_subtest(self):
        with self.subTest(1): self.fail("in a subtest")
    def test_i_leaves_a_child(self):
        child = os.fork()
        if child == 0:
            os.setsid()
            time.sleep(600)
        with open("child", "w") as file:
            file.write(str(child))
"""


@pytest.fixture(scope="module")
def python() -> str:
    try:
        return run.find_python()
    except CannotRun as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("suite", SHORT)
def test_the_same_as_on_the_kernel(python: str, suite: str, tmp_path: Path) -> None:
    runs = []
    for mode in Mode:
        place = tmp_path / mode.value
        place.mkdir()
        runs.append(run.run_suite(python, suite, mode, place, test_limit=60))
    verdict = judge.judge(suite, runs)
    assert not verdict.differences
    assert verdict.passed >= 10
    if suite in ON_RINGS:
        assert verdict.connections > 0
        assert verdict.ring_bytes > 0
    assert not runs[0].connections


def _bad_suite(python: str, place: Path) -> Run:
    package = place / "lib" / "test"
    (package / "support").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "support" / "__init__.py").write_text("def reap_children(): pass\n")
    (package / "test_bad.py").write_text(BAD)
    work = place / "work"
    work.mkdir()
    wrapper = place / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={place}/lib exec {python} "$@"\n')
    wrapper.chmod(0o755)
    return run.run_suite(
        str(wrapper),
        "test_bad",
        Mode.KERNEL,
        work,
        left_out=["test.test_bad.T.test_g_*"],
        test_limit=2,
    )


def test_driver_sees_every_way_to_end(python: str, tmp_path: Path) -> None:
    bad = _bad_suite(python, tmp_path)
    ends = {name.rpartition(".")[2]: end for name, end in bad.tests.items()}
    assert {name: end.outcome for name, end in ends.items()} == {
        "test_a_ok": "ok",
        "test_b_fail": "fail",
        "test_c_error": "error",
        "test_d_skip": "skip",
        "test_e_died": "died",
        "test_f_hang": "hang",
        "test_h_subtest": "fail",
        "test_i_leaves_a_child": "ok",
    }
    assert "SIGABRT" in ends["test_e_died"].detail
    assert "test_f_hang" in ends["test_f_hang"].detail
    assert ends["test_b_fail"].detail == "AssertionError: as it should"
    (child,) = (int(path.read_text()) for path in tmp_path.glob("work/*/child"))
    wait_until(lambda: not procfs.exists(child), "no child stays behind")
    assert bad.left_out == {"test.test_bad.T.test_g_left_out"}


def _run(mode: Mode, **outcomes: str) -> Run:
    tests = {f"test.test_x.{name}": Ended(way) for name, way in outcomes.items()}
    return Run("test_x", mode, tests)


def test_judge_takes_no_difference_for_the_same() -> None:
    verdict = judge.judge(
        "test_x",
        [
            _run(Mode.KERNEL, a="ok", b="skip", c="fail", d="ok", e="ok", f="ok"),
            _run(Mode.KERNEL, a="ok", b="skip", c="fail", d="ok", e="ok", f="skip"),
            _run(Mode.KMAP, a="ok", b="skip", c="fail", d="ok", e="ok", f="skip"),
            _run(Mode.KMAP, a="ok", b="skip", c="fail", d="hang", f="ok"),
        ],
    )
    found = {difference.test[-1]: difference for difference in verdict.differences}
    assert set(found) == {"c", "d", "e"}
    assert found["c"].by_kernel
    assert found["d"].kmap == ("hang", "ok")
    assert found["e"].kmap == ("missing", "ok")
    assert (verdict.tests, verdict.passed, verdict.skipped) == (6, 1, 1)


def test_exclusions_are_explained_and_name_tests() -> None:
    for entry in judge.exclusions():
        assert entry.test.startswith("test.test_")
        assert entry.test.split(".")[1] in run.SUITES
    runs = _run(Mode.KERNEL, a="ok")
    runs.left_out = {"test.test_x.b"}
    entries = [
        Exclusion("test.test_x.b", "hang", ""),
        Exclusion("test.test_x.c", "hang", ""),
    ]
    assert suites.stale_exclusions(entries, {"test_x": [runs]}) == ["test.test_x.c"]


def test_an_exclusion_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "exclusions.toml"
    text = '[[exclusion]]\ntest = "test.test_x.a"\nkernel = "%s"\nreason = "%s"\n'
    path.write_text(text % ("hang", "it hangs on every kernel"))
    assert [entry.test for entry in judge.exclusions(path)] == ["test.test_x.a"]
    for kernel, reason in (("sleeps", "it hangs on every kernel"), ("hang", "hangs")):
        path.write_text(text % (kernel, reason))
        with pytest.raises(ValueError, match=r"test\.test_x\.a"):
            judge.exclusions(path)


def test_the_table_has_a_place_in_the_documents() -> None:
    text = suites.DOCS.read_text()
    assert suites.TABLE.search(text)
    for suite in run.SUITES:
        assert f"| {suite} |" in text
