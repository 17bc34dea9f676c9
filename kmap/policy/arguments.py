# SPDX-License-Identifier: Apache-2.0
"""The arguments that name a policy.

They stand apart from the work because ``kmap run`` is in front of every program, and
most have no policy.
"""

from __future__ import annotations

import argparse

_FILES_HELP = {
    "--policy": "rules that say which connections may be upgraded, one a line, or in "
    "YAML; docs/policy.md",
    "--rules": "check the rules of a file, one a line, or YAML; docs/policy.md",
}


def add_envoy_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say who the parties are."""
    parser.add_argument(
        "--envoy-uid",
        metavar="UID",
        help="the user id that Envoy runs as (Istio: 1337), so that only it is "
        "trusted; with --envoy-admin it is found out",
    )
    parser.add_argument(
        "--service-uid",
        metavar="UID",
        help="the user id that the services run as, so that Envoy shares with no other",
    )
    parser.add_argument(
        "--envoy-program",
        metavar="NAME",
        default="envoy",
        help="the name of Envoy's process or executable (envoy)",
    )
    parser.add_argument(
        "--local-address",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="an address of the host that the rules are for; without it, those of this "
        "one",
    )


def add_source_arguments(parser: argparse.ArgumentParser, *, files: str) -> None:
    """The arguments that name a source, one of which may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(files, dest="rules", metavar="FILE", help=_FILES_HELP[files])
    group.add_argument(
        "--envoy-config",
        metavar="FILE",
        help="rules from an Envoy bootstrap, in YAML or JSON: its hops on this host, "
        "and no others",
    )
    group.add_argument(
        "--envoy-admin",
        metavar="URL",
        help="the same from the admin interface of an Envoy that runs, with what it "
        "got by xDS: http://127.0.0.1:9901",
    )
    add_envoy_arguments(parser)


def names_source(args: argparse.Namespace) -> bool:
    """Whether the arguments name a policy at all."""
    return any((args.rules, args.envoy_config, args.envoy_admin))
