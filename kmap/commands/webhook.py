# SPDX-License-Identifier: Apache-2.0
"""``kmap webhook``: injects pods when they are created, for the API server."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from kmap import native
from kmap.commands.inject import add_image_and_settings, need_packages, read_settings
from kmap.render import renders
from kmap.results import (
    EXIT_OK,
    CommandFailed,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
)

_DESCRIPTION = """\
Serves a mutating admission webhook, which does to pods what kmap inject does to
manifests, when they are created.  deploy/helm/kmap installs it in a cluster.

  /mutate             injects pods with the label or annotation kmap.io/inject: "true"
  /mutate/namespace   injects all pods but those with kmap.io/inject: "false"
  /healthz            for probes

It never keeps a pod from being created: what it cannot do is a warning of its answer.
One line for each pod goes to standard error.  The certificate is read again when its
files change.  SIGTERM ends it when what has come is answered.
"""


@dataclass(frozen=True)
class WebhookResult:
    """What it did until it was told to end."""

    # AdmissionReviews answered, pods changed, and answers with a warning.
    reviews: int
    injected: int
    warnings: int

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {"schema": "kmap.webhook/1", "ok": True, **asdict(self)}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "webhook",
        run,
        help="add Kmap to Kubernetes pods when they are created",
        description=_DESCRIPTION,
    )
    for name, what in (("cert", "certificate chain"), ("key", "its private key")):
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", required=True, help=f"{what}, PEM"
        )
    parser.add_argument(
        "--bind",
        default="0.0.0.0",
        metavar="ADDRESS",
        help="address to listen on, :: for IPv6 (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8443,
        help="port to listen on, 0 for a free one (default: %(default)s)",
    )
    add_image_and_settings(parser)


def _log(line: str) -> None:
    # One write: lines of threads do not mix.
    sys.stderr.write(f"kmap webhook: {line}\n")
    sys.stderr.flush()


def run(args: argparse.Namespace) -> WebhookResult:
    """Serves until SIGTERM or SIGINT."""
    need_packages()
    from kmap.kubernetes.pods import IMAGE, Options
    from kmap.kubernetes.server import BadCertificate, Certificate, Server

    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: it is a number from 0 to 65535")
    native.options()  # without the library no setting could be checked: say so now
    options = Options(args.image or IMAGE, read_settings(args.settings))
    try:
        certificate = Certificate(args.cert, args.key, _log)
    except BadCertificate as error:
        raise CommandFailed(str(error)) from error
    try:
        server = Server((args.bind, args.port), certificate, options, _log)
    except OSError as error:
        raise CommandFailed(
            f"cannot listen on {args.bind}, port {args.port}: {error.strerror}"
        ) from error
    ends = {signal.SIGTERM, signal.SIGINT}
    # Before the first thread, which inherits it: they are for sigwait alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    thread = threading.Thread(target=server.serve_forever, name="accept")
    thread.start()
    host = f"[{args.bind}]" if ":" in args.bind else args.bind
    _log(f"listening on https://{host}:{server.server_port}")
    signal.sigwait(ends)
    _log("ending")
    server.end()
    thread.join()
    return WebhookResult(server.reviews, server.injected, server.warnings)


@renders(WebhookResult)
def _render(result: WebhookResult, console: Console) -> None:
    _log(
        f"{result.reviews} reviews answered, {result.injected} pods injected, "
        f"{result.warnings} warnings"
    )
