# SPDX-License-Identifier: Apache-2.0
"""Envoy, redis, PostgreSQL and the stress tool under Kmap, for an hour.

scripts/soak sets up what this needs.  It works in a directory of its own, as root in
a network namespace of its own, on two CPUs, and ends everything it started.
Exit codes: 0 no error and everything flat, 1 not so, 2 usage, 77 cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kmap import launch, native
from kmap.demo.children import ChildFailed, none_left
from kmap.results import EXIT_CANNOT_RUN, EXIT_USAGE, CannotRun
from tests.soak import report
from tests.soak.judge import judge
from tests.soak.loads import LOADS, Load, StressLoad
from tests.soak.programs import own_network
from tests.soak.report import Soak
from tests.soak.run import Runner, say, totals

DOCS = Path(__file__).resolve().parents[2] / "docs" / "soak.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)
_CPUS = 2


def soak(
    minutes: float,
    names: Sequence[str],
    directory: Path,
    *,
    seed: int = 1,
    network: bool = False,
) -> Soak:
    """Runs these loads; directory is private and is left to the caller."""
    seconds = minutes * 60
    base = launch.without_kmap(os.environ)
    base["KMAP_LIB_DIR"] = str(native.library_path().parent)
    env = launch.environment(base)
    loads: list[Load] = []
    for name in LOADS:
        if name in names:
            place = directory / name
            kind = LOADS[name]
            loads.append(
                StressLoad(place, env, seed) if kind is StressLoad else kind(place, env)
            )
    runner = Runner(
        loads,
        round_s=int(max(2, min(20, seconds / 12))),
        rest_s=max(1.0, min(6.0, seconds / 10)),
    )
    with none_left():
        try:
            seen = runner.run(seconds, interval=max(0.5, min(10, seconds / 120)))
            runner.finish()
        finally:
            for load in reversed(loads):
                load.close()
    stress = [load for load in loads if isinstance(load, StressLoad)]
    return Soak(
        minutes=seen.series[-1].at / 60 if seen.series else 0.0,
        cpus=len(os.sched_getaffinity(0)),
        own_network=network,
        verdicts=judge(seen.base, seen.series, seen.final),
        series=seen.series,
        done=totals(loads),
        faults=stress[0].faults if stress else {},
        upgrades={name: held.upgrades for name, held in seen.final.items()},
        names_left=seen.names_left,
        resets=sum(held.resets for held in seen.final.values()),
        errors=tuple(seen.errors),
    )


def _write_docs(result: Soak) -> None:
    text = DOCS.read_text()
    if not TABLE.search(text):
        raise RuntimeError(f"{DOCS} has no place for the table")
    DOCS.write_text(TABLE.sub(lambda _: report.markdown(result), text))


def _loads(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(LOADS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no load {', '.join(unknown)}; they are {', '.join(LOADS)}"
        )
    return names


def _minutes(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("more than 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; the value is the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Envoy with wrk, redis, PostgreSQL with pgbench, and kmap stress "
        "with all faults, side by side under Kmap.  Memory, descriptors, threads and "
        "mappings of the servers must be flat, and come back when the load ends.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=60.0, help="under load (default: 60)"
    )
    parser.add_argument(
        "--loads",
        type=_loads,
        default=list(LOADS),
        metavar="NAMES",
        help=f"some of {','.join(LOADS)} (default: all)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first round of stress (default: 1)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything to a file, too"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep logs and data in DIR"
    )
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="run nothing: judge what --json wrote once more",
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the table into docs/soak.md"
    )
    args = parser.parse_args(argv)
    if args.docs and set(args.loads) != set(LOADS):
        parser.error("--docs is for all loads")
    if args.again is not None:
        return _tell(Soak.from_json(json.loads(args.again.read_text())), docs=args.docs)
    # A signal must not leave servers behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.nice(5)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CPUS])
    directory = args.keep or Path(tempfile.mkdtemp(prefix="kmap-soak-"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        result = soak(
            args.minutes,
            args.loads,
            directory,
            seed=args.seed,
            network=own_network(),
        )
        if args.json:
            args.json.write_text(json.dumps(result.to_json(), indent=1) + "\n")
    except CannotRun as error:
        say(f"scripts/soak: {error}")
        return EXIT_CANNOT_RUN
    except ChildFailed as error:
        say(f"scripts/soak: {error}")
        return 1
    finally:
        if args.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    return _tell(result, docs=args.docs)


def _tell(result: Soak, *, docs: bool) -> int:
    if docs:
        _write_docs(result)
    print(report.markdown(result), end="")
    return result.exit_code


assert EXIT_USAGE == 2  # what argparse exits with
if __name__ == "__main__":
    sys.exit(main())
