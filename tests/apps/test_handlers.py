# SPDX-License-Identifier: Apache-2.0
"""Signal handlers that use the sockets of the call that they interrupted."""

from __future__ import annotations

import subprocess
from pathlib import Path

from kmap import launch

PROGRAM = Path(__file__).with_name("programs") / "handler.c"
SIGNALS = 3000


def test_handler_on_a_non_blocking_socket(
    mode: str, kernel_env: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "handler"
    subprocess.run(["cc", "-O1", "-o", program, PROGRAM], check=True)
    env = kernel_env
    if mode == "kmap":
        env = launch.environment(kernel_env, options={"KMAP_UPGRADE_AFTER": "0"})
    done = subprocess.run(
        [program, str(SIGNALS)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
