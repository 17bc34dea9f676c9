# SPDX-License-Identifier: Apache-2.0
"""``kmap completion SHELL``: what makes a shell complete kmap's words."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import shtab
from rich.console import Console

from kmap.render import renders
from kmap.results import EXIT_OK, JsonObject, SubParsers, command_parser

SHELLS = ("bash", "zsh", "tcsh")


@dataclass(frozen=True)
class CompletionResult:
    """A script for one shell."""

    shell: str
    script: str

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.completion/1",
            "ok": True,
            "shell": self.shell,
            "script": self.script,
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "completion",
        run,
        help="print a completion script for a shell",
        description="Prints a script that makes a shell complete commands and options.",
        epilog='bash: add to ~/.bashrc      eval "$(kmap completion bash)"\n'
        'zsh:  add to ~/.zshrc       eval "$(kmap completion zsh)"  (after compinit)\n'
        "tcsh: add to ~/.tcshrc      kmap completion tcsh | source /dev/stdin",
    )
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> CompletionResult:
    """Makes the script from the parser of all commands."""
    # Not at the top: the command line imports this module.
    from kmap.cli import build_parser

    script = shtab.complete(build_parser(), shell=args.shell)
    return CompletionResult(shell=args.shell, script=script)


@renders(CompletionResult)
def _render(result: CompletionResult, console: Console) -> None:
    console.out(result.script, highlight=False)
