# SPDX-License-Identifier: Apache-2.0
"""The commands of ``kmap``, one module each; :mod:`kmap.results` has the protocol."""

from __future__ import annotations

# Modules in the order in which ``kmap --help`` lists them.  They are imported by
# name so that a command whose optional packages are absent can say so itself.
COMMANDS = (
    "run",
    "ss",
    "top",
    "stats",
    "exporter",
    "doctor",
    "tap",
    "path",
    "policy",
    "inject",
    "webhook",
    "demo",
    "trace",
    "bench",
    "stress",
    "help",
    "completion",
)
