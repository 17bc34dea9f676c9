# SPDX-License-Identifier: Apache-2.0
"""``python -m kmap.stress`` is the same as ``kmap stress``."""

from __future__ import annotations

import sys

from kmap.cli import main

if __name__ == "__main__":
    sys.exit(main(["stress", *sys.argv[1:]]))
