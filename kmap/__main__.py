# SPDX-License-Identifier: Apache-2.0
"""``python -m kmap`` is the same as ``kmap``."""

from __future__ import annotations

import sys

from kmap.cli import main

if __name__ == "__main__":
    sys.exit(main())
