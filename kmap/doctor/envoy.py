# SPDX-License-Identifier: Apache-2.0
"""io_uring, which goes past libc; Envoy uses it where its settings say so."""

from __future__ import annotations

from kmap.doctor.check import Check, Subject
from kmap.policy.rules import read_text
from kmap.policy.tree import Node, parse_yaml

# What stands in the text of an Envoy, and of libuv since 1.45.
ENVOY_MARK = b"io_uring_options"
LIBUV_MARK = b"UV_USE_IO_URING"
SWITCH_OFF = "take io_uring_options out of Envoy's bootstrap extension"
MARKS = (ENVOY_MARK, LIBUV_MARK)


def may_use_io_uring(found: str, subject: Subject) -> Check:
    """It has it, and whether it uses it for sockets shows when it runs."""
    return subject.limited(
        "io_uring",
        f"{found}; connections that are served by io_uring stay on the kernel",
        "start it and check the process: kmap doctor PID",
    )


def _extensions_with_io_uring(bootstrap: Node) -> list[str]:
    """Names of bootstrap extensions that switch it on."""
    extensions = bootstrap.get("bootstrap_extensions")
    found = []
    for extension in extensions.sequence() if extensions is not None else ():
        config = extension.get("typed_config")
        # Options that are there and empty ({}) switch it on, too.
        if config is not None and "io_uring_options" in config.mapping():
            name = extension.get("name")
            found.append(name.text() if name is not None else extension.path)
    return found


def settings(path: str, subject: Subject) -> Check:
    """Whether an Envoy with the bootstrap at path uses io_uring."""
    found = _extensions_with_io_uring(parse_yaml(read_text(path), path))
    if not found:
        return subject.ok("io_uring", f"not in {path}")
    return subject.cannot(
        "io_uring",
        f"{path} has io_uring_options in {', '.join(found)}: connections are served by "
        "io_uring and stay on the kernel",
        SWITCH_OFF,
    )
