# SPDX-License-Identifier: Apache-2.0
"""The wheel: its tag, what is in it, and that it works outside the checkout.

scripts/dist goes on from here: the manylinux tag, the sdist, and an environment into
which pip brings everything.
"""

from __future__ import annotations

import email.message
import email.parser
import fcntl
import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kmap import __version__, native
from tests.builds import ROOT
from tests.spec.test_glibc_baseline import newer_than_baseline, required_versions

TALK = Path(__file__).parent / "talk.py"
ELF = b"\x7fELF"

# Both libraries are compiled in it, from nothing.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it for a user, by a backend that it brings itself."""
    # Workers of pytest-xdist share one, and no build directory of the source tree.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "wheel"
    env = {name: text for name, text in os.environ.items() if name[:5] != "KMAP_"}
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            done = subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
                + [f"--config-settings=build-dir={shared}/wheel-build"]
                + ["--disable-pip-version-check", "--wheel-dir", str(out), str(ROOT)],
                env=env,
                cwd=shared,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed, without what it depends on, into a directory."""
    out = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
        + ["--disable-pip-version-check", "--target", str(out), str(wheel)],
        check=True,
        cwd=out,
    )
    return out


@pytest.fixture
def installed_env(unpacked: Path, kernel_env: dict[str, str]) -> dict[str, str]:
    """An environment in which Python finds that package first."""
    env = {**kernel_env, "PYTHONPATH": str(unpacked)}
    del env["KMAP_LIB_DIR"]
    return env


def test_one_wheel_for_all_pythons(wheel: Path) -> None:
    name = f"kmap-{__version__}-py3-none-linux_{platform.machine()}.whl"
    assert wheel.name == name


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        return email.parser.BytesParser().parsebytes(archive.read(name))


def test_metadata(wheel: Path) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "kmap"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert "# Kmap" in str(metadata.get_payload())


def test_contents(wheel: Path) -> None:
    """The package, its programs, and nothing that is for building or testing it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kmap", f"kmap-{__version__}.dist-info"}
    lib = {name.removeprefix("kmap/lib/") for name in names if "/lib/" in name}
    built = {native.LIBRARY_NAME, native.PRELOAD_NAME, native.BENCH_NAME}
    if (Path(os.environ["KMAP_LIB_DIR"]) / native.MUSL_NAME).exists():
        built.add(native.MUSL_NAME)
    assert lib == built
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kmap").rglob("*.py")}
    assert sources <= set(names)


def test_every_binary_runs_with_glibc_2_28(wheel: Path, tmp_path: Path) -> None:
    seen = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            if data[:4] != ELF:
                continue
            seen += 1
            path = tmp_path / Path(name).name
            path.write_bytes(data)
            assert newer_than_baseline(required_versions(path)) == set(), name
    assert seen >= 3


def test_it_is_the_installed_one_that_runs(
    unpacked: Path, installed_env: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kmap", "path"],
        env=installed_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{unpacked}/kmap/lib/{native.PRELOAD_NAME}\n"


@pytest.mark.parametrize("on", [True, False])
def test_a_connection_by_ring(
    installed_env: dict[str, str], tmp_path: Path, on: bool
) -> None:
    """As a user does it, from any directory."""
    env = installed_env if on else {**installed_env, "KMAP_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kmap", "run", "--"] + [sys.executable, str(TALK)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    answer = "by ring\n" if on else ""
    assert (done.returncode, done.stdout) == (0 if on else 1, answer), done.stderr


def test_versions_agree() -> None:
    """CMake has the version of a build without Python."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"set\(KMAP_VERSION ([\d.]+)\)", text)
    assert found is not None
    assert found[1] == __version__
