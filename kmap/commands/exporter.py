# SPDX-License-Identifier: Apache-2.0
"""``kmap exporter``: the counters of this host's processes for Prometheus."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from rich.console import Console

from kmap.metrics import KmapCollector
from kmap.progress import orderly_end
from kmap.render import renders
from kmap.results import EXIT_OK, CannotRun, JsonObject, SubParsers, command_parser

DEFAULT_PORT = 9464


@dataclass(frozen=True)
class ExporterResult:
    """One scrape as text, or where it has been served."""

    text: str = ""
    address: str | None = None
    port: int | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        document: JsonObject = {"schema": "kmap.exporter/1", "ok": True}
        if self.port is None:
            return {**document, "text": self.text}
        return {**document, "address": self.address, "port": self.port}


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "exporter",
        run,
        help="serve counters and connections to Prometheus",
        description="Answers scrapes at http://ADDRESS:PORT/metrics until it is "
        "interrupted.  It sees the\nprocesses of its own user; as root, those of all "
        "users and containers.",
        epilog="docs/metrics.md lists the metrics.  --once is for node_exporter's "
        "textfile collector.",
    )
    parser.add_argument(
        "--bind",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at (default 127.0.0.1; there is no authentication)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        help=f"default {DEFAULT_PORT}; 0 takes a free one and says which",
    )
    parser.add_argument(
        "--per-process",
        action="store_true",
        help="a label pid: more series, and new ones with every process",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one scrape and serve nothing"
    )


def run(args: argparse.Namespace) -> ExporterResult:
    """Serves until it is interrupted, or prints once."""
    collector = KmapCollector(per_process=args.per_process)
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        if args.once:
            return ExporterResult(text=generate_latest(registry).decode())
        return _serve(args, registry)
    finally:
        collector.close()


def _serve(args: argparse.Namespace, registry: CollectorRegistry) -> ExporterResult:
    try:
        server, thread = start_http_server(args.port, args.bind, registry)
    except (OSError, OverflowError) as error:
        raise CannotRun(
            f"cannot listen at {args.bind} port {args.port}: {error}; "
            "choose others with --bind and --port"
        ) from error
    port = server.server_port
    host = f"[{args.bind}]" if ":" in args.bind else args.bind
    try:
        with orderly_end(), contextlib.suppress(KeyboardInterrupt):
            print(
                f"kmap exporter: serving http://{host}:{port}/metrics",
                file=sys.stderr,
                flush=True,
            )
            threading.Event().wait()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return ExporterResult(address=args.bind, port=port)


@renders(ExporterResult)
def _render(result: ExporterResult, console: Console) -> None:
    console.file.write(result.text)
