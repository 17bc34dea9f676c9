# SPDX-License-Identifier: Apache-2.0
"""The libraries export what they should and nothing else.

A leaked internal name can capture a function of the program; a missing one is a call
that silently goes around the library.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from kmap import native

ROOT = Path(__file__).resolve().parents[2]


def _dynamic(library: Path, which: str) -> set[str]:
    done = subprocess.run(
        ["nm", "--dynamic", which, "--format=posix", str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    return {line.split()[0].split("@")[0] for line in done.stdout.splitlines()}


def exported(library: Path) -> set[str]:
    """The dynamic symbols that the library defines."""
    return _dynamic(library, "--defined-only")


def undefined(library: Path) -> set[str]:
    """Those that others have to define."""
    return _dynamic(library, "--undefined-only")


def test_preload_exports_the_interposed_names() -> None:
    names = native.symbols()
    assert len(names) == len(set(names))
    assert exported(native.preload_path()) == set(names)


def test_library_exports_the_c_abi() -> None:
    header = (ROOT / "core/include/kmap.h").read_text()
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    declared = set(re.findall(r"\b(kmap_\w+)\s*\(", code))
    assert exported(native.library_path()) == declared


def test_every_declared_function_has_a_signature() -> None:
    assert set(native._SIGNATURES) == exported(native.library_path())


def test_calls_between_entry_points_stay_inside() -> None:
    """A program's own function called send must not capture a call of ours.

    A call that the dynamic linker resolves shows as a PLT slot with the name.
    """
    done = subprocess.run(
        ["readelf", "--relocs", "--wide", str(native.preload_path())],
        check=True,
        capture_output=True,
        text=True,
    )
    slots = set(re.findall(r"_JUMP_SLO\w*\s+\S+\s+(\w+)", done.stdout))
    assert "dlsym" in slots, "the PLT was not found"
    assert slots & set(native.symbols()) == set()
