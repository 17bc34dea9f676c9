# SPDX-License-Identifier: Apache-2.0
"""A picture of kmap top under a real load: scripts/top-figure."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kmap import top_screen
from kmap.demo import programs, wrk
from kmap.demo.rig import Rig, Setup
from kmap.demo.wrk import LOADS

_SECONDS = 8
_INTERVAL_S = 1.5


def main() -> None:
    """Requests through Envoy to nginx, and some from a program without Kmap."""
    found = programs.find_all()
    load = LOADS["http-16k"]
    with tempfile.TemporaryDirectory(prefix="kmap-picture-") as name:
        directory = Path(name)
        root = directory / "root"
        root.mkdir()
        (root / load.path.lstrip("/")).write_bytes(b"x" * load.body_bytes)
        rig = Rig(found, Setup.KMAP, directory / "rig", root)
        try:
            with wrk.start(found, rig, load, _SECONDS) as under_kmap:
                with wrk.start(found, rig, load, _SECONDS, env=rig.plain_env) as plain:
                    picture, _ = top_screen.picture(_INTERVAL_S)
                    wrk.report(plain, _SECONDS)
                wrk.report(under_kmap, _SECONDS)
        finally:
            rig.close()
    Path(sys.argv[1]).write_text(picture)


if __name__ == "__main__":
    main()
