# SPDX-License-Identifier: Apache-2.0
"""The policy that the arguments of a command name."""

from __future__ import annotations

import argparse
import ipaddress
import re
from dataclasses import replace

from kmap.policy import derive, rules
from kmap.policy.admin import read_admin
from kmap.policy.derive import Derivation, Parties
from kmap.policy.envoy import Ip, read_bootstrap
from kmap.results import UsageError

UID_MAX = 4294967294


def _uid(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > UID_MAX:
        raise UsageError(f"{name} {text}: a user id is a number; id -u NAME prints it")
    return int(text)


def _address(text: str) -> Ip:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise UsageError(f"--local-address {text}: not an IP address") from None


def _parties(args: argparse.Namespace) -> Parties:
    if not re.fullmatch(r"[^\s/#][^\s/]{0,254}", args.envoy_program):
        raise UsageError(
            f"--envoy-program {args.envoy_program}: the name of a process or the last "
            "part of its path, without blanks"
        )
    given = frozenset(map(_address, args.local_address))
    return Parties(
        envoy_program=args.envoy_program,
        envoy_uid=_uid("--envoy-uid", args.envoy_uid),
        service_uid=_uid("--service-uid", args.service_uid),
        addresses=given or derive.own_addresses(),
    )


def read(args: argparse.Namespace) -> tuple[str, Derivation]:
    """What the policy comes from, and the policy."""
    parties = _parties(args)
    if args.rules is not None:
        return args.rules, Derivation(rules.load(args.rules), ())
    if args.envoy_config is not None:
        config = read_bootstrap(args.envoy_config)
    else:
        config = read_admin(args.envoy_admin)
        if parties.envoy_uid is None:
            parties = replace(parties, envoy_uid=config.uid)
    return config.label, derive.derive(config, parties)
