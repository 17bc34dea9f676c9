# SPDX-License-Identifier: Apache-2.0
"""What kmap.settings says of a value is what the library says."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from kmap import settings

VALUES = {
    "KMAP_DISABLE": ["", "0", "1", "2", "yes", "-1"],
    "KMAP_TRANSPORT": ["", "shm", "tcp"],
    "KMAP_RING_SIZE": ["1", "4096", "4K", "64k", "16M", "17M", "1G", "4 K", "0x1000"],
    "KMAP_UPGRADE_AFTER": ["0", "1000000", "1000001", "1K", "08", "1.5"],
    "KMAP_MEMORY_LIMIT": [
        "0",
        "1024G",
        "1025G",
        "99999999999999999999",
        "18446744073G",
    ],
    "KMAP_LOG": ["", "info", "debug:{}", "warning", "inform"],
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_the_library_agrees(
    name: str, value: str, kmap_env: dict[str, str], tmp_path: Path
) -> None:
    value = value.format(tmp_path / "log")
    done = subprocess.run(
        ["/bin/true"], env={**kmap_env, name: value}, text=True, capture_output=True
    )
    refused = f"kmap: {name}={value}" in done.stderr
    with (
        contextlib.nullcontext()
        if not refused
        else pytest.raises(ValueError, match=name)
    ):
        settings.check(name, value)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"KMAP_RINGSIZE is not a setting .*KMAP_LOG"):
        settings.check("KMAP_RINGSIZE", "1")
