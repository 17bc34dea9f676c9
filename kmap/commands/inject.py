# SPDX-License-Identifier: Apache-2.0
"""``kmap inject -f FILE``: adds Kmap to Kubernetes manifests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kmap import __version__, settings
from kmap.render import renders
from kmap.results import (
    EXIT_FAILED,
    EXIT_OK,
    CannotRun,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
)

if TYPE_CHECKING:
    from kmap.kubernetes.manifest import Problem, Report

_DESCRIPTION = """\
Adds Kmap to the pods of Kubernetes manifests: an init container that copies the
library into an emptyDir, and in each container that volume, LD_PRELOAD and settings.
Prints the manifests; everything else in them stays as it is, and a manifest that has
it already stays as it is altogether.  Nothing is printed if one of them cannot be
changed as asked.

  kmap inject -f deployment.yaml | kubectl apply -f -

Pods are found in Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet,
ReplicationController, Job, CronJob and List; other objects pass.
"""
_EPILOG = """\
annotations of the pod (of a template: in its metadata):
  kmap.io/inject: "false"              leaves it alone
  kmap.io/containers: "envoy,app"      these containers; all, if it is not there
  kmap.io/settings: "KMAP_LOG=info"    settings, with commas between; kmap run --help
                                       lists them
"""

# How messages name it.
STDIN = "(standard input)"


@dataclass(frozen=True)
class InjectResult:
    """The manifests afterwards, and what became of each workload."""

    manifest: str
    workloads: tuple[Report, ...]
    problems: tuple[Problem, ...]
    removed: bool

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED if self.problems else EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.inject/1",
            "ok": not self.problems,
            "manifest": None if self.problems else self.manifest,
            "workloads": [asdict(report) for report in self.workloads],
            "problems": [asdict(problem) for problem in self.problems],
        }


def add_image_and_settings(parser: argparse.ArgumentParser) -> None:
    """What kmap webhook takes, too."""
    parser.add_argument(
        "--image",
        metavar="IMAGE",
        help="image of the init container, as built from deploy/Dockerfile "
        f"(default: kmap-init:{__version__})",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting for all containers; may be repeated.  Annotations and the "
        "variables that a container has go before it",
    )


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "inject",
        run,
        help="add Kmap to Kubernetes manifests",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "-f",
        "--filename",
        dest="files",
        metavar="FILE",
        action="append",
        required=True,
        help="manifest in YAML or JSON, - for standard input; may be repeated",
    )
    add_image_and_settings(parser)
    parser.add_argument(
        "--uninject",
        action="store_true",
        help="take everything out that inject has put in",
    )


def read_settings(words: Iterable[str]) -> dict[str, str]:
    """Settings from the command line; raises UsageError."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word} has no value: write --set NAME=VALUE")
        try:
            settings.check(name, value)
        except ValueError as error:
            raise UsageError(f"--set {error}") from error
        found[name] = value
    return found


def need_packages() -> None:
    """Raises CannotRun unless what Kubernetes support needs is installed."""
    try:
        import jsonpatch
        import ruamel.yaml

        del jsonpatch, ruamel
    except ImportError as error:
        raise CannotRun(
            f"the Python package {error.name} is not installed: "
            "pip install 'kmap[kubernetes]' (in the source tree, "
            "pip install '.[kubernetes]')"
        ) from error


def _read(file: str) -> str:
    name = STDIN if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as stream:
                data = stream.read()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    try:
        # Not text mode, which would change the ends of lines.
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 (byte {error.start}): convert it first"
        ) from error


def _join(texts: list[str]) -> str:
    """Several files as one, with a document marker between those that need one."""
    joined = ""
    for text in texts:
        if joined and not joined.endswith("\n"):
            joined += "\n"
        if joined and not text.startswith("---"):
            joined += "---\n"
        joined += text
    return joined


def run(args: argparse.Namespace) -> InjectResult:
    """Reads, changes, and hands back."""
    need_packages()
    from kmap.kubernetes import manifest, pods

    if args.uninject and (args.image or args.settings):
        raise UsageError("--image and --set say what to put in; --uninject takes out")
    options = pods.Options(args.image or pods.IMAGE, read_settings(args.settings))

    def decide(pod: Any) -> pods.Plan:
        return pods.uninject(pod) if args.uninject else pods.inject(pod, options)

    names = [STDIN if file == "-" else file for file in args.files]
    texts = [_read(file) for file in args.files]
    changed = [
        manifest.change(text, name, decide)
        for text, name in zip(texts, names, strict=True)
    ]
    return InjectResult(
        manifest=_join([each.text for each in changed]),
        workloads=tuple(report for each in changed for report in each.reports),
        problems=tuple(problem for each in changed for problem in each.problems),
        removed=args.uninject,
    )


@renders(InjectResult)
def _render(result: InjectResult, console: Console) -> None:
    said = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for problem in result.problems:
        said.print(f"kmap inject: {problem}")
    if result.problems:
        return
    # The bytes themselves: a console would wrap and colour them.
    sys.stdout.flush()
    sys.stdout.buffer.write(result.manifest.encode())
    sys.stdout.buffer.flush()
    for report in result.workloads:
        name = f"{report.kind} {report.name}"
        already = "already " if report.outcome == "unchanged" else ""
        if report.containers:
            what = f"{already}in {', '.join(report.containers)}"
        elif result.removed:
            what = "not there" if already else "taken out"
        else:
            what = f"left out: {report.reason}"
        said.print(f"kmap inject: {name}: {what}")
    if not result.workloads:
        said.print("kmap inject: there is no pod in it")
