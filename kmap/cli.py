# SPDX-License-Identifier: Apache-2.0
"""The command line: one parser, and the one place that turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from kmap import __version__
from kmap.commands import COMMANDS
from kmap.render import render
from kmap.results import (
    EXIT_CANNOT_RUN,
    EXIT_FAILED,
    EXIT_USAGE,
    CannotRun,
    CommandFailed,
    JsonObject,
    Result,
    UsageError,
)


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with the named commands."""
    parser = argparse.ArgumentParser(
        prog="kmap",
        description="Carries loopback TCP connections over shared memory.",
        epilog="Exit codes: 0 done, 1 the thing checked failed, 2 usage, "
        "77 cannot run here.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kmap {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        module = importlib.import_module(f"kmap.commands.{name}")
        module.add_parser(subparsers)
    return parser


def _failure(args: argparse.Namespace, error: str, code: int) -> int:
    if getattr(args, "json", False):
        document: JsonObject = {
            "schema": f"kmap.{args.command}/1",
            "ok": False,
            "error": error,
        }
        print(json.dumps(document))
    print(f"kmap {args.command}: {error}", file=sys.stderr)
    return code


def show(result: Result, *, as_json: bool) -> int:
    """Prints result and returns its exit code."""
    if as_json:
        # Indented for people; for programs at a tenth of the cost, in one line.
        indent = 2 if sys.stdout.isatty() else None
        print(json.dumps(result.to_json(), indent=indent))
    else:
        render(result, Console())
    return result.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the value is the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Only what is needed is imported: kmap run stands in front of every program.
    names = words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS
    args = build_parser(names).parse_args(words)
    try:
        code = show(args.run(args), as_json=getattr(args, "json", False))
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _failure(args, str(error), EXIT_USAGE)
    except CannotRun as error:
        return _failure(args, str(error), EXIT_CANNOT_RUN)
    except CommandFailed as error:
        return _failure(args, str(error), EXIT_FAILED)
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter from
        # complaining about it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
