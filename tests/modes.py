# SPDX-License-Identifier: Apache-2.0
"""In what a test runs: on the kernel, or under Kmap with one of its transports."""

from __future__ import annotations

import os

from kmap import launch, native
from tests.conformance import kit

# Each with the transport that carries the bytes; the kernel has none.
MODES = {"kernel": "", "kmap": "shm", "pipe": "pipe", "fifo": "fifo"}


def environment(mode: str, **options: str) -> dict[str, str]:
    """The environment of a program that uses tests/conformance/kit.py."""
    env = launch.without_kmap(os.environ)
    if transport := MODES[mode]:
        options = {"KMAP_TRANSPORT": transport, **options}
        env = launch.environment(env, options=options)
        names = [entry.name for entry in native.transports()]
        env[kit.TRANSPORT_ENV] = str(names.index(transport))
    return env
