# SPDX-License-Identifier: Apache-2.0
"""Runs kept programs again, on the kernel and under Kmap.

    python -m tests.properties.replay [--mode kmap|pipe|fifo] [--times N] FILE...

FILE holds one program as JSON.  Exit codes: 0 no difference, 1 there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests import modes
from tests.properties.compare import Judge


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--mode", choices=list(modes.MODES)[1:], default="kmap")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--results", action="store_true", help="print both runs")
    options = parser.parse_args()
    judge = Judge(options.mode)
    worst = 0
    for file in options.files:
        program = json.loads(file.read_text())
        if options.results:
            for executor in (judge.kernel, judge.kmap):
                print(executor.mode, *executor.run(program), sep="\n  ")
        for _ in range(options.times):
            difference = judge.difference(program)
            print(f"{file}: {difference or 'no difference'}")
            worst |= difference is not None
    judge.close()
    return worst


if __name__ == "__main__":
    sys.exit(main())
