# SPDX-License-Identifier: Apache-2.0
"""Whether a value suits a setting, by the rules of the library's own parser.

The library uses its default for a bad value and says so in one line.  Where a value is
written for many programs to start with, it is better refused while somebody looks.
"""

from __future__ import annotations

import re

from kmap import native

LOG_LEVELS = ("error", "info", "debug")
# Of a directory for names, which have to fit behind it.
PATH_MOST = 200

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMBER = re.compile(r"([0-9]+)([KMG]?)")


def transports() -> list[str]:
    """What KMAP_TRANSPORT may be."""
    return [entry.name for entry in native.transports()]


def check(name: str, value: str) -> None:
    """Raises ValueError, with the remedy, unless value may be given to setting name.

    The message names the setting.  Ranges are those of the loaded library.
    """
    options = {option.env: option for option in native.options()}
    option = options.get(name)
    if option is None:
        raise ValueError(
            f"{name} is not a setting of this version; it has {', '.join(options)}"
        )
    if not value:
        return  # as if it were not set
    if option.type != "str":
        match = _NUMBER.fullmatch(value)
        number = int(match[1]) * _UNITS[match[2]] if match else -1
        if not option.minimum <= number <= option.maximum:
            raise ValueError(
                f"{name}={value}: it is a number from {option.minimum} to "
                f"{option.maximum}; K, M or G may follow"
            )
    elif name == "KMAP_TRANSPORT" and value not in transports():
        raise ValueError(f"{name}={value}: it is one of {', '.join(transports())}")
    elif name == "KMAP_FIFO_DIR" and (value[0] != "/" or len(value) > PATH_MOST):
        raise ValueError(
            f"{name}={value}: it is an absolute path of at most {PATH_MOST} bytes"
        )
    elif name == "KMAP_LOG" and value.partition(":")[0] not in LOG_LEVELS:
        raise ValueError(
            f"{name}={value}: it is one of {', '.join(LOG_LEVELS)}; :FILE may follow"
        )
