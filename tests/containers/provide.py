# SPDX-License-Identifier: Apache-2.0
"""Fetches what the containers are made of: a Debian, wheels, Envoy.

Base images come from no registry: debootstrap makes them from Debian's packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from kmap.demo import programs
from tests.builds import ROOT

# Base images and their packages, beyond a minimal Debian.
BASES = {
    # What the stages of that name in deploy/Dockerfile install.
    "tools": "build-essential,cmake,musl-tools,python3-venv,ca-certificates",
    "runtime": "python3",
    # Instead of images that their makers publish.
    "programs": "nginx-light,curl",
}
_SUITE = "bookworm"


def base(name: str, packages: str, work: Path) -> None:
    """The root of a base image."""
    print(f"containers: a Debian with {packages}", flush=True)
    subprocess.run(
        [
            *("debootstrap", "--variant=minbase", f"--include={packages}"),
            *("--cache-dir", str(work / "packages"), _SUITE, str(work / name)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(work / name / "var/cache/apt")


def main() -> None:
    """Fills the directory that is named."""
    work = Path(sys.argv[1])
    (work / "packages").mkdir()
    for name, packages in BASES.items():
        base(name, packages, work)
    shutil.rmtree(work / "packages")
    # pip finds in the image what it would fetch from PyPI.
    wheels = work / "tools/wheels"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet"),
            *("--wheel-dir", str(wheels)),
            *(f"{ROOT}[kubernetes]", "scikit-build-core", "ninja"),
        ],
        check=True,
    )
    for own in wheels.glob("kmap-*"):
        own.unlink()
    (work / "tools/etc/pip.conf").write_text(
        "[global]\nno-index = true\nfind-links = /wheels\n"
    )
    shutil.copy(programs.find_envoy().path, work / "programs/usr/local/bin/envoy")


if __name__ == "__main__":
    main()
